"""The architectures of generated trainings: (features, outputs, depth, width, activation)."""

import itertools

import torch
from torch import Tensor, nn

Activation = type[nn.Module]
# Pictures of 8×8.
_SIDE = 8


def perceptron(
    features: int, outputs: int, depth: int, width: int, activation: Activation
) -> nn.Module:
    """Layers one behind the other, initialized for what is behind them."""
    widths = [features, *[width] * depth]
    layers: list[nn.Module] = []
    for before, behind in itertools.pairwise(widths):
        layers += [nn.Linear(before, behind), activation()]
    model = nn.Sequential(*layers, nn.Linear(width, outputs))
    return _initialized(model)


def convolutional(
    features: int, outputs: int, depth: int, width: int, activation: Activation
) -> nn.Module:
    """Convolutions, pooled once, and a linear layer."""
    assert features == _SIDE**2
    channels = width // 2
    layers: list[nn.Module] = [nn.Unflatten(1, (1, _SIDE, _SIDE))]
    before = 1
    for index in range(depth):
        layers += [nn.Conv2d(before, channels, 3, padding=1), activation()]
        before = channels
        if index == 0:
            layers.append(nn.MaxPool2d(2))
    layers += [nn.Flatten(), nn.Linear(channels * (_SIDE // 2) ** 2, outputs)]
    return _initialized(nn.Sequential(*layers))


def _initialized(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    return model


class _Block(nn.Module):
    def __init__(self, width: int, activation: Activation) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, 2 * width)
        self.activation = activation()
        self.outer = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.outer(self.activation(self.inner(self.norm(x))))
        return result


def residual(
    features: int, outputs: int, depth: int, width: int, activation: Activation
) -> nn.Module:
    """Pre-norm blocks."""
    blocks = [_Block(width, activation) for _ in range(depth)]
    return nn.Sequential(nn.Linear(features, width), *blocks, nn.Linear(width, outputs))


class _Rows(nn.Module):
    """A picture's rows as a sequence."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(-1, _SIDE, _SIDE)


class transformer(nn.Module):  # noqa: N801  (called like the functions beside it)
    """Self-attention over the rows of a picture, averaged."""

    def __init__(
        self, features: int, outputs: int, depth: int, width: int, activation: Activation
    ) -> None:
        super().__init__()
        assert features == _SIDE**2
        self.rows = _Rows()
        self.embed = nn.Linear(_SIDE, width)
        self.positions = nn.Parameter(0.02 * torch.randn(_SIDE, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 2 * width, 0.0, activation(), batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Classes."""
        x = self.embed(self.rows(x)) + self.positions
        for block in self.blocks:
            x = block(x)
        result: Tensor = self.head(self.norm(x).mean(1))
        return result


class recurrent(nn.Module):  # noqa: N801
    """An LSTM over the rows of a picture."""

    def __init__(
        self, features: int, outputs: int, depth: int, width: int, activation: Activation
    ) -> None:
        super().__init__()
        assert features == _SIDE**2
        del activation
        self.rows = _Rows()
        self.lstm = nn.LSTM(_SIDE, width, min(depth, 2), batch_first=True)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Classes."""
        states, _ = self.lstm(self.rows(x))
        result: Tensor = self.head(states[:, -1])
        return result
