"""What a module returned: finding the tensor in it, and the loss."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from gradscope.capture.shards import known

_WHOLE = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})


def first_tensor(value: object) -> Tensor | None:
    """The first floating, non-scalar tensor of a structured value that can be measured."""
    for tensor in tensors(value):
        if _is_real(tensor) and is_measurable(tensor):
            return tensor
    return None


def first_input(value: object) -> Tensor | None:
    """The first non-scalar tensor of numbers, whole ones too, that can be measured."""
    for tensor in tensors(value):
        is_whole = tensor.dim() > 0 and tensor.dtype in _WHOLE
        if (is_whole or _is_real(tensor)) and is_measurable(tensor):
            return tensor
    return None


def is_measurable(tensor: Tensor) -> bool:
    """Whether its entries are there to be read."""
    return _layout(tensor) in {"strided", "sparse_coo"} and tensor.device.type != "meta"


def why_unmeasured(value: object) -> str:
    """What of a returned value nothing is measured of, as a module's blind spot."""
    for tensor in tensors(value):
        if _is_real(tensor):
            kind = "meta" if tensor.device.type == "meta" else _layout(tensor)
            return f"it returns a tensor that is not measured: {kind}"
    return "it returns no floating-point tensor with a dimension"


def _is_real(tensor: Tensor) -> bool:
    return tensor.dim() > 0 and (tensor.is_floating_point() or tensor.is_complex())


def _layout(tensor: Tensor) -> str:
    return "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")


def tensors(value: object) -> Iterator[Tensor]:
    """All tensors of a structured value, in its order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors(part)
    elif is_dataclass(value) and not isinstance(value, type):
        for entry in fields(value):
            yield from tensors(getattr(value, entry.name, None))


def output_loss(output: Any) -> Tensor | None:
    """The loss that a model returned: `output.loss`, `output["loss"]`, or a 0-d output."""
    loss: object = output
    if isinstance(output, Mapping):
        loss = output.get("loss")
    elif not isinstance(output, Tensor):
        loss = getattr(output, "loss", None)
    if isinstance(loss, Tensor) and loss.dim() == 0 and loss.requires_grad:
        return known(loss)
    return None
