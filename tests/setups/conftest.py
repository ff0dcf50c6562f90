"""What tests of set-ups share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.setups import agreement_scenarios, distributed_scenarios
from tests.setups.processes import Outcomes, launcher


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    """No test finds the graphs of another; those that need this import the compiler anyway."""
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Of all that several processes go through, once: so many, on such a device."""
    return launcher([distributed_scenarios.__name__], tmp_path_factory)


@pytest.fixture(scope="session")
def agreements(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Of what they must agree on."""
    return launcher([agreement_scenarios.__name__], tmp_path_factory)
