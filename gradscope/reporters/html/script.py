"""A page's one script: the viewer's modules and the page's own, each in a scope of its own."""

import base64
import hashlib
import re
from functools import cache
from importlib import resources

_IMPORT = re.compile(r'^import \{([^}]*)\} from "\./([\w/.-]+)";\n', re.MULTILINE)
_EXPORTED = re.compile(r"^export (?:async )?(?:function|class|const) (\w+)", re.MULTILINE)
_EXPORT_LIST = re.compile(r"^export \{([^}]*)\};\n", re.MULTILINE)
_EXPORT = re.compile(r"^export ", re.MULTILINE)


@cache
def script(entry: str = "page.js") -> str:
    """The script that starts there.

    A page opened from disk can't import modules, so they come in one piece. Relies on how
    the modules are written: named imports and exports at the start of a line.
    """
    ordered: dict[str, str] = {}
    _collect(entry, ordered)
    modules = [f"const {_scope(name)} = {_wrapped(text)};" for name, text in ordered.items()]
    return "\n".join(['"use strict";', *modules])


@cache
def stylesheet() -> str:
    """The styles of the page and of the viewer."""
    return _read("viewer.css") + _read("page.css")


def policy() -> str:
    """The Content-Security-Policy: this script and these styles, pictures within the page."""
    rules = (
        "default-src 'none'",
        f"script-src {digest(script())}",
        f"style-src {digest(stylesheet())}",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
    )
    return "; ".join(rules)


def digest(text: str) -> str:
    """How a Content-Security-Policy names a script or styles."""
    # A browser hashes what stands between the tags, with the line breaks of the template.
    digest = hashlib.sha256(f"\n{text}\n".encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _collect(name: str, ordered: dict[str, str]) -> None:
    """Add a module behind those that it imports."""
    text = _read(name)
    for _, imported in _IMPORT.findall(text):
        if imported not in ordered:
            _collect(imported, ordered)
    ordered[name] = text


def _wrapped(text: str) -> str:
    names = _EXPORTED.findall(text)
    for listed in _EXPORT_LIST.findall(text):
        names += [name.strip() for name in listed.split(",")]
    body = _EXPORT.sub("", _EXPORT_LIST.sub("", _IMPORT.sub(_binding, text)))
    return f"(() => {{\n{body}\nreturn {{ {', '.join(names)} }};\n}})()"


def _binding(found: re.Match[str]) -> str:
    return f"const {{{found.group(1)}}} = {_scope(found.group(2))};\n"


def _scope(name: str) -> str:
    return "module_" + re.sub(r"\W", "_", name)


def _read(name: str) -> str:
    own = resources.files(__name__.rpartition(".")[0]).joinpath(name)
    shared = resources.files("gradscope").joinpath("viewer", name)
    return (own if own.is_file() else shared).read_text(encoding="utf-8")
