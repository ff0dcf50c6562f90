"""What tests of set-ups share."""

from collections.abc import Iterator

import pytest

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


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Of all that several processes go through, once: so many, on such a device."""
    modules = (distributed_scenarios.__name__, agreement_scenarios.__name__)
    return launcher(modules, tmp_path_factory)
