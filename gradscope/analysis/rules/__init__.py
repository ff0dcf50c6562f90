"""The rules: one file each, named by what is wrong. Here in the order of their codes."""

from typing import Any

from gradscope.analysis.rule import Rule
from gradscope.analysis.rules.adam_epsilon_dominates import adam_epsilon_dominates
from gradscope.analysis.rules.attention_collapse import attention_collapse
from gradscope.analysis.rules.attention_logit_growth import attention_logit_growth
from gradscope.analysis.rules.batchnorm_statistics_stale import batchnorm_statistics_stale
from gradscope.analysis.rules.clipping_dominates import clipping_dominates
from gradscope.analysis.rules.constant_output import constant_output
from gradscope.analysis.rules.constant_target import constant_target
from gradscope.analysis.rules.dead_relu import dead_relu
from gradscope.analysis.rules.dropout_dominates import dropout_dominates
from gradscope.analysis.rules.eval_mode_in_training import eval_mode_in_training
from gradscope.analysis.rules.exploding_gradient import exploding_gradient
from gradscope.analysis.rules.exploding_through_time import exploding_through_time
from gradscope.analysis.rules.gradient_ascent import gradient_ascent
from gradscope.analysis.rules.gradient_bottleneck import gradient_bottleneck
from gradscope.analysis.rules.gradient_norm_growth import gradient_norm_growth
from gradscope.analysis.rules.gradient_spike import gradient_spike
from gradscope.analysis.rules.gradients_not_cleared import gradients_not_cleared
from gradscope.analysis.rules.half_precision_overflow import half_precision_overflow
from gradscope.analysis.rules.half_precision_underflow import half_precision_underflow
from gradscope.analysis.rules.hidden_softmax import hidden_softmax
from gradscope.analysis.rules.initial_loss_off import initial_loss_off
from gradscope.analysis.rules.invalid_input import invalid_input
from gradscope.analysis.rules.learning_rate_collapsed import learning_rate_collapsed
from gradscope.analysis.rules.linear_network import linear_network
from gradscope.analysis.rules.loss_diverging import loss_diverging
from gradscope.analysis.rules.loss_not_decreasing import loss_not_decreasing
from gradscope.analysis.rules.loss_oscillating import loss_oscillating
from gradscope.analysis.rules.loss_scale_collapse import loss_scale_collapse
from gradscope.analysis.rules.loss_shape_mismatch import loss_shape_mismatch
from gradscope.analysis.rules.missing_gradient import missing_gradient
from gradscope.analysis.rules.never_updated import never_updated
from gradscope.analysis.rules.non_finite_activation import non_finite_activation
from gradscope.analysis.rules.non_finite_gradient import non_finite_gradient
from gradscope.analysis.rules.non_finite_loss import non_finite_loss
from gradscope.analysis.rules.not_in_optimizer import not_in_optimizer
from gradscope.analysis.rules.nothing_recorded import nothing_recorded
from gradscope.analysis.rules.output_activation_mismatch import output_activation_mismatch
from gradscope.analysis.rules.poor_initialization import poor_initialization
from gradscope.analysis.rules.repeated_batch import repeated_batch
from gradscope.analysis.rules.representation_collapse import representation_collapse
from gradscope.analysis.rules.saturated_activation import saturated_activation
from gradscope.analysis.rules.stale_optimizer_parameters import stale_optimizer_parameters
from gradscope.analysis.rules.symmetric_weights import symmetric_weights
from gradscope.analysis.rules.unscaled_input import unscaled_input
from gradscope.analysis.rules.unscaled_target import unscaled_target
from gradscope.analysis.rules.update_too_large import update_too_large
from gradscope.analysis.rules.update_too_small import update_too_small
from gradscope.analysis.rules.vanishing_gradient import vanishing_gradient
from gradscope.analysis.rules.vanishing_through_time import vanishing_through_time
from gradscope.analysis.rules.weight_decay_dominates import weight_decay_dominates
from gradscope.analysis.rules.zero_gradient import zero_gradient

BUILTIN: tuple[Rule[Any], ...] = (
    nothing_recorded,
    missing_gradient,
    zero_gradient,
    not_in_optimizer,
    never_updated,
    gradients_not_cleared,
    gradient_ascent,
    stale_optimizer_parameters,
    eval_mode_in_training,
    repeated_batch,
    vanishing_gradient,
    exploding_gradient,
    gradient_bottleneck,
    poor_initialization,
    symmetric_weights,
    vanishing_through_time,
    exploding_through_time,
    gradient_spike,
    loss_diverging,
    loss_not_decreasing,
    clipping_dominates,
    loss_oscillating,
    gradient_norm_growth,
    learning_rate_collapsed,
    dead_relu,
    saturated_activation,
    constant_output,
    linear_network,
    hidden_softmax,
    attention_collapse,
    attention_logit_growth,
    batchnorm_statistics_stale,
    dropout_dominates,
    representation_collapse,
    update_too_large,
    update_too_small,
    weight_decay_dominates,
    adam_epsilon_dominates,
    non_finite_loss,
    non_finite_activation,
    non_finite_gradient,
    half_precision_underflow,
    half_precision_overflow,
    loss_scale_collapse,
    unscaled_input,
    unscaled_target,
    initial_loss_off,
    output_activation_mismatch,
    loss_shape_mismatch,
    constant_target,
    invalid_input,
)
