"""What a synthetic run does not have by itself: signals, further modules, a real graph."""

from typing import Any

import numpy as np
from torch import Tensor, nn

from gradscope.record import Entity
from tests.analysis.synthetic import Builder


def add(
    builder: Builder,
    table: str,
    name: str,
    *,
    group: str = "signal",
    of: str = "Tensor",
    shape: tuple[int, ...] = (32, 10),
    depth: int = 0,
    **quantities: Any,
) -> Builder:
    """One more entity, with these quantities at all steps or at each."""
    kind = {"signals": "signal", "modules": "module"}[table]
    entity = Entity(name, kind, shape, int(np.prod(shape)), depth, group, of)
    builder.entities[table].append(entity)
    for quantity, values in builder.arrays[table].items():
        empty = np.full((len(builder.steps), 1), np.nan)
        builder.arrays[table][quantity] = np.concatenate([values, empty], axis=1)
    for quantity, value in quantities.items():
        builder.set(table, quantity, name, value)
    return builder


def graph_of(
    root: Tensor, output: Tensor | None = None, model: nn.Module | None = None
) -> dict[str, Any]:
    """The autograd graph behind a tensor, as a run's meta holds it."""
    names = {} if model is None else {id(p): name for name, p in model.named_parameters()}
    nodes: list[Any] = [root.grad_fn]
    for node in nodes:
        nodes += [source for source, _ in node.next_functions if source and source not in nodes]
    described = []
    for node in nodes:
        inputs = [nodes.index(source) if source else -1 for source, _ in node.next_functions]
        leaf = getattr(node, "variable", None)
        entry: dict[str, Any] = {
            "op": "AccumulateGrad" if leaf is not None else node.name(),
            "inputs": inputs,
            "shapes": [list(given.shape) for given in node._input_metadata],
            "saved": {
                name: getattr(node, f"_saved_{name}")
                for name in ("dim", "exponent")
                if hasattr(node, f"_saved_{name}")
            },
        }
        if leaf is not None:
            entry["parameter"] = names.get(id(leaf), "?")
        described.append(entry)
    at = None if output is None else nodes.index(output.grad_fn)
    return {"step": 0, "root": "loss", "nodes": described, "output": at, "truncated": False}
