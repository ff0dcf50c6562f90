"""The known cures of vanishing and exploding gradients, as changes of a model or its training."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradscope.capture import names
from gradscope.capture.entities import module_group
from gradscope.comparison.naming import known
from gradscope.comparison.sites import Site, Sites
from gradscope.errors import ConfigTypeError

# What a function of a user's makes of the model: another one, or the same, changed.
Change = Callable[[nn.Module], nn.Module | None]

# Where the norms that are added live in the model.
_ADDED = "added_norms"


@dataclass(frozen=True, slots=True)
class Mitigation:
    """What is done against vanishing and exploding gradients.

    needs_training: whether it does anything only while the model trains.
    normalization: the norm that is added before each hidden activation.
    residual: each hidden activation's output is added to the next one's.
    dropout: the share of each hidden activation's output that is dropped.
    weight_decay, clip_norm, clip_value: for the training.
    """

    name: str
    needs_training: bool = False
    normalization: str | None = None
    removes_norms: bool = False
    residual: bool = False
    dropout: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float | None = None
    clip_value: float | None = None
    change: Change | None = None

    @property
    def at_sites(self) -> bool:
        """Whether it acts where activations are called."""
        return self.residual or self.normalization is not None or self.dropout > 0


MITIGATIONS: Mapping[str, Mitigation] = {
    mitigation.name: mitigation
    for mitigation in (
        Mitigation("none"),
        Mitigation("batchnorm", normalization="batchnorm"),
        Mitigation("layernorm", normalization="layernorm"),
        Mitigation("rmsnorm", normalization="rmsnorm"),
        Mitigation("no_normalization", removes_norms=True),
        Mitigation("residual", residual=True),
        # Srivastava et al. 2014 drop half of wide hidden layers; transformers, a tenth.
        Mitigation("dropout", needs_training=True, dropout=0.1),
        # AdamW's default in torch.
        Mitigation("weight_decay", needs_training=True, weight_decay=0.01),
        # Pascanu et al. 2013; 1 is what most published trainings use.
        Mitigation("clip_norm", needs_training=True, clip_norm=1.0),
        Mitigation("clip_value", needs_training=True, clip_value=0.5),
    )
}


def mitigation_called(wanted: str | Change | Mitigation) -> Mitigation:
    """The mitigation of that name, or one that applies a function to the model.

    The function gets a copy of the model, and returns another model or None for the same one.
    Raises ConfigError for an unknown name, naming the nearest; ConfigTypeError for anything else.
    """
    if isinstance(wanted, Mitigation):
        return wanted
    if isinstance(wanted, str):
        return known("mitigations", wanted, MITIGATIONS, {}, "a function of the model")
    if not callable(wanted):
        message = f"mitigations: {wanted!r} is neither a name nor a function of the model"
        raise ConfigTypeError(message)
    return Mitigation(getattr(wanted, "__name__", type(wanted).__name__), change=wanted)


@dataclass(frozen=True, slots=True)
class Effect:
    """How many places a mitigation changes, in words; reason: why it can't change any."""

    changes: int
    text: str
    reason: str | None = None


def effect(model: nn.Module, sites: Sites, mitigation: Mitigation) -> Effect:
    """What `prepare` and `swapping` would do with the mitigation."""
    if (mitigation.normalization or mitigation.residual) and not sites.hidden:
        return Effect(0, "", "the model has no activation to put it at")
    if mitigation.normalization is not None:
        return _effect_of_norms(sites, mitigation.normalization)
    if mitigation.removes_norms:
        number = len(_norms(model))
        reason = None if number else "the model has no normalization to remove"
        return Effect(number, f"{number} removed", reason)
    if mitigation.residual:
        number = sum(_joins(site, sites) for site in sites.hidden)
        reason = (
            None
            if number
            else "no two activations of equal shape follow each other through plain layers"
        )
        return Effect(number, f"{number} residual connections added", reason)
    if mitigation.dropout:
        return Effect(len(sites.hidden), f"after {len(sites.hidden)} activations")
    return Effect(0, "the training" if mitigation.needs_training else "")


def _joins(site: Site, sites: Sites) -> bool:
    return any(o.key == site.previous and o.shape == site.shape for o in sites.hidden)


def _effect_of_norms(sites: Sites, name: str) -> Effect:
    number = len(sites.hidden)
    for site in sites.hidden:
        values = 1
        for size in site.shape:
            values *= size
        if not site.shape or (name == "batchnorm" and values == site.shape[site.unit_dimension]):
            reason = (
                f"{site.key} gets {site.shape}: a single value of each unit, nothing to average"
            )
            return Effect(number, "", reason)
    return Effect(number, f"{number} added")


def prepare(model: nn.Module, sites: Sites, mitigation: Mitigation | None) -> nn.Module:
    """Change the model, a copy, as the mitigation needs it; returns it, or a user's function's own.

    Norms that are added become a part of it, so that their parameters train; they run inside
    `swapping`. The keys of the sites stay the same, but for a user's function: find them anew.
    """
    if mitigation is None:
        return model
    if mitigation.change is not None:
        changed = mitigation.change(model)
        if changed is not None and not isinstance(changed, nn.Module):
            message = (
                f"mitigations: {mitigation.name} returned {type(changed).__name__}; it must "
                "return a model, or None where it has changed the one that it was given"
            )
            raise ConfigTypeError(message)
        return model if changed is None else changed
    if mitigation.normalization is not None:
        floating = (p for p in model.parameters() if p.is_floating_point())
        like = next(floating, torch.empty(0))
        norms = _AddedNorms(
            {
                str(number): _norm(mitigation.normalization, site)
                for number, site in enumerate(sites.hidden)
            }
        )
        norms.numbers = {site.key: str(number) for number, site in enumerate(sites.hidden)}
        norms.to(device=like.device, dtype=like.dtype)
        norms.train(model.training)
        model.add_module(_ADDED, norms)
    if mitigation.removes_norms:
        for path, norm in _norms(model).items():
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, _without(norm))
    return model


class _AddedNorms(nn.ModuleDict):
    """The norms before the hidden activations, by number; called as a module, it does nothing.

    So a Sequential, which calls all its children, can have it as one of them.
    """

    numbers: Mapping[str, str]

    def forward(self, values: Any, *others: Any) -> Any:
        """What it was given."""
        return (values, *others) if others else values


def _norm(name: str, site: Site) -> nn.Module:
    units = site.shape[site.unit_dimension]
    if name == "batchnorm":
        return nn.BatchNorm1d(units)
    return nn.LayerNorm(units) if name == "layernorm" else nn.RMSNorm(units, eps=1e-5)


def normalized(
    model: nn.Module, site: Site, values: Tensor, mitigation: Mitigation | None
) -> Tensor:
    """What enters the activation: the pre-activation, through the norm that was added."""
    if mitigation is None or mitigation.normalization is None:
        return values
    norms: Any = model.get_submodule(_ADDED)
    norm: Callable[[Tensor], Tensor] = norms[norms.numbers[site.key]]
    units = site.unit_dimension
    if mitigation.normalization == "batchnorm":
        # Over all but the units, whichever dimension they are.
        if units == -1:
            return norm(values.flatten(0, -2)).view_as(values)
        first = values.movedim(units, 1)
        return norm(first.flatten(2)).view(first.shape).movedim(1, units)
    # At each place of its own, also over channels, as ConvNeXt does.
    return norm(values.movedim(units, -1)).movedim(-1, units)


class _Bare(nn.Identity):
    """In place of a norm; with what others read of one: of its weight the type, mostly."""

    # nn.TransformerEncoderLayer has a fused kernel that would normalize, but not where the eps
    # of its two norms differ; this one differs from itself.
    eps = float("nan")

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias = (
            None if own is None else own.detach()
            for own in (getattr(norm, "weight", None), getattr(norm, "bias", None))
        )


def _norms(model: nn.Module) -> dict[str, nn.Module]:
    """The norms that work on their own, under each of their paths."""
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        own = (parameter.dim() for parameter in module.parameters())
        # One that has layers of its own to compute its scale from is more than a norm.
        if path and module_group(names.unwrapped(module)) == "norm" and all(d < 2 for d in own):  # noqa: PLR2004
            found[path] = module
    return found


def _without(norm: nn.Module) -> nn.Module:
    """Nothing, or what else was in it: the activation of timm's BatchNormAct2d."""
    children = OrderedDict(norm.named_children())
    return nn.Sequential(children) if children else _Bare(norm)
