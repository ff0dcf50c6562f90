"""Trainings whose steps are too large or too small, and activations that stop passing gradients."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (everybody's name for it)

import gradscope
from tests.trainings.programs import Batch, batches, cnn, digits, fit, initialize, mlp

# Faulty.


def rate_of_three(*, repaired: bool = False) -> gradscope.Report:
    """F22: SGD with a learning rate of 3 kills every unit within a few steps."""
    model = mlp(64, 64, 64, 10)
    optimizer = torch.optim.SGD(model.parameters(), 0.05 if repaired else 3.0, momentum=0.9)
    return fit(model, optimizer, batches(digits(), 200))


def adam_rate_of_one(*, repaired: bool = False) -> gradscope.Report:
    """Each of Adam's first steps changes every entry by 1, in layers whose entries are 0.1."""
    model = cnn()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3 if repaired else 1.0)
    return fit(model, optimizer, batches(digits(), 150))


def unscaled_targets(*, repaired: bool = False) -> gradscope.Report:
    """F08: targets up to 125, mean squared error, SGD with 0.1."""
    inputs = torch.arange(0, 5, 0.1)[:, None]
    targets = 5 * inputs**2 + torch.randn_like(inputs) ** 3
    if repaired:
        inputs = (inputs - inputs.mean()) / inputs.std()
        targets = (targets - targets.mean()) / targets.std()
    model = mlp(1, 50, 30, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return fit(model, optimizer, batches((inputs, targets), 150), F.mse_loss)


def rate_raised_in_training(*, repaired: bool = False) -> gradscope.Report:
    """After 150 good steps the learning rate is multiplied by a thousand."""
    model = mlp(64, 64, 64, 10, activation=nn.Tanh)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 1e3 if step >= 150 and not repaired else 1.0
    )
    with gradscope.watch(model, optimizer, every=2) as scope:
        for inputs, targets in batches(digits(), 300):
            loss = F.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            scope.log(loss=loss)
    return scope.report()


def rate_of_a_hundred_thousandth(*, repaired: bool = False) -> gradscope.Report:
    """F24: SGD with 1e-5."""
    model = mlp(64, 64, 10)
    optimizer = torch.optim.SGD(model.parameters(), 0.1 if repaired else 1e-5)
    return fit(model, optimizer, batches(digits(), 200))


def loss_in_tiny_units(*, repaired: bool = False) -> gradscope.Report:
    """A loss times 1e-5: for SGD that is a learning rate times 1e-5."""
    model = cnn()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scale = 1.0 if repaired else 1e-5
    data = batches(digits(), 200)
    return fit(model, optimizer, data, lambda output, y: scale * F.cross_entropy(output, y))


def killed_in_training(*, repaired: bool = False) -> gradscope.Report:
    """At step 100 the biases of a layer are set to -50."""
    model = mlp(64, 64, 64, 10)
    second = model[2]
    assert isinstance(second, nn.Linear)
    bias = second.bias
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def data() -> Iterator[Batch]:
        for step, batch in enumerate(batches(digits(), 300)):
            if step == 100 and not repaired:
                nn.init.constant_(bias, -50.0)
            yield batch

    return fit(model, optimizer, data())


def wide_weights_before_tanh(*, repaired: bool = False) -> gradscope.Report:
    """Weights from N(0, 3²): nine of ten outputs start saturated."""
    model = mlp(64, 64, 64, 10, activation=nn.Tanh)
    initialize(
        model, nn.init.xavier_normal_ if repaired else lambda weight: nn.init.normal_(weight, 0, 3)
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    return fit(model, optimizer, batches(digits(), 200))


def pixels_before_sigmoid(*, repaired: bool = False) -> gradscope.Report:
    """Inputs a hundred thousand times too large for a sigmoid layer."""
    inputs, labels = digits()
    model = mlp(64, 64, 10, activation=nn.Sigmoid)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    return fit(model, optimizer, batches((inputs * (1.0 if repaired else 1e5), labels), 400))


# Healthy, though their steps or activations look sick.


def large_first_steps() -> gradscope.Report:
    """Adam with 0.01 on small weights: the first steps are as large as they are."""
    model = mlp(64, 128, 10)
    initialize(model, lambda weight: nn.init.normal_(weight, 0, 1e-3))
    return fit(model, torch.optim.Adam(model.parameters(), 1e-2), batches(digits(), 200))


def rate_of_a_third_behind_norms() -> gradscope.Report:
    """Behind BatchNorm only the direction of a weight matters, and it may turn far."""
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(64, 10))
    return fit(model, torch.optim.SGD(model.parameters(), 0.3), batches(digits(), 200))


def tanh_to_its_ends() -> gradscope.Report:
    """Trained long with a large rate: in the end 40 % of a layer is saturated."""
    model = mlp(64, 64, 64, 10, activation=nn.Tanh)
    return fit(model, torch.optim.Adam(model.parameters(), 1e-2), batches(digits(), 400))


def labels_that_say_nothing() -> gradscope.Report:
    """Random labels: the loss rests at ln 10, whatever the steps."""
    inputs, _ = digits()
    model = mlp(64, 64, 64, 10)
    data = ((x, torch.randint(10, (len(x),))) for x, _ in batches((inputs, inputs), 300))
    return fit(model, torch.optim.SGD(model.parameters(), 0.1), data)


class Squeeze(nn.Module):
    """Channels weighted by a sigmoid gate."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.narrow = nn.Conv2d(channels, 4, 1)
        self.act = nn.ReLU()
        self.widen = nn.Conv2d(4, channels, 1)
        self.gate = nn.Sigmoid()
        # Open at first, that is saturated.
        self.widen.bias = nn.Parameter(torch.full((channels,), 6.0))

    def forward(self, x: Tensor) -> Tensor:
        """The weighted channels."""
        pooled = x.mean((2, 3), keepdim=True)
        out: Tensor = x * self.gate(self.widen(self.act(self.narrow(pooled))))
        return out


def open_gates() -> gradscope.Report:
    """Squeeze-and-excitation whose gates start open, that is saturated."""
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU6(),
        Squeeze(16),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.Hardswish(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )
    return fit(model, torch.optim.Adam(model.parameters(), 2e-3), batches(digits(), 150))


def fine_tuning() -> gradscope.Report:
    """A trained net goes on with a hundredth of the rate, at a loss that can hardly fall."""
    model = mlp(64, 64, 64, 10)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for inputs, targets in batches(digits(), 300):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return fit(model, torch.optim.Adam(model.parameters(), 1e-5), batches(digits(), 200))


def half_dead(*, repaired: bool = False) -> gradscope.Report:
    """Raw features of the size of hundreds: half of the units never fire, the others learn."""
    inputs = torch.rand(500, 8) * torch.logspace(0, 3, 8)
    labels = (inputs[:, -1] > 500).long()
    if repaired:
        inputs = (inputs - inputs.mean(0)) / inputs.std(0)
    model = mlp(8, 64, 2)
    return fit(model, torch.optim.Adam(model.parameters(), 1e-3), batches((inputs, labels), 300))
