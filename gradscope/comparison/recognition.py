"""Which modules and functions are activations, by their class or by what they return."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradscope.capture.activations import FUNCTIONS, kind_of
from gradscope.comparison.activation import ACTIVATIONS, ActivationFunction

# Of the functions that capture sees these work along a dimension, not entry by entry.
_ALONG_A_DIMENSION = frozenset({"glu", "softmax"})

# A function of torch → the activation that it is.
ELEMENTWISE: Mapping[Callable[..., Any], str] = {
    function: name for function, name in FUNCTIONS.items() if name not in _ALONG_A_DIMENSION
}

_BY_CLASS: Mapping[type[nn.Module], str] = {kind_of(n): n for n in set(ELEMENTWISE.values())}

# x·σ(1.702x) is called GELU and is 0.02 off. Different ones of the catalogue are 0.08 apart or more
# (ReLU, leaky ReLU); of GELU and its own approximation the nearer counts.
_NEAR = 0.03
# What is not compared, but looks like what is.
_BESIDE: tuple[tuple[str, ActivationFunction], ...] = (
    ("hardsigmoid", F.hardsigmoid),
    ("relu6", F.relu6),
)
# Of float32, in second differences of numbers up to 8.
_ROUNDING = 1e-5
# Where what a module returns is asked for: two rows, the second beyond the first.
_GRID = torch.stack([torch.linspace(-3, 3, 48), torch.linspace(-8, 7, 48)])


def variant(name: str, approximate: object) -> str:
    """GELU has a tanh approximation, which the catalogue has under a name of its own."""
    return "gelu_tanh" if name == "gelu" and approximate == "tanh" else name


def activation_modules(modules: Mapping[str, nn.Module]) -> dict[str, str | None]:
    """The activations among modules, by path, and what each is; None: none of the catalogue.

    Those of torch are known by class. Others count that have neither children, parameters nor
    buffers, and return entry by entry what is no straight line of it.
    """
    found: dict[str, str | None] = {}
    for path, module in modules.items():
        kind = type(module)
        if isinstance(module, nn.PReLU):
            found[path] = "prelu"
        elif kind in _BY_CLASS:
            found[path] = variant(_BY_CLASS[kind], getattr(module, "approximate", None))
        elif _may_be_one(module):
            values = _on_grid(module)
            if values is not None:
                found[path] = _nearest(values)
    return found


def _may_be_one(module: nn.Module) -> bool:
    if isinstance(module, (torch.jit.ScriptModule, nn.Identity)):
        return False
    if next(module.children(), None) is not None:
        return False
    return not any(True for _ in (*module.parameters(), *module.buffers()))


def _on_grid(module: nn.Module) -> Tensor | None:
    """What it returns on the grid, in float64; None if it isn't a curve, entry by entry.

    Asked of a copy, with the random numbers put back: nobody knows what a user's module does.
    """
    try:
        copied = copy.deepcopy(module)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            whole, again = (copied.forward(_GRID.clone()) for _ in range(2))
            row = copied.forward(_GRID[:1].clone())
            columns = copied.forward(_GRID[:, :7].clone())
        if not isinstance(whole, Tensor) or whole.shape != _GRID.shape:
            return None
        same = (
            torch.equal(whole, again)
            and torch.allclose(whole[:1], row, atol=1e-6)
            and torch.allclose(whole[:, :7], columns, atol=1e-6)
        )
    except Exception:  # noqa: BLE001  (whatever it wants of its input, it isn't the grid)
        return None
    if not same or not whole.is_floating_point() or not whole.isfinite().all():
        return None
    return None if _is_straight(whole) else whole.double()


def _is_straight(values: Tensor) -> bool:
    bends = values.double().diff(n=2, dim=1)
    return bool((bends.abs() < _ROUNDING).all())


def _nearest(values: Tensor) -> str | None:
    known = ((activation.name, activation.function) for activation in ACTIVATIONS.values())
    with torch.no_grad():
        distances = {
            name: (function(_GRID.double()) - values).abs().max().item()
            for name, function in (*known, *_BESIDE)
        }
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] < _NEAR else None
