"""GS306 attention-collapse."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradscope.analysis.finding import Evidence, Finding, Severity
from gradscope.analysis.harm import progress
from gradscope.analysis.lasting import lasting
from gradscope.analysis.robust import F64, measured
from gradscope.analysis.rule import rule
from gradscope.analysis.words import layer_in_words, number
from gradscope.record import Entity, Run


@dataclass(frozen=True, slots=True)
class Limits:
    """When attention counts as collapsed; entropies in nats."""

    # e**0.1 = 1.1 keys: each query looks at a single one. Entropy collapse is "pathologically
    # low entropy" (Zhai et al. 2023), without a number.
    one_key: float = 0.1
    # The mean over all keys: 1 % less than the largest entropy there can be …
    all_keys: float = 0.99
    # … after there had been a choice. At the start attention is uniform in every model.
    choice: float = 0.9
    # A single layer may do so on purpose (a copy of the token before); half of them don't.
    share_of_layers: float = 0.5
    # A fifth of the records, as in GS003, and not fewer than a spike has.
    min_share_of_steps: float = 0.2
    min_steps: int = 5


@dataclass(frozen=True, slots=True)
class _Collapse:
    entity: Entity
    onset: int
    first: float
    last: float
    # The largest entropy there can be, where it is all keys that it looks at.
    most: float | None


@rule("GS306", name="attention-collapse", requires=("modules.attention_entropy",), limits=Limits())
def attention_collapse(run: Run, limits: Limits) -> Iterator[Finding]:
    """Attention looks at one key only, or at all alike: it does not choose any more.

    ## What it measures
    The entropy of attention's weights, the mean over heads and queries, in each attention whose
    softmax is seen: below 0.1 nats (1.1 keys) up to the last records, or at the largest value
    there can be for its number of keys (with or without a causal mask) after it had been lower.

    ## Why it matters
    A softmax that puts everything on one key has no derivative: queries and keys get no gradient,
    and what they look at is what the weights happened to be when it froze. One that spreads over
    all keys hands on their mean, the same for every query.

    ## How sure it is
    Certain as to the entropy. That it holds the training up is likely, where the loss is stuck.

    ## Known limits
    Copying needs attention to one key, and succeeds with it: without a stuck loss it is
    information. A single layer of several is no finding. Fused kernels
    (`scaled_dot_product_attention`) show no weights. Where the number of keys is one, the entropy
    is zero by structure, and not judged.

    ## Example
    AdamW with `lr=0.1` on a small transformer: within some steps the logits are in the thousands,
    each query looks at one key, and the loss stays at that of guessing. Do instead: `lr=3e-3`
    with a warm-up, and a norm on queries and keys.

    ## References
    Zhai et al. 2023 (arXiv:2303.06296), on entropy collapse; Wortsman et al. 2023
    (arXiv:2309.14322), section 3.1; Dong et al. 2021 (arXiv:2103.03404), on rank collapse.
    """
    table = run.modules
    entropies = table["attention_entropy"].astype(np.float64)
    # Over a single key it is always zero: there is no choice to lose.
    judged = [int(column) for column in np.flatnonzero((entropies > 0).any(axis=0))]
    found = [c for column in judged if (c := _collapse(run, column, limits)) is not None]
    for uniform in (False, True):
        layers = [layer for layer in found if (layer.most is not None) == uniform]
        if not layers or len(layers) < limits.share_of_layers * len(judged):
            continue
        worst = min(layers, key=lambda layer: layer.entity.depth)
        loss = progress(run)
        harm = Severity.WARNING if uniform else Severity.ERROR
        yield attention_collapse.finding(
            harm if loss.failed else Severity.INFO,
            worst.entity.name,
            f"{_what(worst)} in {len(layers)} of {len(judged)} attention layers, first in "
            f"{layer_in_words(worst.entity.name)} {_since(run, worst)}; {loss.words}.",
            evidence=tuple(
                Evidence(
                    "attention_entropy",
                    layer.entity.name,
                    int(table.steps[layer.onset]),
                    int(table.steps[-1]),
                    layer.last,
                    limits.one_key if layer.most is None else limits.all_keys * layer.most,
                )
                for layer in layers[:3]
            ),
            remedies=_remedies(worst),
        )


def _collapse(run: Run, column: int, limits: Limits) -> _Collapse | None:
    entity = run.modules.entities[column]
    values: F64 = run.modules["attention_entropy"][:, column].astype(np.float64)
    known = values[measured(values)]
    first, last = float(known[0]), float(known[-1])
    least, share = limits.min_steps, limits.min_share_of_steps
    onset = lasting(values, values <= limits.one_key, least=least, share=share)
    if onset is not None:
        return _Collapse(entity, onset, first, last, None)
    for most in _largest(entity):
        high = (values >= limits.all_keys * most) & (values <= most * (2 - limits.all_keys))
        onset = lasting(values, high, least=least, share=share)
        if onset is not None and known.min() < limits.choice * most:
            return _Collapse(entity, onset, first, last, most)
    return None


def _largest(entity: Entity) -> list[float]:
    """The mean entropies of uniform attention: over all keys, and over those so far."""
    # Only a softmax's own output has the keys as its last dimension.
    if entity.type != "Softmax" or not entity.shape or entity.shape[-1] < 2:  # noqa: PLR2004
        return []
    keys = entity.shape[-1]
    return [math.log(keys), math.lgamma(keys + 1) / keys]


def _what(layer: _Collapse) -> str:
    if layer.most is None:
        keys = number(math.exp(layer.last))
        return f"Queries look at {keys} keys each (entropy {number(layer.last)})"
    return f"Queries look at all keys alike (entropy {number(layer.last)})"


def _since(run: Run, layer: _Collapse) -> str:
    if layer.onset == 0:
        return "from the first step on"
    return (
        f"since step {int(run.modules.steps[layer.onset])} (it was {number(layer.first)} at first)"
    )


def _remedies(layer: _Collapse) -> tuple[str, ...]:
    if layer.most is not None:
        return (
            "Lower the weight decay on queries and keys: weights near zero make every key alike.",
            "Lower the learning rate, or ramp it up: the choice was learned, and lost.",
        )
    return (
        "Lower the learning rate, and ramp it up over the first steps "
        "(torch.optim.lr_scheduler.LinearLR).",
        "Normalize queries and keys (nn.LayerNorm or nn.RMSNorm per head) before their product.",
        "Check the scale of the product: q·k/√d, with d the size of a head.",
    )
