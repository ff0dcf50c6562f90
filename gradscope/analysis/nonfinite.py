"""NaN and infinity: where they were first, and what came before."""

import numpy as np

from gradscope.analysis.flow import operations_of_the_loss
from gradscope.analysis.robust import F64, Bools, measured
from gradscope.analysis.signals import signal
from gradscope.analysis.words import count, listed, number
from gradscope.record import Run, Table

# The largest number of float16.
LARGEST_HALF = 65504.0

# So many records before tell what led to it.
_RECORDS = 20
# An order of magnitude is growth.
_GROWTH = 10.0
# Within a factor of ten of what float16 holds, the next step may be beyond.
_NEAR_HALF = 0.1
# Where instability of attention sets in (Wortsman et al. 2023, arXiv:2309.14322).
_LARGE_LOGIT = 1e4

# Operations whose value or slope is not finite at an end of their range.
_RISKY = {
    "Acos": "an arc cosine",
    "Asin": "an arc sine",
    "Atanh": "an inverse tanh",
    "Div": "a division",
    "Exp": "an exponential",
    "LinalgVectorNorm": "a norm",
    "Log": "a logarithm",
    "Log10": "a logarithm",
    "Log2": "a logarithm",
    "Norm": "a norm",
    "Pow": "a power",
    "Reciprocal": "a division",
    "Rsqrt": "a square root",
    "Sqrt": "a square root",
}


def inner_first(modules: Table, index: int) -> tuple[bool, int]:
    """Order of execution; a container after the layers inside it, whose output it hands on."""
    entity = modules.entities[index]
    return (entity.group == "container", entity.depth)


def nonfinite_inputs(run: Run, step: int) -> float:
    """How many entries of the model's input were NaN or infinite at the step."""
    given = signal(run, "input")
    if given is None:
        return 0.0
    return float(np.nan_to_num(given["nonfinite"][given.steps == step]).sum())


def earliest(table: Table, row: int) -> int:
    """The first step at which what this row shows can have begun: after the record before."""
    return int(table.steps[row - 1]) + 1 if row else int(table.steps[0])


def when(table: Table, row: int) -> str:
    """The step, or the interval in which it must have begun."""
    step, first = int(table.steps[row]), earliest(table, row)
    if first == step:
        return f"at step {step}"
    return f"at step {step} (it began after step {first - 1}, the record before)"


def risky_operations(run: Run) -> str:
    """What between the model's output and the loss may leave the numbers; "" if nothing."""
    names = [
        _RISKY[op]
        for op, saved in operations_of_the_loss(run)
        if op in _RISKY and not _is_whole(saved.get("exponent"))
    ]
    return " and ".join(dict.fromkeys(names))


def _is_whole(exponent: object) -> bool:
    """Whether a power, as a square, is smooth everywhere."""
    return isinstance(exponent, (int, float)) and exponent >= 1 and exponent == int(exponent)


def in_half(run: Run) -> Bools:
    """Per module: whether its output's gradient was float16 or bfloat16."""
    known = measured(run.modules["output_grad_underflow_fraction"])
    return np.asarray(known.any(axis=0))


def preceding(run: Run, row: int, column: int) -> str:
    """What the module's output did before the row, as a clause; "" if nothing to speak of."""
    table = run.modules
    begin = max(0, row - _RECORDS)
    sizes: F64 = table["output_absmax"][begin:row, column].astype(np.float64)
    known = sizes[measured(sizes)]
    clauses = []
    if known.size and in_half(run)[column] and 1 >= known[-1] / LARGEST_HALF >= _NEAR_HALF:
        clauses.append(
            f"its largest entry had reached {number(float(known[-1]))}, and float16 ends at 65,504"
        )
    elif known.size and known[-1] >= _GROWTH * known.min() > 0:
        growth = number(float(known[-1] / known.min()))
        clauses.append(
            f"its largest entry had grown {growth}-fold, to {number(float(known[-1]))}, within "
            f"{count(known.size, 'record')}"
        )
    before = slice(max(0, row - 1), row)
    logits = np.nan_to_num(table["attention_logit_max"][before])
    if logits.size and logits.max() >= _LARGE_LOGIT:
        clauses.append(f"logits of attention had reached {number(float(logits.max()))}")
    return f"; {listed(clauses)}" if clauses else ""
