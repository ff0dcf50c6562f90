"""Models of transformers, timm, torchvision and diffusers train as if nobody watched."""

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradscope.analysis.finding import Severity
from gradscope.capture.scope import watch
from tests.models.subjects import SUBJECTS
from tests.models.twins import (
    STEPS,
    Bare,
    Measured,
    Training,
    Watched,
    assert_measured,
    assert_same_bits,
    watched_names,
)
from tests.setups.support import support


@dataclass(frozen=True)
class Twins:
    training: Training
    bare: Bare
    measured: Measured
    watched: Watched


@pytest.fixture(scope="module", params=SUBJECTS)
def twins(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Twins:
    training = Training(SUBJECTS[request.param])
    folder = tmp_path_factory.mktemp(request.param) / "run"
    return Twins(training, training.bare(), training.measured(), training.watched(folder))


def test_not_a_bit_of_the_training_changes(twins: Twins) -> None:
    assert_same_bits(twins.watched.bits, twins.bare.bits)


@pytest.mark.parametrize(
    "twins",
    [
        pytest.param(
            name,
            marks=support(
                "Models",
                subject.title,
                parameters="right",
                outputs="right",
                output_gradients="right",
            ),
        )
        for name, subject in SUBJECTS.items()
    ],
    indirect=True,
)
def test_gradients_updates_and_outputs_are_right(twins: Twins) -> None:
    assert_measured(twins.watched.run, twins.measured)


def test_all_that_ran_was_seen_and_what_did_not_is_named(twins: Twins) -> None:
    run, model = twins.watched.run, twins.watched.model
    assert run.meta["problems"] == []
    coverage = run.meta["coverage"]
    assert coverage["closed_steps"] == coverage["recorded_steps"] == STEPS
    trainable = sum(parameter.requires_grad for parameter in model.parameters())
    assert coverage["parameters"] == {"expected": trainable, "seen": trainable}
    modules = coverage["modules"]
    assert modules["expected"] == len(watched_names(model))
    assert set(modules["never_ran"]) == watched_names(model) - twins.measured.ran
    assert modules["output_gradients_unseen"] == []
    last = twins.measured.passes[-1]
    arrived = {label for label in last.gradients if label.partition("#")[0] in watched_names(model)}
    calls = [entity.kind == "call" for entity in run.modules.entities]
    seen = np.count_nonzero(~np.isnan(run.modules["output_grad_norm"][-1, calls]))
    assert modules["output_gradients_seen"] == len(arrived) + seen


def test_three_healthy_steps_give_no_warning(twins: Twins) -> None:
    report = twins.watched.scope.report()
    loud = [finding for finding in report.findings if finding.severity >= Severity.WARNING]
    assert loud == []


def test_nothing_is_left_behind(twins: Twins) -> None:
    # Some libraries leave hooks and attributes of their own.
    assert left(twins.watched.model) == left(twins.bare.model)
    for parameter in twins.watched.model.parameters():
        assert not parameter._backward_hooks
        assert not parameter._post_accumulate_grad_hooks
    assert not twins.watched.optimizer._optimizer_step_pre_hooks
    assert not twins.watched.optimizer._optimizer_step_post_hooks


def left(model: nn.Module) -> list[tuple[str, set[str], list[int]]]:
    kinds = [kind for kind in vars(nn.Module()) if kind.endswith(("_hooks", "_with_kwargs"))]
    assert len(kinds) >= 8
    return [
        (name, set(vars(module)), [len(getattr(module, kind)) for kind in kinds])
        for name, module in model.named_modules()
    ]


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def pickled(model: nn.Module) -> nn.Module:
    loaded: nn.Module = pickle.loads(pickle.dumps(model))  # noqa: S301
    return loaded


# Of one that has run, transformers hooks the router with a function that can't be pickled.
PICKLED = [name for name in SUBJECTS if name != "mixtral"]


@pytest.mark.parametrize(
    ("copied", "name"),
    [
        *product([copy.deepcopy], SUBJECTS),
        *product([pickled, saved], PICKLED),
    ],
)
def test_a_watched_model_is_copied_as_it_is(
    copied: Callable[[nn.Module], nn.Module], name: str, tmp_path: Path
) -> None:
    training = Training(SUBJECTS[name])
    model, optimizer = training.built()
    with watch(model, optimizer, log_dir=tmp_path / "run", every=1) as scope:
        batch = training.subject.batch()
        # In the middle of a recorded step, when every module has a hook.
        training.subject.loss(model, batch).backward()
        twin = copied(model)
        state: dict[str, Tensor] = twin.state_dict()
        assert_same_bits(state, model.state_dict())
        torch.manual_seed(1)
        expected = training.subject.loss(model, batch)
        torch.manual_seed(1)
        assert torch.equal(training.subject.loss(twin, batch), expected)
        assert scope.run().meta["problems"] == []


def test_a_report_of_one(tmp_path: Path) -> None:
    watched = Training(SUBJECTS["gpt2"]).watched(tmp_path / "run")
    report = watched.scope.report()
    report.write(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "transformer.h.1.attn.c_attn" in page
    assert "GPT2LMHeadModel" in page
