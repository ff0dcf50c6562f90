"""The exceptions and the warning that gradscope raises.

GradscopeError
├── ConfigError (ValueError)      an argument can't mean anything sensible
├── ConfigTypeError (TypeError)   an argument is of the wrong type
├── UsageError (RuntimeError)     a call at a time when it can't work
└── LogError (OSError)            a log that can't be written or read
    ├── NoRunError                there is no run in that place
    └── LogVersionError           the run was written by a newer gradscope
"""


class GradscopeError(Exception):
    """Base of everything gradscope raises."""


class ConfigError(GradscopeError, ValueError):
    """An argument whose value can't work; the message names the value and the way out."""


class ConfigTypeError(GradscopeError, TypeError):
    """An argument of the wrong type; the message names the right one."""


class UsageError(GradscopeError, RuntimeError):
    """A call that can't work at this time."""


class LogError(GradscopeError, OSError):
    """A log directory that can't be written or read."""


class NoRunError(LogError):
    """The place holds no gradscope run."""


class LogVersionError(LogError):
    """The run was written by a newer version of gradscope."""


class GradscopeWarning(UserWarning):
    """Something the user should know; training goes on."""
