"""What tests of set-ups share."""

from collections.abc import Iterator

import pytest


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    """No test finds the graphs of another; those that need this import the compiler anyway."""
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()
