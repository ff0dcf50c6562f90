"""Tensors of which each process holds a part: DTensors, and what fully_shard keeps of them."""

import sys
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

# Of a parameter: the processes, one group per mesh dimension, among which its parts lie.
Groups: TypeAlias = tuple[ProcessGroup, ...]

_ORDINARY = (Tensor, nn.Parameter)


def _loaded(module: str, name: str) -> Any:
    """What is there only if the user's code uses it; importing it takes long."""
    return getattr(sys.modules.get(module), name, ())


def _is_dtensor(tensor: Tensor) -> bool:
    # Asked of every tensor, of which nearly all are these.
    if type(tensor) in _ORDINARY:
        return False
    kind = _loaded("torch.distributed.tensor", "DTensor")
    return isinstance(tensor, kind)


def local(tensor: Tensor) -> Tensor:
    """The part that this process holds; of a tensor that is not split the tensor."""
    if not _is_dtensor(tensor):
        return tensor
    # In grad mode it would become a part of the graph.
    with torch.no_grad():
        part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
        return part


def groups(tensor: Tensor) -> Groups:
    """The groups of processes among which the tensor is split; none where each holds all of it."""
    if not _is_dtensor(tensor):
        return ()
    distributed: Any = tensor
    mesh = distributed.device_mesh
    return tuple(
        mesh.get_group(dim)
        for dim, placement in enumerate(distributed.placements)
        if mesh.size(dim) > 1 and not placement.is_replicate() and not placement.is_partial()
    )


def known(tensor: Tensor) -> Tensor | None:
    """The tensor as this process has it; None where others would have to be asked."""
    if not _is_dtensor(tensor):
        return tensor
    distributed: Any = tensor
    whole = all(placement.is_replicate() for placement in distributed.placements)
    return local(tensor) if whole else None


def is_laid_out_alike(tensor: Tensor, other: Tensor) -> bool:
    """Whether this process holds the same part of both, neither of them to be summed first."""
    layouts = [
        (t.device_mesh, t.placements) if _is_dtensor(t) else None  # type: ignore[attr-defined]
        for t in (tensor, other)
    ]
    return layouts[0] == layouts[1]


def placement(tensor: Tensor) -> str | None:
    """How it is split, in torch's words; None where it is an ordinary tensor."""
    if not _is_dtensor(tensor):
        return None
    distributed: Any = tensor
    shape = " × ".join(map(str, distributed.device_mesh.shape))
    return f"{', '.join(map(str, distributed.placements))} over {shape}"


def mesh_ranks(tensor: Tensor) -> list[int]:
    """All processes that hold a part or a replica of the split tensor."""
    ranks: list[int] = tensor.device_mesh.mesh.flatten().tolist()  # type: ignore[attr-defined]
    return ranks


def merge_device(tensor: Tensor) -> torch.device:
    """Where the groups of a split tensor exchange numbers; it may itself be kept elsewhere."""
    kind: str = tensor.device_mesh.device_type  # type: ignore[attr-defined]
    if kind == "cpu":
        return torch.device(kind)
    return torch.device(kind, torch.get_device_module(kind).current_device())


def at_rest(model: nn.Module) -> dict[tuple[int, str], Tensor]:
    """The shards that fully_shard keeps, by owner and name.

    During forward and backward the gathered weights are in their place.
    """
    kept: dict[tuple[int, str], Tensor] = {}
    sharding = _loaded("torch.distributed.fsdp", "FSDPModule")
    if not sharding:
        return kept
    for module in model.modules():
        if not isinstance(module, sharding):
            continue
        # Torch has no public list; where it has another one, what is in place has to do.
        state: Any = getattr(module, "_get_fsdp_state", lambda: None)()
        units = getattr(state, "_fsdp_param_groups", None)
        if units is None:
            units = [getattr(state, "_fsdp_param_group", None)]
        for parameter in (p for unit in units for p in getattr(unit, "fsdp_params", ())):
            info = parameter._module_info  # noqa: SLF001
            kept[id(info.module), info.param_name] = parameter.sharded_param
            for owner, name in zip(info.shared_modules, info.shared_param_names, strict=True):
                kept[id(owner), name] = parameter.sharded_param
    return kept
