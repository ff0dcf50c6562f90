"""The trainings that are measured: built from their configurations, nothing is downloaded."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torchvision.models import ResNet
from torchvision.models.resnet import BasicBlock


@dataclass(frozen=True, slots=True)
class Subject:
    """A model, a batch for it, and the loss."""

    title: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    loss: Callable[[nn.Module, Tensor], Tensor]


def _mlp(layers: int = 50, width: int = 256) -> nn.Module:
    hidden = [m for _ in range(layers - 1) for m in (nn.Linear(width, width), nn.ReLU())]
    model = nn.Sequential(*hidden, nn.Linear(width, 10))
    # By torch's own initialization its gradients fade into subnormal numbers, which are slow.
    for module in model:
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return model


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_embd=384, n_layer=6, n_head=6, n_positions=128)
    model: nn.Module = transformers.GPT2LMHeadModel(config)
    return model


def _classes(model: nn.Module, inputs: Tensor) -> Tensor:
    outputs = model(inputs)
    return F.cross_entropy(outputs, torch.arange(len(outputs)) % outputs.shape[1])


def _words(model: nn.Module, inputs: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=inputs, labels=inputs).loss
    return loss


SUBJECTS = {
    "mlp": Subject("MLP, 50 × 256", _mlp, lambda: torch.randn(64, 256), _classes),
    "resnet": Subject(
        "ResNet-18",
        lambda: ResNet(BasicBlock, [2, 2, 2, 2], num_classes=10),
        lambda: torch.randn(16, 3, 64, 64),
        _classes,
    ),
    "gpt2": Subject("GPT-2, 6 × 384", _gpt2, lambda: torch.randint(50_257, (4, 128)), _words),
}
