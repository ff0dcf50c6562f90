"""What the net is fed, and what it is told to answer."""

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  (everybody's name for it)
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import LambdaLR

from tests.zoo.case import Faulty, Watch
from tests.zoo.data import (
    Batch,
    batches,
    diabetes,
    digits,
    regression,
    standardized,
    whole,
    wine,
)
from tests.zoo.loop import accuracy, fit
from tests.zoo.models import RowTransformer, cnn, mlp

# Scales.


def fourth_power(watch: Watch, repaired: bool) -> None:
    """F09: inputs to 100, targets to 1e8."""
    x = torch.arange(-100, 100, 0.5)[:, None]
    y = x**4
    data = (standardized(x), standardized(y)) if repaired else (x, y)
    model = nn.Sequential(
        nn.Linear(1, 50), nn.Sigmoid(), nn.Linear(50, 50), nn.ELU(), nn.Linear(50, 1)
    )
    rate = 1e-2 if repaired else 1e-3
    fit(watch, model, Adam(model.parameters(), rate), whole(data, 500), nn.MSELoss())


def raw_wine(watch: Watch, repaired: bool) -> None:
    """F15: features between 0.1 and 1 680."""
    inputs, labels = wine()
    data = (standardized(inputs) if repaired else inputs, labels)
    model = mlp(13, 21, 3)
    fit(watch, model, Adam(model.parameters(), 1e-3), batches(data, 400))


def divided_by_255_again(watch: Watch, repaired: bool) -> None:
    """F31: pixels in [0, 1], divided by 255."""
    inputs, labels = digits()
    data = (inputs if repaired else inputs / 255, labels)
    model = cnn()
    fit(watch, model, SGD(model.parameters(), 0.1), batches(data, 300))


def features_of_ten_thousand(watch: Watch, repaired: bool) -> None:
    """Incomes and areas as they are, in front of tanh."""
    inputs, targets = regression()
    data = (inputs if repaired else 1e4 * inputs + 2e4, targets)
    model = mlp(8, 64, 64, 1, activation=nn.Tanh)
    fit(watch, model, Adam(model.parameters(), 3e-3), batches(data, 400), nn.MSELoss())


def one_feature_in_millions(watch: Watch, repaired: bool) -> None:
    """One feature of ten drowns the others."""
    inputs, targets = diabetes()
    scale = torch.ones(10)
    scale[3] = 1.0 if repaired else 1e6
    data = (scale * inputs, (targets - targets.mean()) / targets.std())
    model = mlp(10, 64, 64, 1)
    optimizer = AdamW(model.parameters(), 3e-3)
    fit(watch, model, optimizer, batches(data, 300), F.mse_loss)


def inputs_of_a_millionth(watch: Watch, repaired: bool) -> None:
    """Metres where micrometres were meant."""
    inputs, targets = regression()
    data = (inputs if repaired else 1e-6 * inputs, targets)
    model = mlp(8, 64, 64, 1)
    optimizer = SGD(model.parameters(), 0.05, momentum=0.9)
    fit(watch, model, optimizer, batches(data, 400), nn.MSELoss())


def prices(watch: Watch, repaired: bool) -> None:
    """Targets of 300 000: Adam at 1e-3 would be years on the way."""
    inputs, targets = regression()
    data = (inputs, targets if repaired else 3e5 + 1e5 * targets)
    model = mlp(8, 64, 64, 1)
    fit(watch, model, Adam(model.parameters(), 3e-3), batches(data, 400), nn.MSELoss())


def years(watch: Watch, repaired: bool) -> None:
    """Targets around 1 990, with a deviation of ten."""
    inputs, targets = regression()
    data = (inputs, targets if repaired else 1990 + 10 * targets)
    model = mlp(8, 64, 1, activation=nn.Tanh)
    fit(watch, model, Adam(model.parameters(), 3e-3), batches(data, 400), nn.L1Loss())


# Values that are none.


def _spoiled(data: Batch, steps: int, at: int, value: float) -> Iterator[Batch]:
    """Batches, one of them with that value in a few places."""
    for step, (inputs, targets) in enumerate(batches(data, steps)):
        if step == at:
            # Indexing has copied them.
            inputs[3, 5:8] = value
        yield inputs, targets


def nan_in_a_late_batch(watch: Watch, repaired: bool) -> None:
    """A missing value in one sample, after a good start."""
    model = mlp(64, 64, 10)
    optimizer = SGD(model.parameters(), 0.1, momentum=0.9)
    data = _spoiled(digits(), 300, 150, 0.0 if repaired else torch.nan)
    fit(watch, model, optimizer, data, nn.CrossEntropyLoss())


def infinity_in_a_feature(watch: Watch, repaired: bool) -> None:
    """A division by zero in a feature."""
    model = RowTransformer()
    data = _spoiled(digits(), 200, 80, 0.0 if repaired else torch.inf)
    fit(watch, model, Adam(model.parameters(), 2e-3), data)


def nan_in_the_targets(watch: Watch, repaired: bool) -> None:
    """A label that is missing."""
    inputs, targets = regression()
    if not repaired:
        targets = targets.clone()
        targets[7] = torch.nan
    model = mlp(8, 64, 64, 1)
    optimizer = Adam(model.parameters(), 3e-3)
    with watch(model, optimizer) as scope:
        for x, y in batches((inputs, targets), 400):
            loss = F.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scope.log(loss=loss, target=y)


def a_batch_a_thousand_times_too_large(watch: Watch, repaired: bool) -> None:
    """F57: one batch was not scaled, and throws the net off."""
    model = mlp(64, 64, 64, 10)

    def data() -> Iterator[Batch]:
        for step, (inputs, targets) in enumerate(batches(digits(), 400)):
            yield (inputs if repaired or step != 250 else 1000 * inputs), targets

    fit(watch, model, SGD(model.parameters(), 0.05, momentum=0.5), data())


# Data that can't teach.


def the_same_batch(watch: Watch, repaired: bool) -> None:
    """The iterator is made anew at every step: eight samples are all it ever sees."""
    data = digits()
    model = mlp(64, 64, 10)
    first = next(batches(data, 1, 8))
    optimizer = Adam(model.parameters(), 2e-3)
    with watch(model, optimizer) as scope:
        for x, y in batches(data, 300) if repaired else whole(first, 300):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scope.log(loss=loss, target=y)
        scope.log(accuracy=accuracy(model, data))


def a_generator_seeded_anew(watch: Watch, repaired: bool) -> None:
    """The data's generator starts again at each epoch, of one batch."""
    inputs, labels = digits()
    model = cnn()
    generator = torch.Generator()

    def data() -> Iterator[Batch]:
        for step in range(250):
            generator.manual_seed(step if repaired else 0)
            drawn = torch.randint(len(inputs), (16,), generator=generator)
            yield inputs[drawn], labels[drawn]

    optimizer = SGD(model.parameters(), 0.05, momentum=0.9)
    loss_of = nn.CrossEntropyLoss()
    with watch(model, optimizer, loss_of) as scope:
        for x, y in data():
            loss = loss_of(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scope.log(accuracy=accuracy(model, (inputs, labels)))


def labels_all_zero(watch: Watch, repaired: bool) -> None:
    """A parser that read every label as 0."""
    inputs, labels = digits()
    model = mlp(64, 64, 10)
    optimizer = SGD(model.parameters(), 0.1, momentum=0.9)
    told = labels if repaired else torch.zeros_like(labels)
    loss_of = nn.CrossEntropyLoss()
    with watch(model, optimizer, loss_of) as scope:
        for x, y in batches((inputs, told), 200):
            loss = loss_of(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scope.log(accuracy=accuracy(model, (inputs, labels)))


def a_constant_target(watch: Watch, repaired: bool) -> None:
    """The wrong column: the same number in every row."""
    inputs, targets = regression()
    told = targets if repaired else torch.full_like(targets, 2.5)
    model = mlp(8, 64, 64, 1)
    optimizer = Adam(model.parameters(), 3e-3)
    schedule = LambdaLR(optimizer, lambda step: 1 - step / 400)
    with watch(model, optimizer) as scope:
        for x, y in batches((inputs, told), 400):
            loss = F.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            scope.log(loss=loss, target=y)
        with torch.no_grad():
            error = F.mse_loss(model(inputs), targets) / targets.var()
        scope.log(unexplained=error)


def labels_shuffled(watch: Watch, repaired: bool) -> None:
    """Labels against other inputs: noise, as far as anyone can see."""
    inputs, labels = digits()
    model = mlp(64, 32, 10)
    told = labels if repaired else labels[torch.randperm(len(labels))]
    fit(watch, model, SGD(model.parameters(), 0.1), batches((inputs, told), 300))


def targets_shuffled(watch: Watch, repaired: bool) -> None:
    """The same in regression."""
    inputs, targets = regression(2048)
    told = targets if repaired else targets[torch.randperm(len(targets))]
    model = mlp(8, 32, 1)
    fit(watch, model, Adam(model.parameters(), 3e-3), batches((inputs, told), 300), nn.MSELoss())


INPUT, TARGET, INVALID = "unscaled-input", "unscaled-target", "invalid-data"
AGAIN, CONSTANT, SHUFFLED = "repeated-batch", "constant-target", "labels-shuffled"

CASES = (
    Faulty("fourth_power", TARGET, ("GS602", "GS601"), "SO 52800582", fourth_power),
    Faulty("prices", TARGET, ("GS602",), "own", prices),
    Faulty("years", TARGET, ("GS602",), "own", years),
    Faulty("raw_wine", INPUT, ("GS601",), "SO 47724077", raw_wine),
    Faulty("features_of_ten_thousand", INPUT, ("GS601",), "own", features_of_ten_thousand),
    Faulty("one_feature_in_millions", INPUT, ("GS601",), "own", one_feature_in_millions),
    Faulty(
        "divided_by_255_again",
        "input-scaled-away",
        ("GS601",),
        "TheDeepChecker double_normalization",
        divided_by_255_again,
    ),
    Faulty("inputs_of_a_millionth", "input-scaled-away", ("GS601",), "own", inputs_of_a_millionth),
    Faulty("nan_in_a_late_batch", INVALID, ("GS607",), "own", nan_in_a_late_batch),
    Faulty("infinity_in_a_feature", INVALID, ("GS607",), "own", infinity_in_a_feature),
    Faulty("nan_in_the_targets", INVALID, ("GS607",), "own", nan_in_the_targets),
    Faulty(
        "a_batch_a_thousand_times_too_large",
        "bad-batch",
        ("GS201", "GS607"),
        "OLMo 2 and PaLM, data spikes",
        a_batch_a_thousand_times_too_large,
    ),
    Faulty("the_same_batch", AGAIN, ("GS010",), "own", the_same_batch),
    Faulty("a_generator_seeded_anew", AGAIN, ("GS010",), "own", a_generator_seeded_anew),
    Faulty("labels_all_zero", CONSTANT, ("GS606",), "own", labels_all_zero),
    Faulty("a_constant_target", CONSTANT, ("GS606",), "own", a_constant_target),
    Faulty("labels_shuffled", SHUFFLED, ("GS203",), "own", labels_shuffled, observable=False),
    Faulty("targets_shuffled", SHUFFLED, ("GS203",), "own", targets_shuffled, observable=False),
)
