"""Tensors of every kind that statistics are asked of, and what float64 numpy says of them."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

F64 = NDArray[np.float64]


def normal(count: int, *, mean: float = 0.0, spread: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, generator=generator) * spread + mean


CASES = {
    "one": torch.tensor([0.7]),
    "zeros": torch.zeros(100),
    "many zeros": torch.zeros(70_001),
    "nothing": torch.zeros(0),
    "nothing, of a shape": torch.zeros(3, 0, 2),
    "scalar": torch.tensor(-0.3),
    "normal": normal(1000),
    "many": normal(3_000_001),
    "far from zero": normal(100_000, mean=1.0, spread=1e-3),
    "many far from zero": normal(2_500_000, mean=1.0, spread=1e-3),
    "pieces of different means": torch.arange(2_500_000) / 1e6,
    "pieces of different sizes": torch.cat([normal(70_000), normal(70_001, spread=1e-20)]),
    "huge": normal(1000, spread=1e20),
    "many huge": normal(100_000, spread=1e30),
    "largest": torch.full((1000,), torch.finfo(torch.float32).max),
    "tiny": normal(1000, spread=1e-25),
    "many tiny": normal(100_000, spread=1e-25),
    "all the same": torch.full((70_001,), 0.1),
    "all the same, large": torch.full((1000,), 1e4),
    "subnormal": normal(1000, spread=1e-40),
    "many subnormal": normal(100_000, spread=1e-40),
    "smallest": torch.full((10,), 1e-45),
    "huge and ordinary": torch.cat([normal(1000), torch.tensor([1e30, -3e30])]),
    "mostly zero": torch.cat([torch.zeros(99_999), normal(3)]),
    "both signs of zero": torch.tensor([0.0, -0.0, 1e-45, 1.0]),
    "not finite": torch.tensor([1.0, torch.nan, torch.inf, -torch.inf, 0.0, -2.0]),
    "one of many infinite": torch.cat([normal(100_000), torch.tensor([-torch.inf])]),
    "one of many NaN": torch.cat([torch.tensor([torch.nan]), normal(100_000)]),
    "huge and not finite": torch.tensor([1e30, torch.nan, 0.0, -2e30]),
    "nothing finite": torch.tensor([torch.nan, torch.inf]),
    "float16": normal(5000, spread=300.0).half(),
    "largest float16": torch.full((70_001,), 65504.0).half(),
    "small float16": normal(5000, spread=1e-6).half(),
    "bfloat16": normal(5000).bfloat16(),
    "many bfloat16": normal(200_000, mean=0.1).bfloat16(),
    "huge bfloat16": normal(5000, spread=1e30).bfloat16(),
    "float16, not finite": torch.tensor([torch.inf, 1.0, torch.nan]).half(),
    "float8": normal(5000).to(torch.float8_e4m3fn),
    "integers": torch.arange(-5, 1000),
    "booleans": normal(100) > 0,
    "complex": torch.complex(normal(50), normal(51)[:50]),
    "conjugated": torch.complex(normal(50), normal(51)[:50]).conj(),
    "of the conjugated": torch.complex(normal(50), normal(51)[:50]).conj().imag,
    "transposed": normal(600).view(20, 30).t(),
    "large transposed": normal(60_000).view(200, 300).t(),
    "channels last": normal(6000).view(2, 10, 15, 20).to(memory_format=torch.channels_last),
    "every third": normal(30_000)[1::3],
    "a column": normal(30_000).view(3000, 10)[:, 4],
    "expanded": normal(30).expand(400, 30),
    "expanded scalar": torch.tensor(0.25).expand(300, 40),
}
# What no device without float64 has.
WIDE = {
    "float64": normal(5000).double() / 3,
    "many float64": normal(100_000).double() / 3,
    "huge float64": normal(5000).double() * 1e140,
    "tiny float64": normal(5000).double() * 1e-140,
    "float64, not finite": torch.tensor([1 / 3, torch.nan, -torch.inf], dtype=torch.float64),
    "complex128": torch.complex(normal(50).double(), normal(51)[:50].double() / 3),
}


def entries(tensor: Tensor) -> F64:
    """In the order of the shape; of complex ones the real and the imaginary parts in turn."""
    plain = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    found: F64 = plain.to(torch.float64).numpy().reshape(-1)
    return found
