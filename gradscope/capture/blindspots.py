"""What a recorded step can't show of a model's modules, and why: in words that follow "because"."""

from collections.abc import Iterator, Mapping

import torch
from torch import nn

WITHOUT_GRADIENTS = "it ran without gradients"
# Gradients reached what it is a view of; of the two reasons torch does not tell which.
PASSED_BY_VIEW = "it returns a view that is changed in place, or that the loss does not depend on"
IN_DERIVATIVES_ONLY = "it is reached by torch.autograd.grad(create_graph=True) alone"
NOT_IN_THE_LOSS = "it returns what the loss does not depend on"
FUSED = "it is frozen and in evaluation mode, in a layer that torch runs as one if it has no hooks"
UNREGISTERED = "it is in a plain list or dict, and so no part of the model"

# Of no module in particular: said of the run.
OLD_TORCH = (
    f"torch {torch.__version__} can't tell of modules inside torch.compile, 2.13 can: "
    "their parameters are recorded, their outputs are not"
)
CUDA_GRAPHS = (
    'CUDA graphs (mode="reduce-overhead") are replayed without Python; parameters are recorded, '
    "with another mode of torch.compile module outputs would be, too"
)
IN_TRANSFORMS = "what runs inside torch.func transforms is not recorded"


def fused(model: nn.Module) -> set[nn.Module]:
    """The layers that torch may run as one kernel where gradients are on, with their parts."""
    return {
        part
        for layer in model.modules()
        if isinstance(layer, nn.TransformerEncoderLayer) and not layer.training
        if not any(parameter.requires_grad for parameter in layer.parameters())
        for part in layer.modules()
    }


def unregistered(model: nn.Module) -> dict[str, str]:
    """Trainable modules that a list, tuple or dict of a module's holds, where torch finds none."""
    known = set(model.modules())
    return {
        f"{prefix}.{place}" if prefix else place: UNREGISTERED
        for prefix, module in model.named_modules()
        for place, part in _held(module)
        if part not in known and any(p.requires_grad for p in part.parameters())
    }


def _held(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, value in vars(module).items():
        # Torch's own are registries: of parts, and of hooks.
        if isinstance(value, (list, tuple)):
            parts: Iterator[tuple[object, object]] = enumerate(value)
        elif isinstance(value, Mapping) and not name.startswith("_"):
            parts = iter(value.items())
        else:
            continue
        for key, part in parts:
            if isinstance(part, nn.Module):
                yield f"{name}[{key!r}]", part
