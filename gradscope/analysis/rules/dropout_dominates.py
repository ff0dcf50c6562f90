"""GS309 dropout-dominates."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from gradscope.analysis.finding import Evidence, Finding, Severity
from gradscope.analysis.harm import Progress, progress
from gradscope.analysis.layers import part_of
from gradscope.analysis.rule import UnjudgedError, rule
from gradscope.analysis.words import layer_in_words, number, share
from gradscope.record import Run


@dataclass(frozen=True, slots=True)
class Limits:
    """When dropout takes too much."""

    # Nine of ten. Srivastava et al. 2014 (section 7.3) find the error flat where 20 to 60 % are
    # dropped, and rising beyond; graph networks go up to 0.8 (APPNP) and learn.
    p: float = 0.9


@rule("GS309", name="dropout-dominates", limits=Limits())
def dropout_dominates(run: Run, limits: Limits) -> Iterator[Finding]:
    """Dropout leaves too little of a layer to learn from.

    ## What it measures
    The probability p of each dropout module that ran in training mode.

    ## Why it matters
    Dropout keeps a share of 1 - p of the entries and scales them by 1/(1 - p): the variance of
    what comes out is 1/(1 - p) times that of what went in. From nine of ten dropped on, what a
    unit hears is mostly noise, and so is its gradient. At p = 1 nothing comes out at all.

    ## How sure it is
    Certain as to p. That less would be better is likely, where the loss is stuck.

    ## Known limits
    Calls of `nn.functional.dropout` are not seen. Layers with many redundant units may bear it:
    unless the loss is stuck it is information.

    ## Example
    `nn.Dropout(0.95)`, where 0.95 was meant as the share to keep, as in TensorFlow 1. Do instead:
    `nn.Dropout(0.05)`.

    ## References
    Srivastava et al. 2014 (JMLR 15), section 7.3; Schoop, Huang & Hartmann 2021 (UMLAUT, CHI).
    """
    known = run.meta.get("dropout")
    if not isinstance(known, Mapping) or not known:
        message = "no dropout module was seen"
        raise UnjudgedError(message)
    strong = {
        str(name): float(p) for name, p in known.items() if p >= limits.p and _drops(run, str(name))
    }
    if not strong:
        return
    worst = max(strong, key=lambda name: strong[name])
    p = strong[worst]
    loss = progress(run)
    more = f" (and {len(strong) - 1} more)" if len(strong) > 1 else ""
    kept = "nothing" if p >= 1 else f"{share(1 - p)} of what comes in"
    first, last = (int(run.steps[0]), int(run.steps[-1])) if len(run.steps) else (0, 0)
    yield dropout_dominates.finding(
        _severity(loss, p),
        worst,
        f"{layer_in_words(worst)}{more} drops with p = {number(p)} and keeps {kept}; {loss.words}.",
        evidence=tuple(
            Evidence("p of the dropout", name, first, last, value, limits.p)
            for name, value in sorted(strong.items(), key=lambda item: -item[1])[:3]
        ),
        remedies=(
            f"Set p of {layer_in_words(worst)} to {_advised(p)}: torch's p is the share that is "
            "dropped, not the one that is kept.",
            "Try without dropout first, and add it once the training loss falls and the "
            "validation loss does not.",
        ),
    )


def _drops(run: Run, name: str) -> bool:
    """Whether it ran in training mode, as far as that is known."""
    table = run.modules
    columns = [column for column, use in enumerate(table.names) if part_of(use) == name]
    modes = table["training"][:, columns] if "training" in table else np.empty((0, 0))
    known = modes[~np.isnan(modes)]
    return not known.size or bool((known == 1).any())


def _severity(loss: Progress, p: float) -> Severity:
    if not loss.failed:
        return Severity.INFO
    return Severity.ERROR if p >= 1 else Severity.WARNING


def _advised(p: float) -> str:
    """What was meant if p was taken for the share to keep; half at most."""
    return "0.5 or less" if p >= 1 else f"{number(round(1 - p, 3))}, or 0.5 at most"
