"""Which optimizers train the model, which parameters they hold, and their settings."""

import math
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.optim import Optimizer

from gradscope.capture.guard import STEPS, Guard
from gradscope.capture.names import owned_parameters
from gradscope.capture.replaced import Former


class Optimizers:
    """The optimizers of one model: those that were named, and those that have stepped."""

    def __init__(self, model: nn.Module, former: Former, guard: Guard) -> None:
        self._model = model
        self._former = former
        self._guard = guard
        # Whether they hold any of the model's parameters, as last looked up.
        self._ours: WeakKeyDictionary[Optimizer, tuple[tuple[int, ...], bool]] = WeakKeyDictionary()
        self._known: WeakKeyDictionary[Optimizer, None] = WeakKeyDictionary()
        self._settings: dict[int, dict[str, Any]] = {}
        self._given = 0
        # Whose step is going on: what steps within it does so on its behalf.
        self._stepping = 0

    def expect(self, optimizer: Optimizer) -> None:
        """One that was named when watching began."""
        self._given += 1
        self._known[optimizer] = None

    def before_any_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """A step begins, of those that were named or another: of another say what is missed."""
        del args, kwargs
        self._guard.run(STEPS, self._look_for_others, optimizer)

    def _look_for_others(self, optimizer: Optimizer) -> None:
        if self._stepping:
            return
        if optimizer not in self._known and self.parameters_of(optimizer):
            message = (
                f"another {type(optimizer).__name__} trains this model, and was not given to "
                "watch(): its steps are not recorded; leave out optimizer to watch every one"
            )
            self._guard.say("optimizers", message)

    def parameters_of(self, optimizer: Optimizer) -> list[Tensor]:
        """Its parameters if it holds any of the model's, or nothing but former ones, else none."""
        parameters: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        # Groups may be added in mid-training, and their content replaced.
        content = tuple(map(id, parameters))
        ours = self._ours.get(optimizer)
        if ours is None or ours[0] != content:
            model = {id(parameter) for _, _, parameter in owned_parameters(self._model)}
            is_ours = not model.isdisjoint(content) or all(map(self._former.knows, parameters))
            ours = self._ours[optimizer] = (content, is_ours)
        return parameters if ours[1] else []

    def held(self) -> Iterator[Tensor]:
        """The parameters of all optimizers that are known."""
        for optimizer in self._known:
            for group in optimizer.param_groups:
                yield from group["params"]

    def known(self) -> set[int]:
        """The identities of all optimizers that are known."""
        return {id(optimizer) for optimizer in self._known}

    def note(self, optimizer: Optimizer, *, recorded: bool) -> None:
        """It steps: its settings as they are the first time are for the report, and how often."""
        self._known[optimizer] = None
        self._stepping = self._stepping or id(optimizer)
        if id(optimizer) not in self._settings:
            self._settings[id(optimizer)] = {
                "type": type(optimizer).__name__,
                **{k: v for k, v in optimizer.param_groups[0].items() if _is_plain(v)},
                "steps": 0,
                "recorded_steps": 0,
            }
        settings = self._settings[id(optimizer)]
        settings["steps"] += 1
        settings["recorded_steps"] += recorded

    def ended(self, optimizer: Optimizer) -> None:
        """Its step is over."""
        if self._stepping == id(optimizer):
            self._stepping = 0

    @property
    def have_stepped(self) -> bool:
        """Whether any of them has."""
        return bool(self._settings)

    def coverage(self) -> dict[str, Any]:
        """How many were named; type and settings of those that have stepped, and how often."""
        stepped = [dict(settings) for settings in self._settings.values()]
        return {"optimizers": stepped, "optimizers_given": self._given}


def with_closure(
    args: Any, kwargs: Any, after: Callable[[], None]
) -> tuple[Any, dict[str, Any]] | None:
    """The arguments of a step, `after` being called when its closure first returns.

    None without a closure.
    """
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if not callable(closure):
        return None

    waiting = [after]

    def watched() -> Any:
        result = closure()
        while waiting:
            waiting.pop()()
        return result

    if len(args) > 1:
        return (args[0], watched, *args[2:]), kwargs
    return args, {**kwargs, "closure": watched}


def _is_plain(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, (bool, int, str))
