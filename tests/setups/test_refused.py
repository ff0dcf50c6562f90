"""Ways to shard of which the gradients can't be found: refused, in words that say what to do."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from gradscope.capture.scope import watch
from gradscope.errors import ConfigError
from tests.setups.support import Verdict, support

WAY_OUT = r"fully_shard.*DistributedDataParallel"
REFUSED: Verdict = "refused"


def refused(setup: str) -> pytest.MarkDecorator:
    return support(
        "Distributed",
        setup,
        parameters=REFUSED,
        outputs=REFUSED,
        output_gradients=REFUSED,
    )


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3))


@refused("`FullyShardedDataParallel` (FSDP1)")
# Torch's own.
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.usefixtures("alone")
def test_flat_parameters_are_refused(tmp_path: Path) -> None:
    sharded = FullyShardedDataParallel(net(), device_id=torch.device("cpu"))
    for model in (sharded, nn.Sequential(sharded)):
        with pytest.raises(ConfigError, match=rf"FSDP1.*{WAY_OUT}"):
            watch(model, log_dir=tmp_path)


def named(kind: str, module: str) -> type[nn.Module]:
    return type(kind, (nn.Linear,), {"__module__": module})


@refused("DeepSpeed's engines")
@pytest.mark.parametrize(
    ("kind", "module"),
    [
        ("DeepSpeedEngine", "deepspeed.runtime.engine"),
        ("PipelineEngine", "deepspeed.runtime.pipe.engine"),
    ],
)
def test_engines_are_refused(kind: str, module: str, tmp_path: Path) -> None:
    """By their names: DeepSpeed is not installed here."""
    model = nn.Sequential(named(kind, module)(2, 2))
    with pytest.raises(ConfigError, match=WAY_OUT):
        watch(model, log_dir=tmp_path)


@refused("DeepSpeed ZeRO")
def test_parameters_that_zero_took_apart_are_refused(tmp_path: Path) -> None:
    """By the mark that it leaves on them."""
    model = net()
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id = number  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=rf"DeepSpeed ZeRO.*{WAY_OUT}"):
        watch(model, log_dir=tmp_path)
