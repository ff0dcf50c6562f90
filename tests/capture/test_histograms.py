"""Histograms of gradients: every entry in its octave, by exact comparison with powers of two."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import SGD

from gradscope.capture import recorder, statistics
from gradscope.capture.scope import Scope, watch
from gradscope.errors import GradscopeWarning
from gradscope.record import Run
from gradscope.reporters.provenance import particulars
from tests.capture import trainings
from tests.capture.reference import watched, wide
from tests.capture.trainings import (
    Build,
    Cnn,
    Nobody,
    PartlyUsed,
    adamw,
    built,
    lbfgs,
    mlp_model,
    plain,
    vectors,
    with_closure,
)

Counts = NDArray[np.int64]

# Between the octaves from 2**-112 to 2**16, the outer ones open.
BORDERS = np.exp2(np.arange(-111, 16, dtype=np.float64))


def counted(entries: NDArray[Any]) -> Counts:
    """The entries per octave, by comparison in float64; a logarithm rounds near powers of two."""
    with np.errstate(invalid="ignore"):
        # Some NaN of float32 make numpy complain.
        sizes = np.abs(entries.astype(np.float64))
    sizes = sizes[np.isfinite(sizes) & (sizes > 0)]
    return np.bincount(np.searchsorted(BORDERS, sizes, side="right"), minlength=128)


def with_lost(entries: NDArray[Any], dtype: torch.dtype) -> Counts:
    """Also how many are subnormal in the dtype, and how many finite."""
    with np.errstate(invalid="ignore"):
        sizes = np.abs(entries.astype(np.float64))
    small = (sizes > 0) & (sizes < torch.finfo(dtype).smallest_normal)
    return np.append(counted(entries), [small.sum(), np.isfinite(sizes).sum()])


def parts(gradient: Tensor) -> NDArray[np.float64]:
    """All entries; of a complex gradient the real and the imaginary parts."""
    return wide(torch.view_as_real(gradient) if gradient.is_complex() else gradient)


class HistogramReference:
    """Counts every parameter's `.grad` right before an update, the first time in a step."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._now: dict[str, Counts] = {}
        self.steps: list[dict[str, Counts]] = []

    def before_update(self) -> None:
        if not self._now:
            self._now = {
                name: counted(np.zeros(0) if parameter.grad is None else wide(parameter.grad))
                for name, parameter in self._model.named_parameters()
            }

    def after_update(self) -> None:
        self.steps.append(self._now)
        self._now = {}


def recounted(build: Build, steps: int) -> list[dict[str, Counts]]:
    """Per step and parameter, from the same training without gradscope."""
    training = built(build)
    reference = HistogramReference(training.model)
    for number in range(steps):
        training.step(number, reference)
    return reference.steps


def assert_counted(run: Run, expected: list[dict[str, Counts]]) -> None:
    assert run.histograms.steps.tolist() == list(range(len(expected)))
    assert (run.histograms.lowest, run.histograms.bins) == (-112, 128)
    for index, step in enumerate(expected):
        assert set(run.histograms.names) == set(step)
        for name, counts in step.items():
            row = run.histograms.at(index)[run.histograms.names.index(name)]
            np.testing.assert_array_equal(row, counts, err_msg=f"step {index}, {name}")


CASES: dict[str, Build] = {
    "mlp": lambda: plain(mlp_model(), vectors),
    "cnn": lambda: plain(Cnn(), trainings.images),
    "adamw closure": lambda: with_closure(mlp_model(), vectors, adamw),
    "lbfgs closure": lambda: with_closure(mlp_model(), vectors, lbfgs),
    "accumulation": trainings.accumulated,
    "clipping": trainings.clipped,
    "frozen": trainings.frozen,
    "unused": lambda: plain(PartlyUsed(), vectors),
    "two optimizers": trainings.two_optimizers,
    "sparse embedding": trainings.sparse_embedding,
    "by hand": trainings.hand_written,
    "float64": lambda: plain(mlp_model(torch.float64), partial(vectors, torch.float64)),
    "bfloat16": lambda: plain(mlp_model(torch.bfloat16), partial(vectors, torch.bfloat16)),
    "huge gradients": partial(trainings.rescaled, 1e20),
    "tiny gradients": partial(trainings.rescaled, 1e-30),
    "not finite": partial(trainings.poisoned, (float("nan"), float("inf"), 0.0, -0.0)),
}


@pytest.mark.parametrize("name", CASES)
def test_every_gradient_is_counted_as_the_optimizer_is_given_it(name: str, tmp_path: Path) -> None:
    expected = recounted(CASES[name], 2)
    assert sum(counts.sum() for step in expected for counts in step.values()) > 0
    run = watched(CASES[name], 2, tmp_path)
    assert_counted(run, expected)
    assert run.meta["problems"] == []


def test_the_level_of_parameters_counts_nothing(tmp_path: Path) -> None:
    run = watched(CASES["mlp"], 2, tmp_path, level="parameters")
    assert not run.histograms
    assert (run.parameters["grad_norm"] > 0).all()
    assert np.isnan(run.parameters["update_norm"]).all()


def test_recorded_steps_only(tmp_path: Path) -> None:
    run = watched(CASES["mlp"], 5, tmp_path, every=2)
    assert run.histograms.steps.tolist() == [0, 2, 4] == run.recorded_steps.tolist()
    expected = recounted(CASES["mlp"], 5)
    for index, step in enumerate((0, 2, 4)):
        for row, name in enumerate(run.histograms.names):
            np.testing.assert_array_equal(run.histograms.at(index)[row], expected[step][name])


# One gradient, entry by entry.


class Bare(nn.Module):
    """A parameter of this shape and format, and nothing else."""

    def __init__(self, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape, dtype=dtype))

    def forward(self) -> Tensor:
        return torch.view_as_real(self.weight).sum() if self.weight.is_complex() else self.weight


def run_of(gradient: Tensor, tmp_path: Path) -> Run:
    """One step in which the optimizer is given this gradient."""
    model = Bare(*gradient.shape, dtype=gradient.dtype)
    optimizer = SGD(model.parameters(), lr=0.0)
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        model()
        model.weight.grad = gradient
        optimizer.step()
        return scope.run()


FORMATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def notable(dtype: torch.dtype) -> Tensor:
    """Powers of two, their neighbours, the ends of the format, zeros, what is not finite."""
    limits = torch.finfo(dtype)
    # frexp gives 2**e as 0.5 × 2**(e + 1).
    first, last = (math.frexp(end)[1] - 1 for end in (limits.smallest_normal, limits.max))
    powers = torch.tensor([2.0**exponent for exponent in range(first, last + 1)], dtype=dtype)
    zero, infinity = torch.zeros((), dtype=dtype), torch.full((), torch.inf, dtype=dtype)
    above, below = torch.nextafter(powers, infinity), torch.nextafter(powers, zero)
    smallest = torch.nextafter(zero, infinity)
    nan = torch.full((), torch.nan, dtype=dtype)
    ends = torch.stack(
        [smallest, smallest * 3, zero, -zero, infinity, -infinity, nan, infinity.nextafter(zero)]
    )
    return torch.cat([powers, -powers, above, below, ends])


# The squares of the largest float64 numbers are beyond every sum in the tables.
@pytest.mark.parametrize("dtype", FORMATS[:3], ids=str)
def test_borders_subnormals_and_ends_of_every_format(dtype: torch.dtype, tmp_path: Path) -> None:
    gradient = notable(dtype)
    expected = counted(parts(gradient))
    # Two zeros and three that are not finite are in no bin.
    assert expected.sum() == gradient.numel() - 5
    run = run_of(gradient, tmp_path)
    np.testing.assert_array_equal(run.histograms["weight"], [expected])


def test_a_few_by_hand(tmp_path: Path) -> None:
    values = [1.0, 1.5, -1.99, 2.0, 0.5, 0.0, 2.0**-112, 2.0**-111, 2.0**-140, 65536.0, 1e30]
    (row,) = run_of(torch.tensor(values), tmp_path).histograms["weight"]
    held = {int(index) - 112: int(row[index]) for index in np.flatnonzero(row)}
    assert held == {-112: 2, -111: 1, -1: 1, 0: 3, 1: 1, 15: 2}


def test_complex_gradient_counts_both_parts(tmp_path: Path) -> None:
    gradient = torch.tensor([1 + 4j, -0.25j, complex("nan"), 3e-40 + 0j], dtype=torch.complex64)
    run = run_of(gradient, tmp_path)
    np.testing.assert_array_equal(run.histograms["weight"], [counted(parts(gradient))])
    assert run.histograms["weight"].sum() == 4


# Any bit pattern is a number of the format.
any_bits = hnp.arrays(
    np.uint32, st.integers(1, 40), elements=st.integers(0, 2**32 - 1), fill=st.nothing()
)


@settings(max_examples=200, deadline=None)
@given(st.lists(any_bits, min_size=1, max_size=6), st.sampled_from([1, 30, 65_536]))
def test_any_float32_alone_and_in_batches(bits: list[NDArray[np.uint32]], chunk: int) -> None:
    tensors = [torch.from_numpy(array.view(np.float32).copy()) for array in bits]
    before = [tensor.clone() for tensor in tensors]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "_CHUNK", chunk)
        found = statistics.magnitudes(tensors)
    assert found.dtype == torch.float64
    expected = [with_lost(array.view(np.float32), torch.float32) for array in bits]
    np.testing.assert_array_equal(found.numpy(), expected)
    # The copies are the updates' as well.
    for tensor, earlier in zip(tensors, before, strict=True):
        assert torch.equal(tensor.view(torch.int32), earlier.view(torch.int32))


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.uint64, 20, elements=st.integers(0, 2**64 - 1), fill=st.nothing()))
def test_any_float64(bits: NDArray[np.uint64]) -> None:
    found = statistics.magnitudes([torch.from_numpy(bits.view(np.float64).copy())])
    np.testing.assert_array_equal(found.numpy(), [with_lost(bits.view(np.float64), torch.float64)])


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_formats_alone_and_in_one_batch(dtype: torch.dtype) -> None:
    tensor = notable(dtype)
    for some in ([tensor], [tensor, tensor[:5]]):
        found = statistics.magnitudes(some)
        expected = [with_lost(wide(one), dtype) for one in some]
        np.testing.assert_array_equal(found.numpy(), expected)


def test_way_for_other_devices_counts_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_occurrences", statistics._device_occurrences)
    tensors = [torch.randn(1000) * 10.0**-index for index in range(5)] + [notable(torch.float32)]
    for some in (tensors, [notable(torch.float64)]):
        found = statistics.magnitudes(some)
        expected = [with_lost(wide(tensor), tensor.dtype) for tensor in some]
        np.testing.assert_array_equal(found.numpy(), expected)


def test_counting_never_waits_for_a_device() -> None:
    # There are no numbers on this device: whatever needs one on the host raises.
    tensors = [torch.empty(size, device="meta") for size in (10, 70_000)]
    found = statistics.magnitudes(tensors)
    assert (found.shape, found.device.type) == ((2, 130), "meta")
    with pytest.raises(NotImplementedError):
        torch.bincount(torch.empty(3, dtype=torch.int32, device="meta"))


# Large parameters.


def sampled(entries: NDArray[np.float64]) -> Counts:
    """What the fixed sample of a large parameter holds."""
    generator = torch.Generator().manual_seed(entries.size)
    return counted(entries[torch.randint(entries.size, (4096,), generator=generator).numpy()])


@pytest.mark.parametrize(("rows", "count"), [(32_768, counted), (32_769, sampled)])
def test_beyond_32768_entries_a_fixed_sample_is_counted(
    rows: int, count: Callable[[NDArray[np.float64]], Counts], tmp_path: Path
) -> None:
    gradient = torch.randn(rows) * torch.logspace(-20, 4, rows)
    run = run_of(gradient, tmp_path)
    np.testing.assert_array_equal(run.histograms["weight"], [count(parts(gradient))])
    said = "updates and histograms of parameters above 32,768 entries, on a fixed sample of 4,096"
    assert particulars(run).get("Sampling") == (said if rows > 32_768 else None)


def test_both_parts_of_a_complex_parameter_make_it_large(tmp_path: Path) -> None:
    gradient = torch.randn(40_000, dtype=torch.complex64)
    run = run_of(gradient, tmp_path)
    np.testing.assert_array_equal(run.histograms["weight"], [sampled(parts(gradient))])
    assert "fixed sample" in particulars(run)["Sampling"]


def test_large_sparse_gradient_is_not_counted(tmp_path: Path) -> None:
    model = nn.Embedding(700, 100, sparse=True)
    optimizer = SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        model(torch.arange(5)).sum().backward()
        optimizer.step()
        run = scope.run()
    assert run.parameters["grad_norm"][0, 0] > 0
    assert not run.histograms


# What is there late, or not at all.


def test_late_parameters_have_empty_rows_before(tmp_path: Path) -> None:
    training = built(CASES["mlp"])
    model = training.model
    with watch(model, log_dir=tmp_path, every=1) as scope:
        training.step(0, Nobody())
        model.add_module("late", nn.Linear(5, 5))
        optimizer = SGD(model.parameters(), lr=0.1)
        x, y = vectors()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        expected = counted(parts(_gradient(model.get_parameter("late.weight"))))
        optimizer.step()
        run = scope.run()
    assert run.histograms.steps.tolist() == [0, 1]
    assert run.histograms.names == run.parameters.names
    assert run.histograms.at(0).shape == run.histograms.at(1).shape
    np.testing.assert_array_equal(run.histograms["late.weight"], [0 * expected, expected])
    assert run.histograms["0.weight"][0].any()


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def test_step_without_a_gradient_has_no_histograms(tmp_path: Path) -> None:
    model = mlp_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        model(torch.ones(2, 6))
        optimizer.step()
        run = scope.run()
    assert run.recorded_steps.tolist() == [0]
    assert not run.histograms


# What it costs, and what happens when it fails.


@pytest.fixture
def scope_of_mlp(tmp_path: Path) -> Iterator[tuple[trainings.Training, Scope]]:
    training = built(CASES["mlp"])
    with watch(training.model, training.optimizers, log_dir=tmp_path, every=1) as scope:
        yield training, scope


def test_one_copy_per_recorded_step(
    scope_of_mlp: tuple[trainings.Training, Scope], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[torch.device] = []
    send = recorder.to_host

    def counting(device: torch.device, numbers: Tensor) -> Any:
        sent.append(device)
        return send(device, numbers)

    monkeypatch.setattr(recorder, "to_host", counting)
    # An offer that comes due would be a copy of its own.
    monkeypatch.setattr(recorder, "PATIENCE", 1000.0)
    training, scope = scope_of_mlp
    for number in range(3):
        training.step(number, Nobody())
    run = scope.run()
    assert len(run.histograms.steps) == 3
    assert len(sent) == 3


def test_failure_costs_the_histograms_alone(
    scope_of_mlp: tuple[trainings.Training, Scope], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> Tensor:
        message = "no such kernel"
        raise RuntimeError(message)

    training, scope = scope_of_mlp
    training.step(0, Nobody())
    monkeypatch.setattr(statistics, "magnitudes", fail)
    with pytest.warns(GradscopeWarning, match="histograms disabled.*no such kernel"):
        training.step(1, Nobody())
    # A second warning would be an error here.
    training.step(2, Nobody())
    run = scope.run()
    assert run.histograms.steps.tolist() == [0]
    assert run.recorded_steps.tolist() == [0, 1, 2]
    assert (run.parameters["update_norm"] > 0).all()
    assert "no such kernel" in str(run.meta["problems"])
