"""The moments of many tensors on a GPU in two launches, each entry read once; by Triton.

It has been compiled for GPUs, and run by Triton's interpreter, which computes on the CPU what the
kernels say; it has **never been run on a GPU**, and its speed is unknown (docs/decisions/0021).
So before it is used on a device it has to find known moments there. Where it does not, where Triton
is not installed, or where anything fails, tensors are read by torch's operators one by one.
"""

import importlib
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradscope.capture import host
from gradscope.capture.guard import in_words
from gradscope.capture.precision import has_float64

_FORMATS = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float64: "float64",
}
# Entries of a block, and of it at a time: some hundred blocks of a million entries.
_CHUNK, _BLOCK = 8_192, 1_024

# What fails once is not tried again; why it failed, in words.
usable = True
problem: str | None = None
_trusted: set[torch.device] = set()


def is_on_gpu(tensor: Tensor) -> bool:
    """Whether it is worth asking if its entries fit."""
    return usable and tensor.is_cuda and not tensor.is_sparse


def fits(flat: Tensor) -> bool:
    """Whether the flat tensor, which is on a GPU, can be read here."""
    return (
        type(flat) is Tensor
        and flat.dtype in _FORMATS
        and not flat.is_neg()
        and has_float64(flat.device)
    )


def prepare(tensors: Iterable[Tensor]) -> None:
    """Find out whether it can be used where these are, before training: the host waits for it."""
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        _is_trusted(device)


def _is_trusted(device: torch.device) -> bool:
    global usable, problem  # noqa: PLW0603  (of the machine, not of one model)
    if usable and device not in _trusted:
        try:
            _try(importlib.import_module("gradscope.capture.kernels"), device)
            _trusted.add(device)
        except ImportError:
            # Triton does not come with every torch.
            usable = False
        except Exception as error:  # noqa: BLE001  (there is another way)
            usable, problem = False, in_words(error)
    return usable


def moments_of(flats: Sequence[Tensor]) -> Tensor | None:
    """A row for each, see `statistics.MOMENTS`; None if they have to be read in another way.

    All on one device.
    """
    global usable, problem
    device = flats[0].device
    # A graph that is being captured would repeat the reading with this table, and forbids pinning.
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None
    if not _is_trusted(device):
        return None
    try:
        kernels = importlib.import_module("gradscope.capture.kernels")
        # A flat view may skip entries, or repeat one.
        return _read(kernels, [flat.contiguous() for flat in flats])
    except Exception as error:  # noqa: BLE001  (there is another way)
        usable, problem = False, in_words(error)
    return None


def _read(kernels: ModuleType, flats: Sequence[Tensor]) -> Tensor:
    rows = torch.empty(len(flats), 7, dtype=torch.float64, device=flats[0].device)
    alike: dict[torch.dtype, list[int]] = {}
    for place, flat in enumerate(flats):
        alike.setdefault(flat.dtype, []).append(place)
    if len(alike) == 1:
        _launch(kernels, flats, rows)
        return rows
    found: list[Tensor | None] = [None] * len(flats)
    for places in alike.values():
        some = torch.empty_like(rows[: len(places)])
        _launch(kernels, [flats[place] for place in places], some)
        for place, row in zip(places, some, strict=True):
            found[place] = row
    return torch.stack([row for row in found if row is not None], out=rows)


def _launch(kernels: Any, flats: Sequence[Tensor], rows: Tensor) -> None:
    """Of tensors of one format on one device."""
    device, count = flats[0].device, len(flats)
    sizes = np.array([flat.numel() for flat in flats], np.int64)
    owners = np.repeat(np.arange(count), -(-sizes // _CHUNK))
    starts = np.searchsorted(owners, np.arange(count + 1))
    addresses = np.array([flat.data_ptr() for flat in flats], np.int64)
    table = torch.from_numpy(np.concatenate([addresses, sizes, starts, owners]))
    parts = torch.empty(7 * len(owners), dtype=torch.float64, device=device)
    kind = getattr(kernels.tl, _FORMATS[flats[0].dtype])
    if device.type == "cuda":
        table = table.pin_memory().to(device, non_blocking=True)
    # Said, as Triton warns of the default, which it is about to change.
    how = {"BLOCK": _BLOCK, "enable_fp_fusion": True}
    with torch.cuda.device_of(rows):
        if len(owners):
            kernels.moments_of_blocks[(len(owners),)](
                table, count, parts, len(owners), DTYPE=kind, CHUNK=_CHUNK, **how
            )
        kernels.moments_of_tensors[(count,)](table, count, parts, len(owners), rows, **how)


def _try(kernels: ModuleType, device: torch.device) -> None:
    """Raises unless it finds what is known: once per device, so that the host may wait for it."""
    sound = torch.linspace(-3.0, 5.0, 3 * _CHUNK + 5, device="cpu")
    odd = torch.tensor([0.0, -0.0, 1e-41, -2e30, 3e-30, torch.nan, -torch.inf], device="cpu")
    for dtype in _FORMATS:
        known = [sound.to(dtype), odd.to(dtype), sound[:0].to(dtype)]
        found = _read(kernels, [tensor.to(device) for tensor in known]).cpu().numpy()
        expected = np.stack([host.moments(tensor).numpy() for tensor in known])
        if not np.allclose(found, expected, rtol=1e-6, atol=0):
            message = f"the kernel finds other moments of {dtype} than there are"
            raise ArithmeticError(message)
