"""What a comparison says, in sentences that terminal and page share."""

import math

from gradscope.analysis.words import count, number
from gradscope.comparison.result import EARLY_STEPS, Comparison, Configuration
from gradscope.comparison.table import per_layer

_WRITTEN_OUT = 300
_MANY = 3


def verdict(comparison: Comparison) -> str:
    """In a sentence, which configurations lead."""
    best, top = comparison.best, comparison.first_tier
    if best.failure is not None:
        return "No configuration can train."
    others = f", and {len(top) - 1} more can't be told from it" if len(top) > 1 else ""
    if math.isnan(best.score.mean):
        all_alike = len(top) == len(comparison.configurations)
        told = ": nothing is told apart" if all_alike else f"; {best.name} trains fastest{others}"
        return f"Too few layers for a slope{told}."
    if not best.arrives:
        return (
            "In no configuration does the gradient arrive as it left the last layer; "
            f"{best.name} comes closest{others}."
        )
    if len(top) == len(comparison.configurations) > 1:
        return f"All {len(top)} configurations carry the gradient alike."
    arriving = sum(c.arrives for c in comparison.configurations)
    if arriving > sum(c.arrives for c in top):
        return f"{arriving} configurations carry the gradient; {best.name} trains fastest{others}."
    return f"{best.name} carries the gradient best{others}."


def size(comparison: Comparison) -> str:
    """The model, and how much was measured."""
    layers = count(len(comparison.layers), "layer")
    configurations = count(len(comparison.configurations), "configuration")
    seeds = count(len(comparison.seeds), "seed")
    return f"{comparison.model}, read at {layers}; {configurations}, {seeds}"


def gradient(c: Configuration) -> str:
    """What becomes of the gradient's norm from the last layer to the first."""
    if c.failure is not None:
        return c.failure
    ways = [("layers", c.mean("decades")), ("time", c.mean("time_decades"))]
    told = [
        f"{_fold(abs(d))} {'smaller' if d < 0 else 'larger'} over the {what}"
        for what, d in ways
        if not math.isnan(d)
    ]
    return "; ".join(told) or "not measured"


def _fold(decades: float) -> str:
    # Beyond what a float holds, where single precision has long ended.
    return f"{number(10**decades)}-fold" if decades < _WRITTEN_OUT else f"10^{decades:.0f} times"


def recommendation(comparison: Comparison) -> str:
    """What to do, and how far that was tried."""
    return f"{_recommended(comparison)}{_more(comparison)}"


def _more(comparison: Comparison) -> str:
    """What would tell more, where the gradient alone does not tell most of them apart."""
    top = comparison.first_tier
    untrained = all(math.isnan(c.mean("early")) for c in top)
    if len(top) < _MANY or 2 * len(top) <= len(comparison.configurations) or not untrained:
        return ""
    if comparison.best.failure is not None:
        return ""
    return (
        f" The gradient alone does not tell {len(top)} of them apart: train_steps={EARLY_STEPS} "
        "trains them for some steps, and tells more."
    )


def _recommended(comparison: Comparison) -> str:
    best, tried = comparison.best, comparison.verification
    if best.failure is not None:
        return "There is nothing to recommend."
    if best.name.initialization == "own" and best.name.activation == "own":
        return "Keep the initialization and the activation that the model has."
    if tried is None:
        return f"Worth a try: {best.name}. It was not tried in a training."
    losses = (
        f"after {count(tried.steps, 'step')} on the batch, each at its best of four learning "
        f"rates, the loss is {number(tried.recommended)}, with the model's own {number(tried.own)}"
    )
    if not tried.better:
        return f"Keep what the model has: {best.name} carries the gradient, but {losses}."
    activation = best.name.activation
    also = "" if activation == "own" else f" (in the model, write {activation} for its activations)"
    return f"Take {best.name}{also}: {losses}."


def disagreements(comparison: Comparison) -> list[str]:
    """Where theory is outside what the seeds' interval allows, and by one hundredth or more."""
    told = []
    for c in comparison.configurations:
        wide = math.isnan(c.growth.low) or c.growth.low <= c.theory <= c.growth.high
        if c.failure or math.isnan(c.theory) or wide or abs(c.theory_error) < 0.02:  # noqa: PLR2004
            continue
        plug_in = c.mean("plug_in")
        why = c.remark or "layers of finite width, or weights that are not independent"
        if not math.isnan(plug_in) and abs(plug_in - c.growth.mean) < abs(c.theory_error) / 2:
            why = c.remark or "the variance takes another course than in layers of infinite width"
        told.append(
            f"{c.name}: theory says {number(per_layer(c.theory))} per layer, measured is "
            f"{number(per_layer(c.growth.mean))}. Why that may be: {why}."
        )
    return told
