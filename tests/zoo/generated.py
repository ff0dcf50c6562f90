"""Fresh trainings, one seed away: architecture × data × optimizer × injected fault × magnitude.

`healthy(seed)` draws one that learns; `faulty(seed, fault)` the same kind of training with a fault
in it, and its twin without. Nothing is drawn from torch's generator, so a case is its seed.
"""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from sklearn.datasets import load_diabetes, load_wine, make_moons
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import Optimizer

from tests.zoo.architectures import convolutional, perceptron, recurrent, residual, transformer
from tests.zoo.case import Faulty, Healthy, Watch
from tests.zoo.data import Batch, batches, digits


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that a training is made of; `fault` by `magnitude` is what is wrong with it."""

    data: str
    architecture: str
    depth: int
    width: int
    activation: str
    optimizer: str
    rate: float
    size: int
    steps: int
    fault: str = ""
    magnitude: float = 1.0


_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "leaky": nn.LeakyReLU,
}
_BUILDERS: dict[str, Callable[[int, int, int, int, type[nn.Module]], nn.Module]] = {
    "mlp": perceptron,
    "residual": residual,
    "cnn": convolutional,
    "transformer": transformer,
    "lstm": recurrent,
}
# Learning rates at which each trains well, as a range.
_RATES: dict[str, tuple[float, float]] = {
    "sgd": (0.02, 0.1),
    "momentum": (0.005, 0.03),
    "adam": (5e-4, 3e-3),
    "adamw": (5e-4, 3e-3),
    "rmsprop": (3e-4, 1e-3),
}


def healthy(seed: int) -> Healthy:
    """A training that learns."""
    recipe = _drawn(random.Random(seed))  # noqa: S311  (no secret)
    name = f"generated-{seed}-{recipe.architecture}-{recipe.data}-{recipe.optimizer}"
    return Healthy(name, f"generated-{recipe.architecture}", "generated", partial(_train, recipe))


def faulty(seed: int, fault: str) -> Faulty:
    """A training with that fault. Raises KeyError for one that is not in FAULTS."""
    rng = random.Random(f"{seed}-{fault}")  # noqa: S311
    kind = FAULTS[fault]
    recipe = _drawn(rng)
    while not kind.fits(recipe):
        recipe = _drawn(rng)
    low, high = kind.magnitudes
    magnitude = math.exp(rng.uniform(math.log(low), math.log(high)))

    def program(watch: Watch, repaired: bool) -> None:
        broken = replace(recipe, fault=fault, magnitude=magnitude)
        _train(recipe if repaired else broken, watch)

    name = f"generated-{seed}-{fault}-{recipe.architecture}-{recipe.data}-{recipe.optimizer}"
    return Faulty(name, fault, kind.accepts, "generated", program)


def _drawn(rng: random.Random) -> Recipe:
    architecture = rng.choice([*_BUILDERS])
    # Only pictures have rows and patches.
    data = "digits" if architecture in _PICTURES else rng.choice([*_DATA])
    optimizer = rng.choice(["adam", "adamw"] if architecture in _SEQUENTIAL else [*_RATES])
    low, high = _RATES[optimizer]
    if data in _REGRESSIONS and optimizer in _FOLLOWS_THE_GRADIENT:
        # The gradient of a squared error has no bound.
        low, high = low / 10, high / 10
    return Recipe(
        data=data,
        architecture=architecture,
        depth=rng.choice([2, 3, 4, 6]) if architecture != "transformer" else rng.choice([1, 2]),
        width=rng.choice([32, 48, 64, 96]),
        activation=rng.choice([*_ACTIVATIONS]),
        optimizer=optimizer,
        rate=math.exp(rng.uniform(math.log(low), math.log(high))),
        size=rng.choice([16, 32, 64]),
        steps=rng.choice([200, 300, 400]),
    )


_PICTURES = frozenset({"cnn", "transformer", "lstm"})
_REGRESSIONS = frozenset({"diabetes", "waves"})
_FOLLOWS_THE_GRADIENT = frozenset({"sgd", "momentum"})
_SEQUENTIAL = frozenset({"transformer", "lstm"})


@dataclass(frozen=True, slots=True)
class Data:
    """Inputs and targets; `outputs` classes, or 0 for a regression."""

    inputs: Tensor
    targets: Tensor
    outputs: int

    @property
    def batch(self) -> Batch:
        """Both."""
        return self.inputs, self.targets


def _standardized(values: Tensor) -> Tensor:
    result: Tensor = (values - values.mean(0)) / values.std(0).clamp_min(1e-6)
    return result


def _digits() -> Data:
    inputs, targets = digits()
    return Data(inputs, targets, 10)


def _wine() -> Data:
    found = load_wine()
    inputs = _standardized(torch.tensor(found.data, dtype=torch.float32))
    return Data(inputs, torch.tensor(found.target), 3)


def _moons() -> Data:
    inputs, targets = make_moons(1000, noise=0.1, random_state=0)
    return Data(_standardized(torch.tensor(inputs, dtype=torch.float32)), torch.tensor(targets), 2)


def _diabetes() -> Data:
    found = load_diabetes()
    inputs = _standardized(torch.tensor(found.data, dtype=torch.float32))
    targets = _standardized(torch.tensor(found.target, dtype=torch.float32)[:, None])
    return Data(inputs, targets, 0)


def _waves() -> Data:
    inputs = torch.linspace(-1, 1, 512)[:, None] * torch.tensor([[1.0, 2.0, 3.0]])
    targets = torch.sin(3 * inputs).sum(1, keepdim=True)
    return Data(inputs, _standardized(targets), 0)


_DATA: dict[str, Callable[[], Data]] = {
    "digits": _digits,
    "wine": _wine,
    "moons": _moons,
    "diabetes": _diabetes,
    "waves": _waves,
}


def _optimizer(recipe: Recipe, parameters: list[nn.Parameter]) -> Optimizer:
    rate = recipe.rate
    if recipe.fault == "learning-rate-too-high":
        rate *= recipe.magnitude
    if recipe.fault == "learning-rate-too-low":
        rate /= recipe.magnitude
    decay = recipe.magnitude / rate if recipe.fault == "weight-decay-too-large" else 0.0
    epsilon = recipe.magnitude if recipe.fault == "adam-epsilon-too-large" else 1e-8
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parameters, rate, weight_decay=decay)
    if recipe.optimizer == "momentum":
        return torch.optim.SGD(parameters, rate, momentum=0.9, weight_decay=decay)
    if recipe.optimizer == "adam":
        return torch.optim.Adam(parameters, rate, eps=epsilon)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(parameters, rate, weight_decay=decay or 0.01, eps=epsilon)
    return torch.optim.RMSprop(parameters, rate)


def _loss(recipe: Recipe, data: Data, outputs: Tensor, targets: Tensor) -> Tensor:
    if recipe.fault == "hundredfold-targets":
        targets = recipe.magnitude * targets
    if data.outputs:
        reduction = "sum" if recipe.fault == "sum-reduction" else "mean"
        if recipe.fault == "softmax-before-cross-entropy":
            outputs = outputs.softmax(1)
        return F.cross_entropy(outputs, targets, reduction=reduction)
    if recipe.fault == "loss-shape-broadcast":
        return (outputs - targets[:, 0]).square().mean()
    if recipe.fault == "bounded-output":
        outputs = outputs.sigmoid()
    return F.mse_loss(outputs, targets)


def _weights(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            yield module


def _spoil(recipe: Recipe, model: nn.Module) -> None:
    """What is wrong with the model from the start."""
    with torch.no_grad():
        layers = list(_weights(model))
        for layer in layers:
            weight, bias = layer.weight, layer.bias
            assert isinstance(weight, Tensor)
            assert isinstance(bias, Tensor)
            if recipe.fault == "weights-too-small":
                weight /= recipe.magnitude
            if recipe.fault == "weights-too-large":
                weight *= recipe.magnitude
            if recipe.fault == "negative-biases" and layer is not layers[-1]:
                bias.fill_(-recipe.magnitude)
            if recipe.fault == "symmetric-weights":
                weight.fill_(recipe.magnitude / weight[0].numel())


def _trained_parameters(recipe: Recipe, model: nn.Module) -> list[nn.Parameter]:
    if recipe.fault == "part-not-in-optimizer":
        # Without the last layer's neighbours: only the output layer is trained.
        return list(list(_weights(model))[-1].parameters())
    return list(model.parameters())


def _train(recipe: Recipe, watch: Watch) -> None:
    data = _DATA[recipe.data]()
    features = data.inputs.shape[1]
    model = _BUILDERS[recipe.architecture](
        features, max(data.outputs, 1), recipe.depth, recipe.width, _ACTIVATIONS[recipe.activation]
    )
    _spoil(recipe, model)
    optimizer = _optimizer(recipe, _trained_parameters(recipe, model))
    scale = 1.0
    if recipe.fault == "inputs-too-large":
        scale = recipe.magnitude
    if recipe.fault == "inputs-too-small":
        scale = 1 / recipe.magnitude
    sign = -1.0 if recipe.fault == "ascent" else 1.0
    with watch(model, optimizer) as scope:
        for inputs, targets in batches(data.batch, recipe.steps, recipe.size):
            loss = _loss(recipe, data, model(scale * inputs), targets)
            (sign * loss).backward()
            if recipe.fault == "clipped-to-nothing":
                nn.utils.clip_grad_norm_(model.parameters(), 1 / recipe.magnitude)
            scope.log(loss=loss)
            optimizer.step()
            if recipe.fault != "gradients-not-cleared":
                optimizer.zero_grad()


@dataclass(frozen=True, slots=True)
class Fault:
    """A kind of fault: what names it, how strong it may be, and into which trainings it fits."""

    accepts: tuple[str, ...]
    magnitudes: tuple[float, float] = (1.0, 1.0)
    fits: Callable[[Recipe], bool] = lambda _: True


def _is_regression(recipe: Recipe) -> bool:
    return recipe.data in _REGRESSIONS


def _is_classification(recipe: Recipe) -> bool:
    return not _is_regression(recipe)


def _is_plain(recipe: Recipe) -> bool:
    """Layers one behind the other: nothing passes them by, nothing normalizes."""
    return recipe.architecture in {"mlp", "cnn"}


def _steps_follow_the_gradient(recipe: Recipe) -> bool:
    return recipe.optimizer in _FOLLOWS_THE_GRADIENT


FAULTS: dict[str, Fault] = {
    "learning-rate-too-high": Fault(("GS401",), (300, 3000)),
    "learning-rate-too-low": Fault(("GS402",), (1e4, 1e6)),
    "weights-too-small": Fault(
        ("GS104", "GS101"),
        (20, 100),
        lambda r: _is_plain(r) and r.depth >= 4,
    ),
    "weights-too-large": Fault(("GS104", "GS102"), (30, 100), _is_plain),
    "negative-biases": Fault(
        ("GS301",), (20, 40), lambda r: _is_plain(r) and r.activation == "relu"
    ),
    "symmetric-weights": Fault(("GS105",), (0.5, 2.0), lambda r: r.architecture == "mlp"),
    "part-not-in-optimizer": Fault(("GS004",), fits=lambda r: r.depth > 1),
    "sum-reduction": Fault(
        ("GS603", "GS401"),
        fits=lambda r: _is_classification(r) and _steps_follow_the_gradient(r),
    ),
    "softmax-before-cross-entropy": Fault(("GS604", "GS305"), fits=_is_classification),
    "loss-shape-broadcast": Fault(("GS605",), fits=_is_regression),
    "bounded-output": Fault(("GS604",), fits=_is_regression),
    "hundredfold-targets": Fault(("GS602", "GS401"), (100, 1000), _is_regression),
    "inputs-too-large": Fault(("GS601",), (1e3, 1e4), _is_plain),
    "inputs-too-small": Fault(
        ("GS601",), (1e3, 1e4), lambda r: _is_plain(r) and _steps_follow_the_gradient(r)
    ),
    "gradients-not-cleared": Fault(("GS006",)),
    "ascent": Fault(("GS007", "GS202")),
    "weight-decay-too-large": Fault(
        ("GS403",), (0.1, 0.5), lambda r: r.optimizer in {"sgd", "momentum", "adamw"}
    ),
    "adam-epsilon-too-large": Fault(
        ("GS404", "GS402"), (10, 1e4), lambda r: r.optimizer in {"adam", "adamw"}
    ),
    "clipped-to-nothing": Fault(("GS204", "GS402"), (1e4, 1e6), _steps_follow_the_gradient),
}
