"""GS003 zero-gradient."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from gradscope.analysis.finding import Evidence, Finding, Severity
from gradscope.analysis.harm import LossVerdict, Progress, progress
from gradscope.analysis.layers import idle, module_of, trainable_share
from gradscope.analysis.optimizers import take_turns
from gradscope.analysis.robust import Bools, at_last, measured, since
from gradscope.analysis.rule import rule
from gradscope.analysis.words import listed
from gradscope.record import Run


@dataclass(frozen=True, slots=True)
class Limits:
    """When an exactly zero gradient is a finding."""

    # LoRA's A, zero-initialized residual branches, ReZero and Fixup start at exactly zero and
    # leave it within a step or two: only zeros that last count.
    min_steps: int = 5
    # What is chosen now and then, a branch or an expert, rests for a few steps at a time.
    min_share_of_steps: float = 0.2
    # If most of the weights are cut off, little is left that could train …
    majority: float = 0.5
    # … and though the loss has fallen, nothing if it is all of them.
    all_but_all: float = 0.9
    # A gate, a class token: that a net learns without it is in order.
    negligible: float = 0.01


# Biases before a norm and the bias of attention's keys are zero by structure; an expert that no
# token chose and rows of an embedding that no token touched are idle, not ill.
_JUDGED = frozenset({"weight", "attention", "norm", "adapter"})


@rule("GS003", name="zero-gradient", requires=("parameters.grad_norm",), limits=Limits())
def zero_gradient(run: Run, limits: Limits) -> Iterator[Finding]:
    """Gradients arrive, and every entry of them is exactly zero.

    ## What it measures
    Weights whose gradient had not a single entry other than zero at each of the last recorded
    steps: at least five of them, and a fifth of all. Where optimizers take turns, a weight is
    judged on the steps of its own.

    ## Why it matters
    Exactly zero is not small: no learning rate moves such a weight. Behind it stand dead ReLUs,
    a constant output (softmax over one unit), a loss that does not depend on the layer, or a
    signal lost to the range of the dtype.

    ## How sure it is
    Certain that the gradient was zero. That it does harm is likely: zeros by structure are left
    out as far as they are known.

    ## Known limits
    Biases, experts and embeddings are not judged: they have zeros by structure. A layer whose
    output gets no gradient at all is not used by the loss, and is information only. Once the
    loss is solved exactly, zero is the right gradient; unless another optimizer still gets one:
    then one network has lost against the other. Zero by structure, and reported all the
    same: queries and keys of attention over a single token, what a gate at zero shuts off.

    ## Example
    All biases at -2 in a ReLU network on inputs in [0, 1]: every unit is dead from the start. Do
    instead: biases at 0, or LeakyReLU.

    ## References
    Lu et al. 2019 (arXiv:1903.06733), on ReLUs born dead; Hu et al. 2021 (LoRA,
    arXiv:2106.09685), section 4.1, for a zero that is in order.
    """
    table = run.parameters
    norms = table["grad_norm"]
    known = measured(norms)
    zero = (norms == 0) & (np.nan_to_num(table["grad_nonfinite"]) == 0)
    # A parameter whose optimizer takes turns with others is judged on its own turns.
    needed = np.maximum(limits.min_steps, limits.min_share_of_steps * known.sum(axis=0))
    lasting = _last_in_a_row(zero, known) >= needed
    judged = np.array([e.group in _JUDGED and len(e.shape) > 1 for e in table.entities], dtype=bool)
    found = np.flatnonzero(lasting & judged)
    loss = progress(run)
    starts = {table.names[i]: _since(zero[:, i], known[:, i]) for i in found}
    cut_off = _cut_off(run, loss, starts)
    if _is_solved(run, loss):
        starts = {name: starts[name] for name in cut_off}
    if not starts:
        return
    begin = int(table.steps[min(starts.values())])
    last = int(table.steps[-1])
    unused = [name for name, start in starts.items() if idle(run, name, slice(start, None))]
    used = [name for name in starts if name not in unused or name in cut_off]
    shown = used or unused
    dead = _dead_activations(run)
    yield zero_gradient.finding(
        _severity(run, loss, used, cut_off, limits),
        module_of(shown[0]),
        f"{len(shown)} weights ({listed(shown)}) have had a gradient of exactly zero "
        f"since step {begin}{_reason(used, cut_off, dead)}.",
        evidence=tuple(Evidence("grad_norm", name, begin, last, 0.0, 0.0) for name in shown[:3]),
        remedies=_remedies(dead=bool(dead), cut_off=bool(cut_off))
        if used
        else ("If they are meant to rest, requires_grad_(False) says so.",),
    )


def _last_in_a_row(
    condition: Bools, known: Bools
) -> "np.ndarray[tuple[int, ...], np.dtype[np.int64]]":
    """Per column: how many of the last measured values in a row meet the condition."""
    counts = np.zeros(condition.shape[1], np.int64)
    running = np.ones(condition.shape[1], dtype=bool)
    for holds, seen in zip(condition[::-1], known[::-1], strict=True):
        running &= holds | ~seen
        counts += running & seen
    return counts


def _since(zero: Bools, known: Bools) -> int:
    """The row at which the last unbroken stretch began, of a gradient known in these rows."""
    rows = np.flatnonzero(known)
    return int(rows[since(zero[rows])])


def _cut_off(run: Run, loss: Progress, starts: Mapping[str, int]) -> list[str]:
    """Those of an optimizer whose turns bring nothing any more, while another's still do.

    A generator whose discriminator has won. What never had a gradient, or a loss of zero, is not
    cut off.
    """
    table = run.parameters
    if not take_turns(run) or loss.end == 0:
        return []
    norms = table["grad_norm"]
    turns = measured(norms)
    other = (norms > 0) | (np.nan_to_num(table["grad_nonfinite"]) > 0)
    moves: Bools = np.asarray(other.any(axis=1))
    found = []
    for name, start in starts.items():
        column = table.names.index(name)
        own = turns[start:, column]
        had_one = bool((norms[:start, column] > 0).any())
        if had_one and not moves[start:][own].any() and moves[start:][~own].any():
            found.append(name)
    return found


def _is_solved(run: Run, loss: Progress) -> bool:
    """Whether the loss itself sends nothing back: a hinge that is met, an error of zero.

    To the output of a net that is dead inside, the loss still sends its gradient.
    """
    modules = run.modules
    if "(root)" not in modules.names:
        return loss.verdict is LossVerdict.CONVERGED
    root = [modules.names.index("(root)")]
    return bool(at_last(modules["output_grad_norm"][:, root])[0, 0] == 0)


def _severity(
    run: Run, loss: Progress, used: list[str], cut_off: list[str], limits: Limits
) -> Severity:
    levels = [Severity.INFO]
    if cut_off:
        # They stand still while others move, whosever the loss is.
        levels.append(Severity.ERROR if loss.failed else Severity.WARNING)
    if others := [name for name in used if name not in cut_off]:
        portion = trainable_share(run, np.isin(run.parameters.names, others))
        levels.append(_of_a_part(loss, portion, limits))
    return max(levels)


def _of_a_part(loss: Progress, portion: float, limits: Limits) -> Severity:
    if LossVerdict.CONVERGED in {loss.verdict, loss.before} and portion < limits.majority:
        return Severity.INFO
    learning = loss.verdict is LossVerdict.LEARNING
    if portion >= (limits.all_but_all if learning else limits.majority):
        return Severity.ERROR
    if learning and portion < limits.negligible:
        return Severity.INFO
    return Severity.ERROR if loss.failed else Severity.WARNING


def _reason(used: list[str], cut_off: list[str], dead: list[str]) -> str:
    if used and dead:
        return f"; every unit of {listed(dead)} is zero"
    if cut_off:
        return ", while what another optimizer steps still gets one"
    return "" if used else "; the loss does not use these layers"


def _dead_activations(run: Run) -> list[str]:
    """The activations all of whose units are dead when they were last measured."""
    dead = run.modules["dead_unit_fraction"]
    if not dead.size:
        return []
    return [
        entity.name
        for entity, share in zip(run.modules.entities, at_last(dead)[0], strict=True)
        if share == 1 and entity.group == "activation"
    ]


def _remedies(*, dead: bool, cut_off: bool) -> tuple[str, ...]:
    revive = (
        "Revive the units: zero or small positive biases, He initialization, a lower learning "
        "rate, or nn.LeakyReLU in place of nn.ReLU.",
    )
    lost = (
        "Of two networks that train against each other the other has won: a non-saturating loss, "
        "or fewer and smaller steps for the winner, leave this one a gradient.",
    )
    return (
        *(revive if dead else ()),
        *(lost if cut_off else ()),
        "Check that the loss depends on these layers: a softmax over one unit, a clamp outside "
        "its range, argmax or rounding have no gradient.",
        "In half precision, use a GradScaler or bfloat16: small gradients become zero.",
    )
