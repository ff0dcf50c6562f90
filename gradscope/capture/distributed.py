"""Several processes that train one model: who they are, and what can't be watched of them."""

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed import distributed_c10d

from gradscope.capture.names import owned_parameters
from gradscope.capture.shards import placement
from gradscope.errors import ConfigError

# The process that writes the run.
WRITER = 0

_WAY_OUT = (
    "shard with torch.distributed.fsdp.fully_shard, or train with DistributedDataParallel; both "
    "are watched rightly"
)


@dataclass(frozen=True, slots=True)
class Processes:
    """The processes that train together, and which of them this is."""

    rank: int
    size: int
    backend: str

    @property
    def writes(self) -> bool:
        """Whether this one writes the run."""
        return self.rank == WRITER


def processes() -> Processes | None:
    """Those of the default group; None where there is one only."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    return Processes(dist.get_rank(), dist.get_world_size(), str(dist.get_backend()))


# Between processes hours may lie only if one of them does not come at all.
_PATIENCE = timedelta(seconds=60)

_counted: Counter[str] = Counter()


class Presence:
    """Whether every process watches that would have to take part: alone one would wait for ever.

    Through the store by which the processes found each other; no collective operation.
    """

    def __init__(self, model: nn.Module) -> None:
        names = "\n".join(name for name, _, _ in owned_parameters(model))
        which = hashlib.sha256(names.encode()).hexdigest()[:16]
        # The nth watch of such a model is the nth on every process.
        _counted[which] += 1
        self._key = f"gradscope/{which}/{_counted[which]}"
        # Without a public name in torch; where it is not to be had, all are taken to be there.
        self._store = getattr(distributed_c10d, "_get_default_store", lambda: None)()
        if self._store is not None:
            self._store.set(f"{self._key}/{dist.get_rank()}", "here")

    def is_complete(self, ranks: Iterable[int]) -> bool:
        """Wait until all these watch; what the first one finds holds for all of them."""
        if self._store is None:
            return True
        found = "all"
        try:
            self._store.wait([f"{self._key}/{rank}" for rank in ranks], _PATIENCE)
        except RuntimeError:
            found = "some"
        verdict: bytes = self._store.compare_set(f"{self._key}/verdict", "", found)
        return verdict == b"all"


def check_sharding(model: nn.Module) -> None:
    """Refuse what holds gradients where nobody else finds them."""
    for module in model.modules():
        kind = type(module)
        if kind.__name__ == "FullyShardedDataParallel":
            message = (
                "FullyShardedDataParallel (FSDP1) keeps gradients in flat parameters that mix "
                f"layers; {_WAY_OUT}"
            )
            raise ConfigError(message)
        if kind.__module__.partition(".")[0] == "deepspeed" and kind.__name__.endswith("Engine"):
            message = f"{kind.__name__} updates copies of its own, out of sight; {_WAY_OUT}"
            raise ConfigError(message)
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        message = f"DeepSpeed ZeRO has taken the parameters apart; {_WAY_OUT}"
        raise ConfigError(message)


def described_processes(model: nn.Module, known: Processes) -> dict[str, Any]:
    """The processes, and how many parameters are split in which way when watching begins."""
    ways = Counter(placement(parameter) for _, _, parameter in owned_parameters(model))
    return {
        "world_size": known.size,
        "rank": known.rank,
        "backend": known.backend,
        "sharding": {way: amount for way, amount in ways.items() if way is not None},
    }


def limits(known: Processes) -> str:
    """What is not of the whole batch, or not here, for the report."""
    if not known.writes:
        return f"rank {WRITER} of {known.size} processes has the run; this is rank {known.rank}"
    return (
        f"trained by {known.size} processes ({known.backend}): outputs, their gradients, signals "
        f"and scalars are those of rank {known.rank}, of its own share of the batch; parameters' "
        "gradients and updates are the whole model's"
    )
