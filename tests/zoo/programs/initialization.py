"""How the weights start, and the scale that they give the signal."""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  (everybody's name for it)
from torch.optim import SGD, Adam, RMSprop
from torch.optim.optimizer import Optimizer

from tests.zoo.case import Faulty, Watch
from tests.zoo.data import batches, circles, diabetes, digits, regression, whole
from tests.zoo.loop import fit
from tests.zoo.models import cnn, initialize, linears, mlp

# Vanishing.


def permuted_bits(watch: Watch, repaired: bool) -> None:
    """F06: three sigmoid layers, tiny weights, plain gradient descent."""
    numbers = torch.arange(256)
    bits = ((numbers[:, None] >> torch.arange(8)) & 1).float()
    data = (bits, bits[torch.randperm(256)])
    if repaired:
        model = mlp(8, 64, 64, 8)
        optimizer = Adam(model.parameters(), 1e-2)
        fit(watch, model, optimizer, whole(data, 800), F.binary_cross_entropy_with_logits)
        return
    model = mlp(8, 8, 8, 8, activation=nn.Sigmoid).append(nn.Sigmoid())
    initialize(model, lambda weight: nn.init.normal_(weight, std=0.05))
    fit(watch, model, SGD(model.parameters(), 0.01), batches(data, 1500, 50), F.mse_loss)


def ten_narrow_tanh(watch: Watch, repaired: bool) -> None:
    """F17: ten layers of five units, each of which passes on a third of the gradient."""
    model = mlp(2, *[5] * 10, 1, activation=nn.Tanh)
    optimizer: Optimizer
    if repaired:
        initialize(model, lambda weight: nn.init.xavier_normal_(weight, 5 / 3))
        optimizer = Adam(model.parameters(), 1e-2)
    else:
        initialize(model, lambda weight: nn.init.uniform_(weight, -0.3, 0.3))
        optimizer = SGD(model.parameters(), 0.01)
    fit(watch, model, optimizer, batches(circles(), 500), nn.BCEWithLogitsLoss())


def eight_sigmoids(watch: Watch, repaired: bool) -> None:
    """A sigmoid passes on a quarter at most; eight of them 1.5e-5."""
    model = mlp(64, *[32] * 8, 10, activation=nn.ReLU if repaired else nn.Sigmoid)
    if repaired:
        initialize(model, lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="relu"))
    fit(watch, model, SGD(model.parameters(), 0.1), batches(digits(), 300))


def six_small_relu(watch: Watch, repaired: bool) -> None:
    """Weights of a hundredth: each layer shrinks the signal tenfold."""
    model = mlp(10, *[64] * 6, 1)
    if not repaired:
        initialize(model, lambda weight: nn.init.normal_(weight, std=0.01))
    else:
        initialize(model, lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="relu"))
    optimizer = SGD(model.parameters(), 0.02, momentum=0.9)
    inputs, targets = diabetes()
    data = (inputs, (targets - targets.mean()) / targets.std())
    fit(watch, model, optimizer, batches(data, 400), nn.MSELoss())


def bottleneck_of_a_thousandth(watch: Watch, repaired: bool) -> None:
    """One layer among sound ones is a thousand times too small, and takes its time to grow."""
    model = mlp(64, 64, 64, 64, 64, 10, activation=nn.Tanh)
    if not repaired:
        with torch.no_grad():
            linears(model)[2].weight.mul_(1e-3)
    fit(watch, model, SGD(model.parameters(), 0.1), batches(digits(), 150))


class Scaled(nn.Module):
    """A constant factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * x


def scaled_in_the_middle(watch: Watch, repaired: bool) -> None:
    """A factor of 1e-4 between two layers: what is behind it hears nothing of the input."""
    model = mlp(8, 64, 64, 64, 1, activation=nn.GELU)
    model.insert(4, Scaled(1.0 if repaired else 1e-4))
    optimizer = SGD(model.parameters(), 0.05, momentum=0.9)
    fit(watch, model, optimizer, batches(regression(), 400), nn.MSELoss())


# Exploding.


def nine_wide_normals(watch: Watch, repaired: bool) -> None:
    """Weights of N(0, 1) in nine layers: each grows the signal sixfold."""
    model = mlp(64, *[64] * 8, 10)
    initialize(
        model,
        (lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="relu"))
        if repaired
        else (nn.init.normal_),
    )
    fit(watch, model, SGD(model.parameters(), 0.02), batches(digits(), 300))


def convolutions_ten_times_too_large(watch: Watch, repaired: bool) -> None:
    """All weights ten times torch's own."""
    model = cnn()
    if not repaired:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(10.0)
    fit(
        watch,
        model,
        SGD(model.parameters(), 0.05, momentum=0.9),
        batches(digits(), 250),
        nn.CrossEntropyLoss(),
    )


# Saturated and dead.


def tanh_at_its_ends(watch: Watch, repaired: bool) -> None:
    """Weights eighty times too large in front of tanh."""
    model = mlp(8, 16, 16, 16, 1, activation=nn.Tanh)
    if not repaired:
        initialize(model, lambda weight: nn.init.normal_(weight, std=20.0))
        nn.init.normal_(linears(model)[-1].weight, std=0.1)
    optimizer = Adam(model.parameters(), 1e-3)
    fit(watch, model, optimizer, batches(regression(), 400), nn.MSELoss())


def bias_of_minus_two(watch: Watch, repaired: bool) -> None:
    """F21: no unit is ever above zero."""
    model = mlp(64, 64, 64, 10)
    if not repaired:
        initialize(model, nn.init.kaiming_uniform_, bias=-2.0)
        initialize(model[0], lambda weight: nn.init.uniform_(weight, -0.1, 0.1), bias=-2.0)
    fit(watch, model, SGD(model.parameters(), 0.05, momentum=0.9), batches(digits(), 300))


def dead_second_layer(watch: Watch, repaired: bool) -> None:
    """One layer's biases at −50."""
    model = mlp(8, 64, 64, 64, 1)
    if not repaired:
        nn.init.constant_(linears(model)[1].bias, -50.0)
    optimizer = RMSprop(model.parameters(), 1e-3)
    fit(watch, model, optimizer, batches(regression(), 400), nn.MSELoss())


def dead_convolutions(watch: Watch, repaired: bool) -> None:
    """A bias of −3 behind a convolution of inputs in [0, 1]."""
    model = cnn()
    if not repaired:
        nn.init.constant_(model[4].get_parameter("bias"), -3.0)
    fit(watch, model, Adam(model.parameters(), 1e-3), batches(digits(), 300))


# Symmetric.


def all_weights_alike(watch: Watch, repaired: bool) -> None:
    """F36: every weight is 0.01, and all units of a layer stay one."""
    model = mlp(64, 64, 64, 10)
    if not repaired:
        initialize(model, lambda weight: nn.init.constant_(weight, 0.01))
    fit(watch, model, SGD(model.parameters(), 0.1), batches(digits(), 300))


def zeros_everywhere(watch: Watch, repaired: bool) -> None:
    """Weights and biases of zero: nothing but the last bias has a gradient."""
    model = mlp(64, 64, 10, activation=nn.Tanh)
    if not repaired:
        initialize(model, nn.init.zeros_)
    optimizer = SGD(model.parameters(), 0.1, momentum=0.9)
    fit(watch, model, optimizer, batches(digits(), 300), nn.CrossEntropyLoss())


def equal_hidden_weights(watch: Watch, repaired: bool) -> None:
    """Every weight is 0.1; sigmoids and Adam do not tell the units apart either."""
    model = mlp(2, 32, 32, 1, activation=nn.Sigmoid)
    if not repaired:
        initialize(model, lambda weight: nn.init.constant_(weight, 0.1))
    optimizer = Adam(model.parameters(), 2e-2)
    fit(watch, model, optimizer, batches(circles(), 400), nn.BCEWithLogitsLoss())


VANISHING, DEAD, SYMMETRIC = "vanishing-gradient", "dead-relu", "symmetric-weights"

CASES = (
    Faulty("permuted_bits", VANISHING, ("GS101", "GS104"), "SO 39217567", permuted_bits),
    Faulty(
        "ten_narrow_tanh",
        VANISHING,
        ("GS104", "GS101"),
        "AUTOTRAINER Circle GV",
        ten_narrow_tanh,
    ),
    Faulty("eight_sigmoids", VANISHING, ("GS101",), "own", eight_sigmoids),
    Faulty("six_small_relu", VANISHING, ("GS104", "GS101"), "own", six_small_relu),
    Faulty(
        "bottleneck_of_a_thousandth",
        "gradient-bottleneck",
        ("GS103", "GS104"),
        "own",
        bottleneck_of_a_thousandth,
    ),
    Faulty("scaled_in_the_middle", "gradient-bottleneck", ("GS103",), "own", scaled_in_the_middle),
    Faulty(
        "nine_wide_normals",
        "exploding-gradient",
        ("GS104", "GS102"),
        "own",
        nine_wide_normals,
    ),
    Faulty(
        "convolutions_ten_times_too_large",
        "exploding-gradient",
        ("GS104", "GS102"),
        "own",
        convolutions_ten_times_too_large,
    ),
    Faulty("tanh_at_its_ends", "saturated-activation", ("GS302", "GS104"), "own", tanh_at_its_ends),
    Faulty(
        "bias_of_minus_two",
        DEAD,
        ("GS301", "GS104"),
        "AUTOTRAINER DR; SO 53749895",
        bias_of_minus_two,
    ),
    Faulty("dead_second_layer", DEAD, ("GS301",), "own", dead_second_layer),
    Faulty("dead_convolutions", DEAD, ("GS301",), "own", dead_convolutions),
    Faulty(
        "all_weights_alike",
        SYMMETRIC,
        ("GS105",),
        "TheDeepChecker wrong_init; SO 48027263, 55006469, 35961434",
        all_weights_alike,
    ),
    Faulty("zeros_everywhere", SYMMETRIC, ("GS105", "GS104"), "own", zeros_everywhere),
    Faulty("equal_hidden_weights", SYMMETRIC, ("GS105",), "own", equal_hidden_weights),
)
