"""What the numbers can't hold: logarithms of zero, half precision, loss scales."""

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional as F  # noqa: N812  (everybody's name for it)
from torch.optim import SGD, Adam

from tests.zoo.case import Faulty, Watch
from tests.zoo.data import batches, circles, digits, regression
from tests.zoo.loop import fit
from tests.zoo.models import mlp

# In single precision.


def logarithm_of_a_sure_sigmoid(watch: Watch, repaired: bool) -> None:
    """BCE by hand: once the sigmoid is 1, log(1 − 1) is −∞, and 0·∞ no number."""
    inputs, labels = digits()
    wanted = (labels == 0).float()[:, None]
    model = mlp(64, 64, 1)

    def loss_of(output: Tensor, target: Tensor) -> Tensor:
        if repaired:
            return F.binary_cross_entropy_with_logits(output, target)
        p = torch.sigmoid(output)
        return -(target * p.log() + (1 - target) * (1 - p).log()).mean()

    optimizer = SGD(model.parameters(), 0.05 if repaired else 0.5, momentum=0.9)
    if not repaired:
        inputs = 4 * inputs
    fit(watch, model, optimizer, batches((inputs, wanted), 400), loss_of)


def exponential_in_the_loss(watch: Watch, repaired: bool) -> None:
    """A softmax by hand, without the maximum taken off: e¹⁰⁰ is too much for float32."""
    inputs, labels = digits()
    model = mlp(64, 64, 10)
    with torch.no_grad():
        model[2].weight.mul_(400.0)  # type: ignore[operator]

    def loss_of(output: Tensor, target: Tensor) -> Tensor:
        if repaired:
            return F.cross_entropy(output, target)
        exponential = output.exp()
        shares = exponential / exponential.sum(1, keepdim=True)
        return -shares.gather(1, target[:, None]).log().mean()

    fit(watch, model, Adam(model.parameters(), 3e-3), batches((inputs, labels), 300), loss_of)


class Distances(nn.Module):
    """How far apart two points are, once mapped."""

    def __init__(self, least: float) -> None:
        super().__init__()
        self.net = mlp(2, 32, 32, 4, activation=nn.Tanh)
        self.least = least

    def forward(self, pairs: Tensor) -> Tensor:
        difference = self.net(pairs[:, 0]) - self.net(pairs[:, 1])
        distance: Tensor = (difference.square().sum(1) + self.least).sqrt()
        return distance


def root_of_zero(watch: Watch, repaired: bool) -> None:
    """Some pairs are of one point: a root's slope at 0 is infinite, 0 times that no number."""
    points, labels = circles()
    other = torch.randint(len(points), (4000,))
    own = torch.arange(4000) % len(points)
    other[::200] = own[::200]
    pairs = torch.stack([points[own], points[other]], 1)
    same = (labels[own] == labels[other])[:, 0].float()
    model = Distances(1e-6 if repaired else 0.0)

    def loss_of(distance: Tensor, same: Tensor) -> Tensor:
        return (same * distance**2 + (1 - same) * (1 - distance).relu() ** 2).mean()

    fit(watch, model, Adam(model.parameters(), 5e-3), batches((pairs, same), 400), loss_of)


class Standardizing(nn.Module):
    """Divides each sample by the deviation of its features, which may be zero."""

    def __init__(self, *, safe: bool) -> None:
        super().__init__()
        self.safe = safe
        self.net = mlp(64, 64, 10)

    def forward(self, x: Tensor) -> Tensor:
        deviation = x.std(1, keepdim=True)
        scores: Tensor = self.net((x - x.mean(1, keepdim=True)) / (deviation + 1e-5 * self.safe))
        return scores


def division_by_a_deviation_of_zero(watch: Watch, repaired: bool) -> None:
    """Some images are blank."""
    inputs, labels = digits()
    inputs[::100] = 0.0
    model = Standardizing(safe=repaired)
    fit(
        watch,
        model,
        Adam(model.parameters(), 1e-3),
        batches((inputs, labels), 300),
        nn.CrossEntropyLoss(),
    )


# In half precision.


def gradients_below_half(watch: Watch, repaired: bool) -> None:
    """A float16 net whose loss is divided by 1e6: what arrives is below 6e-8, and zero."""
    inputs, labels = digits()
    model = mlp(64, 64, 64, 10).to(torch.float32 if repaired else torch.float16)
    inputs = inputs.to(model[0].weight.dtype)  # type: ignore[arg-type]
    share = 1.0 if repaired else 1e-6
    optimizer = SGD(model.parameters(), 0.1 / share**0.5, momentum=0.9 * repaired)

    def loss_of(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target) * share

    fit(watch, model, optimizer, batches((inputs, labels), 300), loss_of)


def sigmoids_in_half(watch: Watch, repaired: bool) -> None:
    """Five sigmoids in float16: the first layers' gradients are below what it holds."""
    inputs, targets = regression()
    model = mlp(8, 32, 32, 32, 32, 32, 1, activation=nn.Tanh if repaired else nn.Sigmoid)
    dtype = torch.float32 if repaired else torch.float16
    model.to(dtype)
    if not repaired:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.2)
    data = batches((inputs.to(dtype), targets.to(dtype)), 300)
    fit(watch, model, SGD(model.parameters(), 0.05, momentum=0.5), data, nn.MSELoss())


def updates_below_bfloat16(watch: Watch, repaired: bool) -> None:
    """Weights in bfloat16 have 8 bits: a step below 1/512 of a weight is lost."""
    dtype = torch.float32 if repaired else torch.bfloat16
    inputs, labels = digits()
    model = mlp(64, 128, 128, 10).to(dtype)
    optimizer = SGD(model.parameters(), 0.02 if repaired else 1e-4, momentum=0.9)
    data = batches((inputs.to(dtype), labels), 300)
    fit(watch, model, optimizer, data, nn.CrossEntropyLoss())


def activations_above_half(watch: Watch, repaired: bool) -> None:
    """Squares of hundreds, in float16: nothing above 65 504."""
    dtype = torch.float32 if repaired else torch.float16
    inputs, labels = digits()
    inputs = inputs if repaired else 300 * inputs

    class Squares(nn.Module):
        """A layer, squared."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = self.second(self.first(x) ** 2)
            return scores

    model = Squares().to(dtype)
    optimizer = SGD(model.parameters(), 0.1 if repaired else 1e-3, momentum=0.5)
    fit(watch, model, optimizer, batches((inputs.to(dtype), labels), 300), nn.CrossEntropyLoss())


# Loss scales.


def _scaled(
    watch: Watch, model: nn.Module, optimizer: SGD | Adam, scaler: GradScaler, spoil: float
) -> None:
    """A loop with a scaler; the loss is taken `spoil` times before it is scaled."""
    data = batches(digits(), 300)
    with watch(model, optimizer, scaler=scaler) as scope:
        for inputs, targets in data:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                output = model(inputs)
                loss = F.cross_entropy(output.float(), targets)
                penalty = (spoil * output).square().mean()
            scaler.scale(loss + 0.0 * penalty).backward()
            scaler.step(optimizer)
            scaler.update()
            scope.log(loss=loss)


def scale_that_collapses(watch: Watch, repaired: bool) -> None:
    """A penalty that overflows in float16 at every step: the scale is halved to nothing."""
    model = mlp(64, 64, 10)
    optimizer = SGD(model.parameters(), 0.1, momentum=0.9)
    _scaled(watch, model, optimizer, GradScaler("cpu"), 1.0 if repaired else 1e5)


def scale_that_never_fits(watch: Watch, repaired: bool) -> None:
    """A scale of 2^60 that is backed off by a thousandth: every step is skipped."""
    model = mlp(64, 64, 10, activation=nn.GELU)
    optimizer = Adam(model.parameters(), 1e-3)
    if repaired:
        scaler = GradScaler("cpu")
    else:
        scaler = GradScaler("cpu", init_scale=2.0**60, backoff_factor=0.999)
    _scaled(watch, model, optimizer, scaler, 1.0)


CASES = (
    Faulty(
        "logarithm_of_a_sure_sigmoid",
        "logarithm-of-zero",
        ("GS501", "GS503"),
        "own",
        logarithm_of_a_sure_sigmoid,
    ),
    Faulty(
        "exponential_in_the_loss",
        "exponential-overflow",
        ("GS501", "GS503"),
        "own",
        exponential_in_the_loss,
    ),
    Faulty("root_of_zero", "derivative-not-finite", ("GS503",), "own", root_of_zero),
    Faulty(
        "division_by_a_deviation_of_zero",
        "division-by-zero",
        ("GS502", "GS501", "GS503"),
        "own",
        division_by_a_deviation_of_zero,
    ),
    Faulty(
        "gradients_below_half", "half-precision-underflow", ("GS504",), "own", gradients_below_half
    ),
    Faulty(
        "sigmoids_in_half", "half-precision-underflow", ("GS504", "GS101"), "own", sigmoids_in_half
    ),
    Faulty(
        "updates_below_bfloat16",
        "half-precision-underflow",
        ("GS504",),
        "own",
        updates_below_bfloat16,
    ),
    Faulty(
        "activations_above_half",
        "half-precision-overflow",
        ("GS505", "GS502", "GS601"),
        "own",
        activations_above_half,
    ),
    Faulty(
        "scale_that_collapses",
        "loss-scale-collapse",
        ("GS506", "GS505"),
        "own",
        scale_that_collapses,
    ),
    Faulty(
        "scale_that_never_fits", "loss-scale-collapse", ("GS506",), "own", scale_that_never_fits
    ),
)
