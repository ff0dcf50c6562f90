"""Nets that several programs train."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (everybody's name for it)


def mlp(*widths: int, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers with an activation between them, torch's default initialization."""
    layers: list[nn.Module] = []
    for width, following in itertools.pairwise(widths):
        layers += [nn.Linear(width, following), activation()]
    return nn.Sequential(*layers[:-1])


def linears(model: nn.Module) -> list[nn.Linear]:
    """All linear layers, in order."""
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def initialize(model: nn.Module, weight: Callable[[Tensor], object], bias: float = 0.0) -> None:
    """Set all linear and convolutional layers."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            weight(module.weight)
            if module.bias is not None:
                nn.init.constant_(module.bias, bias)


def cnn(*head: nn.Module) -> nn.Sequential:
    """Two convolutions and two linear layers for digits, and what else comes behind them."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
        *head,
    )


class Attention(nn.Module):
    """Causal self-attention with one head, its queries and keys normalized if asked for."""

    def __init__(self, width: int, *, normalized: bool = False) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.query_norm = nn.LayerNorm(width) if normalized else nn.Identity()
        self.key_norm = nn.LayerNorm(width) if normalized else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        query, key = self.query_norm(self.query(x)), self.key_norm(self.key(x))
        mixed = F.scaled_dot_product_attention(query, key, self.value(x), is_causal=True)
        out: Tensor = self.out(mixed)
        return out


class Block(nn.Module):
    """A transformer's block, norms first."""

    def __init__(self, width: int, *, normalized: bool = False) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, normalized=normalized)
        self.mlp = mlp(width, 4 * width, width, activation=nn.GELU)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        mixed: Tensor = x + self.mlp(self.mlp_norm(x))
        return mixed


class SmallGpt(nn.Module):
    """Two blocks over learned positions; scores of the next token."""

    def __init__(
        self, tokens: int = 16, width: int = 32, *, normalized: bool = False, tied: bool = False
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(tokens, width)
        self.positions = nn.Parameter(0.1 * torch.randn(64, width))
        self.blocks = nn.ModuleList(Block(width, normalized=normalized) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, tokens, bias=False)
        if tied:
            nn.init.normal_(self.tokens.weight, std=0.1)
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        scores: Tensor = self.head(self.norm(x))
        return scores


def next_token_loss(scores: Tensor, tokens: Tensor) -> Tensor:
    """The loss of the second half of repeated tokens; scores are of all but the last."""
    half = tokens.shape[1] // 2
    return F.cross_entropy(scores[:, half - 1 :].flatten(0, 1), tokens[:, half:].flatten())


class RowTransformer(nn.Module):
    """Digits as eight tokens, their rows: torch's own encoder layers."""

    def __init__(self, depth: int = 2, width: int = 32, *, norm_first: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Linear(8, width)
        self.positions = nn.Parameter(0.1 * torch.randn(8, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=norm_first
            )
            for _ in range(depth)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x.unflatten(1, (8, 8))) + self.positions
        for layer in self.layers:
            x = layer(x)
        scores: Tensor = self.head(x.mean(1))
        return scores
