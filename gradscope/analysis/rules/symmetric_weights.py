"""GS105 symmetric-weights."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradscope.analysis.finding import Evidence, Finding, Severity
from gradscope.analysis.harm import LossVerdict, Progress, progress
from gradscope.analysis.layers import module_of
from gradscope.analysis.robust import Bools, measured, since
from gradscope.analysis.rule import UnjudgedError, rule
from gradscope.analysis.updates import held_weights
from gradscope.analysis.words import count, layer_in_words, number, share
from gradscope.record import Run


@dataclass(frozen=True, slots=True)
class Limits:
    """When a weight counts as symmetric."""

    # Rows that equal another to the bit: of random ones there are none, of a constant matrix
    # all. In between lie weights of which whole rows were pruned to zero.
    duplicates: float = 0.9
    # Rows that start alike part within a step or two if anything tells them apart.
    min_measurements: int = 5


# Layers whose rows are units.
_LAYERS = frozenset({"linear", "convolution"})


@rule(
    "GS105",
    name="symmetric-weights",
    requires=("parameters.weight_norm",),
    limits=Limits(),
)
def symmetric_weights(run: Run, limits: Limits) -> Iterator[Finding]:
    """The units of a layer are copies of each other, and stay so.

    ## What it measures
    The share of rows of each hidden weight matrix that equal another row to the bit: nine in ten
    or more, in all of the last measurements, at least five of them, while a gradient arrives.

    ## Why it matters
    Units with the same weights compute the same, get the same gradient, and take the same step.
    A layer of 512 such units can learn what a layer of one can. Nothing breaks the symmetry but
    randomness.

    ## How sure it is
    Certain: rows that are equal to the bit, and get equal gradients, stay equal.

    ## Known limits
    The output layer is not judged: classes that never occur have equal rows. Nor are weights
    that get no gradient, unless they are zero and stay so. A layer of which nine rows in ten were
    pruned to zero looks the same.

    ## Example
    `nn.init.constant_(layer.weight, 0.01)` in every layer. Do instead: PyTorch's default, or
    `nn.init.kaiming_normal_(layer.weight, nonlinearity='relu')`; constants are for biases.

    ## References
    Goodfellow, Bengio & Courville 2016, section 8.4, on breaking symmetry; Nikanjam et al. 2021
    (NeuraLint, TOSEM), rule on constant initialization; Braiek & Khomh 2023 (TheDeepChecker,
    TOSEM), on weights without variance.
    """
    table = run.parameters
    # Rows of zeros are all alike; LoRA's B and zero-initialized branches leave that in a step.
    zero = table["weight_norm"] == 0
    duplicates = np.where(zero, 1.0, table["duplicate_rows_fraction"].astype(np.float64))
    if not measured(duplicates).any():
        message = "not measured: parameters.duplicate_rows_fraction"
        raise UnjudgedError(message)
    outputs = _output_layers(run)
    onsets: dict[int, int] = {}
    for column in np.flatnonzero(held_weights(run)):
        known = np.flatnonzero(measured(duplicates[:, column]))
        begin = since(duplicates[known, column] >= limits.duplicates)
        alike = known[begin:]
        reached = (zero[alike, column] | (table["grad_norm"][alike, column] > 0)).any()
        if alike.size < limits.min_measurements or not reached:
            continue
        if module_of(table.names[column]) not in outputs:
            onsets[int(column)] = int(alike[0])
    if not onsets:
        return
    columns = sorted(onsets, key=lambda column: table.entities[column].depth)
    first = columns[0]
    last = int(table.steps[-1])
    loss = progress(run)
    begin = int(table.steps[min(onsets.values())])
    when = "from the first step on" if begin == int(table.steps[0]) else f"since step {begin}"
    at_last = [float(duplicates[measured(duplicates[:, c]), c][-1]) for c in columns]
    also = f" (and of {count(len(columns) - 1, 'other weight')})" if len(columns) > 1 else ""
    name = layer_in_words(module_of(table.names[first]))
    yield symmetric_weights.finding(
        _severity(loss),
        module_of(table.names[first]),
        f"{share(at_last[0])} of the rows of {table.names[first]}{also} are copies of another row, "
        f"{when}: all these units learn the same; {loss.words}.",
        evidence=tuple(
            Evidence(
                "duplicate_rows_fraction",
                table.names[column],
                int(table.steps[onsets[column]]),
                last,
                observed,
                limits.duplicates,
            )
            for column, observed in list(zip(columns, at_last, strict=True))[:3]
        ),
        remedies=(
            f"Initialize {name} at random: nn.init.kaiming_normal_(weight, nonlinearity='relu') "
            "behind ReLU, nn.init.xavier_normal_(weight) behind tanh; "
            f"its rms is {number(float(table['weight_rms'][0, first]))} now, in all rows.",
            "Constants are for biases (0) and the scales of norms (1) only.",
        ),
    )


def _output_layers(run: Run) -> frozenset[str]:
    """The last layer with weights that runs; where none was seen, the last parameter's."""
    layers = [entity for entity in run.modules.entities if entity.group in _LAYERS]
    if layers:
        return frozenset({max(layers, key=lambda entity: entity.depth).name.partition("#")[0]})
    weights: Bools = held_weights(run)
    held = [run.parameters.entities[index] for index in np.flatnonzero(weights)]
    return frozenset({module_of(max(held, key=lambda entity: entity.depth).name)} if held else ())


def _severity(loss: Progress) -> Severity:
    if LossVerdict.CONVERGED in {loss.verdict, loss.before}:
        return Severity.INFO
    # The units are lost whatever the loss does.
    return Severity.ERROR if loss.failed else Severity.WARNING
