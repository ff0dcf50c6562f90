"""Healthy: nets that look sick by their structure."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (everybody's name for it)
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint

from tests.zoo.case import Healthy, Watch
from tests.zoo.data import batches, circles, copies, digits, first_of_sequence, regression
from tests.zoo.loop import fit
from tests.zoo.models import RowTransformer, SmallGpt, cnn, linears, mlp, next_token_loss


class Residual(nn.Module):
    """A block of a residual MLP, norm first; its own end starts at zero if asked for."""

    def __init__(self, width: int, *, from_zero: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.LayerNorm(width), *mlp(width, width, width))
        if from_zero:
            nn.init.zeros_(linears(self.body)[-1].weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.body(x)
        return out


def forty_eight_blocks(watch: Watch) -> None:
    """T01: gradients of the blocks are 10 to 100 times smaller than the head's."""
    blocks = [nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.ReLU()) for _ in range(48)]

    class Deep(nn.Module):
        """Blocks around which the signal may pass."""

        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(blocks)
            self.head = nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = x + block(x)
            scores: Tensor = self.head(x)
            return scores

    model = Deep()
    fit(watch, model, Adam(model.parameters(), 3e-4), batches(digits(), 80))


def branches_from_zero(watch: Watch) -> None:
    """Residual branches that end in zeros: half of the weights have no gradient at first."""
    model = nn.Sequential(*[Residual(64, from_zero=True) for _ in range(8)], nn.Linear(64, 10))
    fit(
        watch, model, AdamW(model.parameters(), 1e-3), batches(digits(), 250), nn.CrossEntropyLoss()
    )


class LowRank(nn.Module):
    """A frozen linear layer, and a product of two thin ones that starts at zero."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_features) / math.sqrt(rank))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + x @ self.lora_A.T @ self.lora_B.T
        return out


def low_rank_adapters(watch: Watch) -> None:
    """T03: LoRA; A's gradient is exactly zero at the first step."""
    model = mlp(64, 64, 64, 10)
    for index in (0, 2, 4):
        model[index] = LowRank(linears(model)[index // 2])
    held = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fit(watch, model, Adam(held, 5e-3), batches(digits(), 300))


class TokenMean(nn.Module):
    """The mean of a text's embeddings, classified."""

    def __init__(self, *, sparse: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(5000, 32, sparse=sparse)
        self.head = nn.Linear(32, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        scores: Tensor = self.head(self.tokens(tokens).mean(1))
        return scores


def _texts() -> tuple[Tensor, Tensor]:
    """Tokens of a Zipf distribution; three in ten come from the 50 words of the text's class."""
    labels = torch.randint(4, (2000,))
    frequency = 1 / torch.arange(1.0, 4801.0)
    common = 200 + torch.multinomial(frequency, 2000 * 20, replacement=True).view(2000, 20)
    own = labels[:, None] * 50 + torch.randint(50, (2000, 20))
    return torch.where(torch.rand(2000, 20) < 0.3, own, common), labels


def rare_tokens(watch: Watch) -> None:
    """T05: nearly all rows of the embedding have no gradient."""
    model = TokenMean()
    fit(watch, model, Adam(model.parameters(), 1e-2), batches(_texts(), 250))


def sparse_gradients(watch: Watch) -> None:
    """The same with sparse gradients, and an optimizer for each kind."""
    model = TokenMean(sparse=True)
    optimizers = [
        torch.optim.SparseAdam(list(model.tokens.parameters()), 1e-2),
        Adam(model.head.parameters(), 1e-2),
    ]
    with watch(model, optimizers) as scope:
        for tokens, labels in batches(_texts(), 250):
            loss = F.cross_entropy(model(tokens), labels)
            model.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            scope.log(loss=loss)


class TwoHeads(nn.Module):
    """A trunk with two heads, of which one rests."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = mlp(64, 64, 64)
        self.head, self.other_head = nn.Linear(64, 10), nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.trunk(x).relu())
        return scores


def head_for_later(watch: Watch) -> None:
    """T18: the second task has not begun."""
    model = TwoHeads()
    fit(watch, model, Adam(model.parameters(), 1e-3), batches(digits(), 300))


def bias_before_batchnorm(watch: Watch) -> None:
    """T21: biases whose gradient is zero but for rounding."""
    model = nn.Sequential(
        nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(),
        nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(),
        nn.Linear(64, 10),
    )  # fmt: skip
    fit(watch, model, Adam(model.parameters(), 1e-3), batches(digits(), 300))


class Mixture(nn.Module):
    """Each input goes to one of sixteen experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(64, 16)
        self.experts = nn.ModuleList(mlp(64, 32, 64) for _ in range(16))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.gate(x).softmax(1).max(1)
        mixed = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero()[:, 0]
            if len(rows):
                mixed = mixed.index_add(0, rows, expert(x[rows]) * weight[rows, None])
        scores: Tensor = self.head(x + mixed)
        return scores


def experts_at_rest(watch: Watch) -> None:
    """In batches of sixteen many experts have no input, and no gradient."""
    model = Mixture()
    fit(watch, model, AdamW(model.parameters(), 2e-3), batches(digits(), 200, 16))


def width_scaled_rates(watch: Watch) -> None:
    """muP: a head that starts at zero, and rates that shrink with the width."""
    width = 512
    model = mlp(64, width, width, 10)
    first, hidden, head = linears(model)
    nn.init.zeros_(head.weight)
    nn.init.normal_(hidden.weight, std=width**-0.5)
    optimizer = Adam(
        [
            {"params": first.parameters(), "lr": 3e-3},
            {"params": [hidden.weight, head.weight], "lr": 3e-3 * 64 / width},
            {"params": [hidden.bias, head.bias], "lr": 3e-3},
        ]
    )
    fit(watch, model, optimizer, batches(digits(), 150), nn.CrossEntropyLoss())


def tied_embeddings(watch: Watch) -> None:
    """A small GPT whose head is its embedding, with a warm-up."""
    model = SmallGpt(tied=True, normalized=True)
    optimizer = AdamW(model.parameters(), 5e-3)
    warm_up = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))
    fit(watch, model, optimizer, copies(200), next_token_loss, schedule=warm_up)


class Checkpointed(nn.Module):
    """Parts whose forward runs again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([mlp(64, 64, 64), mlp(64, 64, 64)])
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = checkpoint(part, x, use_reentrant=False).relu()
        scores: Tensor = self.head(x)
        return scores


def checkpointed(watch: Watch) -> None:
    """Gradient checkpointing."""
    model = Checkpointed()
    fit(watch, model, Adam(model.parameters(), 1e-3), batches(digits(), 250))


class Remembering(nn.Module):
    """An LSTM read at its last step."""

    def __init__(self) -> None:
        super().__init__()
        self.core = nn.LSTM(1, 32, batch_first=True)
        with torch.no_grad():
            self.core.get_parameter("bias_ih_l0")[32:64] = 2.0
        self.head = nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.core(x)[0][:, -1])
        return out


def open_forget_gates(watch: Watch) -> None:
    """An LSTM with saturated gates, as they should be, remembers the first of twelve values."""
    model = Remembering()
    data = batches(first_of_sequence(4096, 12), 300, 64)
    fit(watch, model, Adam(model.parameters(), 1e-2), data, nn.MSELoss())


def heavy_dropout(watch: Watch) -> None:
    """Half of everything is dropped, the inputs included."""
    model = nn.Sequential(
        nn.Dropout(0.5), nn.Linear(64, 256), nn.ReLU(),
        nn.Dropout(0.5), nn.Linear(256, 256), nn.ReLU(),
        nn.Dropout(0.5), nn.Linear(256, 10),
    )  # fmt: skip
    fit(watch, model, Adam(model.parameters(), 1e-3), batches(digits(), 300))


def post_norm_transformer(watch: Watch) -> None:
    """Norms behind the sums: gradients fall from the last layer to the first."""
    model = RowTransformer(depth=2, norm_first=False)
    fit(watch, model, Adam(model.parameters(), 2e-3), batches(digits(), 150), nn.CrossEntropyLoss())


def sine_units(watch: Watch) -> None:
    """SIREN: sines of thirty times the input; every unit is beyond its first period."""

    class Sine(nn.Module):
        """A sine of many periods."""

        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(6 * x)

    model = mlp(2, 64, 64, 1, activation=Sine)
    for layer in linears(model)[1:]:
        nn.init.uniform_(layer.weight, -math.sqrt(6 / 64) / 6, math.sqrt(6 / 64) / 6)
    optimizer = Adam(model.parameters(), 1e-3)
    fit(watch, model, optimizer, batches(circles(), 250), nn.BCEWithLogitsLoss())


def weight_normalized(watch: Watch) -> None:
    """Weights as length times direction: the parameters are not the weights."""
    model = mlp(8, 64, 64, 1)
    for layer in linears(model):
        nn.utils.parametrizations.weight_norm(layer)
    optimizer = SGD(model.parameters(), 0.05, momentum=0.9)
    fit(watch, model, optimizer, batches(regression(), 400), nn.MSELoss())


def squeeze_and_excite(watch: Watch) -> None:
    """Gates between 0 and 1, and average pooling."""

    class Gated(nn.Module):
        """Channels scaled by what all of them say."""

        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 32), nn.Sigmoid())

        def forward(self, x: Tensor) -> Tensor:
            gate: Tensor = self.gate(x.mean((2, 3)))
            return x * gate[..., None, None]

    model = cnn()
    model.insert(7, Gated())
    fit(watch, model, AdamW(model.parameters(), 2e-3), batches(digits(), 250))


CASES = (
    Healthy("forty_eight_blocks", "residual", "arXiv:2002.04745", forty_eight_blocks),
    Healthy("branches_from_zero", "residual", "own", branches_from_zero),
    Healthy("low_rank_adapters", "adapters", "arXiv:2106.09685", low_rank_adapters),
    Healthy("rare_tokens", "sparse-embedding", "own", rare_tokens),
    Healthy("sparse_gradients", "sparse-embedding", "own", sparse_gradients),
    Healthy("head_for_later", "unused-head", "DDP, find_unused_parameters", head_for_later),
    Healthy("bias_before_batchnorm", "structural-zero", "NeuraLint f005", bias_before_batchnorm),
    Healthy("experts_at_rest", "experts", "own", experts_at_rest),
    Healthy("width_scaled_rates", "width-scaled", "arXiv:2203.03466", width_scaled_rates),
    Healthy("tied_embeddings", "weight-tying", "own", tied_embeddings),
    Healthy("checkpointed", "checkpointing", "own", checkpointed),
    Healthy("open_forget_gates", "gates", "own", open_forget_gates),
    Healthy("squeeze_and_excite", "gates", "arXiv:1709.01507", squeeze_and_excite),
    Healthy("heavy_dropout", "dropout", "own", heavy_dropout),
    Healthy("post_norm_transformer", "transformer", "own", post_norm_transformer),
    Healthy("sine_units", "unusual-activation", "arXiv:2006.09661", sine_units),
    Healthy("weight_normalized", "reparametrized", "own", weight_normalized),
)
