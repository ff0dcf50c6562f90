"""Functional activations and attention: calls in the model's forward, seen while it runs.

A call is an entity like a module's use, named after the innermost module of the watched model
that makes it, the function, and which of that module's calls of the function it is in a forward
of the model: `layers.3/relu#0`.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn

from gradscope.capture import attention
from gradscope.capture.activations import FUNCTIONS, kind_of, range_of_call
from gradscope.capture.config import CaptureConfig
from gradscope.capture.context import is_compiled, is_inside_compiled, is_set_apart
from gradscope.capture.entities import ROOT, Roster, module_group
from gradscope.capture.guard import OUTPUTS, Guard
from gradscope.capture.hooks import Hooks
from gradscope.capture.mode import ForwardMode, Function
from gradscope.capture.recorder import Rows

# With a mode on, these run the same operations one by one that they else have fused kernels for.
_FUSING = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


class Measure(Protocol):
    """Measures an output, and waits for its gradient."""

    def __call__(
        self, row: int, output: Tensor, limits: tuple[float, float] | None, *, has_units: bool
    ) -> None:
        """`limits` are the ends of its range; dead units are counted where it has any."""


class FunctionalTaps:
    """Sees functions that are called in the forward of the model while a step is recorded.

    Not those of nn.ReLU and its like, which are measured as modules; attention is seen also
    inside nn.MultiheadAttention and nn.Softmax. Not seen, beside what is compiled: calls
    without gradients, in threads of nn.DataParallel, where the model's parts are called
    without the model, and in the replay of a re-entrant checkpoint.
    """

    def __init__(
        self,
        roster: Roster,
        config: CaptureConfig,
        guard: Guard,
        measure: Measure,
        note_start: Callable[[str], None],
    ) -> None:
        self._roster = roster
        self._config = config
        self._guard = guard
        self._measure_output = measure
        self._note_start = note_start
        self._hooks = Hooks(self)
        self._rows: Rows | None = None
        # Whether the modules have hooks, which they get once in a step.
        self._follows = False
        self._names: dict[nn.Module, str] = {}
        self._mode: ForwardMode | None = None
        # The modules that are running, from the outermost to the innermost.
        self._running: list[nn.Module] = []
        self._calls: Counter[tuple[nn.Module, str]] = Counter()
        self._scores = attention.Scores()
        # Whether a call without gradients was passed over in this step.
        self._passed_over = False

    def arm(self, rows: Rows) -> None:
        """What is called in the forwards of this step goes to `rows`."""
        self.disarm()
        self._passed_over = False
        self._rows = rows

    def _follow(self) -> None:
        """Follow which module runs."""
        if self._follows:
            return
        self._follows = True
        root = self._roster.model
        self._names = {module: name or ROOT for name, module in root.named_modules()}
        for module in self._names:
            if module is root:
                # Its own hooks that come before were called by the time that this one is added.
                self._hooks.after_forward(root, self._leaves, always=True)
            elif _may_call(module):
                self._hooks.before_forward(module, self._enters)
                self._hooks.after_forward(module, self._leaves, always=True)

    def stand_aside(self) -> None:
        """Have no hooks until the next forward that is followed."""
        if self._mode is None:
            self._hooks.remove()
            self._follows = False

    def disarm(self) -> None:
        """Follow no more."""
        self._rows = None
        self._leave()

    def forward_begins(self, module: nn.Module) -> None:
        """The model's forward starts; that of a replica does not count."""
        mode = self._mode
        if mode is not None and mode.is_over():
            # An interrupt ended the last one, and no hook was called.
            self._leave()
        if self._rows is None or module is not self._roster.model:
            return
        if self._mode is None:
            if self._is_left_alone():
                return
            self._follow()
            self._calls.clear()
            self._scores.clear()
            self._mode = ForwardMode(self._see)
            self._mode.enter()
        if self._mode.is_here():
            self._running.append(module)

    def _is_left_alone(self) -> bool:
        """Whether a mode would change what the model runs."""
        if is_compiled(self._roster.model) or is_inside_compiled():
            self.say_compiled()
            return True
        for name, module in self._roster.model.named_modules():
            may_fuse = isinstance(module, _FUSING) and not module.training
            if may_fuse and not any(p.requires_grad for p in module.parameters()):
                self._guard.say(
                    OUTPUTS,
                    f"functional calls are not recorded while {name or ROOT} is frozen and in "
                    "evaluation mode: torch could not use its fused kernel",
                    aloud=False,
                )
                return True
        return False

    # Which module runs.

    def _enters(self, module: nn.Module, args: object, kwargs: object) -> None:
        del args, kwargs
        # The replicas of nn.DataParallel run in threads of their own, as the backward may.
        if self._mode is not None and module in self._names and self._mode.is_here():
            self._running.append(module)

    def _leaves(self, module: nn.Module, args: object, kwargs: object, output: object) -> None:
        del args, kwargs, output
        if self._mode is None or not self._mode.is_here():
            return
        if not any(module is other for other in self._running):
            return
        # With what an exception that the model caught left behind.
        while self._running.pop() is not module:
            pass
        if not self._running:
            self._leave()

    def _leave(self) -> None:
        if self._mode is not None and not self._mode.leave():
            # The hook at the end of the forward comes back here.
            return
        self._mode = None
        self._running.clear()
        self._scores.clear()
        if self._rows is None:
            self._hooks.remove()
            self._follows = False

    def say_compiled(self) -> None:
        """A mode, and hooks that come and go, would have the graphs compiled anew."""
        message = "functional calls are not recorded: parts of the model are compiled"
        self._guard.say(OUTPUTS, message, aloud=False)

    def say_passed_over(self) -> None:
        """What ran without gradients did so in a re-entrant checkpoint."""
        if self._passed_over:
            self._guard.say(
                OUTPUTS,
                "functional calls inside re-entrant checkpoints are not recorded; "
                "checkpoint(..., use_reentrant=False) shows them",
                aloud=False,
            )

    # What is called in it.

    def _see(
        self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: object
    ) -> None:
        """A function of torch was called in the model's forward, and returned."""
        try:
            is_known = function in FUNCTIONS or function is attention.FUSED
        except TypeError:  # Something of the user's own that has no hash.
            return
        if is_known:
            self._guard.run(OUTPUTS, self._see_call, function, args, kwargs, result)
        elif self._scores.concern(function) and not is_set_apart():
            self._guard.run(OUTPUTS, self._scores.follow, function, args, result)

    def _see_call(
        self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: object
    ) -> None:
        # After an interrupt the mode is still on.
        if self._mode is None or self._mode.is_over() or self._rows is None:
            return
        if is_set_apart() or not _is_plain(result):
            return
        if function is attention.FUSED:
            self._see_fused(self._rows, args, kwargs, result)
            return
        name = FUNCTIONS[function]
        scores = args[0] if args else kwargs.get("input")
        if isinstance(scores, Tensor) and scores in self._scores:
            # What else is applied to scores shapes them, as the tanh that caps them.
            if name == "softmax" and attention.is_over_keys(scores, args, kwargs):
                self._see_weights(self._rows, scores, result)
            else:
                self._scores.follow(function, args, result)
            return
        limits = range_of_call(name, args, kwargs)
        if not _is_inside_activation(self._running[-1], is_bounded=limits is not None):
            row = self._row(name, "activation", kind_of(name).__name__, result)
            if row is not None:
                self._measure_output(row, result, limits, has_units=name != "softmax")

    def _see_weights(self, rows: Rows, scores: Tensor, weights: Tensor) -> None:
        row = self._row("softmax", "attention", "Softmax", weights)
        if row is not None and weights.numel():
            self._measure_output(row, weights, None, has_units=False)
            with torch.no_grad():
                rows.add("attention_logit", row, attention.largest(scores))
                rows.add("attention_entropy", row, attention.entropy(weights))

    def _see_fused(
        self, rows: Rows, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor
    ) -> None:
        row = self._row(attention.FUSED_NAME, "attention", "ScaledDotProductAttention", result)
        if row is not None:
            self._measure_output(row, result, None, has_units=False)
            with torch.no_grad():
                limit = attention.bound(args, kwargs)
            if limit is not None:
                rows.add("attention_bound", row, limit)

    def _row(self, function: str, group: str, of: str, output: Tensor) -> int | None:
        """The row of a call; None if it is not to be measured."""
        module = self._running[-1]
        owner = self._names[module]
        number = self._calls[module, function]
        self._calls[module, function] += 1
        name = f"{owner}/{function}#{number}"
        if not self._config.selects(name, owner):
            return None
        if not torch.is_grad_enabled():
            self._passed_over = True
            return None
        if number >= self._config.max_uses:
            self._guard.say(
                OUTPUTS,
                f"{owner} calls {function} more than {self._config.max_uses} times; further "
                "calls are not recorded",
                aloud=False,
            )
            return None
        # The modules around it have begun before it, and are known when they end.
        self._note_start(owner)
        return self._roster.call(name, group, of, output)


def _is_torchs(module: nn.Module) -> bool:
    """Whether it is a layer of torch's own."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    is_leaf = next(module.children(), None) is None
    return is_leaf and type(module).__module__.startswith("torch.nn.")


def _is_inside_activation(module: nn.Module, *, is_bounded: bool) -> bool:
    """Whether what it calls is a part of an activation that is measured as a module.

    Of a user's own such module, what it does is not known: a relu in it is one, but a tanh or
    sigmoid may be a factor, as in x·σ(x), of which the ends of the range mean nothing.
    """
    is_leaf = next(module.children(), None) is None
    if _is_torchs(module) or (is_leaf and module_group(module) == "activation"):
        return True
    return is_bounded and is_leaf and next(module.parameters(), None) is None


def _may_call(module: nn.Module) -> bool:
    """Whether it can matter that it is this module that runs."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.ParameterList)):
        return False
    return not _is_torchs(module) or module_group(module) in {"activation", "attention"}


def _is_plain(result: object) -> TypeGuard[Tensor]:
    # What is sharded, nested or fake has rules of its own.
    return (
        type(result) is Tensor
        and result.dim() > 0
        and (result.is_floating_point() or result.is_complex())
        and result.layout is torch.strided
        and not result.is_nested
    )
