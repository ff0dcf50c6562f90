"""What is reported of the parameters is what the optimizer was given."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import SGD

from gradscope.capture.scope import watch
from gradscope.reporters.provenance import particulars
from tests.capture import trainings
from tests.capture.reference import (
    PROBED,
    ParameterReference,
    assert_equal,
    described,
    prefixed,
    recomputed,
    watched,
)
from tests.capture.trainings import (
    Build,
    Cnn,
    Nobody,
    PartlyUsed,
    Recurrent,
    Reused,
    Tied,
    Training,
    adamw,
    built,
    lbfgs,
    mlp_model,
    momentum,
    plain,
    sgd,
    vectors,
    with_closure,
)

STEPS = 4

CASES: dict[str, Build] = {
    "mlp": lambda: plain(mlp_model(), vectors),
    "cnn": lambda: plain(Cnn(), trainings.images),
    "lstm": lambda: plain(Recurrent(), trainings.sequences),
    "reused module": lambda: plain(Reused(), vectors),
    "tied weights": lambda: plain(Tied(), trainings.tokens),
    "momentum": lambda: plain(mlp_model(), vectors, momentum),
    "adamw": lambda: plain(mlp_model(), vectors, adamw),
    "lbfgs closure": lambda: with_closure(mlp_model(), vectors, lbfgs),
    "adamw closure": lambda: with_closure(mlp_model(), vectors, adamw),
    "cnn closure": lambda: with_closure(Cnn(), trainings.images, momentum),
    "accumulation": trainings.accumulated,
    "clipping": trainings.clipped,
    "frozen": trainings.frozen,
    "unused": lambda: plain(PartlyUsed(), vectors),
    "two optimizers": trainings.two_optimizers,
    "sparse embedding": trainings.sparse_embedding,
    "float64": lambda: plain(mlp_model(torch.float64), partial(vectors, torch.float64)),
    "bfloat16": lambda: plain(mlp_model(torch.bfloat16), partial(vectors, torch.bfloat16)),
    "huge gradients": partial(trainings.rescaled, 1e20),
    "tiny gradients": partial(trainings.rescaled, 1e-25),
}


@pytest.mark.parametrize("name", CASES)
def test_every_quantity_equals_the_float64_reference(name: str, tmp_path: Path) -> None:
    run = watched(CASES[name], STEPS, tmp_path / "run")
    assert_equal(run.parameters, recomputed(CASES[name], STEPS))
    assert run.meta["problems"] == []


def test_scales_beyond_float32_squares_are_real_numbers(tmp_path: Path) -> None:
    # That the reference is not zero or infinite either: the two cases above mean something.
    for factor in (1e20, 1e-25):
        build = partial(trainings.rescaled, factor)
        norms = watched(build, 1, tmp_path / str(factor)).parameters["grad_norm"]
        assert np.isfinite(norms).all()
        assert (norms > 0).all()
        assert np.log10(norms.max()) == pytest.approx(np.log10(factor), abs=2)


@pytest.mark.parametrize(
    "values",
    [(float("nan"),), (float("inf"), float("-inf")), (float("nan"), float("inf"), 0.0)],
    ids=["nan", "inf", "nan, inf and zero"],
)
def test_nonfinite_gradient_entries_are_counted_and_left_out(
    values: tuple[float, ...], tmp_path: Path
) -> None:
    build = partial(trainings.poisoned, values)
    run = watched(build, 1, tmp_path / "run")
    at = run.parameters.names.index("2.weight")
    assert run.parameters["grad_nonfinite"][0, at] == sum(not np.isfinite(v) for v in values)
    gradient_only = [q for q in run.parameters.quantities if q.startswith(("grad_", "weight_"))]
    assert_equal(run.parameters, recomputed(build, 1), quantities=gradient_only)


def test_nonfinite_entries_are_left_out_of_update_and_weights(tmp_path: Path) -> None:
    # Step 0 has one NaN in the gradient, hence in the update; step 1 one in the weights.
    build = partial(trainings.poisoned, (float("nan"),))
    run = watched(build, 2, tmp_path / "run")
    expected = recomputed(build, 2)
    update = ["update_norm", "update_ratio", "update_gradient_cosine"]
    assert_equal(run.parameters, expected, quantities=["weight_norm", "weight_rms", *update])


def test_gradient_that_is_wholly_nan_has_a_count_and_no_statistics(tmp_path: Path) -> None:
    training = built(lambda: plain(mlp_model(), vectors))
    with watch(training.model, training.optimizers, log_dir=tmp_path, every=1) as scope:
        (training.model(torch.full((3, 6), torch.nan)).sum()).backward()
        training.optimizers[0].step()
        table = scope.run().parameters
    at = table.names.index("0.weight")
    assert table["grad_nonfinite"][0, at] == 16 * 6
    for quantity in ("norm", "rms", "mean", "std", "absmax", "zero_fraction"):
        assert np.isnan(table[f"grad_{quantity}"][0, at])


def test_tied_weights_are_one_entity(tmp_path: Path) -> None:
    table = watched(CASES["tied weights"], 1, tmp_path).parameters
    assert sorted(table.names) == ["embedding.weight", "hidden.bias", "hidden.weight"]


def test_frozen_parameters_have_no_gradient_and_no_update(tmp_path: Path) -> None:
    table = watched(CASES["frozen"], 2, tmp_path).parameters
    at = table.names.index("0.weight")
    assert (table["requires_grad"][:, at] == 0).all()
    assert (table["weight_norm"][:, at] > 0).all()
    for quantity in ("grad_norm", "grad_missing", "update_norm"):
        assert np.isnan(table[quantity][:, at]).all()


def test_unused_parameter_is_missing(tmp_path: Path) -> None:
    table = watched(CASES["unused"], 2, tmp_path).parameters
    at = table.names.index("unused.weight")
    assert (table["grad_missing"][:, at] == 1).all()
    assert np.isnan(table["grad_norm"][:, at]).all()
    assert np.isnan(table["update_norm"][:, at]).all()


@pytest.mark.parametrize("built_after", [False, True], ids=["before", "after"])
def test_optimizer_is_found_by_itself(built_after: bool, tmp_path: Path) -> None:
    model = built(lambda: plain(mlp_model(), vectors)).model
    optimizer = None if built_after else sgd(model)
    with watch(model, log_dir=tmp_path, every=1) as scope:
        optimizer = optimizer or sgd(model)
        unrelated = nn.Linear(2, 2)
        for number in range(STEPS):
            torch.manual_seed(1000 + number)
            x, y = vectors()
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            # Another model's optimizer is none of this run's business.
            unrelated(torch.ones(1, 2)).sum().backward()
            other = SGD(unrelated.parameters(), lr=0.1)
            other.step()
            optimizer.step()
        run = scope.run()
    assert_equal(run.parameters, recomputed(CASES["mlp"], STEPS))
    assert run.meta["coverage"]["optimizer_steps"] == STEPS


def test_hand_written_updates(tmp_path: Path) -> None:
    run = watched(trainings.hand_written, STEPS, tmp_path)
    assert_equal(run.parameters, recomputed(trainings.hand_written, STEPS))


def test_parameter_that_no_optimizer_holds(tmp_path: Path) -> None:
    model = mlp_model()
    optimizer = SGD(model[4].parameters(), lr=0.1)
    with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
        x, y = vectors()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        table = scope.run().parameters
    held = {name: table["in_optimizer"][0, i] for i, name in enumerate(table.names)}
    assert {name for name, value in held.items() if value == 1} == {"4.weight", "4.bias"}
    at = table.names.index("0.weight")
    # A gradient came, but nobody was given it.
    assert table["grad_missing"][0, at] == 0
    assert np.isnan(table["grad_norm"][0, at])
    assert np.isnan(table["update_norm"][0, at])


class TestLargeTensors:
    """Beyond 32,768 entries updates and histograms are sampled; nothing else is."""

    SAMPLED = ("update_norm", "update_ratio", "update_gradient_cosine")

    @pytest.fixture
    def build(self) -> Build:
        def build() -> Training:
            return plain(nn.Sequential(nn.Linear(300, 300), nn.Tanh(), nn.Linear(300, 5)), batch)

        def batch() -> tuple[Tensor, Tensor]:
            return torch.randn(64, 300), torch.randint(5, (64,))

        return build

    def test_gradient_and_weight_statistics_are_exact(self, build: Build, tmp_path: Path) -> None:
        run = watched(build, 2, tmp_path)
        sampled = (*self.SAMPLED, "grad_underflow_fraction", "update_lost_fraction")
        exact = [q for q in run.parameters.quantities if q not in sampled]
        assert_equal(run.parameters, recomputed(build, 2), quantities=exact)

    def test_updates_are_right_within_the_sampling_error(
        self, build: Build, tmp_path: Path
    ) -> None:
        run = watched(build, 2, tmp_path)
        expected = recomputed(build, 2)
        assert_equal(run.parameters, expected, rtol=0.05, quantities=self.SAMPLED)
        # Tensors of ordinary size are not sampled.
        small = [{name: step[name] for name in ("0.bias", "2.weight")} for step in expected]
        assert_equal(run.parameters, small, quantities=self.SAMPLED)

    def test_what_is_sampled_is_said(self, build: Build, tmp_path: Path) -> None:
        run = watched(build, 1, tmp_path)
        said = {key: value for key, value in run.meta.items() if key != "log_dir"}
        assert "sample" in str(said)
        assert "fixed sample of 4,096" in particulars(run)["Sampling"]

    def test_what_is_exact_is_not_said_to_be_sampled(self, tmp_path: Path) -> None:
        assert "Sampling" not in particulars(watched(CASES["mlp"], 1, tmp_path))

    def test_gradient_far_from_zero_keeps_its_spread(self, tmp_path: Path) -> None:
        # mean 1, std 1e-3 over 90,000 entries: E[x²] − mean² in float32 gets this 2 % wrong.
        model = nn.Linear(300, 300, bias=False)
        optimizer = SGD(model.parameters(), lr=0.1)
        gradient = 1 + 1e-3 * torch.randn(300, 300)
        with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
            (model(torch.ones(1, 300)).sum() * 0).backward()
            model.weight.grad = gradient
            optimizer.step()
            table = scope.run().parameters
        expected = prefixed("grad_", described([gradient]))
        assert table["grad_std"][0, 0] == pytest.approx(expected["grad_std"], rel=1e-4)
        assert table["grad_mean"][0, 0] == pytest.approx(expected["grad_mean"], rel=1e-4)


def test_growing_and_unfreezing_in_mid_training(tmp_path: Path) -> None:
    def run_loop(training: Training, probe: ParameterReference | Nobody) -> None:
        for number in range(4):
            if number == 2:
                for parameter in training.model.parameters():
                    parameter.requires_grad_(True)
            training.step(number, probe)

    training = built(trainings.frozen)
    reference = ParameterReference(training.model)
    run_loop(training, reference)
    training = built(trainings.frozen)
    with watch(training.model, training.optimizers, log_dir=tmp_path, every=1) as scope:
        run_loop(training, Nobody())
        table = scope.run().parameters
    assert_equal(table, reference.steps)


def test_parameters_replaced_in_mid_training(tmp_path: Path) -> None:
    """A new head under the same name, put into the same optimizer in the place of the old."""

    def replace_head(training: Training) -> None:
        assert isinstance(training.model, nn.Sequential)
        torch.manual_seed(7)
        training.model[4] = nn.Linear(8, 5)
        training.optimizers[0].param_groups[0]["params"][4:] = training.model[4].parameters()

    expected = []
    training = built(CASES["mlp"])
    for number in range(4):
        if number == 2:
            replace_head(training)
        reference = ParameterReference(training.model)
        training.step(number, reference)
        expected += reference.steps

    training = built(CASES["mlp"])
    with watch(training.model, training.optimizers, log_dir=tmp_path, every=1) as scope:
        for number in range(4):
            if number == 2:
                replace_head(training)
            training.step(number, Nobody())
        table = scope.run().parameters
    assert_equal(table, expected)


def test_default_device_of_the_process_does_not_matter(tmp_path: Path) -> None:
    """A default device other than the model's, as `torch.set_default_device` leaves it."""
    training = built(CASES["mlp"])
    batches = [vectors() for _ in range(2)]
    with watch(training.model, training.optimizers, log_dir=tmp_path, every=1) as scope:
        with torch.device("meta"):
            for x, y in batches:
                F.cross_entropy(training.model(x), y).backward()
                training.optimizers[0].step()
        run = scope.run()
    assert run.meta["problems"] == []
    assert (run.parameters["grad_norm"] > 0).all()


def test_parameters_come_in_the_order_of_execution(tmp_path: Path) -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(8, 5)
            self.first = nn.Linear(6, 8)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(self.first(x))
            return out

    wanted = ["first.weight", "first.bias", "last.weight", "last.bias"]
    ordinary = watched(lambda: plain(Backwards(), vectors), 1, tmp_path / "a")
    assert list(ordinary.parameters.names) == wanted
    in_closure = watched(lambda: with_closure(Backwards(), vectors, adamw), 1, tmp_path / "b")
    assert list(in_closure.parameters.names) == wanted


def test_every_quantity_of_the_catalogue_is_checked_here(tmp_path: Path) -> None:
    checked = [recomputed(CASES[name], 1)[0] for name in ("mlp", "sparse embedding")]
    covered = {quantity for step in checked for numbers in step.values() for quantity in numbers}
    known = set(watched(CASES["mlp"], 1, tmp_path).parameters.quantities)
    assert known - PROBED == covered
