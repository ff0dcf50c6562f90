"""How HTML is made of templates: whatever a name holds, it stays text."""

from importlib import resources

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup, escape

from gradscope.analysis.words import number
from gradscope.reporters.wording import how_sure, inert, place, since, steps, why


def template(name: str) -> Template:
    """The template of this name beside this file."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_inert,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(prose=prose, number=number)
    environment.globals.update(place=place, since=since, steps=steps, why=why, how_sure=how_sure)
    source = resources.files("gradscope.reporters").joinpath(name).read_text(encoding="utf-8")
    return environment.from_string(source)


def prose(text: str) -> Markup:
    """A sentence in which what stands between backticks is code."""
    parts = [escape(inert(part)) for part in text.split("`")]
    if len(parts) % 2 == 0:
        return escape(inert(text))
    code = Markup("<code>{}</code>")
    return Markup("").join(
        code.format(part) if index % 2 else part for index, part in enumerate(parts)
    )


def _inert(value: object) -> object:
    # What is Markup already has been through here.
    return inert(value) if type(value) is str else value
