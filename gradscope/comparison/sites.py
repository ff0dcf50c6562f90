"""Where a model applies activations, and which of them can be swapped for another."""

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from gradscope.capture.entities import ROOT
from gradscope.comparison.calls import Call, Function, Place, answering, is_closed, open_modules
from gradscope.comparison.dataflow import (
    Dataflow,
    Edge,
    edge_of,
    kind,
    parameter_identities,
    unit_dimension,
)
from gradscope.comparison.recognition import activation_modules
from gradscope.errors import ConfigError, ConfigTypeError

# Bounded or positive, they also serve as factors; the others are hidden activations even then, as
# in GEGLU and SwiGLU.
_GATES = frozenset(
    {"sigmoid", "hardsigmoid", "tanh", "hardtanh", "relu6", "softsign", "softplus", "logsigmoid"}
)
_CLAMP = re.compile(r"(clamp_?|clip_?|clamp_min_?|maximum|max|threshold)$")
_PRODUCTS = frozenset({"mul", "mul_", "multiply"})
_RECURRENT = re.compile(r"(rnn|lstm|gru)\w*$")
# Nodes of activations.
_ACTIVATION = re.compile(
    r"(relu|gelu|silu|mish|elu|leakyrelu|tanh|sigmoid|hardtanh|hardswish|softplus|prelukernel)$"
)
_LOOKED_FOR = (
    "modules and functions of torch (ReLU, GELU, SiLU, tanh and their like, also as methods and "
    "in place), and modules without parameters that work entry by entry"
)


@dataclass(frozen=True, slots=True)
class Site:
    """A place where the model applies a hidden activation.

    key: its name, the same in every forward. module: the path of the activation, or of the module
    that calls it as a function. spelling: the class or the function. activation: what it is in
    the catalogue, or in torch; None: something else.
    shape: of the pre-activation. unit_dimension: 1 behind convolutions, else -1.
    in_place: whether it writes into its input. previous: the key of the site whose output alone
    leads here, through layers of a plain stack.
    """

    key: str
    module: str
    spelling: str
    activation: str | None
    shape: tuple[int, ...]
    unit_dimension: int
    in_place: bool = False
    previous: str | None = None


@dataclass(frozen=True, slots=True)
class Sites:
    """hidden: those that are swapped, in the order of their first call. left: what is not, and why.

    modules: the activations among the modules, by path.
    """

    hidden: tuple[Site, ...]
    left: Mapping[str, str]
    modules: Mapping[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Seen:
    place: Place | None
    activation: str | None
    given: Edge | None
    output: Node | None
    shape: tuple[int, ...]
    in_place: bool
    has_gradients: bool
    # The numbers of the autograd nodes that it made.
    span: range


class _Recorder:
    """Notes the calls of one forward; changes nothing."""

    def __init__(self) -> None:
        self.seen: list[_Seen] = []
        self.clamps: list[tuple[str, str]] = []
        self.products: set[Node] = set()
        self.recurrent: list[range] = []
        self._last = _node_number()

    def answer(self, call: Call) -> Tensor:
        values = call.values
        given, version, first = edge_of(values), values._version, _node_number()  # noqa: SLF001
        shape = tuple(values.shape)
        result = call.apply(values)
        self._last = _node_number()
        self.seen.append(
            _Seen(
                call.place,
                call.activation,
                given,
                _made(result),
                shape,
                values._version != version,  # noqa: SLF001
                torch.is_grad_enabled(),
                range(first, self._last),
            )
        )
        return result

    def see(
        self,
        path: str | None,
        function: Function,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        result: object,
    ) -> None:
        name = getattr(function, "__name__", "")
        first, self._last = self._last, _node_number()
        if _RECURRENT.match(name):
            self.recurrent.append(range(first, self._last))
        elif name in _PRODUCTS and isinstance(result, Tensor) and result.grad_fn is not None:
            if all(isinstance(factor, Tensor) and factor.dim() for factor in args[:2]):
                self.products.add(result.grad_fn)
        elif _CLAMP.match(name) and path is not None and _is_rectifier(name, args, kwargs):
            self.clamps.append((f"{path}/{name}", f"written as {name} at 0"))


def _node_number() -> int:
    return int(torch._C._autograd._get_sequence_nr())  # noqa: SLF001  (no public name)


def _made(result: Tensor) -> Node | None:
    # Of a view that was changed in place, what uses the whole of it asks the whole.
    base = result._base if result._is_view() else None  # noqa: SLF001
    return result.grad_fn if base is None else base.grad_fn


def _is_rectifier(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether it is max(x, 0)."""
    if name in {"maximum", "max"}:
        return any(
            isinstance(value, Tensor) and not value.requires_grad and not value.any()
            for value in (*args[:2], kwargs.get("other"))
        )
    if name == "threshold":
        given = (*args[1:3], kwargs.get("threshold"), kwargs.get("value"))
        return all(value == 0 for value in given if value is not None)
    low = args[1] if len(args) > 1 else kwargs.get("min")
    high = args[2] if len(args) > 2 else kwargs.get("max")  # noqa: PLR2004  (as torch has them)
    return high is None and isinstance(low, (int, float)) and low == 0


def refuse_compiled(model: nn.Module) -> None:
    """Raise ConfigError for a model that torch.compile has made: nothing inside is reached."""
    if not isinstance(model, nn.Module):
        message = f"model: {type(model).__name__} is no torch.nn.Module"
        raise ConfigTypeError(message)
    why = is_closed(model)
    if why == "torch.compile":
        message = (
            "model: it is compiled (torch.compile), and its activations can't be swapped; give "
            "the uncompiled model, which is model._orig_mod where model was returned by it"
        )
        raise ConfigError(message)


def find_sites(
    model: nn.Module,
    forward: Callable[[], Tensor],
    *,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = None,
) -> Sites:
    """The model's activations, found in one forward.

    forward: runs the model and returns the loss, a scalar with a graph. It counts as any forward
    does: BatchNorm's averages move, and random numbers are drawn.
    include, exclude: fnmatch patterns of Site.module, which is "(root)" for the model itself.
    Raises ConfigError where there is none to swap, naming what was looked for and what was left.
    """
    sites = look_for_sites(model, forward, include=include, exclude=exclude)
    refuse_none(sites)
    return sites


def look_for_sites(
    model: nn.Module,
    forward: Callable[[], Tensor],
    *,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = None,
) -> Sites:
    """As `find_sites`, where none is an answer, too."""
    refuse_compiled(model)
    modules, closed = open_modules(model)
    activations = activation_modules({path: m for path, m in modules.items() if path})
    recorder = _Recorder()
    with torch.enable_grad(), _all_require_gradients(model):
        with answering(model, activations, recorder):
            loss = forward()
        root = _root(loss)
        flow = Dataflow(
            root, parameter_identities(model), {s.output for s in recorder.seen if s.output}
        )
        hidden, left = _sorted_out(recorder, flow)
    left |= dict(recorder.clamps)
    left |= {
        path: why for path, why in closed.items() if _has_activation(model.get_submodule(path))
    }
    left |= _recurrent(modules)
    if not closed:
        left |= _unseen(recorder, flow)
    hidden, out = _selected(hidden, _patterns("include", include), _patterns("exclude", exclude))
    return Sites(hidden, left | out, activations)


def refuse_none(sites: Sites) -> None:
    """Raise ConfigError where there is no site, naming what was looked for and what was left."""
    if not sites.hidden:
        raise ConfigError(_none_found(sites.left))


def _root(loss: object) -> Node:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.grad_fn is None:
        what = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        message = f"forward: it returned {what}; it must return the loss, a scalar with a graph"
        raise ConfigError(message)
    return loss.grad_fn


@contextlib.contextmanager
def _all_require_gradients(model: nn.Module) -> Iterator[None]:
    """The graph has all of the model, also what is frozen."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    for parameter in frozen:
        parameter.requires_grad_(True)  # noqa: FBT003
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)  # noqa: FBT003


def _sorted_out(recorder: _Recorder, flow: Dataflow) -> tuple[tuple[Site, ...], dict[str, str]]:
    hidden: dict[str, Site] = {}
    left: dict[str, str] = {}
    keys: dict[Node, str] = {}
    parts: set[Node] = set()
    # From the last on: an activation may be a part of the next one, as in Mish.
    reasons = [_reason(seen, flow, recorder.products, parts) for seen in reversed(recorder.seen)]
    for seen, reason in zip(recorder.seen, reversed(reasons), strict=True):
        if seen.place is None:
            if reason is None:
                left[f"(outside)/{seen.activation}"] = "called outside every forward of a module"
            continue
        key = seen.place.key
        if reason is not None:
            left.setdefault(key, f"{seen.activation or seen.place.spelling}: {reason}")
            continue
        if seen.output is not None:
            keys[seen.output] = key
        if key not in hidden:
            previous = flow.follows(seen.given)
            hidden[key] = Site(
                key,
                seen.place.module,
                seen.place.spelling,
                seen.activation,
                seen.shape,
                unit_dimension(seen.given, len(seen.shape)),
                seen.in_place,
                None if previous is None else keys.get(previous),
            )
    # What is a hidden activation in one of its calls is one.
    return tuple(hidden.values()), {k: why for k, why in left.items() if k not in hidden}


def _reason(seen: _Seen, flow: Dataflow, products: set[Node], parts: set[Node]) -> str | None:
    """Why it isn't a hidden activation; None: it is."""
    if seen.output is None:
        if seen.has_gradients:
            return "it is applied to the model's input"
        return "what uses it can't be seen: no gradients here" if _is_gate(seen) else None
    if seen.output not in flow:
        return "the loss does not depend on it"
    use = flow.use(seen.output, seen.given, products)
    if seen.output in parts:
        use = "a part of an activation that is written out"
    if use is not None and (_is_gate(seen) or use.startswith("a part")):
        if seen.given is not None and use.startswith("a part"):
            parts.add(seen.given[0])
        return use
    if not flow.is_before_weights(seen.output):
        return "an output: no layer with weights follows"
    return None


def _is_gate(seen: _Seen) -> bool:
    # Of an unknown one, to be used as a factor is the only sign there is.
    return seen.activation is None or seen.activation in _GATES


def _has_activation(module: nn.Module) -> bool:
    """Whether what is closed may have one: of a script the text is there."""
    graph = getattr(module, "inlined_graph", None)
    return (
        graph is None
        or re.search(r"aten::\w*(elu|silu|mish|tanh|sigmoid|hardswish|softplus)", str(graph))
        is not None
    )


def _recurrent(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    return {
        path or ROOT: f"inside nn.{type(module).__name__}"
        for path, module in modules.items()
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase))
    }


def _unseen(recorder: _Recorder, flow: Dataflow) -> dict[str, str]:
    """Activations that are in the graph, and that nothing has called in Python."""
    spans = [seen.span for seen in recorder.seen] + recorder.recurrent
    found: Counter[str] = Counter()
    for node in flow.nodes:
        number = node._sequence_nr()  # noqa: SLF001  (no public name)
        if _ACTIVATION.match(kind(node)) and not any(number in span for span in spans):
            found[node.name()] += 1
    return {
        name: f"{number} in the graph, called outside Python (a scripted function, an extension)"
        for name, number in found.items()
    }


def _patterns(argument: str, given: Iterable[str] | None) -> tuple[str, ...] | None:
    if given is None:
        return None
    patterns = (given,) if isinstance(given, str) else tuple(given)
    for pattern in patterns:
        if not isinstance(pattern, str):
            message = f"{argument}: {pattern!r} is no pattern of module paths, such as 'layers.*'"
            raise ConfigTypeError(message)
    return patterns


def _selected(
    hidden: tuple[Site, ...], include: Sequence[str] | None, exclude: Sequence[str] | None
) -> tuple[tuple[Site, ...], dict[str, str]]:
    def why_not(site: Site) -> str | None:
        if include is not None and not any(fnmatchcase(site.module, p) for p in include):
            return "not in include"
        if exclude is not None and any(fnmatchcase(site.module, p) for p in exclude):
            return "in exclude"
        return None

    left = {site.key: why for site in hidden if (why := why_not(site)) is not None}
    chosen = [site for site in hidden if site.key not in left]
    keys = {site.key for site in chosen}
    linked = (site if site.previous in keys else replace(site, previous=None) for site in chosen)
    return tuple(linked), left


def _none_found(left: Mapping[str, str]) -> str:
    message = f"activations: the model has none that can be swapped. Looked for were {_LOOKED_FOR}"
    if not left:
        return message
    named = "; ".join(f"{key} ({why})" for key, why in list(left.items())[:5])
    more = f"; and {len(left) - 5} more" if len(left) > 5 else ""  # noqa: PLR2004
    return f"{message}. Left as they are: {named}{more}"
