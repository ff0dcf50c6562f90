"""The grid on Dask's workers, on one machine."""

import os
from collections.abc import Iterator

import dask
import pytest
from distributed import Client, LocalCluster

from tests.comparison.test_compare import compared, deadly, values_of


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with (
        pytest.MonkeyPatch.context() as patch,
        # A task that kills a worker would kill three more before it is given up.
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
    ):
        # The workers inherit it.
        patch.setenv("GRADSCOPE_TEST_PID", str(os.getpid()))
        with (
            LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
            Client(cluster) as client,
        ):
            yield client


def test_dask_gives_the_same_numbers(client: Client) -> None:
    assert values_of(compared(executor=client.get_executor())) == values_of(compared())


def test_a_dask_worker_that_dies_costs_its_own_cells(client: Client) -> None:
    made = compared(
        initializations=("kaiming_normal", deadly),
        activations=("own",),
        executor=client.get_executor(),
        seeds=1,
    )
    assert [str(c.name) for c in made.configurations] == ["kaiming_normal + own"]
    assert made.missing == 1
    assert any("deadly" in note and "died" in note for note in made.notes)
