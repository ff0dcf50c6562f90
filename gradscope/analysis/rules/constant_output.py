"""GS303 constant-output."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradscope.analysis.finding import Evidence, Finding
from gradscope.analysis.harm import progress, severity
from gradscope.analysis.lasting import lasting
from gradscope.analysis.robust import F64, measured
from gradscope.analysis.rule import UnjudgedError, rule
from gradscope.analysis.words import number
from gradscope.record import Run


@dataclass(frozen=True, slots=True)
class Limits:
    """When an output counts as the same for every sample; relative to its largest entry."""

    # Half of bfloat16's resolution at 1 (2**-9 = 2e-3): a difference that mixed precision loses.
    # TheDeepChecker's rule "outputs constant" gives no tolerance.
    spread: float = 1e-3
    # A head that starts at zero leaves it with the first step.
    min_steps: int = 5
    # What holds at last may be a phase; a fifth of the records is not (as in GS003).
    min_share_of_steps: float = 0.2


@rule("GS303", name="constant-output", requires=("signals.sample_std",), limits=Limits())
def constant_output(run: Run, limits: Limits) -> Iterator[Finding]:
    """The model answers every sample of a batch the same, though they differ.

    ## What it measures
    The standard deviation of the model's output over the samples of the batch, relative to its
    largest entry, in the last recorded steps in which the input differed from sample to sample.

    ## Why it matters
    Such a model has learned the answer to no question: the best constant. Somewhere on the way
    the input is lost: units that are dead, a softmax over one unit, saturated or collapsed
    layers, weights that decayed to zero. Behind that place nothing can be learned, and before it
    the gradient is often exactly zero.

    ## How sure it is
    Certain that the output hardly differs from sample to sample. That it should is likely, as
    the targets differ or the loss is stuck.

    ## Known limits
    A head that starts at zero is constant at first only, and no finding. Batches of one sample
    are not judged, nor outputs without samples (a loss). Where the targets hardly differ such an
    output is right: unless the loss is stuck, or the samples' outputs are equal to the bit, it is
    information.

    ## Example
    `nn.Sequential(nn.Linear(128, 1), nn.Softmax(dim=1))`: a softmax over one unit is 1 for every
    input. Do instead: a raw logit with `nn.BCEWithLogitsLoss`.

    ## References
    Ben Braiek & Khomh 2023 (TheDeepChecker, TOSEM), on constant outputs; stackoverflow.com,
    question 31880720, for the example.
    """
    table = run.signals
    if "output" not in table.names or "input" not in table.names:
        message = "the model's input and output were not both seen"
        raise UnjudgedError(message)
    output, fed = table.names.index("output"), table.names.index("input")
    if not table.entities[output].shape or table.entities[output].shape[0] == 1:
        message = "the model's output does not have several samples"
        raise UnjudgedError(message)
    relative = _spread(run, output, fed)
    since = lasting(
        relative,
        relative <= limits.spread,
        least=limits.min_steps,
        share=limits.min_share_of_steps,
    )
    if since is None:
        return
    rows = np.flatnonzero(measured(relative) & (np.arange(relative.size) >= since))
    worst = float(relative[rows].max())
    loss = progress(run)
    first, last = int(table.steps[rows[0]]), int(table.steps[rows[-1]])
    value = float(table["mean"][rows[-1], output])
    amount = "equal to the bit" if worst == 0 else f"within {number(worst)} of their size"
    of = "" if np.isnan(value) else f" (their mean is {number(value)})"
    inputs = float(np.nanmedian(table["sample_std"][rows, fed]))
    yield constant_output.finding(
        severity(loss, still=False, extreme=worst == 0),
        None,
        f"The outputs of all samples of a batch are {amount}{of} from step {first} to step {last}, "
        f"while the inputs differ by {number(inputs)}; {loss.words}.",
        evidence=(
            Evidence(
                "sample_std / absmax of the output", "output", first, last, worst, limits.spread
            ),
        ),
        remedies=(
            "Find the first layer whose output is the same for all samples "
            "(output_sample_similarity, dead_unit_fraction), and start there: dead or saturated "
            "units, a normalization over the batch, weights that have decayed.",
            "Check the last activation: a softmax over one unit is always 1, a ReLU whose inputs "
            "are negative always 0.",
            "Check that the input reaches the output: a detach, a mask or a multiplication with "
            "zero cuts it off.",
        ),
    )


def _spread(run: Run, output: int, fed: int) -> F64:
    """Per record: how far samples' outputs differ; NaN where not known, or the inputs are alike."""
    table = run.signals
    spread = table["sample_std"][:, output].astype(np.float64)
    size = table["absmax"][:, output].astype(np.float64)
    differ = np.nan_to_num(table["sample_std"][:, fed]) > 0
    # An output of nothing but zeros is a constant, too.
    with np.errstate(invalid="ignore", divide="ignore"):
        relative = np.where(spread == 0, 0.0, spread / size)
    result: F64 = np.where(differ & measured(spread), relative, np.nan)
    return result
