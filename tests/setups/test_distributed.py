"""What rank 0 records of a model that several processes train, against one process."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import nn

from gradscope.log.reader import load
from gradscope.record import Run
from tests.capture.reference import Numbers, assert_equal
from tests.setups.distributed_scenarios import DDP, FOUR, SPLIT
from tests.setups.processes import EVERYWHERE, Outcomes, devices
from tests.setups.received import Arrived, assert_describes
from tests.setups.sharded import BATCH, STEPS, batch, net
from tests.setups.support import support


def followed(
    outcomes: Outcomes, size: int, device: str, name: str
) -> tuple[list[dict[str, Numbers]], list[str], Path]:
    """The reference, gradscope's reductions, and where the run is; none failed or warned."""
    found, folder = outcomes(size, device)
    for outcome in found[name]:
        assert not outcome.error, outcome.error
        assert outcome.warned == []
    steps, reductions = found[name][0].result
    assert all(outcome.result[1] == reductions for outcome in found[name])
    return steps, reductions, folder / name


def claimed(titles: Mapping[str, str]) -> list[Any]:
    """The scenarios by name, each with what it shows."""
    return [
        pytest.param(
            name,
            marks=support(
                "Distributed",
                title,
                parameters="right",
                outputs="labelled",
                output_gradients="labelled",
            ),
            id=name,
        )
        for name, title in titles.items()
    ]


@pytest.mark.parametrize(("size", "device"), EVERYWHERE)
@pytest.mark.parametrize("name", claimed(DDP))
def test_reduced_gradients_are_those_of_the_whole_batch(
    name: str, size: int, device: str, outcomes: Outcomes
) -> None:
    steps, reductions, folder = followed(outcomes, size, device, name)
    assert_equal(load(folder).parameters, steps, rtol=1e-5)
    assert reductions == []


@pytest.mark.parametrize(("size", "device"), EVERYWHERE)
@pytest.mark.parametrize("name", claimed(SPLIT))
def test_split_parameters_are_recorded_as_whole_ones(
    name: str, size: int, device: str, outcomes: Outcomes
) -> None:
    steps, reductions, folder = followed(outcomes, size, device, name)
    run = load(folder)
    assert_equal(run.parameters, steps, rtol=1e-5)
    assert reductions == ["SUM", "MAX"] * STEPS
    # The entities are the model's, not a process's part of it.
    shapes = {entity.name: entity.shape for entity in run.parameters.entities}
    assert shapes["last.weight"][0] == 3
    assert all(not entity.type.startswith("FSDP") for entity in run.parameters.entities)


@pytest.mark.parametrize(("size", "device"), devices(4))
@pytest.mark.parametrize("name", claimed(FOUR))
def test_meshes_of_two_dimensions_count_every_part_once(
    name: str, size: int, device: str, outcomes: Outcomes
) -> None:
    steps, reductions, folder = followed(outcomes, size, device, name)
    assert_equal(load(folder).parameters, steps, rtol=1e-5)
    assert reductions == ["SUM", "MAX"] * STEPS


def counts(run: Run) -> NDArray[np.int64]:
    """Of shape (steps, parameters, bins)."""
    steps = range(len(run.histograms.steps))
    return np.array([run.histograms.at(index) for index in steps], np.int64)


@pytest.mark.parametrize(("size", "device"), EVERYWHERE)
def test_histograms_count_every_entry_once(size: int, device: str, outcomes: Outcomes) -> None:
    _, _, split = followed(outcomes, size, device, "fsdp_default")
    _, _, whole = followed(outcomes, size, device, "ddp")
    counted, expected = (counts(load(run)) for run in (split, whole))
    assert counted.sum() > 0
    # An entry at the border of an octave may fall to either side of it.
    moved = np.abs(counted - expected).sum()
    assert moved <= 0.01 * expected.sum()
    assert (counted.sum(-1) == expected.sum(-1)).all()


@pytest.mark.parametrize(("size", "device"), EVERYWHERE)
def test_split_parameters_have_no_histograms_of_their_own_part(
    size: int, device: str, outcomes: Outcomes
) -> None:
    steps, _, folder = followed(outcomes, size, device, "fsdp_deep")
    run = load(folder)
    assert_equal(run.parameters, steps, rtol=1e-5)
    assert set(run.deep) == {"output", "output_grad"}
    # 10 entries for each sample of this process's share.
    row = run.deep["output"].names.index("first")
    assert run.deep["output"].at(0)[row].sum() == 10 * BATCH // size
    said = "no histograms of weights and updates of parameters split over processes"
    assert said in [problem["message"] for problem in run.meta["problems"]]


@pytest.mark.parametrize(("size", "device"), EVERYWHERE)
def test_large_shards_are_measured_on_samples_of_each(
    size: int, device: str, outcomes: Outcomes
) -> None:
    found, folder = outcomes(size, device)
    outcome = found["fsdp_large"][0]
    assert not outcome.error, outcome.error
    run, steps = load(folder / "fsdp_large"), outcome.result
    exact = [q for q in run.parameters.quantities if not q.startswith("update")]
    assert_equal(run.parameters, steps, rtol=1e-5, quantities=exact)
    # A sample of 8192 from each process: 0.8 % off, or less.
    assert_equal(run.parameters, steps, rtol=0.03, quantities=["update_norm", "update_ratio"])
    assert "on a fixed sample" in run.meta["sampling"]


@pytest.mark.parametrize(("size", "device"), devices(2))
def test_what_is_of_one_process_alone_is_labelled(
    size: int, device: str, outcomes: Outcomes
) -> None:
    _, _, folder = followed(outcomes, size, device, "fsdp_default")
    run = load(folder)
    backend = "gloo" if device == "cpu" else "nccl"
    assert run.meta["distributed"] == {
        "world_size": size,
        "rank": 0,
        "backend": backend,
        "sharding": {"S(0) over 2": 8},
    }
    assert any("its own share of the batch" in p["message"] for p in run.meta["problems"])
    assert run.meta["model"] == "Sequential"


@pytest.mark.parametrize(("size", "device"), EVERYWHERE)
@support(
    "Distributed",
    "DDP, compiled",
    parameters="right",
    outputs="unknown",
    output_gradients="unknown",
)
def test_buckets_that_are_compiled_one_by_one_tell_of_no_output(
    size: int, device: str, outcomes: Outcomes
) -> None:
    steps, reductions, folder = followed(outcomes, size, device, "ddp_compiled")
    run = load(folder)
    assert_equal(run.parameters, steps, rtol=1e-5)
    assert reductions == []
    said = [problem["message"] for problem in run.meta["problems"]]
    assert any("DDP's compiled buckets are not recorded" in message for message in said)


@pytest.mark.parametrize(("size", "device"), EVERYWHERE)
@pytest.mark.parametrize("name", ["ddp", "ddp_compiled_whole", "fsdp_default", "fsdp_compiled"])
def test_outputs_and_their_gradients_are_those_of_the_share_of_rank_0(
    name: str, size: int, device: str, outcomes: Outcomes
) -> None:
    _, _, folder = followed(outcomes, size, device, name)
    model, (x, y) = net(), batch(0)
    arrived = Arrived(model)
    nn.functional.mse_loss(model(x.chunk(size)[0]), y.chunk(size)[0]).backward()
    modules = load(folder).modules
    assert {"(root)", "first", "act", "block", "block.0", "block.1", "norm", "last"} == set(
        modules.names
    )
    for module, output in arrived.outputs.items():
        assert_describes(modules, "output_", 0, module, output)
        assert_describes(modules, "output_grad_", 0, module, arrived.gradients[module])


@pytest.mark.parametrize(("size", "device"), devices(2))
def test_the_norm_that_torch_finds_in_clipping_is_recorded(
    size: int, device: str, outcomes: Outcomes
) -> None:
    steps, _, folder = followed(outcomes, size, device, "fsdp_clipped")
    run = load(folder)
    after = [np.sqrt(sum(n.get("grad_norm", 0.0) ** 2 for n in step.values())) for step in steps]
    assert np.allclose(after, 0.1, rtol=1e-4)
    assert np.allclose(run.scalars["grad_norm_after_clip"], after, rtol=1e-5)
    # Logged by the user and found in clipping: the same.
    assert (run.scalars["grad_norm_before_clip"] > 0.1).all()
    assert (run.scalars["clipped"] == 1).all()


@pytest.mark.parametrize(("size", "device"), EVERYWHERE)
@support(
    "Distributed",
    "sequence parallel: gradients of norms (`Partial`)",
    parameters="unknown",
    note="their weights and all other parameters are right",
)
def test_gradients_that_are_still_to_be_summed_are_not_passed_off(
    size: int, device: str, outcomes: Outcomes
) -> None:
    found, folder = outcomes(size, device)
    outcome = found["sequence_parallel"][0]
    assert not outcome.error, outcome.error
    run, steps = load(folder / "sequence_parallel"), outcome.result
    for numbers in steps:
        for name in ("norm.weight", "norm.bias"):
            measured = ("grad_", "update_")
            known = {q: v for q, v in numbers[name].items() if not q.startswith(measured)}
            numbers[name] = {**known, "grad_missing": 0.0}
    assert_equal(run.parameters, steps, rtol=1e-5)
    assert any("still to be summed" in p["message"] for p in run.meta["problems"])
