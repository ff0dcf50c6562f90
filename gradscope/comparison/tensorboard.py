"""A comparison for TensorBoard's hparams: one run per configuration, under its name."""

import hashlib
import math
import re
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from gradscope.comparison.result import Comparison, Configuration
from gradscope.comparison.table import per_layer

# File systems end at 255 bytes; a letter may have four.
_LONGEST = 60


def write_hparams(comparison: Comparison, log_dir: Path) -> None:
    """Write a folder per configuration into `log_dir`, in place of those that were there.

    SummaryWriter.add_hparams would make a folder named by the time inside each.
    """
    for number, configuration in enumerate(comparison.configurations):
        folder = log_dir / _folder(configuration)
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        metrics = {
            name: value for name, value in _metrics(configuration).items() if math.isfinite(value)
        }
        with SummaryWriter(folder) as writer:
            names = {
                "initialization": configuration.name.initialization,
                "activation": configuration.name.activation,
                "mitigation": configuration.name.mitigation,
            }
            for summary in hparams(names, metrics):
                writer.file_writer.add_summary(summary)
            for name, value in metrics.items():
                writer.add_scalar(name, value, 0)
            writer.add_scalar("compare/rank", number + 1, 0)


def _folder(configuration: Configuration) -> str:
    name = str(configuration.name)
    plain = re.sub(r"[^\w.+-]+", "_", name.replace(" ", ""))
    if plain == name.replace(" ", "") and len(plain) <= _LONGEST:
        return plain
    # Others may look the same without their signs, or where they are cut.
    return f"{plain[:_LONGEST]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _metrics(c: Configuration) -> dict[str, float]:
    made = {
        "tier": float(c.tier),
        "score": c.score.mean,
        "growth_per_layer": per_layer(c.growth.mean),
    }
    for name in ("decades", "time_decades", "dead", "saturated", "trained"):
        made[name] = c.mean(name)
    return {f"compare/{name}": value for name, value in made.items()}
