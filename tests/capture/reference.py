"""What gradscope should report, computed anew in float64 with numpy."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gradscope.capture.scope import watch
from gradscope.record import Run, Table
from tests.capture.trainings import Build, Nobody, built

F64 = NDArray[np.float64]
Numbers = dict[str, float]

_NAN = float("nan")


def wide(tensor: Tensor) -> F64:
    """All entries, dense, as float64."""
    dense = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
    return dense.to(torch.float64, copy=True).numpy().reshape(-1)


def described(tensors: Iterable[Tensor]) -> Numbers:
    """The statistics of several tensors as of one, over the entries that are finite."""
    entries = np.concatenate([wide(tensor) for tensor in tensors])
    finite = entries[np.isfinite(entries)]
    numbers = {"nonfinite": float(entries.size - finite.size)}
    if finite.size == 0:
        return numbers
    return numbers | {
        "norm": float(np.sqrt((finite**2).sum())),
        "rms": float(np.sqrt((finite**2).mean())),
        "mean": float(finite.mean()),
        "std": float(finite.std()),
        "absmax": float(np.abs(finite).max()),
        "zero_fraction": float((finite == 0).mean()),
    }


def signal_numbers(tensors: Sequence[Tensor]) -> Numbers:
    """The quantities of a signal but `repeated`; of micro-batches what has no sum as a mean."""
    numbers = described(tensors)
    entries = np.concatenate([wide(tensor) for tensor in tensors])
    finite = entries[np.isfinite(entries)]
    if finite.size:
        numbers |= {"min": float(finite.min()), "max": float(finite.max())}
    looks = [_looks(tensor) for tensor in tensors if tensor.numel()]
    for name in {name for look in looks for name in look}:
        numbers[name] = float(np.mean([look[name] for look in looks if name in look]))
    return numbers


def _looks(tensor: Tensor) -> Numbers:
    flat = wide(tensor)
    numbers = {"distinct": float(len(np.unique(flat[np.isfinite(flat)])))}
    features = tensor.shape[1] if tensor.dim() > 1 else 1
    places = flat.reshape(len(tensor), features, -1)
    variances: list[list[float]] = []
    for feature in range(features):
        of_places = [place[np.isfinite(place)] for place in places[:, feature].T]
        variances.append([float(np.var(place)) for place in of_places if len(place) > 1])
    known = [float(np.mean(some)) for some in variances if some]
    if known:
        numbers["sample_std"] = float(np.sqrt(np.mean([v for some in variances for v in some])))
        if tensor.dim() > 1 and tensor.is_floating_point():
            numbers["feature_std_min"] = float(np.sqrt(min(known)))
            numbers["feature_std_max"] = float(np.sqrt(max(known)))
    return numbers


def assert_signal(
    table: Table, row: int, name: str, *tensors: Tensor, repeated: float = _NAN, rtol: float = 1e-4
) -> None:
    """Every quantity of a signal, given what was seen of it in the step."""
    expected = {**signal_numbers(tensors), "repeated": repeated}
    column = table.names.index(name)
    for quantity in table.quantities:
        found = table[quantity][row, column]
        wanted = expected.get(quantity, _NAN)
        assert found == pytest.approx(wanted, rel=rtol, abs=1e-7, nan_ok=True), quantity


def prefixed(prefix: str, numbers: Mapping[str, float]) -> Numbers:
    return {prefix + name: value for name, value in numbers.items()}


class ParameterReference:
    """Reads weights and `.grad` right before each update, and the weights right after."""

    def __init__(self, model: nn.Module) -> None:
        self._named = dict(model.named_parameters())
        self._embeddings = {
            f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Embedding)
        }
        self._before: dict[str, F64] = {}
        self._gradients: dict[str, F64 | None] = {}
        self._smallest: dict[str, float] = {}
        self.steps: list[dict[str, Numbers]] = []

    def before_update(self) -> None:
        # The first time in a step: a closure may come back here.
        if self._before:
            return
        for name, parameter in self._named.items():
            self._before[name] = wide(parameter)
            self._gradients[name] = None if parameter.grad is None else wide(parameter.grad)
            if parameter.grad is not None:
                self._smallest[name] = torch.finfo(parameter.grad.dtype).smallest_normal

    def after_update(self) -> None:
        self.steps.append(
            {name: self._numbers(name, parameter) for name, parameter in self._named.items()}
        )
        self._before, self._gradients = {}, {}

    def _numbers(self, name: str, parameter: nn.Parameter) -> Numbers:
        before, gradient = self._before[name], self._gradients[name]
        known = before[np.isfinite(before)]
        # Of nothing that is finite there is no norm: zero would be a number.
        norm = float(np.sqrt((known**2).sum())) if known.size else _NAN
        numbers = {
            "weight_norm": norm,
            "weight_rms": float(np.sqrt((known**2).mean())) if known.size else _NAN,
            "requires_grad": float(parameter.requires_grad),
            "in_optimizer": 1.0,
            "stale_in_optimizer": 0.0,
        }
        if not parameter.requires_grad:
            return numbers
        numbers["grad_missing"] = float(gradient is None)
        if gradient is None:
            return numbers
        numbers |= prefixed("grad_", described([torch.from_numpy(gradient)]))
        if name in self._embeddings:
            rows = gradient.reshape(len(parameter), -1)
            numbers["grad_touched_fraction"] = float((rows != 0).any(axis=1).mean())
        sizes = np.abs(gradient[np.isfinite(gradient)])
        lost = (sizes > 0) & (sizes < self._smallest[name])
        numbers["grad_underflow_fraction"] = float(lost.mean()) if sizes.size else _NAN
        change = wide(parameter) - before
        both = np.isfinite(change) & np.isfinite(gradient)
        change, gradient = change[both], gradient[both]
        kept = change[gradient != 0] == 0
        numbers["update_lost_fraction"] = float(kept.mean()) if kept.size else _NAN
        size = float(np.sqrt((change**2).sum())) if both.any() else _NAN
        numbers["update_norm"] = size
        numbers["update_ratio"] = size / norm if norm > 0 else _NAN
        product = size * float(np.sqrt((gradient**2).sum()))
        numbers["update_gradient_cosine"] = (
            float(change @ gradient) / product if product > 0 else _NAN
        )
        return numbers


def recomputed(build: Build, steps: int) -> list[dict[str, Numbers]]:
    """The parameters' numbers per step, from the same training without gradscope."""
    training = built(build)
    reference = ParameterReference(training.model)
    for number in range(steps):
        training.step(number, reference)
    return reference.steps


def watched(build: Build, steps: int, log_dir: Path, **options: Any) -> Run:
    """The run that gradscope makes of the training, every step recorded."""
    training = built(build)
    settings = {"optimizer": training.optimizers or None, "every": 1, **options}
    with watch(training.model, log_dir=log_dir, **settings) as scope:
        if not training.optimizers:
            training.extra["mark"] = scope.step
        for number in range(steps):
            training.step(number, Nobody())
            scope.log(loss=1.0)
        return scope.run()


# They have a reference of their own, in test_probes and test_balance.
PROBED = frozenset(
    {
        "grad_previous_cosine",
        "grad_balance",
        "grad_balance_cosine",
        "duplicate_rows_fraction",
        "epsilon_share",
        "output_sample_similarity",
    }
)

# Below this share of the rms a mean or a standard deviation is a rounding error of the sums.
_ROUNDING = 1e-7


def assert_equal(
    table: Table,
    expected: Sequence[Mapping[str, Numbers]],
    *,
    rtol: float = 1e-4,
    quantities: Iterable[str] | None = None,
) -> None:
    """Every quantity of every entity and step; what the reference does not have must be NaN."""
    assert list(table.steps) == list(range(len(expected)))
    for row, entities in enumerate(expected):
        assert set(entities) <= set(table.names)
        for name, numbers in entities.items():
            column = table.names.index(name)
            for quantity in set(quantities or table.quantities) - PROBED:
                found = float(table[quantity][row, column])
                wanted = numbers.get(quantity, _NAN)
                where = f"step {row}, {name}, {quantity}: {found} instead of {wanted}"
                if np.isnan(wanted):
                    assert np.isnan(found), where
                else:
                    scale = numbers.get(quantity.replace("mean", "rms").replace("std", "rms"), 0)
                    slack = 1e-6 if quantity == "update_gradient_cosine" else _ROUNDING * scale
                    assert abs(found - wanted) <= rtol * abs(wanted) + slack, where
