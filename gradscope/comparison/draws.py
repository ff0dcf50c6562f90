"""Common random numbers: what one seed draws for one weight is the same for every initialization.

Two configurations then differ by what they do with the numbers, not by the numbers: between
kaiming and xavier on a ReLU network lies exactly ln 2 per layer, without noise.
"""

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

# What 30 layers of 1024 × 1024 need, as normals and as uniforms; more is drawn again each time.
_KEPT_BYTES = 256 << 20


class Draws:
    """The random numbers of one seed, each under a key (the weight's name).

    They come from generators of their own, on the CPU: the user's random state is neither read
    nor moved, and every device gets the same numbers. What is handed out is shared: never write
    to it. Up to `kept_bytes` of it stay on `device`; what does not fit is drawn again.
    """

    def __init__(
        self, seed: int, *, device: str | torch.device = "cpu", kept_bytes: int = _KEPT_BYTES
    ) -> None:
        self.seed = seed
        self._device = torch.device(device)
        self._free = kept_bytes
        self._kept: dict[tuple[str, str, tuple[int, ...]], Tensor] = {}

    def normal(self, key: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal numbers, float32."""
        return self._once("normal", key, shape, lambda: self._drawn(key, shape))

    def uniform(self, key: str, shape: tuple[int, ...]) -> Tensor:
        """Uniform numbers of mean 0 and variance 1: the ranks of the same normals."""
        return self._once(
            "uniform",
            key,
            shape,
            # √3 (2 Φ(z) − 1)
            lambda: torch.erf(self.normal(key, shape) * math.sqrt(0.5)).mul_(math.sqrt(3.0)),
        )

    def orthogonal(self, key: str, rows: int, columns: int, *, count: int = 1) -> Tensor:
        """`count` matrices with orthonormal rows, or columns where those are fewer.

        Shape (count, rows, columns). Each is uniform over all such matrices (Mezzadri 2007: QR
        of a normal matrix, with the signs of R's diagonal made positive).
        """
        shape = (count, rows, columns)
        return self._once("orthogonal", key, shape, lambda: _orthonormal(self._drawn(key, shape)))

    def _drawn(self, key: str, shape: tuple[int, ...]) -> Tensor:
        # Of a hash: neither the order in which keys are asked for nor PYTHONHASHSEED counts.
        digest = hashlib.blake2b(f"{self.seed}/{key}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        # Whatever dtype and device are the default: the numbers are the same.
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    def _once(
        self, kind: str, key: str, shape: tuple[int, ...], make: Callable[[], Tensor]
    ) -> Tensor:
        held = self._kept.get((kind, key, shape))
        if held is None:
            with torch.no_grad():
                held = make().to(self._device)
            size = held.numel() * held.element_size()
            if size <= self._free:
                self._free -= size
                self._kept[kind, key, shape] = held
        return held


def _orthonormal(normals: Tensor) -> Tensor:
    wide = normals.shape[-2] < normals.shape[-1]
    # In double precision: the rows of a large matrix are then orthonormal to float32's last bit.
    q, r = torch.linalg.qr((normals.mT if wide else normals).double())
    drawn: Tensor = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    return (drawn.mT if wide else drawn).float().contiguous()
