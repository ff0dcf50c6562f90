"""GS207 gradient-norm-growth."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradscope.analysis.finding import Evidence, Finding, Severity
from gradscope.analysis.harm import progress
from gradscope.analysis.losses import at_most
from gradscope.analysis.norms import global_norms
from gradscope.analysis.robust import F64
from gradscope.analysis.rule import rule
from gradscope.analysis.words import number
from gradscope.record import Run


@dataclass(frozen=True, slots=True)
class Limits:
    """When the gradient's norm counts as growing."""

    # A decade over the run, by its trend: TheDeepChecker's four doublings in a row make 16.
    growth: float = 10.0
    # Kendall's τ of the medians of ten blocks: that of ten random numbers exceeds 0.6 in 0.5 %
    # of cases (Kendall 1938). A rise followed by a plateau, or by noise, stays below.
    trend: float = 0.6
    # Two norms for each block.
    min_norms: int = 20


_BLOCKS = 10


@rule("GS207", name="gradient-norm-growth", limits=Limits())
def gradient_norm_growth(run: Run, limits: Limits) -> Iterator[Finding]:
    """The gradient's norm grows all through the run.

    ## What it measures
    The global norm of the gradient, before clipping where that is known. The run is cut into ten
    blocks; the slope through the logarithms of their medians (Theil–Sen) must make a decade over
    the run, and most pairs of blocks must agree on its sign (Kendall's τ).

    ## Why it matters
    Gradients shrink as a model learns. A norm that keeps growing while the loss gets nowhere is a
    process that feeds itself: gradients that are never cleared, a learning rate at which weights
    run away, logits that grow.

    ## How sure it is
    Certain that the norm grows. That it ends badly is possible: it is a warning only where the
    loss has suffered.

    ## Known limits
    Norms rise in order, too: while a net leaves a plateau, or under weight decay with norms
    behind the weights. Unless the loss is stuck or has broken, it is information. A growth within
    a few steps is GS401's to see.

    ## Example
    A loop without `optimizer.zero_grad()`: after t steps the gradient is the sum of t. Do
    instead: `optimizer.zero_grad()` in each step.

    ## References
    Mann 1945; Kendall 1938; Sen 1968 (JASA); Wortsman et al. 2023 (arXiv:2309.14322), section 3;
    Braiek & Khomh 2023 (TheDeepChecker, TOSEM).
    """
    steps, norms, name = global_norms(run, limits.min_norms)
    blocks = np.array([np.median(block) for block in np.array_split(np.log10(norms), _BLOCKS)])
    slopes = _slopes(blocks)
    # From the middle of the first block to that of the last.
    growth = 10 ** (float(np.median(slopes)) * (_BLOCKS - 1))
    agreement = float(np.sign(slopes).mean())
    if growth < limits.growth or agreement < limits.trend:
        return
    loss = progress(run)
    # It shows when half of it is done: what came before that may have caused it.
    half = int(np.flatnonzero(blocks - blocks[0] >= (blocks[-1] - blocks[0]) / 2)[0])
    first, last = int(np.array_split(steps, _BLOCKS)[half][0]), int(steps[-1])
    yield gradient_norm_growth.finding(
        at_most(run, Severity.WARNING if loss.failed else Severity.INFO),
        None,
        f"The gradient's norm grew {number(growth)}-fold over the run, from "
        f"{number(10 ** blocks[0])} to {number(10 ** blocks[-1])}; {loss.words}.",
        evidence=(
            Evidence(f"{name} (trend over the run)", None, first, last, growth, limits.growth),
        ),
        remedies=(
            "Check that optimizer.zero_grad() is called once per step.",
            "Lower the learning rate, and clip with scope.clip_grad_norm_(1.0).",
            "If logits or activations grow along: a norm (nn.LayerNorm) or weight decay bounds "
            "them.",
        ),
    )


def _slopes(values: F64) -> F64:
    """The slopes between all pairs."""
    first, second = np.triu_indices(values.size, 1)
    slopes: F64 = (values[second] - values[first]) / (second - first)
    return slopes
