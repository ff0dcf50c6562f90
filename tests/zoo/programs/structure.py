"""What the net is made of, and the mode it is in."""

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (everybody's name for it)
from torch.optim import SGD, Adam

from tests.zoo.case import Faulty, Watch
from tests.zoo.data import batches, circles, diabetes, digits, first_of_sequence, regression
from tests.zoo.loop import accuracy, fit
from tests.zoo.models import initialize, mlp

# Activations.


class Exponential(nn.Module):
    """e to the power of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


def ten_exponentials(watch: Watch, repaired: bool) -> None:
    """F19: exponentials of exponentials, on blobs of points up to 10 from the origin."""
    labels = torch.randint(3, (600,))
    centres = torch.tensor([[-2.0, 9.0], [4.0, 2.0], [-7.0, -7.0]])
    points = centres[labels] + torch.randn(600, 2)
    activation = nn.ReLU if repaired else Exponential
    model = mlp(2, *[16 if repaired else 5] * 10, 3, activation=activation)
    initialize(model, nn.init.kaiming_uniform_)
    fit(watch, model, Adam(model.parameters(), 1e-3), batches((points, labels), 300))


class Cube(nn.Module):
    """The third power."""

    def forward(self, x: Tensor) -> Tensor:
        return x**3


def cubes(watch: Watch, repaired: bool) -> None:
    """A third power after each layer: what is above one is soon beyond all bounds."""
    model = mlp(8, 32, 32, 32, 32, 32, 1, activation=nn.GELU if repaired else Cube)
    initialize(model, lambda weight: nn.init.normal_(weight, std=0.25))
    optimizer = Adam(model.parameters(), 3e-3)
    fit(watch, model, optimizer, batches(regression(), 400), nn.MSELoss())


def linear_circles(watch: Watch, repaired: bool) -> None:
    """F50: three linear layers are one; no line parts a circle from what is in it."""
    model = mlp(2, 64, 64, 1, activation=nn.ReLU if repaired else nn.Identity)
    optimizer = Adam(model.parameters(), 1e-2)
    fit(watch, model, optimizer, batches(circles(), 300), nn.BCEWithLogitsLoss())


def linear_product(watch: Watch, repaired: bool) -> None:
    """The sign of a product, by a net whose author forgot the activations."""
    inputs = torch.randn(1024, 2)
    labels = (inputs.prod(1) > 0).long()
    layers: list[nn.Module] = [nn.Linear(2, 48), nn.Linear(48, 48), nn.Linear(48, 2)]
    if repaired:
        layers = [layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2]]
    model = nn.Sequential(*layers)
    optimizer = SGD(model.parameters(), 0.2, momentum=0.9)
    fit(watch, model, optimizer, batches((inputs, labels), 400), nn.CrossEntropyLoss())


def softmax_between_layers(watch: Watch, repaired: bool) -> None:
    """Softmax as the hidden activation: 64 units share a sum of 1."""
    activation = nn.ReLU if repaired else (lambda: nn.Softmax(dim=1))
    model = mlp(64, 64, 64, 10, activation=activation)
    fit(watch, model, SGD(model.parameters(), 0.1, momentum=0.5), batches(digits(), 300))


class SoftmaxNet(nn.Module):
    """The same written by hand."""

    def __init__(self, *, soft: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(10, 128), nn.Linear(128, 128)
        self.last = nn.Linear(128, 1)
        self.soft = soft

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            x = layer(x)
            x = F.softmax(x, dim=-1) if self.soft else x.relu()
        out: Tensor = self.last(x)
        return out


def softmax_in_regression(watch: Watch, repaired: bool) -> None:
    """Regression through two softmaxes."""
    model = SoftmaxNet(soft=not repaired)
    inputs, targets = diabetes()
    data = (inputs, (targets - targets.mean()) / targets.std())
    optimizer = Adam(model.parameters(), 1e-3)
    fit(watch, model, optimizer, batches(data, 400), F.mse_loss)


# Modes and what is kept of the batches.


class Normalized(nn.Module):
    """Narrow sigmoid layers, which can't do without their norms."""

    def __init__(self, depth: int, momentum: float = 0.1) -> None:
        super().__init__()
        widths = [64] + [32] * depth
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Linear(before, width, bias=False),
                nn.BatchNorm1d(width, momentum=momentum),
                nn.Sigmoid(),
            )
            for before, width in itertools.pairwise(widths)
        )
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        scores: Tensor = self.head(x)
        return scores


def evaluation_mode_left_on(watch: Watch, repaired: bool) -> None:
    """`model.eval()` before the first epoch, and no `train()` after it."""
    model = Normalized(8)
    model.train(repaired)
    fit(watch, model, Adam(model.parameters(), 3e-3), batches(digits(), 300))


def evaluation_mode_after_validation(watch: Watch, repaired: bool) -> None:
    """A validation before training left the mode behind; the inputs need their norm."""
    inputs, labels = digits()
    inputs = 3000 * inputs - 400
    model = nn.Sequential(nn.BatchNorm1d(64), *mlp(64, 24, 10, activation=nn.Tanh))
    accuracy(model, (inputs, labels))
    if not repaired:
        model.eval()
    optimizer = SGD(model.parameters(), 0.05)
    fit(watch, model, optimizer, batches((inputs, labels), 300), nn.CrossEntropyLoss())


def statistics_that_never_move(watch: Watch, repaired: bool) -> None:
    """A momentum of 0: in evaluation the norms use what they started with."""
    data = digits()
    model = Normalized(2, momentum=0.1 if repaired else 0.0)
    optimizer = Adam(model.parameters(), 3e-3)
    with watch(model, optimizer) as scope:
        for inputs, targets in batches(data, 300):
            loss = F.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scope.log(loss=loss)
        scope.log(accuracy=accuracy(model, data))


def statistics_of_convolutions(watch: Watch, repaired: bool) -> None:
    """The same with a momentum of a millionth, behind convolutions."""
    inputs, labels = digits()
    data = (10 * inputs - 40, labels)
    momentum = 0.1 if repaired else 1e-6
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16, momentum=momentum),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32, momentum=momentum),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )
    optimizer = SGD(model.parameters(), 0.05, momentum=0.9)
    loss_of = nn.CrossEntropyLoss()
    with watch(model, optimizer, loss_of) as scope:
        for x, y in batches(data, 200):
            loss = loss_of(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scope.log(accuracy=accuracy(model, data))


def dropout_of_nineteen_in_twenty(watch: Watch, repaired: bool) -> None:
    """Three layers, each of which drops 95 % of its inputs."""
    share = 0.1 if repaired else 0.95
    model = nn.Sequential()
    for before, width in ((64, 64), (64, 64), (64, 64)):
        model.extend([nn.Linear(before, width), nn.ReLU(), nn.Dropout(share)])
    model.append(nn.Linear(64, 10))
    fit(watch, model, Adam(model.parameters(), 1e-3), batches(digits(), 300))


def dropout_of_nearly_everything(watch: Watch, repaired: bool) -> None:
    """`p` was taken for the share to keep."""
    model = mlp(8, 64, 64, 1)
    model.insert(0, nn.Dropout(0.01 if repaired else 0.99))
    model.insert(3, nn.Dropout(0.01 if repaired else 0.99))
    optimizer = Adam(model.parameters(), 3e-3)
    fit(watch, model, optimizer, batches(regression(), 400), nn.MSELoss())


# Through time.


class Recurrent(nn.Module):
    """A recurrent net over one feature, read at its last step."""

    def __init__(self, core: nn.RNN | nn.LSTM) -> None:
        super().__init__()
        self.core = core
        self.head = nn.Linear(core.hidden_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.core(x)[0][:, -1])
        return out


def _orthogonal(core: nn.RNN, gain: float) -> nn.RNN:
    nn.init.orthogonal_(core.get_parameter("weight_hh_l0"), gain)
    return core


def halved_at_every_step(watch: Watch, repaired: bool) -> None:
    """F55: after sixty steps 1e-18 is left of the first."""
    length = 20 if repaired else 60
    model = Recurrent(_orthogonal(nn.RNN(1, 32, batch_first=True), 1.0 if repaired else 0.5))
    optimizer = Adam(model.parameters(), 3e-3 if repaired else 1e-3)
    data = batches(first_of_sequence(4096, length), 300, 64)
    fit(watch, model, optimizer, data, nn.MSELoss())


def closed_forget_gates(watch: Watch, repaired: bool) -> None:
    """An LSTM whose forget gates are shut: it remembers nothing for forty steps."""
    length = 15
    core = nn.LSTM(1, 32, batch_first=True)
    with torch.no_grad():
        core.get_parameter("bias_ih_l0")[32:64] = 2.0 if repaired else -6.0
    model = Recurrent(core)
    data = batches(first_of_sequence(4096, length), 400, 64)
    fit(watch, model, Adam(model.parameters(), 1e-2), data, F.mse_loss)


def grown_at_every_step(watch: Watch, repaired: bool) -> None:
    """ReLU and recurrent weights of 1.5: thirty steps make 2e5."""
    core = nn.RNN(1, 32, nonlinearity="relu", batch_first=True)
    gain = 0.9 if repaired else 1.5
    with torch.no_grad():
        core.get_parameter("weight_hh_l0").copy_(gain * torch.eye(32))
    model = Recurrent(core)
    inputs = torch.rand(2048, 30, 1) - 0.4
    data = (inputs, 3 * inputs[:, -8:].mean(1))
    optimizer = SGD(model.parameters(), 0.01)
    fit(watch, model, optimizer, batches(data, 300, 64), nn.MSELoss())


LINEAR, SOFT = "linear-network", "hidden-softmax"
EVALUATING, STALE, DROPOUT = (
    "eval-mode-in-training",
    "batchnorm-statistics-stale",
    "dropout-too-large",
)
EXPLODING, FORGETTING = "exploding-activation", "vanishing-through-time"

CASES = (
    Faulty(
        "ten_exponentials",
        EXPLODING,
        ("GS502",),
        "AUTOTRAINER Models_Blob 9b8bdaab",
        ten_exponentials,
    ),
    Faulty("cubes", EXPLODING, ("GS502", "GS102"), "own", cubes),
    Faulty("linear_circles", LINEAR, ("GS304",), "SO 46181692, 53138899", linear_circles),
    Faulty("linear_product", LINEAR, ("GS304",), "own", linear_product),
    Faulty("softmax_between_layers", SOFT, ("GS305",), "own", softmax_between_layers),
    Faulty("softmax_in_regression", SOFT, ("GS305",), "own", softmax_in_regression),
    Faulty("evaluation_mode_left_on", EVALUATING, ("GS009",), "own", evaluation_mode_left_on),
    Faulty(
        "evaluation_mode_after_validation",
        EVALUATING,
        ("GS009",),
        "own",
        evaluation_mode_after_validation,
    ),
    Faulty("statistics_that_never_move", STALE, ("GS308",), "own", statistics_that_never_move),
    Faulty("statistics_of_convolutions", STALE, ("GS308",), "own", statistics_of_convolutions),
    Faulty(
        "dropout_of_nineteen_in_twenty", DROPOUT, ("GS309",), "own", dropout_of_nineteen_in_twenty
    ),
    Faulty(
        "dropout_of_nearly_everything", DROPOUT, ("GS309",), "own", dropout_of_nearly_everything
    ),
    Faulty(
        "halved_at_every_step",
        FORGETTING,
        ("GS106",),
        "Pascanu 2013; AUTOTRAINER GV",
        halved_at_every_step,
    ),
    Faulty("closed_forget_gates", FORGETTING, ("GS106",), "own", closed_forget_gates),
    Faulty("grown_at_every_step", "exploding-through-time", ("GS107",), "own", grown_at_every_step),
)
