"""Gradients in turn, rows that are alike, Adam's epsilon and outputs alike, against numpy."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer

from gradscope.capture import pairs
from gradscope.capture.probes import ParameterProbes, Sampled
from gradscope.capture.recorder import Rows
from gradscope.capture.samples import Draw, is_turn, spread
from gradscope.capture.scope import watch
from gradscope.record import Run
from tests.capture.tensors import normal
from tests.capture.trainings import mlp_model, vectors

F64 = NDArray[np.float64]


def wide(tensor: Tensor) -> F64:
    found: F64 = tensor.detach().double().numpy().reshape(-1).copy()
    return found


def trained(
    model: nn.Module,
    optimizer: Optimizer,
    log_dir: Path,
    steps: int,
    look: Callable[[int], object] = lambda _: None,
    *,
    every: int = 1,
) -> Run:
    """`look` is called right before the optimizer's step."""
    with watch(model, optimizer, log_dir=log_dir, every=every) as scope:
        for number in range(steps):
            torch.manual_seed(number)
            x, y = vectors()
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            look(number)
            optimizer.step()
            scope.log(loss=1.0)
        run = scope.run()
    assert run.meta["problems"] == []
    return run


def column(run: Run, quantity: str, name: str) -> list[float]:
    at = run.parameters.names.index(name)
    return [float(number) for number in run.parameters[quantity][:, at]]


class TestGradientsInTurn:
    def test_the_cosine_is_that_of_the_gradients_of_two_steps(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        model = mlp_model()
        gradients: list[dict[str, F64]] = []

        def look(number: int) -> None:
            if number == 2:
                model[4].bias.grad = None
            found = {n: wide(p.grad) for n, p in model.named_parameters() if p.grad is not None}
            gradients.append(found)

        run = trained(model, SGD(model.parameters(), lr=0.5), tmp_path, 5, look)
        for name in run.parameters.names:
            found = column(run, "grad_previous_cosine", name)
            assert np.isnan(found[0])
            for number in range(1, 5):
                before, now = gradients[number - 1].get(name), gradients[number].get(name)
                if before is None or now is None:
                    assert np.isnan(found[number])
                else:
                    size = np.linalg.norm(before) * np.linalg.norm(now)
                    assert found[number] == pytest.approx(float(before @ now / size), abs=1e-6)

    def test_steps_that_do_not_follow_each_other_have_none(self, tmp_path: Path) -> None:
        model = mlp_model()
        run = trained(model, SGD(model.parameters(), lr=0.1), tmp_path, 6, every=2)
        assert len(run.parameters.steps) == 3
        assert np.isnan(run.parameters["grad_previous_cosine"]).all()

    def test_a_large_gradient_is_sampled_in_the_same_places(self) -> None:
        parameter = torch.empty(300, 400)
        probes, rows = ParameterProbes(), Rows()
        one, other = normal(4096), normal(4096) + normal(4095, mean=0.5)[0]
        for step, gradient in enumerate((one, other)):
            probes.begin(step, [parameter])
            probes.gradients(rows, [Sampled(3, parameter, gradient, None)])
        ((what, entity, numbers, _),) = rows.entries
        assert (what, entity) == ("previous", 3)
        places = Draw(256)(4096, torch.device("cpu"))
        assert places is not None
        first, second = wide(one[places]), wide(other[places])
        expected = [first @ second, second @ second, first @ first]
        assert numbers.tolist() == pytest.approx(expected, rel=1e-6)

    def test_what_an_optimizer_skips_is_no_step(self) -> None:
        parameter = torch.empty(8)
        probes, rows = ParameterProbes(), Rows()
        for step in range(3):
            probes.begin(step, [parameter])
            skipped = torch.tensor(step == 1)
            probes.gradients(rows, [Sampled(0, parameter, normal(8), skipped)])
        assert [entry[2].tolist() for entry in rows.entries] == [[0.0] * 3] * 2

    def test_samples_of_many_parameters_stay_small(self) -> None:
        parameters = [torch.empty(512) for _ in range(4_000)]
        probes, rows = ParameterProbes(), Rows()
        probes.begin(0, parameters)
        gradient = normal(512)
        read = [Sampled(row, p, gradient, None) for row, p in enumerate(parameters)]
        probes.gradients(rows, read)
        kept = sum(matrix.numel() for matrix in probes._current.values())
        assert 0 < 2 * kept <= 0.01 * 512 * 4_000 + 262_144


@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
def test_entries_that_are_not_finite_are_left_out_of_a_cosine(scale: float) -> None:
    one, other = normal(40).view(2, 20) * scale, normal(41)[:40].view(2, 20) * scale
    one[0, 3], other[1, 5] = torch.nan, torch.inf
    for row, numbers in enumerate(pairs.cosine_products(one, other).tolist()):
        kept = [place for place in range(20) if (row, place) not in {(0, 3), (1, 5)}]
        x, y = wide(one[row, kept]), wide(other[row, kept])
        assert numbers == pytest.approx([x @ y, x @ x, y @ y], rel=1e-6)


class TestDuplicateRows:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_rows_alike_to_the_bit_are_counted(self, dtype: torch.dtype) -> None:
        sample = normal(200).view(20, 10).to(dtype)
        sample[7] = sample[2]
        sample[9] = sample[2]
        sample[11] = sample[12]
        # Other signs in two places, one other bit, zeros and NaN.
        sample[13] = sample[14] * torch.tensor([-1.0, -1.0] + [1.0] * 8).to(dtype)
        sample[15] = sample[16]
        sample[15, 9] *= 1 + torch.finfo(dtype).eps
        sample[17:19] = 0.0
        sample[19] = torch.nan
        kept = [row for row in sample.double().numpy().tolist() if any(row) and row[0] == row[0]]
        alike = sum(kept.count(row) > 1 for row in kept)
        assert alike == 5
        assert pairs.duplicate_rows(sample).tolist() == [alike, len(kept)]

    def test_layers_are_judged_that_have_rows_with_weights_of_their_own(
        self, tmp_path: Path
    ) -> None:
        torch.manual_seed(0)
        first, second, third = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(4, 5)
        with torch.no_grad():
            first.weight[:] = first.weight[0]
            second.weight[1] = second.weight[0]
            third.weight.zero_()
        norm = nn.LayerNorm((2, 4))
        model = nn.Sequential(
            first, nn.Unflatten(1, (2, 4)), norm, nn.Flatten(), second, nn.Tanh(), third
        )
        run = trained(model, SGD(model.parameters(), lr=0.0), tmp_path, 1)
        assert column(run, "duplicate_rows_fraction", "0.weight") == [1.0]
        assert column(run, "duplicate_rows_fraction", "4.weight") == [0.5]
        for name in ("0.bias", "2.weight", "6.weight"):
            assert np.isnan(column(run, "duplicate_rows_fraction", name)).all()

    def test_one_step_in_ten_is_looked_at(self, tmp_path: Path) -> None:
        model = mlp_model()
        run = trained(model, SGD(model.parameters(), lr=0.1), tmp_path, 21)
        known = ~np.isnan(column(run, "duplicate_rows_fraction", "0.weight"))
        assert np.flatnonzero(known).tolist() == [*range(10), 19]
        assert [is_turn(count) for count in range(1, 22)] == known.tolist()

    def test_few_bits_say_nothing(self) -> None:
        assert pairs.is_comparable(torch.float32, 2)
        assert pairs.is_comparable(torch.bfloat16, 3)
        assert not pairs.is_comparable(torch.bfloat16, 2)
        assert not pairs.is_comparable(torch.float32, 1)


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "Adam": Adam,
    "AdamW": AdamW,
    "NAdam": NAdam,
    "amsgrad": partial(Adam, amsgrad=True),
}


class TestEpsilon:
    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_the_share_is_that_of_the_corrected_second_moments(
        self, name: str, tmp_path: Path
    ) -> None:
        torch.manual_seed(0)
        model = mlp_model()
        epsilon, beta = 3e-3, 0.99
        make = OPTIMIZERS[name]
        optimizer = make(model.parameters(), lr=1e-3, eps=epsilon, betas=(0.9, beta))
        run = trained(model, optimizer, tmp_path / "run", 3)
        key = "max_exp_avg_sq" if name == "amsgrad" else "exp_avg_sq"
        shares = []
        for parameter_name, parameter in model.named_parameters():
            second = wide(optimizer.state[parameter][key]) / (1 - beta**3)
            second = second[second > 0]
            share = float((np.sqrt(second) < epsilon).mean())
            shares.append(share)
            found = column(run, "epsilon_share", parameter_name)[-1]
            assert found == pytest.approx(share, abs=1e-6)
        assert 0 < np.mean(shares) < 1

    def test_untouched_coordinates_and_other_optimizers_say_nothing(self, tmp_path: Path) -> None:
        model = mlp_model()
        run = trained(model, SGD(model.parameters(), lr=0.1, momentum=0.9), tmp_path / "sgd", 2)
        assert np.isnan(run.parameters["epsilon_share"]).all()

        model = mlp_model()
        optimizer = Adam(model.parameters(), lr=0.1)

        def clear(number: int) -> None:
            del number
            gradient = model.get_parameter("4.bias").grad
            assert gradient is not None
            gradient.zero_()

        run = trained(model, optimizer, tmp_path / "adam", 2, clear)
        assert np.isnan(column(run, "epsilon_share", "4.bias")).all()
        assert column(run, "epsilon_share", "4.weight") == [0.0, 0.0]
        # Nobody was asked for in vain: the state has what Adam put there.
        assert len(optimizer.state) == len(list(model.parameters()))


def mean_cosine(outputs: Tensor) -> float:
    """Over all pairs, one by one."""
    flat = outputs.detach().double().flatten(1).numpy()
    rows = [row / np.linalg.norm(row) for row in flat if np.linalg.norm(row) > 0]
    cosines = [a @ b for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]
    return float(np.mean(cosines))


class TestOutputsAlike:
    def test_each_layer_and_the_model_as_computed_by_hand(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Dropout(0.0), nn.Linear(7, 5))
        torch.manual_seed(0)
        x, _ = vectors()
        first = model[0](x)
        expected = {"0": first, "1": first.relu(), "3": model(x), "(root)": model(x)}
        run = trained(model, SGD(model.parameters(), lr=0.1), tmp_path, 1)
        for name in run.modules.names:
            found = run.modules["output_sample_similarity"][0, run.modules.names.index(name)]
            if name in expected:
                assert found == pytest.approx(mean_cosine(expected[name]), abs=1e-5)
            else:
                assert np.isnan(found)

    def test_micro_batches_count_alike_and_single_samples_not(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        model = nn.Linear(6, 5)
        optimizer = SGD(model.parameters(), lr=0.1)
        batches = [torch.randn(4, 6), torch.randn(9, 6), torch.randn(1, 6)]
        expected = np.mean([mean_cosine(model(batch)) for batch in batches[:2]])
        with watch(model, optimizer, log_dir=tmp_path, every=1) as scope:
            for batch in batches:
                model(batch).square().mean().backward()
            optimizer.step()
            table = scope.run().modules
        assert table["output_sample_similarity"][0].tolist() == pytest.approx([expected], abs=1e-5)

    @pytest.mark.parametrize("scale", [1.0, 1e25, 1e-25])
    def test_samples_of_nothing_or_not_finite_are_left_out(self, scale: float) -> None:
        rows = normal(60).view(6, 10) * scale
        rows[1], rows[3, 2], rows[4, 2] = 0.0, torch.nan, torch.inf
        value, count = pairs.mean_cosine(rows).tolist()
        assert count == 1
        assert value == pytest.approx(mean_cosine(rows[[0, 2, 5]]), abs=1e-5)
        assert pairs.mean_cosine(rows[[0, 1]]).tolist() == [0.0, 0.0]

    def test_outputs_all_alike_have_1(self) -> None:
        value, _ = pairs.mean_cosine(normal(10).expand(64, 10)).tolist()
        assert value == pytest.approx(1.0, abs=1e-6)


def test_some_of_many_are_spread_over_all_of_them() -> None:
    assert spread(range(5), 8) == [0, 1, 2, 3, 4]
    assert spread(range(20), 8) == [0, 2, 5, 8, 10, 13, 16, 19]
