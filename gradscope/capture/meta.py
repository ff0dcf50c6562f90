"""What a run says of itself from the start."""

import platform
import time
from importlib.metadata import version
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from gradscope.capture.cadence import describe
from gradscope.capture.config import CaptureConfig
from gradscope.capture.entities import ROOT
from gradscope.capture.names import class_name, named_modules
from gradscope.capture.samples import sampling


def described(
    model: nn.Module, config: CaptureConfig, criterion: nn.Module | None
) -> dict[str, Any]:
    """The model, how it is watched, and by what."""
    known = [p for p in model.parameters() if not isinstance(p, UninitializedParameter)]
    return {
        "model": class_name(model),
        "parameters": sum(p.numel() for p in known),
        "trainable_parameters": sum(p.numel() for p in known if p.requires_grad),
        "device": str(next(model.parameters()).device),
        "criterion": None if criterion is None else type(criterion).__name__,
        "cadence": describe(config.every, config.budget),
        "level": config.level,
        "sampling": sampling(known, config),
        "dropout": _dropout(model),
        "loss_is_progress": config.loss_is_progress,
        "created": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "versions": {
            "gradscope": version("torch-gradscope"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _dropout(model: nn.Module) -> dict[str, float]:
    """The share that each dropout drops."""
    kind = nn.modules.dropout._DropoutNd  # noqa: SLF001  (the only common base)
    return {
        name or ROOT: float(module.p)
        for name, module in named_modules(model)
        if isinstance(module, kind)
    }
