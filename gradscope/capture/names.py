"""The names that modules and parameters have for the user, whatever torch has wrapped them in."""

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradscope.capture.shards import at_rest

# What torch.compile, FSDP and activation checkpointing call the module inside.
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def inside(module: nn.Module) -> nn.Module | None:
    """What the module wraps; None where it is the user's own."""
    if isinstance(module, DistributedDataParallel):
        wrapped: nn.Module = module.module
        return wrapped
    for name in _WRAPPED:
        # OptimizedModule hands on every attribute that it does not have, modules too.
        if name in module._modules:  # noqa: SLF001  (getattr may reach into the wrapped one)
            return module._modules[name]  # noqa: SLF001
    return None


def unwrapped(module: nn.Module) -> nn.Module:
    """The user's module inside all wrappers."""
    while (wrapped := inside(module)) is not None:
        module = wrapped
    return module


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Each of the user's modules once, under its first name, parents first."""
    # Of a stack: a recursion of generators hands each module on through all that are around it.
    waiting = [("", model)]
    seen: set[nn.Module] = set()
    while waiting:
        name, module = waiting.pop()
        module = unwrapped(module)
        if module in seen:
            continue
        seen.add(module)
        yield name, module
        children = [
            (f"{name}.{part}" if name else part, child)
            for part, child in module._modules.items()  # noqa: SLF001  (named_children leaves twins out)
            if child is not None
        ]
        waiting += reversed(children)


def held_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Every parameter under each of its names, with the module that holds it.

    Of what fully_shard has gathered for a while, the shard: that is what the optimizer holds.
    """
    sharded = at_rest(model)
    for prefix, owner in named_modules(model):
        for name, held in owner._parameters.items():  # noqa: SLF001  (named_parameters hides the owner)
            parameter = sharded.get((id(owner), name), held)
            if parameter is not None:
                yield (f"{prefix}.{name}" if prefix else name), owner, parameter


def owned_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Every parameter once, under its first name, with the module that holds it."""
    seen: set[int] = set()
    for name, owner, parameter in held_parameters(model):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            yield name, owner, parameter


def class_name(module: nn.Module) -> str:
    """The name of the user's class: fully_shard makes a subclass of it."""
    kind = type(module)
    if kind.__name__.startswith("FSDP") and kind.__bases__[0].__name__ == "FSDPModule":
        return kind.__name__.removeprefix("FSDP")
    return kind.__name__
