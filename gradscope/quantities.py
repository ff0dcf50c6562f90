"""The catalogue of what is measured: name, symbol, unit, meaning, table."""

from dataclasses import dataclass
from typing import Literal

TableName = Literal["parameters", "modules", "signals"]


@dataclass(frozen=True, slots=True)
class Quantity:
    """One measured number per entity and recorded step.

    In every quantity NaN means "not measured". Non-finite entries of a tensor are counted in
    their own quantity and left out of all others.
    """

    name: str
    symbol: str
    unit: str
    meaning: str
    table: TableName


def _parameter(name: str, symbol: str, unit: str, meaning: str) -> Quantity:
    return Quantity(name, symbol, unit, meaning, "parameters")


def _module(name: str, symbol: str, unit: str, meaning: str) -> Quantity:
    return Quantity(name, symbol, unit, meaning, "modules")


def _signal(name: str, symbol: str, unit: str, meaning: str) -> Quantity:
    return Quantity(name, symbol, unit, meaning, "signals")


PARAMETERS: tuple[Quantity, ...] = (
    _parameter(
        "grad_norm",
        "‖g‖",
        "loss/weight",
        "2-norm of the gradient that the optimizer was given",
    ),
    _parameter("grad_rms", "rms(g)", "loss/weight", "root mean square of its entries"),
    _parameter("grad_mean", "mean(g)", "loss/weight", "mean of its entries"),
    _parameter("grad_std", "std(g)", "loss/weight", "population standard deviation of its entries"),
    _parameter("grad_absmax", "max|g|", "loss/weight", "largest magnitude among its entries"),
    _parameter("grad_zero_fraction", "P(g=0)", "share", "share of entries that are exactly zero"),
    _parameter(
        "grad_touched_fraction",
        "touched",
        "share",
        "share of an embedding's rows in which its gradient has an entry other than zero",
    ),
    _parameter("grad_nonfinite", "#NaN,Inf", "count", "number of entries that are NaN or infinite"),
    _parameter(
        "grad_underflow_fraction",
        "P(g subnormal)",
        "share",
        "share of finite entries that are too small for their dtype's full precision, but not zero "
        "(of large parameters, of a sample)",
    ),
    _parameter("grad_missing", "g=None", "0 or 1", "1 where .grad was None when it was to be read"),
    _parameter("weight_norm", "‖w‖", "weight", "2-norm of the parameter before the update"),
    _parameter(
        "weight_rms", "rms(w)", "weight", "root mean square of its entries before the update"
    ),
    _parameter("update_norm", "‖Δw‖", "weight", "2-norm of the change that the step made"),
    _parameter("update_ratio", "‖Δw‖/‖w‖", "ratio", "size of the change relative to the parameter"),
    _parameter(
        "update_gradient_cosine",
        "cos(Δw,g)",
        "-1 to 1",
        "angle of the change with the gradient; plain descent is -1",
    ),
    _parameter(
        "update_lost_fraction",
        "P(Δw=0|g≠0)",
        "share",
        "share of the entries with a gradient that the step left as they were, to the bit: the "
        "change is below the weight's dtype, or the learning rate is zero (of large parameters, "
        "of a sample)",
    ),
    _parameter(
        "grad_previous_cosine",
        "cos(g,g₋₁)",
        "-1 to 1",
        "angle of the gradient with that of the step before, where both were recorded (on a "
        "fixed sample of coordinates)",
    ),
    _parameter(
        "grad_balance",
        "⟨∂L/∂b,Σδ⟩/‖Σδ‖²",
        "ratio",
        "a bias's gradient along the sum of the gradients that arrived at its layer's output in "
        "this step: 1 where it is that sum, -1 where it was negated, less where it was scaled down",
    ),
    _parameter(
        "grad_balance_cosine",
        "cos(∂L/∂b,Σδ)",
        "-1 to 1",
        "the angle between the two: where it is not 1 or -1 the gradient holds something else",
    ),
    _parameter(
        "duplicate_rows_fraction",
        "duplicates",
        "share",
        "share of a matrix's rows, of a sample of 64, that equal another row to the bit",
    ),
    _parameter(
        "epsilon_share",
        "P(√v̂<ε)",
        "share",
        "share of a sample of coordinates in which Adam's √v̂ is below its ε",
    ),
    _parameter("requires_grad", "trainable", "0 or 1", "1 where the parameter is trainable"),
    _parameter(
        "in_optimizer",
        "optimized",
        "0 or 1",
        "1 where a watched optimizer holds the parameter",
    ),
    _parameter(
        "stale_in_optimizer",
        "stale",
        "0 or 1",
        "1 where the optimizer that stepped holds what this parameter was before it was replaced",
    ),
)

MODULES: tuple[Quantity, ...] = (
    _module("output_mean", "mean(y)", "activation", "mean of the output's entries"),
    _module(
        "output_std",
        "std(y)",
        "activation",
        "population standard deviation of the output's entries",
    ),
    _module("output_rms", "rms(y)", "activation", "root mean square of the output's entries"),
    _module("output_absmax", "max|y|", "activation", "largest magnitude in the output"),
    _module(
        "output_zero_fraction",
        "P(y=0)",
        "share",
        "share of output entries that are exactly zero",
    ),
    _module(
        "output_nonfinite",
        "#NaN,Inf",
        "count",
        "number of output entries that are NaN or infinite",
    ),
    _module(
        "output_saturated_fraction",
        "saturated",
        "share",
        "share of outputs where the derivative is below 6 % of its largest (bounded activations)",
    ),
    _module(
        "dead_unit_fraction",
        "dead",
        "share",
        "share of units that were zero for each of the last N recorded samples",
    ),
    _module(
        "output_sample_similarity",
        "cos(yᵢ,yⱼ)",
        "-1 to 1",
        "mean cosine of the outputs of two different samples of the batch (of a sample of 64)",
    ),
    _module(
        "training",
        "training",
        "0 or 1",
        "1 where the module was in training mode when it ran, 0 in evaluation mode (of modules "
        "that behave differently: dropout and batch norms)",
    ),
    _module(
        "buffer_norm",
        "‖running‖",
        "activation",
        "2-norm of a batch norm's running mean and variance before the step",
    ),
    _module(
        "attention_logit_max",
        "max(q·k)",
        "logit",
        "largest logit of attention, scaled and masked, as its softmax was given them",
    ),
    _module(
        "attention_logit_bound",
        "max‖q‖·max‖k‖/√d",
        "logit",
        "upper bound of the largest logit, where a fused kernel shows none",
    ),
    _module(
        "attention_entropy",
        "H(attention)",
        "nats",
        "mean over the queries of the entropy of attention's weights, over the keys it may see",
    ),
    _module(
        "output_grad_norm",
        "‖∂L/∂y‖",
        "loss/activation",
        "2-norm of the gradient arriving at the output",
    ),
    _module(
        "output_grad_rms",
        "rms(∂L/∂y)",
        "loss/activation",
        "root mean square of that gradient's entries",
    ),
    _module(
        "output_grad_absmax",
        "max|∂L/∂y|",
        "loss/activation",
        "largest magnitude in that gradient",
    ),
    _module(
        "output_grad_zero_fraction",
        "P(∂L/∂y=0)",
        "share",
        "share of that gradient's entries that are exactly zero",
    ),
    _module(
        "output_grad_nonfinite",
        "#NaN,Inf",
        "count",
        "number of that gradient's entries that are NaN or infinite",
    ),
    _module(
        "time_steps",
        "T",
        "count",
        "time steps of the longest sequence; of a cell, its uses in a forward; mean over forwards",
    ),
    _module(
        "time_grad_first",
        "‖∂L/∂x₁‖",
        "loss/activation",
        "2-norm of the total gradient at each sequence's first time step, through all later ones: "
        "of a recurrent layer's input; of a cell, of its output. 0: less than its dtype holds",
    ),
    _module(
        "time_grad_middle",
        "‖∂L/∂x_T/2‖",
        "loss/activation",
        "the same at the middle time step",
    ),
    _module(
        "time_grad_last",
        "‖∂L/∂x_T‖",
        "loss/activation",
        "the same at the last time step",
    ),
    _module(
        "time_grad_zero_fraction",
        "P(∂L/∂x=0)",
        "share",
        "share of exact zeros in a recurrent layer's total gradient, over all time steps",
    ),
    _module(
        "time_grad_nonfinite",
        "#NaN,Inf",
        "count",
        "number of NaN or infinite entries in a recurrent layer's total gradient, over all steps",
    ),
    _module(
        "output_grad_underflow_fraction",
        "P(∂L/∂y subnormal)",
        "share",
        "share of that gradient's finite entries, as the backward held them, that are too small "
        "for float16's or bfloat16's full precision, but not zero (of a sample)",
    ),
)

SIGNALS: tuple[Quantity, ...] = (
    _signal("mean", "mean(x)", "signal", "mean of the signal's entries"),
    _signal("std", "std(x)", "signal", "population standard deviation of its entries"),
    _signal("rms", "rms(x)", "signal", "root mean square of its entries"),
    _signal("absmax", "max|x|", "signal", "largest magnitude among its entries"),
    _signal("nonfinite", "#NaN,Inf", "count", "number of entries that are NaN or infinite"),
    _signal("min", "min(x)", "signal", "smallest entry"),
    _signal("max", "max(x)", "signal", "largest entry"),
    _signal(
        "sample_std",
        "std over samples",
        "signal",
        "standard deviation over the samples of the batch, rms over the rest: 0 where all samples "
        "are the same",
    ),
    _signal(
        "feature_std_min",
        "min σ_feature",
        "signal",
        "smallest standard deviation over the samples of any feature (dimension 1)",
    ),
    _signal(
        "feature_std_max",
        "max σ_feature",
        "signal",
        "largest standard deviation over the samples of any feature (dimension 1)",
    ),
    _signal(
        "distinct",
        "#values",
        "count",
        "number of distinct values (of a sample of 4,096 entries)",
    ),
    _signal(
        "repeated",
        "repeated",
        "0 or 1",
        "1 where the entries are those of the step before, to the bit, where both were recorded "
        "(of a sample of 4,096 entries)",
    ),
)

CATALOGUE: dict[TableName, tuple[Quantity, ...]] = {
    "parameters": PARAMETERS,
    "modules": MODULES,
    "signals": SIGNALS,
}

# What the magnitudes of entries are counted of, and which table lists whose they are. Gradients'
# are from level "full" on, the others at level "deep".
Magnitudes = Literal["grad", "weight", "update", "output", "output_grad"]
MAGNITUDES: dict[Magnitudes, TableName] = {
    "grad": "parameters",
    "weight": "parameters",
    "update": "parameters",
    "output": "modules",
    "output_grad": "modules",
}
