"""GS307 attention-logit-growth."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradscope.analysis.finding import Evidence, Finding, Severity
from gradscope.analysis.harm import Progress, progress, severity
from gradscope.analysis.lasting import lasting
from gradscope.analysis.robust import F64, measured
from gradscope.analysis.rule import UnjudgedError, rule
from gradscope.analysis.words import layer_in_words, number
from gradscope.record import Entity, Run


@dataclass(frozen=True, slots=True)
class Limits:
    """When attention's logits count as grown."""

    # A difference of 100 leaves the second key e**-100. Kimi K2's QK-Clip (arXiv:2507.20534)
    # keeps them below 100; small healthy models stay below 30.
    logit: float = 1e2
    # Where instability sets in (Wortsman et al. 2023, about 1e4; ViT-22B diverged at 5e4).
    extreme: float = 1e4
    # Large from the start is an initialization; an order of magnitude more is growth.
    growth: float = 10.0
    # Attention that still spreads over more than half of what it did is not frozen by logits.
    entropy_left: float = 0.5
    # A fifth of the records, as in GS003, and not fewer than a spike has.
    min_share_of_steps: float = 0.2
    min_steps: int = 3


@dataclass(frozen=True, slots=True)
class _Grown:
    entity: Entity
    quantity: str
    onset: int
    first: float
    last: float
    frozen: bool


@rule("GS307", name="attention-logit-growth", limits=Limits())
def attention_logit_growth(run: Run, limits: Limits) -> Iterator[Finding]:
    """The products of queries and keys grow until attention can't move any more.

    ## What it measures
    The largest logit that each attention's softmax is given; of fused kernels, which show none,
    its upper bound max‖q‖·max‖k‖/√d. Above 100 up to the last records, and ten times what it was
    at first, or above 100 from the first step on.

    ## Why it matters
    Softmax turns differences into ratios: with logits that far apart each query looks at one key,
    and its derivative is zero. Queries and keys then get no gradient but the rest of the network
    trains on; the loss rises, or stays where it is. In half precision the logits overflow.

    ## How sure it is
    Certain where the softmax is seen; possible where only a bound is known. That it does harm
    is likely, where the loss has suffered.

    ## Known limits
    A large logit with a large one beside it does no harm: without a stuck loss it is
    information, up to 10,000. The upper bound may be far above the largest logit. Logits inside
    compiled models are not seen.

    ## Example
    AdamW with `lr=0.1` on a small transformer: logits of 7,000 to 45,000, and a loss that stays at
    that of guessing. Do instead: `lr=3e-3` with a warm-up, and a norm on queries and keys.

    ## References
    Wortsman et al. 2023 (arXiv:2309.14322), section 3.1; Dehghani et al. 2023 (ViT-22B,
    arXiv:2302.05442), section 2.2; Kimi Team 2025 (arXiv:2507.20534), on QK-Clip.
    """
    columns = dict(_logits(run))
    if not columns:
        message = "no attention was seen"
        raise UnjudgedError(message)
    found = [
        grown
        for column, quantity in columns.items()
        if (grown := _grown(run, column, quantity, limits)) is not None
    ]
    if not found:
        return
    worst = max(found, key=lambda layer: (layer.last, -layer.entity.depth))
    loss = progress(run)
    steps = run.modules.steps
    bound = "may be up to" if worst.quantity == "attention_logit_bound" else "reach"
    history = (
        f"above {number(limits.logit)} from the first step on"
        if worst.onset == 0
        else f"above {number(limits.logit)} since step {int(steps[worst.onset])}, and "
        f"{number(worst.first)} at first"
    )
    more = f" (and in {len(found) - 1} more)" if len(found) > 1 else ""
    yield attention_logit_growth.finding(
        _severity(loss, found, worst, limits),
        worst.entity.name,
        f"Logits of attention in {layer_in_words(worst.entity.name)}{more} {bound} "
        f"{number(worst.last)}, {history}; {loss.words}.",
        evidence=tuple(
            Evidence(
                layer.quantity,
                layer.entity.name,
                int(steps[layer.onset]),
                int(steps[-1]),
                layer.last,
                limits.logit,
            )
            for layer in sorted(found, key=lambda layer: (-layer.last, layer.entity.depth))[:3]
        ),
        remedies=(
            "Lower the learning rate, and ramp it up over the first steps "
            "(torch.optim.lr_scheduler.LinearLR).",
            f"Normalize queries and keys in {layer_in_words(worst.entity.name.partition('/')[0])} "
            "(nn.LayerNorm or nn.RMSNorm per head) before their product.",
            "Check the scale of the product: q·k/√d, with d the size of a head.",
        ),
    )


def _logits(run: Run) -> Iterator[tuple[int, str]]:
    """The columns of attention, and what is known of each: the bound gives way to the logits."""
    for quantity in ("attention_logit_bound", "attention_logit_max"):
        for column in np.flatnonzero(measured(run.modules[quantity]).any(axis=0)):
            yield int(column), quantity


def _grown(run: Run, column: int, quantity: str, limits: Limits) -> _Grown | None:
    values: F64 = run.modules[quantity][:, column].astype(np.float64)
    onset = lasting(
        values,
        values >= limits.logit,
        least=limits.min_steps,
        share=limits.min_share_of_steps,
    )
    if onset is None:
        return None
    seen = values[measured(values)]
    # A single record may be an exception.
    first = float(np.median(seen[: limits.min_steps]))
    last = float(np.median(seen[-limits.min_steps :]))
    if first < limits.logit and last < limits.growth * abs(first):
        return None
    entropy = run.modules["attention_entropy"][:, column]
    left = entropy[measured(entropy)]
    frozen = not left.size or bool(left[-1] <= limits.entropy_left * left[0])
    return _Grown(run.modules.entities[column], quantity, onset, first, last, frozen)


def _severity(loss: Progress, found: list[_Grown], worst: _Grown, limits: Limits) -> Severity:
    if not any(layer.frozen for layer in found):
        return Severity.INFO
    # A bound that is large proves nothing of the logits.
    certain = worst.quantity == "attention_logit_max"
    return severity(loss, still=False, extreme=certain and worst.last >= limits.extreme)
