"""Healthy: loops, schedules and optimizers that look sick."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional as F  # noqa: N812  (everybody's name for it)
from torch.optim import SGD, Adam, AdamW, RMSprop
from torch.optim.lr_scheduler import (
    CosineAnnealingWarmRestarts,
    LambdaLR,
    OneCycleLR,
    ReduceLROnPlateau,
)

from tests.zoo.case import Healthy, Watch
from tests.zoo.data import Batch, batches, circles, digits, regression, whole
from tests.zoo.loop import fit
from tests.zoo.models import cnn, mlp
from tests.zoo.programs.inputs import raw_wine
from tests.zoo.programs.output import relu_before_the_logarithm


def plain_convolutions(watch: Watch) -> None:
    """F12's control: scores and cross-entropy."""
    relu_before_the_logarithm(watch, repaired=True)


def standardized_wine(watch: Watch) -> None:
    """F15's control: standardized features lie outside [−1, 1]."""
    raw_wine(watch, repaired=True)


def scaled_loss(watch: Watch) -> None:
    """T09: a scale of 65 536 on the loss; `.grad` is that much too large until unscaled."""
    model = mlp(64, 64, 10)
    optimizer = Adam(model.parameters(), 2e-3)
    scaler = GradScaler("cpu", init_scale=2.0**16, growth_interval=2000)
    with watch(model, optimizer, scaler=scaler) as scope:
        for inputs, targets in batches(digits(), 300):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                output = model(inputs)
            loss = F.cross_entropy(output.float(), targets)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scope.log(loss=loss)


def bfloat16_autocast(watch: Watch) -> None:
    """Mixed precision without a scaler."""
    model = cnn()
    optimizer = SGD(model.parameters(), 0.05, momentum=0.9)
    with watch(model, optimizer) as scope:
        for inputs, targets in batches(digits(), 200):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
            scope.log(loss=loss)


def all_learned(watch: Watch) -> None:
    """T10: a net far larger than its data; gradients fall a hundredfold, with bumps."""
    inputs, labels = digits()
    model = mlp(64, 256, 256, 10)
    optimizer = Adam(model.parameters(), 2e-3)
    fit(watch, model, optimizer, batches((inputs[:256], labels[:256]), 400))


def long_warm_up(watch: Watch) -> None:
    """T12: a rate that begins a thousandth of what it will be."""
    model = mlp(64, 64, 64, 10)
    optimizer = Adam(model.parameters(), 3e-3)
    warm_up = LambdaLR(optimizer, lambda step: min(1.0, 1e-3 + step / 200))
    fit(watch, model, optimizer, batches(digits(), 400), schedule=warm_up)


def accumulated(watch: Watch) -> None:
    """T14: eight backward passes to a step."""
    model = mlp(64, 64, 64, 10)
    optimizer = Adam(model.parameters(), 3e-3)
    with watch(model, optimizer) as scope:
        for number, (inputs, targets) in enumerate(batches(digits(), 800), start=1):
            loss = F.cross_entropy(model(inputs), targets)
            (loss / 8).backward()
            scope.log(loss=loss)
            if number % 8 == 0:
                optimizer.step()
                optimizer.zero_grad()


def raw_pixels(watch: Watch) -> None:
    """T25: a linear probe on pixels from 0 to 16."""
    inputs, labels = digits()
    model = nn.Linear(64, 10)
    fit(watch, model, Adam(model.parameters(), 3e-3), batches((16 * inputs, labels), 300))


def warm_restarts(watch: Watch) -> None:
    """The rate goes to nearly nothing, and back, and again."""
    model = mlp(64, 64, 10)
    optimizer = SGD(model.parameters(), 0.2, momentum=0.9)
    schedule = CosineAnnealingWarmRestarts(optimizer, T_0=40, T_mult=2)
    fit(watch, model, optimizer, batches(digits(), 280), nn.CrossEntropyLoss(), schedule=schedule)


def one_cycle(watch: Watch) -> None:
    """A rate up to ten times what would do, and down to a millionth of it."""
    model = cnn()
    optimizer = SGD(model.parameters(), 0.1, momentum=0.9)
    schedule = OneCycleLR(optimizer, 0.1, total_steps=250)
    fit(watch, model, optimizer, batches(digits(), 250), schedule=schedule)


def rate_cut_on_plateaus(watch: Watch) -> None:
    """The rate is halved each time the mean loss has not fallen."""
    model = mlp(8, 64, 1, activation=nn.Tanh)
    optimizer = RMSprop(model.parameters(), 3e-3)
    schedule = ReduceLROnPlateau(optimizer, factor=0.5, patience=1)
    recent: list[Tensor] = []
    with watch(model, optimizer) as scope:
        for number, (x, y) in enumerate(batches(regression(), 400, 64), start=1):
            loss = F.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            recent.append(loss.detach())
            if number % 20 == 0:
                schedule.step(torch.stack(recent[-20:]).mean())
            scope.log(loss=loss)


def wrong_labels(watch: Watch) -> None:
    """Three labels in ten are drawn: the loss has a floor, the gradient noise."""
    inputs, labels = digits()
    drawn = torch.randint(10, labels.shape)
    labels = torch.where(torch.rand(len(labels)) < 0.3, drawn, labels)
    model = mlp(64, 64, 10)
    optimizer = SGD(model.parameters(), 0.1, momentum=0.5)
    fit(watch, model, optimizer, batches((inputs, labels), 500))


def batches_of_two(watch: Watch) -> None:
    """Losses that leap by a factor of a hundred from step to step."""
    model = mlp(64, 64, 10)
    fit(watch, model, SGD(model.parameters(), 0.02), batches(digits(), 1500, 2))


def one_sample_at_a_time(watch: Watch) -> None:
    """Batch size 1, with momentum."""
    inputs, targets = regression()
    model = mlp(8, 32, 1, activation=nn.Tanh)
    optimizer = SGD(model.parameters(), 0.005, momentum=0.9)
    with watch(model, optimizer) as scope:
        for step, (x, y) in enumerate(batches((inputs, targets), 1500, 1)):
            loss = F.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scope.log(loss=loss)
            if step % 100 == 99:
                with torch.no_grad():
                    scope.log(unexplained=F.mse_loss(model(inputs), targets))


def strong_momentum(watch: Watch) -> None:
    """Momentum of 0.99: the loss swings before it settles."""
    model = mlp(64, 64, 10)
    optimizer = SGD(model.parameters(), 0.01, momentum=0.99, nesterov=True)
    fit(watch, model, optimizer, batches(digits(), 400))


def curvature_by_closure(watch: Watch) -> None:
    """L-BFGS calls its closure many times to a step."""
    data = circles(400)
    model = mlp(2, 16, 1, activation=nn.Tanh)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=5)
    with watch(model, optimizer) as scope:
        for inputs, targets in whole(data, 60):

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = F.binary_cross_entropy_with_logits(model(inputs), targets)  # noqa: B023
                loss.backward()
                return loss

            scope.log(loss=optimizer.step(closure))


def every_step_clipped(watch: Watch) -> None:
    """Gradients clipped to a norm of 0.25 at each step, with a rate to match."""
    model = mlp(64, 64, 64, 10)
    optimizer = SGD(model.parameters(), 0.4)
    with watch(model, optimizer) as scope:
        for inputs, targets in batches(digits(), 300):
            loss = F.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.25)
            scope.log(loss=loss, grad_norm=norm)
            optimizer.step()


def frozen_backbone(watch: Watch) -> None:
    """A trained net gets a new head for a new task; the rest is frozen."""
    model = cnn()
    data = digits()
    pretraining = Adam(model.parameters(), 2e-3)
    for inputs, targets in batches(data, 150):
        pretraining.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        pretraining.step()
    model.zero_grad()
    model.requires_grad_(False)
    model[-1] = nn.Linear(64, 2)
    optimizer = Adam(model[-1].parameters(), 1e-2)
    fit(watch, model, optimizer, batches((data[0], data[1] % 2), 200), nn.CrossEntropyLoss())


def thawed_by_and_by(watch: Watch) -> None:
    """Layers that are frozen at first, and join one after the other."""
    model = mlp(64, 64, 64, 10)
    optimizer = Adam(model.parameters(), 1e-3)
    for index in (0, 2):
        model[index].requires_grad_(False)
    with watch(model, optimizer) as scope:
        for step, (inputs, targets) in enumerate(batches(digits(), 300)):
            if step in {80, 160}:
                model[2 if step == 80 else 0].requires_grad_(True)
            loss = F.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scope.log(loss=loss)


def averaged_weights(watch: Watch) -> None:
    """A moving average of the weights is evaluated between the steps."""
    model = mlp(64, 64, 10)
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = AdamW(model.parameters(), 2e-3)
    inputs, labels = digits()
    with watch(model, optimizer) as scope:
        for step, (x, y) in enumerate(batches((inputs, labels), 300)):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update_parameters(model)
            scope.log(loss=loss)
            if step % 100 == 99:
                with torch.no_grad():
                    right = (average(inputs).argmax(1) == labels).float().mean()
                scope.log(accuracy=right)


def rare_class(watch: Watch) -> None:
    """One sample in fifty is positive; sampling evens that out, each epoch in order."""
    inputs, labels = digits()
    positive = torch.nonzero(labels == 0)[:36, 0]
    negative = torch.nonzero(labels != 0)[:, 0]

    def data() -> Iterator[Batch]:
        for step in range(250):
            few = positive[torch.randint(len(positive), (8,))]
            many = negative[torch.randint(len(negative), (24,))]
            drawn = torch.cat([few, many])
            del step
            yield inputs[drawn], (labels[drawn] == 0).float()[:, None]

    model = mlp(64, 32, 1)
    loss = nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0))
    fit(watch, model, Adam(model.parameters(), 2e-3), data(), loss)


def logarithm_twice(watch: Watch) -> None:
    """A log-softmax before cross-entropy, which has one: the second changes nothing."""
    model = mlp(64, 64, 10).append(nn.LogSoftmax(dim=1))
    fit(watch, model, Adam(model.parameters(), 2e-3), batches(digits(), 300), nn.CrossEntropyLoss())


def heavy_tails(watch: Watch) -> None:
    """Targets with outliers of a hundred deviations, under Huber's loss."""
    inputs, targets = regression(2048)
    outliers = 50 * torch.randn_like(targets) * (torch.rand_like(targets) < 0.02)
    model = mlp(8, 64, 64, 1)
    optimizer = Adam(model.parameters(), 3e-3)
    with watch(model, optimizer) as scope:
        for x, y in batches((inputs, targets + outliers), 400):
            output = model(x)
            loss = F.huber_loss(output, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                error = (output - y).abs().median()
            scope.log(loss=loss, target=y, output=output, median_error=error)


CASES = (
    Healthy("plain_convolutions", "ordinary", "SO 47352366, repaired", plain_convolutions),
    Healthy("standardized_wine", "ordinary", "SO 47724077, repaired", standardized_wine),
    Healthy("scaled_loss", "mixed-precision", "PyTorch, automatic mixed precision", scaled_loss),
    Healthy("bfloat16_autocast", "mixed-precision", "own", bfloat16_autocast),
    Healthy("all_learned", "converged", "arXiv:1611.03530", all_learned),
    Healthy("long_warm_up", "schedule", "arXiv:1706.02677", long_warm_up),
    Healthy("warm_restarts", "schedule", "arXiv:1608.03983", warm_restarts),
    Healthy("one_cycle", "schedule", "arXiv:1708.07120", one_cycle),
    Healthy("rate_cut_on_plateaus", "schedule", "own", rate_cut_on_plateaus),
    Healthy("accumulated", "accumulation", "own", accumulated),
    Healthy("raw_pixels", "input-range", "UMLAUT, input range", raw_pixels),
    Healthy("wrong_labels", "label-noise", "own", wrong_labels),
    Healthy("heavy_tails", "label-noise", "own", heavy_tails),
    Healthy("batches_of_two", "small-batches", "own", batches_of_two),
    Healthy("one_sample_at_a_time", "small-batches", "own", one_sample_at_a_time),
    Healthy("strong_momentum", "momentum", "own", strong_momentum),
    Healthy("curvature_by_closure", "closure", "own", curvature_by_closure),
    Healthy("every_step_clipped", "clipping", "own", every_step_clipped),
    Healthy("frozen_backbone", "fine-tuning", "own", frozen_backbone),
    Healthy("thawed_by_and_by", "fine-tuning", "own", thawed_by_and_by),
    Healthy("averaged_weights", "second-model", "own", averaged_weights),
    Healthy("rare_class", "imbalance", "own", rare_class),
    Healthy("logarithm_twice", "harmless-redundancy", "own", logarithm_twice),
)
