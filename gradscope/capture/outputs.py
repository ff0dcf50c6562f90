"""What a module returned: finding the tensor in it, and the loss."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from gradscope.capture.shards import known


def first_tensor(value: object) -> Tensor | None:
    """The first floating, non-scalar tensor of a structured value."""
    for tensor in _tensors(value):
        if tensor.dim() > 0 and (tensor.is_floating_point() or tensor.is_complex()):
            return tensor
    return None


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif is_dataclass(value) and not isinstance(value, type):
        for entry in fields(value):
            yield from _tensors(getattr(value, entry.name, None))


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
