"""Which parameters, module uses and signals there are: their names, groups, depth, table rows."""

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import get_args

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from gradscope.capture.config import CaptureConfig
from gradscope.capture.names import (
    class_name,
    held_parameters,
    named_modules,
    owned_parameters,
    unwrapped,
)
from gradscope.capture.replaced import Former
from gradscope.capture.statistics import real_entries
from gradscope.errors import ConfigError
from gradscope.quantities import TableName
from gradscope.record import Entity

ROOT = "(root)"

_CONVOLUTIONS = (nn.modules.conv._ConvNd,)  # noqa: SLF001  (the only common base)
_NORMS = (
    nn.modules.batchnorm._NormBase,  # noqa: SLF001
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
)
_POOLS = (
    nn.modules.pooling._MaxPoolNd,  # noqa: SLF001
    nn.modules.pooling._AvgPoolNd,  # noqa: SLF001
    nn.modules.pooling._AdaptiveAvgPoolNd,  # noqa: SLF001
    nn.modules.pooling._AdaptiveMaxPoolNd,  # noqa: SLF001
)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_GROUPS: tuple[tuple[str, tuple[type[nn.Module], ...]], ...] = (
    ("convolution", _CONVOLUTIONS),
    ("norm", _NORMS),
    ("pooling", _POOLS),
    ("linear", (nn.Linear, nn.Bilinear)),
    ("embedding", _EMBEDDINGS),
    ("recurrent", (nn.RNNBase, nn.RNNCellBase)),
    ("attention", (nn.MultiheadAttention,)),
    ("dropout", (nn.modules.dropout._DropoutNd,)),  # noqa: SLF001
)

# RMSNorm, and the norms that model libraries bring along; LayerNorm2d is one over channels.
_NORM_NAME = re.compile(r"Norm(Act)?(?P<dimensions>[123]d)?(Fp32)?$")


def module_group(module: nn.Module) -> str:
    """What kind of layer it is."""
    for group, types in _GROUPS:
        if isinstance(module, types):
            return group
    name = class_name(module)
    home = type(module).__module__
    if home == "torch.nn.modules.activation":
        return "activation"
    if _NORM_NAME.search(name):
        return "norm"
    if next(module.children(), None) is not None:
        return "container"
    # transformers.activations, timm.layers.activations_me and the like.
    if home.rpartition(".")[2].startswith("activations"):
        return "activation"
    # GPT-2's name for a linear layer whose weight is stored transposed.
    return "linear" if name == "Conv1D" and _has_matrix(module) else "other"


def _has_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2  # noqa: PLR2004


def parameter_group(name: str, owner: nn.Module) -> str:
    """The group within which a parameter is judged."""
    leaf = name.rpartition(".")[2]
    if "lora_" in name:
        return "adapter"
    kind = module_group(owner)
    if kind in {"norm", "embedding"}:
        return kind
    if leaf.startswith("bias") or leaf.endswith("bias"):
        return "bias"
    if "experts" in name.split("."):
        return "expert"
    return "attention" if kind == "attention" else "weight"


def channels_first(module: nn.Module) -> bool | None:
    """Whether the units of the output are dimension 1; None: as its input has them."""
    if isinstance(module, (*_CONVOLUTIONS, *_POOLS, nn.GroupNorm, nn.LocalResponseNorm)):
        return True
    if isinstance(module, nn.modules.batchnorm._NormBase):  # noqa: SLF001
        return True
    norm = _NORM_NAME.search(class_name(module))
    if norm is not None and norm["dimensions"]:
        return True
    if module_group(module) in {"activation", "dropout", "other", "container"}:
        return None
    return False


def watched_modules(model: nn.Module, config: CaptureConfig) -> dict[nn.Module, str]:
    """Leaves, direct children of ModuleList and Sequential, and the root, by name."""
    lists = (nn.ModuleList, nn.Sequential)
    modules = list(named_modules(model))
    listed = {
        unwrapped(child)
        for _, parent in modules
        if isinstance(parent, lists)
        for child in parent.children()
    }
    # Its children are used as containers of weights: they never run.
    inside = {
        child
        for _, parent in modules
        if isinstance(parent, nn.MultiheadAttention)
        for child in parent.children()
    }
    found: dict[nn.Module, str] = {}
    for name, module in modules:
        # A ModuleList has no forward to hook.
        if module in inside or isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.ParameterList)):
            continue
        is_leaf = next(module.children(), None) is None or isinstance(module, nn.MultiheadAttention)
        if (is_leaf or module in listed or not name) and config.selects(name or ROOT):
            found[module] = name or ROOT
    return found


class Roster:
    """The entities of a run: append-only lists, and the row of each in its table."""

    def __init__(self, model: nn.Module, config: CaptureConfig) -> None:
        self.model = model
        self._config = config
        self._rows: dict[TableName, dict[str, int]] = {table: {} for table in get_args(TableName)}
        self._unwritten: dict[TableName, list[Entity]] = {
            table: [] for table in get_args(TableName)
        }
        # The start of each module's first run: the depth of what belongs to it.
        self._started: dict[str, int] = {}
        # Of the parameters as they were last resolved, by identity.
        self.parameters: dict[int, tuple[int, Tensor]] = {}
        # Rows of those that are an embedding's.
        self.embeddings: set[int] = set()
        # Rows of those whose own rows are units, each with weights of its own.
        self.matrices: set[int] = set()
        self.former = Former()
        self._present()

    def take_up(self, earlier: Mapping[TableName, Sequence[Entity | None]]) -> None:
        """Go on with the entities of a run: what has the same name keeps its row.

        Raises ConfigError where the model has another shape of a parameter, or none of them.
        """
        owned = {name: parameter for name, _, parameter in owned_parameters(self.model)}
        known = [entity for entity in earlier["parameters"] if entity is not None]
        for entity in known:
            parameter = owned.get(entity.name)
            if parameter is None or isinstance(parameter, UninitializedParameter):
                continue
            if tuple(parameter.shape) != entity.shape:
                message = (
                    f"resume=True: {entity.name} has shape {tuple(parameter.shape)}, in the run "
                    f"that is to be resumed {entity.shape}; leave resume out for a run of its own"
                )
                raise ConfigError(message)
        if known and not any(entity.name in owned for entity in known):
            message = (
                f"resume=True: the {type(self.model).__name__} has no parameter of the run that "
                f"is to be resumed ({known[0].name}, …); leave resume out for a run of its own"
            )
            raise ConfigError(message)
        for table, entities in earlier.items():
            # What was lost to damage keeps its row, under a name that nothing has.
            names = (
                entity.name if entity else f"(lost {row})" for row, entity in enumerate(entities)
            )
            self._rows[table] = {name: row for row, name in enumerate(names)}

    def sizes(self) -> dict[TableName, int]:
        """How many entities each table has so far."""
        return {table: len(rows) for table, rows in self._rows.items()}

    def take_new(self) -> dict[TableName, list[Entity]]:
        """The entities that have come since the last call, of the tables that have any."""
        new = {table: entities for table, entities in self._unwritten.items() if entities}
        self._unwritten |= {table: [] for table in new}
        return new

    def started(self, name: str, use: int) -> None:
        """A module begins to run."""
        self._started.setdefault(_use_name(name, use), len(self._started))

    def module(self, name: str, use: int, module: nn.Module, output: Tensor) -> int:
        """The row of one use of a module; registers it if it is new."""
        full_name = _use_name(name, use)
        row = self._rows["modules"].get(full_name)
        if row is not None:
            return row
        self.started(name, use)
        return self._returned(full_name, "module", module_group(module), class_name(module), output)

    def call(self, name: str, group: str, of: str, output: Tensor) -> int:
        """The row of a functional call; registers it if it is new."""
        row = self._rows["modules"].get(name)
        if row is not None:
            return row
        self._started.setdefault(name, len(self._started))
        return self._returned(name, "call", group, of, output)

    def _returned(self, name: str, kind: str, group: str, of: str, output: Tensor) -> int:
        entity = Entity(
            name=name,
            kind=kind,
            shape=tuple(output.shape),
            numel=real_entries(output),
            depth=self._started[name],
            group=group,
            type=of,
        )
        return self._add("modules", entity)

    def companion(self, name: str, part: str, module: nn.Module, shape: tuple[int, ...]) -> int:
        """The row of a further part of what is known as `name`: its last use, say."""
        full_name = f"{name}#{part}"
        row = self._rows["modules"].get(full_name)
        if row is not None:
            return row
        entity = Entity(
            name=full_name,
            kind="module",
            shape=shape,
            numel=math.prod(shape),
            depth=self._started.get(name, len(self._started)),
            group=module_group(module),
            type=class_name(module),
        )
        return self._add("modules", entity)

    def module_name(self, row: int) -> str:
        """The name of the module use in this row."""
        return self.module_names({row})[row]

    def module_names(self, rows: Collection[int]) -> dict[int, str]:
        """The names of the module uses in these rows, in their order."""
        if not rows:
            return {}
        return {row: name for row, name in enumerate(self._rows["modules"]) if row in rows}

    def watched_parameters(self) -> Iterator[Tensor]:
        """The parameters as they are now."""
        for name, _, parameter in owned_parameters(self.model):
            if self._config.selects(name):
                yield parameter

    def parameter_names(self) -> list[str]:
        """Those of all watched parameters, in the order of registration."""
        names = (name for name, _, _ in owned_parameters(self.model))
        return [name for name in names if self._config.selects(name)]

    def parameter_rows(self, names: Iterable[str]) -> dict[str, int]:
        """Name → row, of those among the names that have been resolved."""
        rows = self._rows["parameters"]
        return {name: rows[name] for name in names if name in rows}

    def signal(self, name: str, tensor: Tensor) -> int:
        """The row of a signal; registers it if it is new."""
        row = self._rows["signals"].get(name)
        if row is not None:
            return row
        depth = len(self._rows["signals"])
        entity = Entity(
            name, "signal", tuple(tensor.shape), real_entries(tensor), depth, "signal", name
        )
        return self._add("signals", entity)

    def resolve_parameters(self) -> None:
        """Look the model's parameters up anew: by name, because objects may be replaced."""
        found = [entry for entry in self._present() if self._config.selects(entry[0])]
        rows = self._rows["parameters"]
        new = [entry for entry in found if entry[0] not in rows]
        if new:
            depths = self._depths()
            # By depth; the order of registration where that is the same.
            new.sort(key=lambda entry: depths[id(entry[2])])
        for name, owner, parameter in new:
            entity = replace(_parameter(name, owner, parameter), depth=len(rows))
            self._add("parameters", entity)
        self.parameters = {id(p): (rows[name], p) for name, _, p in found}
        self.embeddings = {rows[name] for name, owner, _ in found if isinstance(owner, _EMBEDDINGS)}
        self.matrices = {rows[name] for name, owner, p in found if _is_matrix(owner, p)}

    def _present(self) -> list[tuple[str, nn.Module, Tensor]]:
        """The model's parameters as they are now, with their names and owners."""
        owned = [
            entry
            for entry in owned_parameters(self.model)
            if not isinstance(entry[2], UninitializedParameter)
        ]
        self.former.remember(owned, _parameter)
        return owned

    def left_behind(self, held: Iterable[Tensor]) -> Iterator[int]:
        """The rows of those that the model had once, and has no more; registers new ones."""
        rows = self._rows["parameters"]
        for entity in self.former.among(held):
            if entity.name in rows:
                yield rows[entity.name]
            elif self._config.selects(entity.name):
                yield self._add("parameters", replace(entity, depth=len(rows)))

    def _earliest(self) -> dict[str, int]:
        """For each module, also one that has no hook of its own, when it or a part first ran."""
        earliest: dict[str, int] = {}
        for name, start in self._started.items():
            prefix = name
            while prefix:
                earliest[prefix] = min(start, earliest.get(prefix, start))
                prefix = prefix.rpartition(".")[0]
        return earliest

    def _depths(self) -> dict[int, float]:
        """For each parameter by identity, when the first module that holds it ran."""
        earliest = self._earliest()
        depths: dict[int, float] = {}
        for name, _, parameter in held_parameters(self.model):
            owner = name.rpartition(".")[0] or ROOT
            depth = min(_depth(owner, earliest), depths.get(id(parameter), math.inf))
            depths[id(parameter)] = depth
        return depths

    def _add(self, table: TableName, entity: Entity) -> int:
        rows = self._rows[table]
        rows[entity.name] = len(rows)
        self._unwritten[table].append(entity)
        return rows[entity.name]


def _is_matrix(owner: nn.Module, parameter: Tensor) -> bool:
    # One weight per channel may have more dimensions, of size 1.
    wide = parameter.dim() > 1 and parameter.numel() > len(parameter) > 1
    return wide and module_group(owner) not in {"embedding", "norm"}


def _parameter(name: str, owner: nn.Module, parameter: Tensor) -> Entity:
    # Its depth is known when it gets a row.
    return Entity(
        name=name,
        kind="parameter",
        shape=tuple(parameter.shape),
        numel=real_entries(parameter),
        depth=-1,
        group=parameter_group(name, owner),
        type=class_name(owner),
    )


def _use_name(name: str, use: int) -> str:
    return f"{name}#{use}" if use else name


def _depth(owner: str, earliest: dict[str, int]) -> float:
    """When the owner, or else the nearest module around it, first ran; what never ran is last."""
    while owner and owner not in earliest:
        owner = owner.rpartition(".")[0]
    return earliest[owner] if owner else math.inf
