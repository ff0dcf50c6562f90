"""The initializations that are compared, by name, and how a model gets one.

Biases become zero, as in the papers; by `torch_default` they are drawn as each module does it, by
`critical` with the variance of the critical point. An LSTM's forget gate keeps its bias. An
embedding that isn't tied to a linear layer is looked up, not multiplied: rules that divide by a
fan leave it.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor, nn

from gradscope.capture.names import owned_parameters
from gradscope.capture.trial import same_modes_and_buffers, same_random_numbers
from gradscope.comparison import snippets
from gradscope.comparison.activation import Activation
from gradscope.comparison.assignment import assign, underlying
from gradscope.comparison.branches import branch_ends
from gradscope.comparison.critical import critical
from gradscope.comparison.draws import Draws
from gradscope.comparison.filling import Rule, filled, filled_bias, filled_by_default
from gradscope.comparison.lsuv import unit_variance
from gradscope.comparison.meanfield import gain
from gradscope.comparison.naming import known
from gradscope.comparison.refusal import refuse
from gradscope.comparison.roles import Layout, Weight, roles_of
from gradscope.errors import ConfigError, ConfigTypeError

Forward = Callable[[], object]
CustomInitialization = Callable[[nn.Module], object]


@dataclass(frozen=True, slots=True)
class Initialized:
    """What became of a model's parameters.

    changed: the names of those that were set; zeroed: of those, the ends of residual branches.
    left: why the others weren't. reason: why the model has no such initialization (then nothing
    about it should be measured).
    """

    changed: tuple[str, ...]
    left: Mapping[str, str]
    notes: tuple[str, ...] = ()
    zeroed: tuple[str, ...] = ()
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Initialization:
    """A way to draw a model's weights.

    Of rule, default and function at most one is set; none for the model as it is.
    rule: for an activation, how weights and biases are drawn; its ConfigError says why there is
    no such initialization. default: each by its module's own rule. function: the user's own.
    """

    name: str
    meaning: str
    rule: Callable[[Activation], Rule] | None = None
    default: bool = False
    function: CustomInitialization | None = None
    # What follows the drawing.
    unit_variance: bool = False
    zeroed_branches: bool = False

    def reason(self, activation: Activation) -> str | None:
        """Why there is no such initialization for the activation; None where there is."""
        if self.rule is None:
            return None
        try:
            self.rule(activation)
        except ConfigError as none:
            return str(none)
        return None

    def snippet(self, activation: Activation, zeroed: tuple[str, ...] = ()) -> str:
        """Plain torch to paste, which does the same to the Linear and Conv layers of `model`.

        zeroed: `Initialized.zeroed`, for the branches of the model at hand.
        """
        if self.function is not None:
            return f"{self.name}(model)\n"
        if self.default:
            return snippets.OF_DEFAULT
        if self.rule is None:
            return snippets.OF_OWN
        code = snippets.of_rule(self.rule(activation))
        if self.unit_variance:
            code += snippets.OF_UNIT_VARIANCE
        return code + (snippets.of_zeroed(zeroed) if self.zeroed_branches else "")


def _constant(rule: Rule) -> Callable[[Activation], Rule]:
    return lambda _: rule


# By quadrature: as long as the drawing of a model.
@cache
def _matched(activation: Activation) -> Rule:
    return Rule("normal", gain(activation), "in", of_activation=True)


def _orthogonal(activation: Activation) -> Rule:
    return replace(_matched(activation), distribution="orthogonal", fan="none")


def _delta_orthogonal(activation: Activation) -> Rule:
    return replace(_matched(activation), distribution="delta_orthogonal", fan="none")


@cache
def _critical(activation: Activation) -> Rule:
    point = critical(activation)
    if point.weight_variance is None:
        raise ConfigError(point.reason)
    scale, bias = math.sqrt(point.weight_variance), math.sqrt(point.bias_variance)
    return Rule("normal", scale, "in", bias_std=bias, of_activation=True)


_SQRT2 = math.sqrt(2)

INITIALIZATIONS: Mapping[str, Initialization] = {
    initialization.name: initialization
    for initialization in (
        Initialization("own", "the model as it is"),
        Initialization("torch_default", "each module's own reset_parameters", default=True),
        Initialization(
            "xavier_uniform",
            "variance 2 / (fan_in + fan_out), uniform (Glorot & Bengio 2010)",
            _constant(Rule("uniform", 1.0, "mean")),
        ),
        Initialization(
            "xavier_normal",
            "variance 2 / (fan_in + fan_out), normal (Glorot & Bengio 2010)",
            _constant(Rule("normal", 1.0, "mean")),
        ),
        Initialization(
            "kaiming_uniform",
            "variance 2 / fan_in, uniform (He et al. 2015)",
            _constant(Rule("uniform", _SQRT2, "in")),
        ),
        Initialization(
            "kaiming_normal",
            "variance 2 / fan_in, normal (He et al. 2015)",
            _constant(Rule("normal", _SQRT2, "in")),
        ),
        Initialization(
            "kaiming_uniform_fan_out",
            "variance 2 / fan_out, uniform (He et al. 2015)",
            _constant(Rule("uniform", _SQRT2, "out")),
        ),
        Initialization(
            "kaiming_normal_fan_out",
            "variance 2 / fan_out, normal (He et al. 2015)",
            _constant(Rule("normal", _SQRT2, "out")),
        ),
        Initialization(
            "lecun_normal",
            "variance 1 / fan_in, normal (LeCun et al. 1998)",
            _constant(Rule("normal", 1.0, "in")),
        ),
        Initialization(
            "orthogonal",
            "orthonormal rows or columns times the activation's gain (Saxe et al. 2014)",
            _orthogonal,
        ),
        Initialization(
            "delta_orthogonal",
            "convolutions orthogonal at the kernel's centre and zero elsewhere, the rest "
            "orthogonal, times the activation's gain (Xiao et al. 2018)",
            _delta_orthogonal,
        ),
        Initialization(
            "lsuv",
            "orthogonal, then each layer's output scaled to variance 1 on the batch (Mishkin & "
            "Matas 2016)",
            _constant(Rule("orthogonal", 1.0)),
            unit_variance=True,
        ),
        Initialization(
            "matched",
            "variance gain² / fan_in, with the gain at which the activation keeps E φ(z)² = 1",
            _matched,
        ),
        Initialization(
            "critical",
            "weight and bias variance at which gradients neither grow nor shrink (Poole et al. "
            "2016, Roberts et al. 2022)",
            _critical,
        ),
        Initialization(
            "zero_residual",
            "as matched, and the last norm or weight of each residual branch zero (Goyal et al. "
            "2017)",
            _matched,
            zeroed_branches=True,
        ),
        Initialization("normal_1", "N(0, 1), a mistake", _constant(Rule("normal", 1.0))),
        Initialization(
            "normal_0.01",
            "normal with standard deviation 0.01 whatever the width, a mistake",
            _constant(Rule("normal", 0.01)),
        ),
        Initialization(
            "constant", "all weights 0.01, a mistake", _constant(Rule("constant", 0.01))
        ),
    )
}

# Without `initializations=`.
COMPARED = (
    "own",
    "torch_default",
    "xavier_uniform",
    "kaiming_normal",
    "lecun_normal",
    "orthogonal",
    "matched",
    "critical",
)

# Other ways to write the same.
_ALSO = {
    "default": "torch_default",
    "xavier": "xavier_uniform",
    "glorot": "xavier_uniform",
    "glorot_uniform": "xavier_uniform",
    "glorot_normal": "xavier_normal",
    "kaiming": "kaiming_normal",
    "he": "kaiming_normal",
    "he_normal": "kaiming_normal",
    "he_uniform": "kaiming_uniform",
    "lecun": "lecun_normal",
}


def initialization_called(wanted: str | CustomInitialization | Initialization) -> Initialization:
    """The initialization of that name, or one made of a function that changes a model in place.

    Raises ConfigError for an unknown name, naming the nearest; ConfigTypeError for anything else.
    """
    if isinstance(wanted, Initialization):
        return wanted
    if isinstance(wanted, str):
        return known("initializations", wanted, INITIALIZATIONS, _ALSO, "a function of a model")
    if not callable(wanted) or isinstance(wanted, nn.Module):
        message = f"initializations: {wanted!r} is neither a name nor a function of a model"
        raise ConfigTypeError(message)
    name = getattr(wanted, "__name__", type(wanted).__name__)
    return Initialization(name, "a function that was given", function=wanted)


def initialize(
    model: nn.Module,
    initialization: Initialization,
    activation: Activation,
    draws: Draws,
    forward: Forward,
) -> Initialized:
    """Give `model`, a copy that may be changed, this initialization.

    activation: the one whose gain or critical point counts. forward: runs the model on the batch
    and returns what it gives (LSUV scales by it, residual branches are read from its graph); only
    those two call it. No random state has moved afterwards.

    Raises ConfigError for a model that can't be initialized here (lazy, meta, quantized, sharded).
    """
    refuse(model)
    with same_random_numbers(model):
        if initialization.function is not None:
            return _by_function(model, initialization, draws)
        missing = initialization.reason(activation)
        if missing is not None:
            return Initialized((), {}, reason=missing)
        if initialization.zeroed_branches:
            return _with_zeroed_branches(model, initialization, activation, draws, forward)
        return _drawn(model, initialization, activation, draws, forward)


def _drawn(
    model: nn.Module,
    initialization: Initialization,
    activation: Activation,
    draws: Draws,
    forward: Forward,
) -> Initialized:
    if initialization.rule is None and not initialization.default:
        return Initialized((), {name: "own" for name, *_ in owned_parameters(model)})
    roles = roles_of(model)
    rule = None if initialization.rule is None else initialization.rule(activation)
    changed: list[str] = []
    left = dict(roles.left)
    weights = []
    for weight in roles.weights:
        if rule is not None and rule.needs_fan and weight.layout is Layout.LOOKUP:
            left[weight.name] = "looked up, not multiplied: it has no fan"
            continue
        why = _assign_weight(weight, rule, draws)
        if why is None:
            changed.append(weight.name)
            weights.append(weight)
        else:
            left[weight.name] = why
    for bias in roles.biases:
        held = underlying(bias.owner, bias.attribute)[0]
        assign(bias.owner, bias.attribute, filled_bias(bias, held.data, rule, draws))
        changed.append(bias.name)
    notes = roles.notes
    if initialization.unit_variance:
        notes += unit_variance(model, tuple(weights), forward)
    return Initialized(tuple(changed), left, notes)


def _assign_weight(weight: Weight, rule: Rule | None, draws: Draws) -> str | None:
    """Why the weight could not be assigned; None where it was."""
    with torch.no_grad():
        like: Tensor = getattr(weight.owner, weight.attribute)
    if not like.is_floating_point():
        return f"its numbers are {like.dtype}"
    values = (
        filled_by_default(weight, like.data, draws)
        if rule is None
        else filled(weight, like.data, rule, draws)
    )
    try:
        assign(weight.owner, weight.attribute, values)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return f"its parametrization takes no new values: {error}"
    return None


def _with_zeroed_branches(
    model: nn.Module,
    initialization: Initialization,
    activation: Activation,
    draws: Draws,
    forward: Forward,
) -> Initialized:
    with same_modes_and_buffers(model):
        ends = branch_ends(model, forward)
    if not ends:
        why = "the graph of a forward shows no residual branch that ends in a weight or a norm"
        return Initialized((), {}, reason=why)
    drawn = _drawn(model, initialization, activation, draws, forward)
    zeroed = []
    for end in ends:
        for attribute in (end.attribute, "bias"):
            for held in underlying(end.owner, attribute):
                held.data.zero_()
                zeroed.append(end.name.removesuffix("weight") + attribute)
    left = {name: why for name, why in drawn.left.items() if name not in zeroed}
    changed = tuple(dict.fromkeys((*drawn.changed, *zeroed)))
    return Initialized(changed, left, drawn.notes, tuple(zeroed))


def _by_function(model: nn.Module, initialization: Initialization, draws: Draws) -> Initialized:
    before = {name: held.detach().clone() for name, _, held in owned_parameters(model)}
    # The user's function draws from torch's own generator: paired by the seed.
    torch.manual_seed(draws.seed)
    try:
        initialization.function(model)  # type: ignore[misc]
    except Exception as error:  # noqa: BLE001  (whatever a user's function raises)
        why = f"{initialization.name} raised {type(error).__name__}: {error}"
        return Initialized((), {}, reason=why)
    changed, left = [], {}
    for name, _, held in owned_parameters(model):
        if name in before and torch.equal(held, before[name]):
            left[name] = f"{initialization.name} left it"
        else:
            changed.append(name)
    return Initialized(tuple(changed), left)
