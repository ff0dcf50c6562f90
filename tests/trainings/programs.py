"""Small real trainings, faulty and healthy, each returning its report."""

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from sklearn.datasets import load_digits, make_circles
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (everybody's name for it)

import gradscope

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


def digits() -> Batch:
    """1 797 images of 8×8 as vectors in [0, 1], 10 classes."""
    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)


def batches(data: Batch, steps: int, size: int = 32) -> Iterator[Batch]:
    """Random batches."""
    inputs, targets = data
    for _ in range(steps):
        drawn = torch.randint(len(inputs), (size,))
        yield inputs[drawn], targets[drawn]


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Iterator[Batch],
    loss_of: Loss = F.cross_entropy,
    *,
    accumulate: int = 1,
    every: int | None = 3,
    loss_is_progress: bool = True,
) -> gradscope.Report:
    """An ordinary loop, watched."""
    with gradscope.watch(model, optimizer, every=every, loss_is_progress=loss_is_progress) as scope:
        for number, (inputs, targets) in enumerate(data, start=1):
            loss = loss_of(model(inputs), targets) / accumulate
            loss.backward()
            scope.log(loss=loss * accumulate)
            if number % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
    return scope.report()


def mlp(*widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers with an activation between them, torch's default initialization."""
    layers: list[nn.Module] = []
    for width, following in itertools.pairwise(widths):
        layers += [nn.Linear(width, following), activation()]
    return nn.Sequential(*layers[:-1])


def initialize(model: nn.Module, weight: Callable[[Tensor], object], bias: float = 0.0) -> None:
    """Set all linear layers."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight(module.weight)
            nn.init.constant_(module.bias, bias)


def cnn() -> nn.Sequential:
    """Two convolutions, two linear layers, for 1×8×8."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 64),
        nn.ReLU(inplace=True),
        nn.Linear(64, 10),
    )


# Faulty.


def circles_narrow_tanh(*, repaired: bool = False) -> gradscope.Report:
    """F17: ten tanh layers of width 5, U(-0.3, 0.3): each passes on 0.39 of the gradient."""
    points, labels = make_circles(1000, noise=0.1, random_state=0)
    data = (torch.tensor(points, dtype=torch.float32), torch.tensor(labels, dtype=torch.float32))
    model = mlp(2, *[5] * 10, 1, activation=nn.Tanh)
    if repaired:
        model = mlp(2, 64, 64, 1)
    else:
        initialize(model, lambda weight: nn.init.uniform_(weight, -0.3, 0.3))
    optimizer = torch.optim.SGD(model.parameters(), 0.2 if repaired else 0.01)
    return fit(
        model,
        optimizer,
        batches(data, 400),
        lambda output, target: F.binary_cross_entropy_with_logits(output.squeeze(1), target),
    )


def dead_from_the_start(*, repaired: bool = False) -> gradscope.Report:
    """F21: all biases at -2 on inputs in [0, 1]."""
    model = mlp(64, 64, 64, 10)
    if not repaired:
        for module in model:
            if isinstance(module, nn.Linear):
                nn.init.constant_(module.bias, -2.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    return fit(model, optimizer, batches(digits(), 300))


def softmax_over_one_unit(*, repaired: bool = False) -> gradscope.Report:
    """F02: the output is constantly 1, every gradient exactly zero."""
    inputs, targets = digits()
    model = nn.Sequential(
        *mlp(64, 50, 50, 1), nn.Sigmoid() if repaired else nn.Softmax(dim=1), nn.Flatten(0)
    )
    optimizer = torch.optim.RMSprop(model.parameters(), 1e-3)
    data = batches((inputs, (targets > 4).float()), 300)
    return fit(model, optimizer, data, F.binary_cross_entropy)


def head_only_in_optimizer(*, repaired: bool = False) -> gradscope.Report:
    """F53: the optimizer holds the last layer."""
    model = mlp(64, 64, 64, 10)
    held = model if repaired else model[-1]
    optimizer = torch.optim.SGD(held.parameters(), 0.1)
    return fit(model, optimizer, batches(digits(), 300))


class Detached(nn.Module):
    """An encoder whose features are detached in front of the head."""

    def __init__(self, *, repaired: bool) -> None:
        super().__init__()
        self.encoder = mlp(64, 64, 64)
        self.head = nn.Linear(64, 10)
        self.repaired = repaired

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        features: Tensor = self.encoder(x).relu()
        scores: Tensor = self.head(features if self.repaired else features.detach())
        return scores


def detached_encoder(*, repaired: bool = False) -> gradscope.Report:
    """The graph is severed between encoder and head."""
    model = Detached(repaired=repaired)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    return fit(model, optimizer, batches(digits(), 300))


def root_of_zero(*, repaired: bool = False) -> gradscope.Report:
    """A penalty √Σb² on biases that start at zero: its derivative there is 0/0."""
    model = mlp(64, 64, 10)
    initialize(model, nn.init.kaiming_normal_)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    biases = [module.bias for module in model if isinstance(module, nn.Linear)]

    def loss_of(output: Tensor, target: Tensor) -> Tensor:
        if repaired:
            penalty = torch.stack([torch.linalg.vector_norm(bias) for bias in biases]).sum()
        else:
            penalty = torch.stack([bias.square().sum().sqrt() for bias in biases]).sum()
        return F.cross_entropy(output, target) + 0.01 * penalty

    return fit(model, optimizer, batches(digits(), 200), loss_of)


def tiny_weights(*, repaired: bool = False) -> gradscope.Report:
    """Twelve ReLU layers with weights from N(0, 0.02²): He's scale is nine times as large."""
    model = mlp(64, *[64] * 11, 10)
    standard = math.sqrt(2 / 64) if repaired else 0.02
    initialize(model, lambda weight: nn.init.normal_(weight, 0, standard))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    return fit(model, optimizer, batches(digits(), 400))


# Healthy, though they look sick.


class PreNormBlock(nn.Module):
    """x + W₂ relu(W₁ norm(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """The block."""
        out: Tensor = x + self.down(self.up(self.norm(x)).relu())
        return out


def deep_pre_norm() -> gradscope.Report:
    """T01: 24 residual blocks; gradients differ tenfold from layer to layer."""
    blocks = [PreNormBlock(64) for _ in range(24)]
    model = nn.Sequential(nn.Linear(64, 64), *blocks, nn.LayerNorm(64), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), 3e-4)
    return fit(model, optimizer, batches(digits(), 200))


class LowRank(nn.Module):
    """A frozen linear layer with a trainable update of rank 4; B starts at zero."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(requires_grad=False)
        self.lora_a = nn.Parameter(torch.randn(4, base.in_features) / math.sqrt(base.in_features))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, 4))

    def forward(self, x: Tensor) -> Tensor:
        """The layer."""
        out: Tensor = self.base(x) + x @ self.lora_a.T @ self.lora_b.T
        return out


def low_rank_adapters() -> gradscope.Report:
    """T03: the gradient of A is exactly zero in the first step."""
    base = mlp(64, 64, 64, 10)
    model = nn.Sequential(*(LowRank(m) if isinstance(m, nn.Linear) else m for m in base))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    return fit(model, optimizer, batches(digits(), 300))


class MeanOfEmbeddings(nn.Module):
    """Mean of token embeddings, then a linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5000, 32)
        self.head = nn.Linear(32, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """Class scores."""
        out: Tensor = self.head(self.embedding(tokens).mean(1))
        return out


def rare_tokens() -> gradscope.Report:
    """T05: of 5 000 embedding rows few are touched; 98 % of the gradient is exactly zero."""
    ranks = torch.arange(1, 5001, dtype=torch.float)
    texts = torch.multinomial(1 / ranks, 2000 * 20, replacement=True).reshape(2000, 20)
    labels = (texts % 2).float().mean(1).gt(0.5).long()
    model = MeanOfEmbeddings()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    return fit(model, optimizer, batches((texts, labels), 300))


class TwoHeads(nn.Module):
    """Two heads, of which this phase uses the second."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = mlp(64, 64, 64)
        self.first = nn.Linear(64, 10)
        self.second = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of both."""
        features = self.trunk(x).relu()
        return self.first(features), self.second(features)


def unused_head() -> gradscope.Report:
    """T18: a head that runs, and that the loss does not use."""
    model = TwoHeads()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    return fit(
        model,
        optimizer,
        batches(digits(), 300),
        lambda output, target: F.cross_entropy(output[1], target),
    )


def bias_before_batchnorm() -> gradscope.Report:
    """T21: biases whose gradient is zero but for round-off."""
    layers: list[nn.Module] = []
    for _ in range(6):
        layers += [nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return fit(model, optimizer, batches(digits(), 200))


def accumulation() -> gradscope.Report:
    """T14: weights change after every eighth backward."""
    model = mlp(64, 64, 64, 10)
    optimizer = torch.optim.SGD(model.parameters(), 0.2)
    return fit(model, optimizer, batches(digits(), 800), accumulate=8)


def converged() -> gradscope.Report:
    """T10: 100 % training accuracy; gradients fall a hundredfold and more."""
    inputs, targets = digits()
    model = mlp(64, 256, 256, 10)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    return fit(model, optimizer, batches((inputs[:256], targets[:256]), 600))


def plain_cnn() -> gradscope.Report:
    """An ordinary convolutional net with in-place activations."""
    model = cnn()
    return fit(model, torch.optim.Adam(model.parameters(), 1e-3), batches(digits(), 300))


def small_learning_rate() -> gradscope.Report:
    """Everything moves little and the loss falls slowly, but it falls."""
    model = mlp(64, 64, 64, 10)
    return fit(model, torch.optim.SGD(model.parameters(), 3e-2), batches(digits(), 600))


class Generator(nn.Module):
    """A net that another net judges; both train in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = mlp(2, 64, 64, 2)
        self.discriminator = mlp(2, 64, 64, 1, activation=nn.Tanh)

    def forward(self, x: Tensor) -> Tensor:
        """A score for generated points."""
        score: Tensor = self.discriminator(self.generator(x))
        return score


def minimax(score: Tensor) -> Tensor:
    """The generator's first loss, log(1 - D(G(z))): once D is sure that is log 1 in float32."""
    return torch.sigmoid(-score).log().mean()


def generator_that_lost(*, repaired: bool = False) -> gradscope.Report:
    """T08: the discriminator soon is sure, and the generator's loss saturates."""
    model = Generator()
    generate = torch.optim.SGD(model.generator.parameters(), 1e-3)
    judge = torch.optim.Adam(model.discriminator.parameters(), 1e-3 if repaired else 0.1)
    ones, zeros = torch.ones(64, 1), torch.zeros(64, 1)
    bce = F.binary_cross_entropy_with_logits
    with gradscope.watch(model, [generate, judge], every=1, loss_is_progress=False) as scope:
        for _ in range(200):
            real = torch.randn(64, 2) * 0.3 + 1
            fake = model.generator(torch.randn(64, 2)).detach()
            loss = bce(model.discriminator(real), ones) + bce(model.discriminator(fake), zeros)
            model.zero_grad()
            loss.backward()
            judge.step()
            model.zero_grad()
            score = model(torch.randn(64, 2))
            (bce(score, ones) if repaired else minimax(score)).backward()
            generate.step()
            scope.log(loss=loss)
    return scope.report()


def gan() -> gradscope.Report:
    """T07: two losses against each other; neither falls."""
    model = Generator()
    generate = torch.optim.Adam(model.generator.parameters(), 1e-3, betas=(0.5, 0.999))
    judge = torch.optim.Adam(model.discriminator.parameters(), 1e-3, betas=(0.5, 0.999))
    ones, zeros = torch.ones(64, 1), torch.zeros(64, 1)
    bce = F.binary_cross_entropy_with_logits
    with gradscope.watch(model, [generate, judge], every=3, loss_is_progress=False) as scope:
        for _ in range(200):
            real = torch.randn(64, 2) * 0.3 + 1
            fake = model.generator(torch.randn(64, 2)).detach()
            loss = bce(model.discriminator(real), ones) + bce(model.discriminator(fake), zeros)
            model.zero_grad()
            loss.backward()
            judge.step()
            model.zero_grad()
            bce(model(torch.randn(64, 2)), ones).backward()
            generate.step()
            scope.log(loss=loss)
    return scope.report()
