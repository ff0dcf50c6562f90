"""Learning rates: too high, too low, and scheduled away."""

import math

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  (everybody's name for it)
from torch.optim import SGD, Adam, AdamW, RMSprop
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR, PolynomialLR, StepLR

from tests.zoo.case import Faulty, Watch
from tests.zoo.data import batches, copies, diabetes, digits, regression, standardized, whole
from tests.zoo.loop import fit
from tests.zoo.models import RowTransformer, SmallGpt, cnn, mlp, next_token_loss

# Too high.


def parabola(watch: Watch, repaired: bool) -> None:
    """F08: targets to 125, SGD at 0.1."""
    x = torch.arange(0, 5, 0.1)[:, None]
    y = 5 * x**2 + torch.randn_like(x) ** 3
    model = mlp(1, 50, 30, 1)
    rate, data = (0.01, (standardized(x), standardized(y))) if repaired else (0.1, (x, y))
    fit(
        watch,
        model,
        SGD(model.parameters(), rate, momentum=0.9 * repaired),
        whole(data, 300),
        nn.MSELoss(),
    )


def rate_of_three(watch: Watch, repaired: bool) -> None:
    """F22: the first steps kill every unit."""
    model = mlp(64, 64, 64, 10)
    optimizer = SGD(model.parameters(), 0.05 if repaired else 3.0, momentum=0.9)
    fit(watch, model, optimizer, batches(digits(), 300))


def steep_line(watch: Watch, repaired: bool) -> None:
    """F45: a curvature of 3 300 allows a rate of 6e-4."""
    time = torch.arange(100.0)[:, None]
    inputs = torch.cat([time, torch.ones_like(time)], 1)
    targets = 2 * time + 4 + 10 * torch.rand_like(time)
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = SGD(model.parameters(), 1e-4 if repaired else 0.5)
    fit(watch, model, optimizer, whole((inputs, targets), 100), lambda o, t: F.mse_loss(o, t) / 2)


def adam_on_transformer(watch: Watch, repaired: bool) -> None:
    """A rate that Adam takes on an MLP, thirty times what attention takes."""
    model = RowTransformer(depth=3, norm_first=False)
    optimizer = Adam(model.parameters(), 1e-3 if repaired else 0.1)
    fit(watch, model, optimizer, batches(digits(), 200), nn.CrossEntropyLoss())


def adam_rate_of_one(watch: Watch, repaired: bool) -> None:
    """Every weight moves by one at each step."""
    model = cnn()
    optimizer = Adam(model.parameters(), 1e-3 if repaired else 1.0)
    fit(watch, model, optimizer, batches(digits(), 250))


def rmsprop_rate_of_a_half(watch: Watch, repaired: bool) -> None:
    """Regression that jumps about."""
    model = mlp(8, 64, 64, 64, 1, activation=nn.Tanh)
    optimizer = RMSprop(model.parameters(), 1e-3 if repaired else 0.5)
    fit(watch, model, optimizer, batches(regression(), 400, 64), nn.MSELoss())


def diverging_regression(watch: Watch, repaired: bool) -> None:
    """Plain gradient descent beyond what the curvature allows."""
    model = mlp(10, 128, 128, 1, activation=nn.GELU)
    optimizer = SGD(model.parameters(), 0.05 if repaired else 5.0, momentum=0.5)
    fit(watch, model, optimizer, batches(diabetes(), 300), lambda o, t: 10 * F.mse_loss(o, t))


def momentum_of_almost_one(watch: Watch, repaired: bool) -> None:
    """Momentum makes of 0.1 a rate of a hundred."""
    model = mlp(64, 128, 10, activation=nn.Tanh)
    optimizer = SGD(model.parameters(), 0.1, momentum=0.9 if repaired else 0.999)
    fit(watch, model, optimizer, batches(digits(), 300))


def attention_logits(watch: Watch, repaired: bool) -> None:
    """F58: the logits of attention grow into the thousands."""
    model = SmallGpt(normalized=repaired)
    optimizer = AdamW(model.parameters(), 3e-3 if repaired else 0.1)
    warm_up = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50) if repaired else 1.0)
    fit(watch, model, optimizer, copies(200), next_token_loss, schedule=warm_up)


# Too low.


def rate_of_a_hundred_thousandth(watch: Watch, repaired: bool) -> None:
    """F24: the weights hardly move."""
    model = mlp(64, 64, 64, 10)
    optimizer = SGD(model.parameters(), 0.1 if repaired else 1e-5)
    fit(watch, model, optimizer, batches(digits(), 400))


def adam_rate_of_a_ten_millionth(watch: Watch, repaired: bool) -> None:
    """Adam moves each weight by its rate, whatever the gradient."""
    model = mlp(8, 64, 64, 1, activation=nn.SiLU)
    optimizer = Adam(model.parameters(), 3e-3 if repaired else 1e-7)
    fit(watch, model, optimizer, batches(regression(), 400), nn.MSELoss())


def slow_convolutions(watch: Watch, repaired: bool) -> None:
    """A rate for fine-tuning, on a net that knows nothing."""
    model = cnn()
    optimizer = SGD(model.parameters(), 0.05 if repaired else 1e-5, momentum=0.9)
    fit(watch, model, optimizer, batches(digits(), 250, 64), nn.CrossEntropyLoss())


# Scheduled away.


def exponential_decay_per_batch(watch: Watch, repaired: bool) -> None:
    """A decay meant for epochs, applied at each batch."""
    model = mlp(64, 128, 10)
    optimizer = SGD(model.parameters(), 0.1)
    schedule = ExponentialLR(optimizer, 0.999 if repaired else 0.7)
    fit(watch, model, optimizer, batches(digits(), 300), schedule=schedule)


def polynomial_that_ends_early(watch: Watch, repaired: bool) -> None:
    """The schedule was told of ten steps."""
    model = cnn()
    optimizer = AdamW(model.parameters(), 1e-3)
    schedule = PolynomialLR(optimizer, 250 if repaired else 10)
    fit(watch, model, optimizer, batches(digits(), 250), nn.CrossEntropyLoss(), schedule=schedule)


def steps_of_a_tenth(watch: Watch, repaired: bool) -> None:
    """A tenth of the rate after every two steps."""
    model = mlp(8, 64, 64, 1)
    optimizer = Adam(model.parameters(), 3e-3)
    schedule = StepLR(optimizer, 200 if repaired else 2)
    fit(watch, model, optimizer, batches(regression(), 400), F.mse_loss, schedule=schedule)


def cosine_in_the_wrong_unit(watch: Watch, repaired: bool) -> None:
    """Half a cosine over as many steps as there are epochs, and then zero."""
    model = RowTransformer()
    optimizer = AdamW(model.parameters(), 2e-3)
    end = 250 if repaired else 15

    def share(step: int) -> float:
        return 0.5 + 0.5 * math.cos(math.pi * min(step / end, 1.0))

    schedule = LambdaLR(optimizer, share)
    fit(watch, model, optimizer, batches(digits(), 250), schedule=schedule)


HIGH, LOW, GONE = "learning-rate-too-high", "learning-rate-too-low", "learning-rate-collapsed"

CASES = (
    Faulty("parabola", HIGH, ("GS401", "GS602"), "SO 48934338", parabola),
    Faulty("rate_of_three", HIGH, ("GS401",), "SO 46639430; arXiv:1903.06733", rate_of_three),
    Faulty("steep_line", HIGH, ("GS401", "GS601"), "TheDeepChecker IPS_15", steep_line),
    Faulty("adam_on_transformer", HIGH, ("GS401", "GS307"), "own", adam_on_transformer),
    Faulty("adam_rate_of_one", HIGH, ("GS401",), "own", adam_rate_of_one),
    Faulty("rmsprop_rate_of_a_half", HIGH, ("GS401",), "own", rmsprop_rate_of_a_half),
    Faulty("diverging_regression", HIGH, ("GS401",), "own", diverging_regression),
    Faulty(
        "momentum_of_almost_one",
        "momentum-too-high",
        ("GS401", "GS206"),
        "own",
        momentum_of_almost_one,
    ),
    Faulty(
        "attention_logits",
        "attention-logit-growth",
        ("GS307", "GS401"),
        "arXiv:2309.14322; ViT-22B",
        attention_logits,
    ),
    Faulty(
        "rate_of_a_hundred_thousandth",
        LOW,
        ("GS402",),
        "AUTOTRAINER slow convergence; SO 59106542",
        rate_of_a_hundred_thousandth,
    ),
    Faulty("adam_rate_of_a_ten_millionth", LOW, ("GS402",), "own", adam_rate_of_a_ten_millionth),
    Faulty("slow_convolutions", LOW, ("GS402",), "own", slow_convolutions),
    Faulty("exponential_decay_per_batch", GONE, ("GS208",), "own", exponential_decay_per_batch),
    Faulty("polynomial_that_ends_early", GONE, ("GS208",), "own", polynomial_that_ends_early),
    Faulty("steps_of_a_tenth", GONE, ("GS208",), "own", steps_of_a_tenth),
    Faulty("cosine_in_the_wrong_unit", GONE, ("GS208",), "own", cosine_in_the_wrong_unit),
)
