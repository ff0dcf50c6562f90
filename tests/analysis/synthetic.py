"""Runs with a known diagnosis, made of arrays: what a chain of linear layers would record."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradscope.analysis.analyzer import analyze
from gradscope.analysis.report import Report
from gradscope.analysis.rules import BUILTIN
from gradscope.quantities import CATALOGUE, TableName
from gradscope.record import Entity, Run, Table

WIDTH = 64

# The rules on what a chain of layers records. Those on the loss alone (GS2xx) would add to what
# these say of a chain that does not learn.
_OF_CHAINS = frozenset(
    {
        *("GS001", "GS002", "GS003", "GS004", "GS008", "GS101", "GS102", "GS104"),
        *("GS301", "GS302", "GS401", "GS402", "GS501", "GS503"),
    }
)


def asked(run: Run, limits: dict[str, dict[str, float]] | None = None) -> Report:
    """What the rules on chains of layers say."""
    return analyze(run, [rule for rule in BUILTIN if rule.code in _OF_CHAINS], limits)


@dataclass(frozen=True)
class Chain:
    """A chain of `layers` linear layers with an activation behind each; healthy by default.

    Its gradient changes by `factor` per layer on its way back; a weight's update ratio is
    `update_ratio`, scaled by the layer's gradient if `updates_follow`.
    """

    layers: int = 12
    steps: int = 100
    factor: float = 1.0
    scale: float = 2**0.5  # σ_w = rms(w)·√fan_in
    activation: str = "ReLU"
    update_ratio: float = 1e-3
    updates_follow: bool = True
    loss: tuple[float, float] = (2.3, 1.0)
    loss_noise: float = 0.01
    meta: dict[str, Any] = field(default_factory=dict)

    def run(self) -> Run:
        """The run that it would record, every step."""
        return self.builder().build()

    def builder(self) -> "Builder":
        """Its arrays, to be changed before the run is built."""
        steps = np.arange(self.steps)
        modules: list[Entity] = []
        for index in range(self.layers):
            name = f"layers.{index}"
            modules.append(_entity(name, "module", 2 * index, "linear", "Linear"))
            modules.append(
                _entity(f"{name}.act", "module", 2 * index + 1, "activation", self.activation)
            )
        parameters: list[Entity] = []
        for index in range(self.layers):
            for leaf, shape in (("weight", (WIDTH, WIDTH)), ("bias", (WIDTH,))):
                name = f"layers.{index}.{leaf}"
                parameters.append(
                    Entity(
                        name,
                        "parameter",
                        shape,
                        int(np.prod(shape)),
                        len(parameters),
                        leaf,
                        "Linear",
                    )
                )
        built = Builder(steps, parameters, modules, dict(self.meta))
        gradient = 0.1 * self.factor ** np.arange(self.layers - 1, -1, -1.0)
        moved = self.update_ratio * (
            gradient / gradient.max() if self.updates_follow else np.ones(self.layers)
        )
        for table, each in (("parameters", 2), ("modules", 2)):
            for quantity, value in (
                ("grad_norm", gradient),
                ("grad_nonfinite", np.zeros(self.layers)),
                ("grad_missing", np.zeros(self.layers)),
                ("weight_norm", np.full(self.layers, self.scale * WIDTH**0.5)),
                ("weight_rms", np.full(self.layers, self.scale / WIDTH**0.5)),
                ("update_ratio", moved),
                ("update_norm", moved * self.scale * WIDTH**0.5),
                ("update_gradient_cosine", np.full(self.layers, -1.0)),
                ("requires_grad", np.ones(self.layers)),
                ("in_optimizer", np.ones(self.layers)),
                ("stale_in_optimizer", np.zeros(self.layers)),
                ("output_grad_norm", gradient),
                ("output_grad_nonfinite", np.zeros(self.layers)),
                ("output_nonfinite", np.zeros(self.layers)),
                ("output_rms", np.ones(self.layers)),
                ("dead_unit_fraction", np.zeros(self.layers)),
            ):
                if quantity in built.arrays[table]:
                    built.arrays[table][quantity][:] = np.repeat(value, each)
        # Weights change from step to step.
        drift = 1 + 1e-3 * steps[:, None]
        built.arrays["parameters"]["weight_norm"] *= drift
        fall = np.linspace(*self.loss, self.steps)
        noise = np.random.default_rng(0).normal(0, self.loss_noise, self.steps)
        built.scalars["loss"] = fall + noise
        return built


def _entity(name: str, kind: str, depth: int, group: str, kind_of: str) -> Entity:
    return Entity(name, kind, (32, WIDTH), 32 * WIDTH, depth, group, kind_of)


class Builder:
    """A run in the making: arrays by table and quantity, of shape (steps, entities)."""

    def __init__(
        self,
        steps: NDArray[Any],
        parameters: list[Entity],
        modules: list[Entity],
        meta: dict[str, Any],
    ) -> None:
        self.steps = steps
        self.entities: dict[str, list[Entity]] = {
            "parameters": parameters,
            "modules": modules,
            "signals": [],
        }
        self.arrays: dict[str, dict[str, NDArray[Any]]] = {
            table: {
                quantity.name: np.full((len(steps), len(self.entities[table])), np.nan)
                for quantity in listed
            }
            for table, listed in CATALOGUE.items()
        }
        self.scalars: dict[str, NDArray[Any]] = {
            name: np.full(len(steps), np.nan) for name in ("loss", "learning_rate")
        }
        self.scalars["loss_nonfinite"] = np.zeros(len(steps))
        self.meta = {"loss_is_progress": True, "problems": [], "left_out": [], **meta}

    def at(self, table: str, name: str) -> int:
        """The column of an entity."""
        return [entity.name for entity in self.entities[table]].index(name)

    def set(self, table: str, quantity: str, name: str, value: object) -> "Builder":
        """Set a quantity of one entity, at all steps or at each."""
        self.arrays[table][quantity][:, self.at(table, name)] = value
        return self

    def shuffled(self, seed: int) -> "Builder":
        """Itself, with the columns of its tables in another order."""
        for table, entities in self.entities.items():
            order = np.random.default_rng(seed).permutation(len(entities))
            self.entities[table] = [entities[index] for index in order]
            for quantity, values in self.arrays[table].items():
                self.arrays[table][quantity] = values[:, order]
        return self

    def build(self) -> Run:
        """The run."""
        norms = self.arrays["parameters"]["grad_norm"]
        scalars = {"grad_norm": np.sqrt(np.nansum(norms**2, axis=1))}
        return Run(
            self._table("parameters"),
            self._table("modules"),
            self._table("signals"),
            self.steps.astype(np.int64),
            {name: values.copy() for name, values in {**self.scalars, **scalars}.items()},
            self.meta,
        )

    def _table(self, name: TableName) -> Table:
        quantities = tuple(quantity.name for quantity in CATALOGUE[name])
        values = np.stack([self.arrays[name][quantity] for quantity in quantities])
        entities = tuple(self.entities[name])
        return Table(entities, self.steps.astype(np.int64), quantities, values.astype(np.float32))
