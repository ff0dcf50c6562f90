"""gradscope watches a PyTorch model train, and says where its gradients go wrong, and why.

    with gradscope.watch(model, optimizer, log_dir="runs/first") as scope:
        ...                                # your loop
    scope.report().print()

Importing gradscope imports neither torch nor TensorBoard: names are looked up when used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradscope import errors, figures, testing
    from gradscope.analysis.analyzer import analyze
    from gradscope.analysis.config import configured_rules
    from gradscope.analysis.finding import Evidence, Finding, Severity
    from gradscope.analysis.report import Report
    from gradscope.analysis.rule import Rule, rule
    from gradscope.capture.preflight import preflight
    from gradscope.capture.scope import Scope, watch
    from gradscope.comparison.grid import compare
    from gradscope.comparison.result import Comparison
    from gradscope.log.reader import load
    from gradscope.record import Entity, Run, Table

_HOMES = {
    "Comparison": "gradscope.comparison.result",
    "Entity": "gradscope.record",
    "Evidence": "gradscope.analysis.finding",
    "Finding": "gradscope.analysis.finding",
    "Report": "gradscope.analysis.report",
    "Rule": "gradscope.analysis.rule",
    "Run": "gradscope.record",
    "Scope": "gradscope.capture.scope",
    "Severity": "gradscope.analysis.finding",
    "Table": "gradscope.record",
    "analyze": "gradscope.analysis.analyzer",
    "compare": "gradscope.comparison.grid",
    "configured_rules": "gradscope.analysis.config",
    "load": "gradscope.log.reader",
    "preflight": "gradscope.capture.preflight",
    "rule": "gradscope.analysis.rule",
    "watch": "gradscope.capture.scope",
}

_MODULES = ("errors", "figures", "testing")

__all__ = [
    "Comparison",
    "Entity",
    "Evidence",
    "Finding",
    "Report",
    "Rule",
    "Run",
    "Scope",
    "Severity",
    "Table",
    "analyze",
    "compare",
    "configured_rules",
    "errors",
    "figures",
    "load",
    "preflight",
    "rule",
    "testing",
    "watch",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _MODULES:
        return import_module(f"gradscope.{name}")
    message = f"module 'gradscope' has no attribute {name!r}"
    raise AttributeError(message)


def __dir__() -> list[str]:
    return __all__
