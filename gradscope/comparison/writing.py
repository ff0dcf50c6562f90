"""Writing a comparison to a file, as its suffix says."""

from collections.abc import Callable, Mapping
from pathlib import Path

from gradscope.comparison.page import render
from gradscope.comparison.result import Comparison
from gradscope.comparison.table import frame
from gradscope.comparison.text import as_text
from gradscope.errors import ConfigError


def _csv(comparison: Comparison) -> str:
    made: str = frame(comparison).to_csv(index=False)
    return made


_WRITERS: Mapping[str, Callable[[Comparison], str]] = {
    ".html": render,
    ".csv": _csv,
    ".txt": as_text,
}


def write(comparison: Comparison, path: Path) -> Path:
    """Write it. Raises ConfigError for another suffix than .html, .csv and .txt."""
    if path.suffix not in _WRITERS:
        message = f"{str(path)!r} ends in {path.suffix!r}; known are {', '.join(_WRITERS)}"
        raise ConfigError(message)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_WRITERS[path.suffix](comparison), encoding="utf-8")
    return path
