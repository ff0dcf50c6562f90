"""Which rules are asked, by which limits: `[tool.gradscope]` in pyproject.toml.

select, ignore: codes, beginnings of codes, or names of rules; without select all are asked.
preset: another tool's limits.
limits: numbers of a rule, as in `[tool.gradscope.limits.GS101]`, `decay = 1e-4`.
"""

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from gradscope.analysis.plugins import available, is_stand_in
from gradscope.analysis.presets import PRESETS
from gradscope.analysis.rule import Rule
from gradscope.errors import ConfigError

Rules = tuple[Rule[Any], ...]
Limits = Mapping[str, Mapping[str, float]]

_KEYS = ("select", "ignore", "preset", "limits")


def configured_rules(folder: Path | None = None) -> Rules:
    """The rules that the project asks for, with its limits; those of other packages too.

    The project's file is the nearest pyproject.toml with a `[tool.gradscope]`, in the folder (by
    default the one that the process works in) or above it. Without one, all rules as they are.

    Raises ConfigError for what in it can't mean anything: it names the file and what is nearest.
    """
    rules = available()
    path, table = _table(folder)
    return rules if path is None else _configured(rules, table, f"{path}: ")


def _table(folder: Path | None) -> tuple[Path | None, Mapping[str, Any]]:
    """The nearest file that speaks of gradscope, and what it says."""
    try:
        start = (Path.cwd() if folder is None else folder).resolve()
    except OSError:
        # The folder is gone.
        return None, {}
    for parent in (start, *start.parents):
        path = parent / "pyproject.toml"
        try:
            text = path.read_bytes()
        except OSError:
            continue
        if b"gradscope" not in text:
            continue
        try:
            table = tomllib.loads(text.decode()).get("tool", {}).get("gradscope")
        except (AttributeError, ValueError) as error:
            message = f"{path} can't be read: {error}"
            raise ConfigError(message) from error
        if table is not None:
            return path, table
    return None, {}


def _configured(rules: Rules, table: Mapping[str, Any], where: str) -> Rules:
    if not isinstance(table, Mapping):
        message = f"{where}tool.gradscope={table!r} must be a table"
        raise ConfigError(message)
    for key in table:
        if key not in _KEYS:
            message = f"{where}[tool.gradscope] has no {key!r}{_near(key, _KEYS)}"
            raise ConfigError(message)
    if (preset := table.get("preset")) is not None:
        if preset not in PRESETS:
            message = f"{where}preset={preset!r} is not one{_near(str(preset), list(PRESETS))}"
            raise ConfigError(message)
        rules = with_limits(rules, PRESETS[preset])
    limits = table.get("limits", {})
    if not isinstance(limits, Mapping) or not all(isinstance(v, Mapping) for v in limits.values()):
        message = f"{where}limits={limits!r} must be tables, as [tool.gradscope.limits.GS101]"
        raise ConfigError(message)
    rules = with_limits(rules, limits, where)
    chosen = {
        key: tuple(named_rules(rules, key, entry, where) for entry in _entries(table, key, where))
        for key in ("select", "ignore")
    }
    selected = chosen["select"] or (rules,)
    # What stands for a package that can't be loaded says so, whatever was selected.
    return tuple(
        rule
        for rule in rules
        if (is_stand_in(rule) or any(rule in named for named in selected))
        and not any(rule in named for named in chosen["ignore"])
    )


def _entries(table: Mapping[str, Any], key: str, where: str) -> Sequence[str]:
    entries = table.get(key, [])
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        message = f"{where}{key}={entries!r} must be a list of codes or names of rules"
        raise ConfigError(message)
    if key == "select" and entries == [] and key in table:
        message = f"{where}select=[] asks no rule; leave it out to ask all"
        raise ConfigError(message)
    return entries


def named_rules(rules: Rules, key: str, entry: str, where: str = "") -> Rules:
    """The rules with this code, beginning of a code, or name; raises ConfigError for none."""
    found = tuple(
        rule for rule in rules if entry == rule.name or (entry and rule.code.startswith(entry))
    )
    if not found and not _may_be_missing(rules, entry):
        message = f"{where}{key} names no rule by {entry!r}{_near_rule(entry, rules)}"
        raise ConfigError(message)
    return found


def _may_be_missing(rules: Rules, code: str) -> bool:
    """Whether it may be a rule of a package that can't be loaded: that is said elsewhere."""
    return not code.startswith("GS") and any(map(is_stand_in, rules))


def with_limits(rules: Rules, limits: Limits, where: str = "") -> Rules:
    """The rules, with other numbers for some, by code or name.

    Raises ConfigError for an unknown rule or limit, or a value of another kind; `where` says in
    which file.
    """
    changed = {rule.code: rule for rule in rules}
    for key, overrides in limits.items():
        is_known = any(key in {rule.code, rule.name} for rule in rules)
        if not is_known and _may_be_missing(rules, key):
            continue
        code = rule_called(key, rules, f"{where}limits for ").code
        own = changed[code].limits
        known = [field.name for field in fields(own)]
        for name, value in overrides.items():
            if name not in known:
                message = f"{where}{code} has no limit {name!r}{_near(name, known)}"
                raise ConfigError(message)
            if kind := _other_kind(getattr(own, name), value):
                message = f"{where}{code}: {name}={value!r} must be {kind}"
                raise ConfigError(message)
        changed[code] = replace(changed[code], limits=replace(own, **overrides))
    return tuple(changed[rule.code] for rule in rules)


def _other_kind(default: object, value: object) -> str:
    """What the value would have to be; "" if it is that."""
    # In Python a bool is an int.
    if isinstance(default, bool) or isinstance(value, bool):
        return "" if type(value) is type(default) else f"of type {type(default).__name__}"
    if isinstance(default, float):
        is_known = isinstance(value, (int, float)) and math.isfinite(value)
        return "" if is_known else "a finite number"
    if isinstance(default, int):
        return "" if isinstance(value, int) else "a whole number"
    return "" if isinstance(value, type(default)) else f"of type {type(default).__name__}"


def rule_called(wanted: str, rules: Rules, where: str = "") -> Rule[Any]:
    """The rule with this code or name; raises ConfigError, and names the nearest."""
    for rule in rules:
        if wanted in {rule.code, rule.name}:
            return rule
    message = f"{where}an unknown rule {wanted!r}{_near_rule(wanted, rules)}"
    raise ConfigError(message)


def _near_rule(wrong: str, rules: Rules) -> str:
    known = [rule.code for rule in rules] + [rule.name for rule in rules]
    match = get_close_matches(wrong, known, n=1) or get_close_matches(wrong.upper(), known, n=1)
    if match:
        return f"; did you mean {match[0]!r}?"
    return "; `gradscope rules` lists them"


def _near(wrong: str, known: Sequence[str]) -> str:
    """The nearest of the known words, or all of them, for a message."""
    match = get_close_matches(wrong, known, n=1)
    return f"; did you mean {match[0]!r}?" if match else f"; there are: {', '.join(known)}"
