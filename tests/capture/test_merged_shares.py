"""What a dtype loses of a parameter that is split: each process's sample stands for its part."""

import numpy as np
import pytest
import torch
from torch import Tensor

from gradscope.capture import derive, merge, statistics
from gradscope.capture.derive import What
from gradscope.quantities import PARAMETERS

CPU = torch.device("cpu")


def test_shares_weigh_the_parts_by_what_their_samples_stand_for() -> None:
    torch.manual_seed(0)
    family = merge.Family((), {0: True}, (0, 1), CPU)
    added, given, lost = torch.zeros(()), 0.0, 0.0
    # Of the second part every tenth entry is looked at.
    for rate, scale in ((1e-3, 1.0), (1e-1, 10.0)):
        weight, gradient = torch.randn(300).bfloat16(), torch.randn(300).bfloat16()
        gradient[:50] = 0
        after = weight - rate * gradient
        products = statistics.update_products(weight, after, gradient)
        counts = statistics.magnitudes([gradient])[0]
        collected: dict[tuple[What, int], tuple[Tensor, tuple[float, ...]]] = {
            ("update", 0): (products, (scale,)),
            ("magnitudes", 0): (counts, ()),
        }
        added = added + merge._contribution(collected, family)[0]
        given += scale * float((gradient != 0).sum())
        lost += scale * float(((gradient != 0) & (weight == after)).sum())
    extremes, missing = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([False, False])
    rows = merge._merged(added, extremes, missing)
    table = derive.tables(
        {
            "update": ([0], rows["update"].numpy()),
            "magnitudes": ([0], rows["magnitudes"].numpy()),
            "gradient": ([0], np.array([[600.0, 0, 0, 0, 0, 0, 0]])),
        },
        {},
        {"parameters": 1, "modules": 0, "signals": 0},
    )["parameters"]
    names = [quantity.name for quantity in PARAMETERS]
    assert table[names.index("update_lost_fraction"), 0] == pytest.approx(lost / given, rel=1e-6)
    assert table[names.index("grad_underflow_fraction"), 0] == 0
