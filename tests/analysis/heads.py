"""Graphs as autograd has them of real losses, and signals, for runs made of arrays."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradscope.record import Entity
from tests.analysis.synthetic import Builder, Chain

LABELS = torch.arange(8) % 4


def recorded(loss: Tensor, output: Tensor) -> dict[str, Any]:
    """`run.meta["graph"]` of a loss."""
    assert loss.grad_fn is not None
    found: list[Any] = [loss.grad_fn]
    nodes = []
    for node in found:
        inputs = []
        for argument, _ in node.next_functions:
            if argument is not None and argument not in found:
                found.append(argument)
            inputs.append(-1 if argument is None else found.index(argument))
        saved = {}
        for name in dir(node):
            if name.startswith("_saved_"):
                value = getattr(node, name)
                if isinstance(value, bool | int | float | str | tuple):
                    saved[name.removeprefix("_saved_")] = value
        shapes = [list(made.shape) for made in node._input_metadata]
        if hasattr(node, "variable"):
            shapes = [list(node.variable.shape)]
        op = node.name().rpartition("::")[2]
        nodes.append({"op": op, "inputs": inputs, "shapes": shapes, "saved": saved})
    at = found.index(output.grad_fn) if output.grad_fn in found else None
    return {"step": 0, "root": "loss", "nodes": nodes, "output": at, "truncated": False}


def headed(
    model: nn.Module,
    criterion: Callable[[Tensor], Tensor],
    *,
    features: int = 5,
    batch: int = 8,
    steps: int = 100,
    loss: tuple[float, float] = (2.3, 1.0),
    **meta: Any,
) -> Builder:
    """A run whose graph is that of the criterion on the model's output."""
    given = torch.linspace(-1, 1, batch * features).view(batch, features)
    output = model(given)
    graph = recorded(criterion(output), output)
    return Chain(layers=4, steps=steps, loss=loss, meta={"graph": graph, **meta}).builder()


def signalled(builder: Builder, name: str, shape: tuple[int, ...], **values: Any) -> Builder:
    """The builder with a signal; what is not given was not measured."""
    depth = len(builder.entities["signals"])
    numel = int(np.prod(shape))
    builder.entities["signals"].append(Entity(name, "signal", shape, numel, depth, "signal", name))
    for quantity, known in builder.arrays["signals"].items():
        column = np.full((len(builder.steps), 1), np.nan)
        builder.arrays["signals"][quantity] = np.concatenate([known, column], axis=1)
    for quantity, value in values.items():
        builder.set("signals", quantity, name, value)
    return builder
