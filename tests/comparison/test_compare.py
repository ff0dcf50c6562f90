"""`gradscope.compare` as a user calls it."""

import copy
import os
import random
import signal
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradscope
from gradscope.comparison.result import Comparison, Name, as_json
from gradscope.errors import ConfigError, ConfigTypeError

INITIALIZATIONS = ("own", "kaiming_normal", "xavier_uniform")


def make_model() -> nn.Module:
    hidden = [m for _ in range(8) for m in (nn.Linear(16, 16), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(16, 3))


def make_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(12, 16, generator=generator)
    return inputs, torch.randint(0, 3, (12,), generator=generator)


def deadly(_model: nn.Module) -> None:
    """Kills the worker that it runs in, and nobody else."""
    if os.getpid() != int(os.environ["GRADSCOPE_TEST_PID"]):
        os.kill(os.getpid(), signal.SIGKILL)


def compared(**changes: Any) -> Comparison:
    settings: dict[str, Any] = {
        "initializations": INITIALIZATIONS,
        "activations": ("own", "tanh"),
        "seeds": 2,
    }
    settings.update(changes)
    return gradscope.compare(make_model, make_batch(), nn.functional.cross_entropy, **settings)


def values_of(comparison: Comparison) -> dict[tuple[Name, int], str]:
    return {
        (cell.name, cell.seed): repr(as_json(cell))
        for configuration in comparison.configurations
        for cell in configuration.cells
    }


@pytest.fixture(scope="module")
def here() -> Comparison:
    """Compared in this process."""
    return compared()


def test_every_configuration_has_every_seed(here: Comparison) -> None:
    names = {c.name for c in here.configurations}
    assert names == {Name(i, a) for i in INITIALIZATIONS for a in ("own", "tanh")}
    assert all([cell.seed for cell in c.cells] == [0, 1] for c in here.configurations)
    assert here.complete
    assert here.layers == tuple(str(2 * i) for i in range(9))
    tiers = [c.tier for c in here.configurations]
    assert tiers == sorted(tiers)
    assert tiers[0] == 1


def test_he_leads_xavier_on_relu_by_exactly_ln_2() -> None:
    # Kaiming has twice Xavier's variance in square layers, and the numbers drawn are the same; a
    # linear loss, as a softmax turns with the scale of its inputs.
    made = gradscope.compare(
        make_model,
        make_batch(),
        initializations=("kaiming_normal", "xavier_normal"),
        activations=("own",),
        seeds=2,
        forward=lambda model, batch: model(batch[0]).sum(),
    )
    slopes = {c.name.initialization: [x.slope for x in c.cells] for c in made.configurations}
    pairs = zip(slopes["kaiming_normal"], slopes["xavier_normal"], strict=True)
    assert [one - other for one, other in pairs] == pytest.approx([np.log(2)] * 2, abs=1e-5)
    assert made.best.name.initialization == "kaiming_normal"


def test_nothing_of_the_users_changes() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3)
    ).eval()
    model(torch.randn(4, 16)).sum().backward()
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.step()
    batch = make_batch()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict(), batch))
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    keys = [set(vars(module)) for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
    gradscope.compare(
        model,
        batch,
        nn.CrossEntropyLoss(),
        initializations=("own", "lsuv", "orthogonal"),
        activations=("own", "gelu"),
        mitigations=("none", "layernorm", "dropout"),
        seeds=2,
        train_steps=2,
    )
    torch.testing.assert_close(
        (model.state_dict(), optimizer.state_dict(), batch), before, rtol=0, atol=0
    )
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)
    assert [set(vars(module)) for module in model.modules()] == keys
    assert not model.training
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]  # type: ignore[index]  # noqa: NPY002


def test_a_process_pool_gives_the_same_numbers(here: Comparison) -> None:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        there = compared(executor=pool)
    assert values_of(there) == values_of(here)


def test_a_worker_that_dies_costs_its_own_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADSCOPE_TEST_PID", str(os.getpid()))
    pool: Executor
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        made = compared(
            initializations=("kaiming_normal", deadly), activations=("own",), executor=pool, seeds=1
        )
    assert [str(c.name) for c in made.configurations] == ["kaiming_normal + own"]
    assert made.missing == 1
    assert any("deadly" in note and "died" in note for note in made.notes)


def test_it_goes_on_where_it_was_interrupted(tmp_path: Path, here: Comparison) -> None:
    def interrupt(done: int, _total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    partial = compared(log_dir=tmp_path, progress=interrupt)
    assert partial.missing == 9
    assert not partial.complete
    told = []
    whole = compared(log_dir=tmp_path, progress=lambda done, total: told.append((done, total)))
    assert told[0] == (4, 12)
    assert told[-1] == (12, 12)
    assert values_of(whole) == values_of(here)


def test_what_else_the_folder_holds_is_not_counted(tmp_path: Path) -> None:
    compared(log_dir=tmp_path)

    def interrupt(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    partial = compared(
        log_dir=tmp_path,
        initializations=("kaiming_normal", "orthogonal"),
        activations=("own",),
        seeds=3,
        progress=interrupt,
    )
    # Of two configurations and three seeds, two cells were there, and one more was measured.
    assert {str(c.name) for c in partial.configurations} <= {
        "kaiming_normal + own",
        "orthogonal + own",
    }
    assert partial.missing == 3


def test_another_comparison_does_not_go_on_in_its_folder(tmp_path: Path) -> None:
    compared(log_dir=tmp_path, seeds=1, activations=("own",))
    with pytest.raises(ConfigError, match="another comparison"):
        gradscope.compare(
            nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)),
            make_batch(),
            nn.functional.cross_entropy,
            log_dir=tmp_path,
        )


def test_the_recommendation_was_tried(here: Comparison) -> None:
    assert here.verification is not None
    assert here.verification.better == (here.verification.recommended < here.verification.own)
    trained = compared(train_steps=5)
    assert trained.verification is None or trained.verification.seeds == 2
    assert not np.isnan(trained.agreement)


def test_training_is_that_of_plain_sgd() -> None:
    made = compared(initializations=("own",), activations=("own",), train_steps=32, seeds=1)
    cell = made.configurations[0].cells[0]
    last, early = [], []
    for rate in (1e-3, 1e-2, 1e-1, 1.0):
        torch.manual_seed(0)
        model = make_model()
        inputs, target = make_batch()
        optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
        losses = []
        for _ in range(32):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        last.append(sum(losses[-3:]) / 3)
        early.append(sum(losses[:30]) / 30)
    # A tenth of the steps, at the rate that is best for them; and the first thirty.
    assert cell.trained == pytest.approx(min(last), rel=1e-6)
    assert cell.learning_rate == (1e-3, 1e-2, 1e-1, 1.0)[int(np.argmin(last))]
    assert cell.early == pytest.approx(min(early), rel=1e-6)


def test_what_does_not_exist_is_listed_with_the_reason() -> None:
    made = compared(
        initializations=("critical",),
        activations=("relu", "sigmoid"),
        mitigations=("none", "no_normalization"),
    )
    assert [str(c.name) for c in made.configurations] == ["critical + relu"]
    assert made.left_out.keys() == {
        Name("critical", "sigmoid"),
        Name("critical", "relu", "no_normalization"),
        Name("critical", "sigmoid", "no_normalization"),
    }
    assert all(made.left_out.values())


def test_a_model_without_activations_is_compared_by_its_initializations() -> None:
    made = gradscope.compare(
        lambda: nn.Sequential(*(nn.Linear(16, 16) for _ in range(6))),
        (torch.randn(4, 16), torch.randn(4, 16)),
        nn.functional.mse_loss,
        initializations=("orthogonal", "normal_0.01"),
        seeds=2,
    )
    assert [str(c.name) for c in made.configurations] == ["orthogonal + own", "normal_0.01 + own"]


@pytest.mark.parametrize(
    ("model", "changes", "error", "words"),
    [
        (lambda: 3, {}, ConfigError, "model_or_factory returned int"),
        (7, {}, ConfigTypeError, "model_or_factory=7"),
        (make_model, {"initializations": ["kaimng"]}, ConfigError, "'kaiming'"),
        (make_model, {"activations": ["relo"]}, ConfigError, "'relu'"),
        (make_model, {"mitigations": ["batchnrm"]}, ConfigError, "'batchnorm'"),
        (make_model, {"activations": "relu"}, ConfigTypeError, r"\['relu'\]"),
        (make_model, {"activations": [lambda x: x / 0 * 0]}, ConfigError, "nan"),
        (make_model, {"seeds": 0}, ConfigError, "seeds=0"),
        (make_model, {"executor": ThreadPoolExecutor()}, ConfigError, "ProcessPoolExecutor"),
        (make_model, {"train_steps": -1}, ConfigError, "train_steps=-1"),
        (make_model, {"loss_fn": lambda out, _: out}, ConfigError, "must be one number"),
        (make_model, {"loss_fn": lambda out, _: out.sum().item()}, ConfigError, "not a tensor"),
    ],
)
def test_bad_input_is_refused_before_the_grid(
    model: Any, changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    settings = {"loss_fn": nn.functional.cross_entropy, **changes}

    def never(*_: int) -> None:
        pytest.fail("the grid has started")

    with pytest.raises(error, match=words):
        gradscope.compare(model, make_batch(), progress=never, **settings)


def test_a_batch_that_does_not_fit_says_which() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as failed:
        gradscope.compare(
            make_model,
            (torch.randn(4, 5), torch.zeros(4, dtype=torch.long)),
            nn.functional.cross_entropy,
        )
    assert any("compare" in note and "(4, 5)" in note for note in failed.value.__notes__)


def test_a_loss_that_reaches_the_model_itself_leaves_it_its_gradients() -> None:
    model = make_model()

    def decayed(output: Tensor, target: Tensor) -> Tensor:
        size = torch.stack([p.square().sum() for p in model.parameters()]).sum()
        return nn.functional.cross_entropy(output, target) + 0.01 * size

    with torch.no_grad():
        made = gradscope.compare(
            model,
            make_batch(),
            decayed,
            initializations=("own", "orthogonal"),
            activations=("own",),
            seeds=1,
            train_steps=1,
        )
    assert made.complete
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_a_model_without_hidden_activations_has_is_said() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.lstm(x)[0]
            return output

    batch = (torch.randn(3, 5, 4), torch.zeros(3, 5, 4))
    arguments: dict[str, Any] = {"initializations": ("orthogonal",), "seeds": 1}
    made = gradscope.compare(Recurrent, batch, nn.functional.mse_loss, **arguments)
    assert made.left["lstm"] == "inside nn.LSTM"
    with pytest.raises(ConfigError, match="none that can be swapped"):
        gradscope.compare(
            Recurrent, batch, nn.functional.mse_loss, activations=("relu",), **arguments
        )
