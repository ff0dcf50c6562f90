"""GS601 unscaled-input."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from gradscope.analysis.chance import chance, first_loss
from gradscope.analysis.finding import Evidence, Finding, Severity
from gradscope.analysis.harm import LossVerdict, Progress, progress
from gradscope.analysis.robust import measured, median
from gradscope.analysis.rule import UnjudgedError, rule
from gradscope.analysis.signals import Signal, signal
from gradscope.analysis.words import layer_in_words, number, share
from gradscope.record import Entity, Run


@dataclass(frozen=True, slots=True)
class Limits:
    """When an input counts as unscaled."""

    # Feature scales that differ by more than this (thresholds 4), of which the largest …
    feature_ratio: float = 100.0
    # … is far beyond a standardized one: AUTOTRAINER's limit of abnormal data (ω1). Among
    # features below it the small ones are left unused, and nothing blows up.
    largest_feature: float = 10.0
    # Pixels from 0 to 16 have an rms of 8 and are learned from; two decades are not.
    large: float = 1e2
    # Pixels in [0, 1] have 0.1 to 0.5; divided by 255 twice they have 1e-3.
    small: float = 1e-2
    # What the first layer puts out over what the model was given: at PyTorch's initialization
    # 0.6. Where it is this little the model scales its input itself.
    scaled_inside: float = 1e-2
    # A first loss so many times ln C (GS603), or half of a layer's units dead at first (GS301) …
    blown_up: float = 3.0
    dead: float = 0.5
    # … did harm where the loss did not come down to a tenth of a guess's (analysis/harm.py).
    converged: float = 0.1


_INTEGERS = frozenset({"bool", "uint8", "int8", "int16", "int32", "int64"})
_WITH_WEIGHTS = frozenset({"linear", "convolution", "recurrent", "attention", "norm", "embedding"})


@dataclass(frozen=True, slots=True)
class _Scale:
    """What is wrong with the input's scale, in words and as a number with its limit."""

    words: str
    quantity: str
    observed: float
    limit: float


@rule("GS601", name="unscaled-input", requires=("signals.rms",), limits=Limits())
def unscaled_input(run: Run, limits: Limits) -> Iterator[Finding]:
    """The model's input is at a scale that its first layer is not made for.

    ## What it measures
    Of what the model is given: the root mean square, and the largest and the smallest standard
    deviation among its features. A hundred is large, a hundredth is small (data scaled twice),
    and features may differ a hundredfold.

    ## Why it matters
    The gradient of the first layer's weights is in proportion to the input. Large features take
    steps too large while small ones take none, units of the first layer die at once or never turn
    off, and the outputs start far out. An input near zero leaves only the biases to learn with.

    ## How sure it is
    Certain as to the scale. That it does harm is likely: it is said only where the loss has
    suffered.

    ## Known limits
    Without harm it is not reported: the loss is stuck or breaks; or it began far above a guess's,
    or half of a layer's units were dead at first, and it did not come down. Integers, inputs of an
    embedding or a norm, and what the model scales itself are not judged.

    ## Example
    `load_wine()`, whose features reach from 0.1 to 1,680, into a small ReLU net. Do instead:
    `StandardScaler`, or `nn.BatchNorm1d(features)` as the first layer.

    ## References
    LeCun et al. 1998, "Efficient BackProp", section 4.3; Zhang et al. 2021 (AUTOTRAINER, ICSE);
    Schoop et al. 2021 (UMLAUT, CHI) and Cao et al. 2022 (DeepDiagnosis, ICSE), whose limit of
    [-1, 1] standardized inputs break.
    """
    given = signal(run, "input")
    if given is None:
        message = "the model's input was not seen"
        raise UnjudgedError(message)
    first = _first_layer(run)
    scale = _scale(given, limits)
    if scale is None or given.entity.type in _INTEGERS:
        return
    if first is not None and (
        first.group in {"norm", "embedding"} or _scales_itself(run, first, given, limits)
    ):
        return
    loss = progress(run)
    harm = _harm(run, loss, limits) if given.typical("rms") > limits.small else None
    if not loss.failed and harm is None:
        return
    step, last = given.span("rms")
    because = loss.words if harm is None else f"{harm}, and {loss.words}"
    yield unscaled_input.finding(
        Severity.ERROR if loss.failed else Severity.WARNING,
        None if first is None else first.name,
        f"{scale.words}; {because}.",
        evidence=(Evidence(scale.quantity, "input", step, last, scale.observed, scale.limit),),
        remedies=_remedies(first, small=scale.observed <= limits.small),
    )


def _scale(given: Signal, limits: Limits) -> _Scale | None:
    rms = given.typical("rms")
    smallest, largest = given.typical("feature_std_min"), given.typical("feature_std_max")
    # A feature without any variation has no scale.
    ratio = largest / smallest if smallest > 0 else math.nan
    if ratio > limits.feature_ratio and largest >= limits.largest_feature:
        return _Scale(
            f"The input's features differ in scale by a factor {number(ratio)}: standard "
            f"deviations from {number(smallest)} to {number(largest)}",
            "feature_std_max / feature_std_min",
            ratio,
            limits.feature_ratio,
        )
    if rms >= limits.large:
        words = f"The input has an rms of {number(rms)}, where a standardized one has 1"
        return _Scale(words, "rms", rms, limits.large)
    if rms <= limits.small:
        words = (
            f"The input has an rms of {number(rms)}, where a standardized one has 1: it may have "
            "been scaled twice"
        )
        return _Scale(words, "rms", rms, limits.small)
    return None


def _first_layer(run: Run) -> Entity | None:
    """The first layer with weights that ran."""
    layers = [entity for entity in run.modules.entities if entity.group in _WITH_WEIGHTS]
    return min(layers, key=lambda entity: entity.depth, default=None)


def _scales_itself(run: Run, first: Entity, given: Signal, limits: Limits) -> bool:
    """Whether the first layer's output shows that it was given far less than the model."""
    column = [run.modules.names.index(first.name)]
    put_out = float(median(run.modules["output_rms"][:1, column], axis=0)[0])
    return put_out < limits.scaled_inside * given.first("rms")


def _harm(run: Run, loss: Progress, limits: Limits) -> str | None:
    """What a large input did at the start, in words, if the loss did not get over it."""
    try:
        guess = chance(run).loss
    except UnjudgedError:
        guess = math.nan
    converged = loss.verdict is LossVerdict.CONVERGED
    if loss.end <= limits.converged * guess if not math.isnan(guess) else converged:
        return None
    try:
        start = first_loss(run)
    except UnjudgedError:
        start = math.nan
    if start >= limits.blown_up * guess:
        return f"the first loss was {number(start)}, {number(start / guess)} times a guess's"
    name, dead = _dead_at_first(run)
    if dead >= limits.dead:
        return f"{share(dead)} of the units of {layer_in_words(name)} were dead from the start"
    return None


def _dead_at_first(run: Run) -> tuple[str, float]:
    """The layer with the largest share of dead units at its first measurement."""
    worst = ("", 0.0)
    for entity, values in zip(
        run.modules.entities, run.modules["dead_unit_fraction"].T, strict=True
    ):
        known = values[measured(values)]
        if known.size and float(known[0]) > worst[1]:
            worst = (entity.name, float(known[0]))
    return worst


def _remedies(first: Entity | None, *, small: bool) -> tuple[str, ...]:
    where = "" if first is None else f" before {layer_in_words(first.name)}"
    twice = (
        "Look for a second scaling: transforms.ToTensor() divides by 255 already, and so does "
        "many a loader."
    )
    standardize = (
        "Standardize every feature with the training set's mean and standard deviation: "
        "(x - mean) / std, sklearn's StandardScaler."
    )
    norm = f"Or let the model do it: nn.BatchNorm1d, or nn.LayerNorm{where}."
    return (twice, standardize, norm) if small else (standardize, norm)
