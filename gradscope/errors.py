"""The exceptions and the warning that gradscope raises.

GradscopeError
├── ConfigError (ValueError)      an argument can't mean anything sensible
├── ConfigTypeError (TypeError)   an argument is of the wrong type
├── UsageError (RuntimeError)     a call at a time when it can't work
├── TrainingStopped               training ends, as `on_finding="stop"` asks for
└── LogError (OSError)            a log that can't be written or read
    ├── NoRunError                there is no run in that place
    └── LogVersionError           the run was written by a newer gradscope
"""

from typing import Any


class GradscopeError(Exception):
    """Base of everything gradscope raises."""


class ConfigError(GradscopeError, ValueError):
    """An argument whose value can't work; the message names the value and the way out."""


class ConfigTypeError(GradscopeError, TypeError):
    """An argument of the wrong type; the message names the right one."""


class UsageError(GradscopeError, RuntimeError):
    """A call that can't work at this time."""


class TrainingStopped(GradscopeError):  # noqa: N818  (an outcome that was asked for)
    """Training ends between two steps: `watch(on_finding="stop")` has found an error.

    A function given as `on_finding` may raise it, too. `findings` holds what was found.
    """

    def __init__(self, findings: tuple[Any, ...] = ()) -> None:
        super().__init__(findings)
        self.findings = findings

    def __str__(self) -> str:
        return "; ".join(f"{f.code} {f.name}: {f.message}" for f in self.findings)


class LogError(GradscopeError, OSError):
    """A log directory that can't be written or read."""


class NoRunError(LogError):
    """The place holds no gradscope run."""


class LogVersionError(LogError):
    """The run was written by a newer version of gradscope."""


class GradscopeWarning(UserWarning):
    """Something the user should know; training goes on."""
