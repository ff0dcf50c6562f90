"""gradscope watches a PyTorch model train, and says where its gradients go wrong, and why.

    with gradscope.watch(model, optimizer, log_dir="runs/first") as scope:
        ...                                # your loop
    scope.report().print()

Importing gradscope imports neither torch nor TensorBoard: names are looked up when used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradscope import figures
    from gradscope.analysis.analyzer import analyze
    from gradscope.analysis.finding import Evidence, Finding, Severity
    from gradscope.analysis.report import Report
    from gradscope.analysis.rule import Rule, rule
    from gradscope.capture.scope import Scope, watch
    from gradscope.log.reader import load
    from gradscope.record import Entity, Run, Table

_HOMES = {
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
    "load": "gradscope.log.reader",
    "rule": "gradscope.analysis.rule",
    "watch": "gradscope.capture.scope",
}

__all__ = [
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
    "figures",
    "load",
    "rule",
    "watch",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name == "figures":
        return import_module("gradscope.figures")
    message = f"module 'gradscope' has no attribute {name!r}"
    raise AttributeError(message)


def __dir__() -> list[str]:
    return __all__
