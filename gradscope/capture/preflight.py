"""A look at a model before it is trained: some forwards and backwards on a copy."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradscope.analysis.analyzer import analyze
from gradscope.analysis.config import configured_rules
from gradscope.analysis.report import Report
from gradscope.capture.arguments import check_model, checked_optimizers
from gradscope.capture.names import unwrapped
from gradscope.capture.scope import watch
from gradscope.capture.trial import (
    LossFunction,
    applied,
    checked,
    cloned,
    copied,
    noted,
    same_gradients,
    same_random_numbers,
)
from gradscope.record import Run, Table

# What was seen once may be chance, as dropout is; most rules ask for three steps. Those that ask
# for more want to see what the first updates make of it, as of a branch that begins at zero.
_PASSES = 3
# Rules on what steps do: before training there are none.
_ON_STEPS = ("GS005", "GS006", "GS007", "GS010", "GS2", "GS4")


def preflight(
    model: nn.Module,
    batch: Any,
    loss_fn: LossFunction | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    *,
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
) -> Report:
    """What can be said of a model before it is trained, from three forwards and backwards.

    They run on a copy of the model, in the mode in which it is: of the model, its gradients, the
    optimizer, the batch and the random numbers nothing changes by one bit. No step is taken. Takes
    the memory of another model and its gradients. Forward hooks of your own are copied with the
    model, and run.

    batch: a tuple or list (inputs…, target) for `loss_fn(model(*inputs), target)`; a mapping for
        `model(**batch)`; on the model's device. Without loss_fn the output has the loss, as
        transformers' does: `.loss`, `["loss"]`, or itself; then all of a tuple are inputs. Dead
        units are told from quiet ones by 256 samples or more.
    loss_fn: a function or module that returns one number; of a mapping `loss_fn(output, batch)`.
    optimizer: the optimizer or optimizers that will train the model, which are asked for the
        parameters that they hold.
    forward: in place of all that `forward(model, batch)`, which returns the loss: mixed precision,
        several calls, losses that are added. Use the model that it is given.

    The rules are those that the project asks for; those on what steps do are left out. Raises
    ConfigError for a model that can't be copied, a batch of another kind, or a loss that is not
    one number with a gradient; what model, loss_fn or forward raise is raised, with a note.
    """
    check_model(model)
    optimizers = checked_optimizers(model, optimizer)
    core = unwrapped(model)
    with ExitStack() as afterwards:
        afterwards.enter_context(same_random_numbers(core))
        afterwards.enter_context(same_gradients(core))
        afterwards.enter_context(torch.enable_grad())
        made = copied(core)
        lossy = copied(loss_fn) if isinstance(loss_fn, nn.Module) else loss_fn
        run = _record(made, _AtRest.of(optimizers, core, made), cloned(batch), lossy, forward)
    rules = [rule for rule in configured_rules() if not rule.code.startswith(_ON_STEPS)]
    return analyze(run, rules)


def _record(
    model: nn.Module,
    optimizers: Sequence[Optimizer] | None,
    batch: Any,
    loss_fn: LossFunction | None,
    forward: Callable[[nn.Module, Any], Tensor] | None,
) -> Run:
    criterion = loss_fn if isinstance(loss_fn, nn.Module) and forward is None else None
    with watch(model, optimizers, criterion, every=1) as scope:
        for _ in range(_PASSES):
            model.zero_grad()
            with noted("preflight", batch):
                # A model may change its input in place.
                given = cloned(batch)
                if forward is not None:
                    loss = forward(model, given)
                else:
                    output, target, loss = applied(model, given, loss_fn)
                    if criterion is None:
                        scope.log(output=output, target=target)
                loss = checked(loss)
                if criterion is None:
                    scope.log(loss=loss)
                loss.backward()
            for optimizer in optimizers or ():
                optimizer.step()
            if optimizers is None:
                scope.step()
    return _without_steps(scope.run())


class _AtRest(Optimizer):
    """Holds of a model's copy what another optimizer holds of the model; its step does nothing."""

    def __init__(self, like: Optimizer, copies: Mapping[int, nn.Parameter]) -> None:
        groups = [
            {
                **{key: value for key, value in group.items() if key != "param_names"},
                "params": [copies[id(p)] for p in group["params"] if id(p) in copies],
            }
            for group in like.param_groups
        ]
        super().__init__(groups, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing, between torch's hooks."""

    @staticmethod
    def of(
        optimizers: Sequence[Optimizer] | None, model: nn.Module, made: nn.Module
    ) -> list[Optimizer] | None:
        """One for each, under its name."""
        if optimizers is None:
            return None
        pairs = zip(model.parameters(), made.parameters(), strict=True)
        copies = {id(parameter): copied for parameter, copied in pairs}
        return [type(type(like).__name__, (_AtRest,), {})(like, copies) for like in optimizers]


def _without_steps(run: Run) -> Run:
    """The run without what it can't know: the weights rest, and every batch is the same."""
    return replace(
        run,
        parameters=_masked(run.parameters, ("update_", "grad_previous_cosine", "epsilon_share")),
        signals=_masked(run.signals, ("repeated",)),
        meta={**run.meta, "log_dir": None, "preflight": True},
    )


def _masked(table: Table, beginnings: tuple[str, ...]) -> Table:
    values = table.values.copy()
    values[[name.startswith(beginnings) for name in table.quantities]] = np.nan
    return replace(table, values=values)
