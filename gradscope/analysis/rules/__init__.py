"""The rules: one file each, named by what is wrong. Here in the order of their codes."""

from typing import Any

from gradscope.analysis.rule import Rule
from gradscope.analysis.rules.clipping_dominates import clipping_dominates
from gradscope.analysis.rules.dead_relu import dead_relu
from gradscope.analysis.rules.exploding_gradient import exploding_gradient
from gradscope.analysis.rules.missing_gradient import missing_gradient
from gradscope.analysis.rules.non_finite_gradient import non_finite_gradient
from gradscope.analysis.rules.non_finite_loss import non_finite_loss
from gradscope.analysis.rules.not_in_optimizer import not_in_optimizer
from gradscope.analysis.rules.nothing_recorded import nothing_recorded
from gradscope.analysis.rules.poor_initialization import poor_initialization
from gradscope.analysis.rules.saturated_activation import saturated_activation
from gradscope.analysis.rules.stale_optimizer_parameters import stale_optimizer_parameters
from gradscope.analysis.rules.update_too_large import update_too_large
from gradscope.analysis.rules.update_too_small import update_too_small
from gradscope.analysis.rules.vanishing_gradient import vanishing_gradient
from gradscope.analysis.rules.zero_gradient import zero_gradient

BUILTIN: tuple[Rule[Any], ...] = (
    nothing_recorded,
    missing_gradient,
    zero_gradient,
    not_in_optimizer,
    stale_optimizer_parameters,
    vanishing_gradient,
    exploding_gradient,
    poor_initialization,
    clipping_dominates,
    dead_relu,
    saturated_activation,
    update_too_large,
    update_too_small,
    non_finite_loss,
    non_finite_gradient,
)
