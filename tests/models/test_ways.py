"""Ways of training that the libraries' models offer: each as if nobody watched, and right."""

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradscope.record import Run
from tests.models.subjects import SUBJECTS, Subject
from tests.models.twins import STEPS, Training, assert_measured, assert_same_bits
from tests.setups.support import support


def check(
    training: Training, folder: Path, *, like: Training | None = None, unseen: str = ""
) -> Run:
    """Not a bit differs, all numbers are right; `like` is a training with the same numbers.

    unseen: how what is not recorded is named, if anything is.
    """
    watched = training.watched(folder)
    messages = [problem["message"] for problem in watched.run.meta["problems"]]
    assert [message.partition(" are ")[0] for message in messages] == ([unseen] if unseen else [])
    assert watched.run.meta["coverage"]["closed_steps"] == STEPS
    assert_same_bits(watched.bits, training.bare().bits)
    assert_measured(watched.run, (like or training).measured())
    return watched.run


def right(setup: str, note: str = "") -> pytest.MarkDecorator:
    return support(
        "Models",
        setup,
        parameters="right",
        outputs="right",
        output_gradients="right",
        note=note,
    )


# What is checkpointed runs twice, and counts once.


@right(
    "transformers: activation checkpointing, re-entrant or not",
    "re-entrant: not of a module that runs twice in what is checkpointed",
)
@pytest.mark.parametrize(
    ("name", "reentrant"),
    [
        *product(["gpt2", "llama", "mixtral", "bert", "t5", "vit"], [False]),
        # Mixtral's loss of the router gets no gradient through it, watched or not. Of a dropout
        # that a checkpointed block of ViT calls twice, nothing is recorded.
        *product(["gpt2", "llama", "bert", "t5"], [True]),
    ],
)
def test_activation_checkpointing(name: str, reentrant: bool, tmp_path: Path) -> None:
    def checkpointing(model: Any) -> None:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})

    subject = SUBJECTS[name]
    training = Training(subject, prepare=checkpointing)
    unseen = "functional calls inside re-entrant checkpoints" if reentrant else ""
    check(training, tmp_path / "run", like=Training(subject), unseen=unseen)


# Evaluation and generation belong to no step.


def generating(subject: Subject, model: Any, optimizer: Optimizer) -> Tensor:
    optimizer.zero_grad()
    loss = subject.loss(model, subject.batch())
    generate(model)
    loss.backward()
    generate(model)
    optimizer.step()
    generate(model)
    return loss


def generate(model: Any) -> None:
    model.eval()
    words = torch.ones(1, 3, dtype=torch.long)
    assert model.generate(words, max_new_tokens=4, do_sample=True, pad_token_id=0).shape[1] > 3
    with torch.no_grad():
        model(input_ids=words, labels=words)
    model.train()


@right("transformers: `generate` between forward, backward and step")
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_generation_in_between(name: str, tmp_path: Path) -> None:
    check(Training(SUBJECTS[name], generating), tmp_path / "run")


# Lower precision, larger batches.


def in_bfloat16(subject: Subject, model: nn.Module, optimizer: Optimizer) -> Tensor:
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = subject.loss(model, subject.batch())
    loss.backward()
    optimizer.step()
    return loss


@right("under autocast to bfloat16")
@pytest.mark.parametrize("name", ["llama", "convnext", "densenet", "unet"])
def test_autocast(name: str, tmp_path: Path) -> None:
    check(Training(SUBJECTS[name], in_bfloat16), tmp_path / "run")


@right("converted to bfloat16")
@pytest.mark.parametrize("name", ["llama", "t5", "timm-vit"])
def test_models_in_bfloat16(name: str, tmp_path: Path) -> None:
    def as_bfloat16(subject: Subject, model: nn.Module, optimizer: Optimizer) -> Tensor:
        optimizer.zero_grad()
        batch = {
            key: value.bfloat16() if value.is_floating_point() else value
            for key, value in subject.batch().items()
        }
        loss = subject.loss(model, batch)
        loss.backward()
        optimizer.step()
        return loss

    training = Training(SUBJECTS[name], as_bfloat16, prepare=lambda model: model.bfloat16())
    check(training, tmp_path / "run")


def accumulating(subject: Subject, model: nn.Module, optimizer: Optimizer) -> Tensor:
    optimizer.zero_grad()
    losses = []
    for _ in range(2):
        loss = subject.loss(model, subject.batch()) / 2
        loss.backward()
        losses.append(loss.detach())
    optimizer.step()
    return torch.stack(losses).sum()


@right("with gradient accumulation")
@pytest.mark.parametrize("name", ["gpt2", "mixtral", "densenet"])
def test_gradient_accumulation(name: str, tmp_path: Path) -> None:
    check(Training(SUBJECTS[name], accumulating), tmp_path / "run")


# Weights that two layers share, and a base that is frozen.


@right("transformers: embeddings shared with the head")
@pytest.mark.parametrize(
    ("name", "first", "also"),
    [
        ("gpt2", "transformer.wte.weight", "lm_head.weight"),
        ("t5", "shared.weight", "decoder.embed_tokens.weight"),
    ],
)
def test_tied_embeddings(name: str, first: str, also: str, tmp_path: Path) -> None:
    training = Training(SUBJECTS[name])
    model, _ = training.built()
    assert model.get_parameter(first) is model.get_parameter(also)
    run = check(training, tmp_path / "run")
    assert also not in run.parameters.names
    # It is where it is first used, also where that is not by its first name.
    assert run.parameters.names.index(first) == 0


class LoraLinear(nn.Module):
    """Hu et al. 2021: the layer as it is, and a learnable product of two thin matrices."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x) + self.lora_B(self.lora_A(x))
        return out


def adapt(model: nn.Module) -> None:
    model.requires_grad_(requires_grad=False)
    for name, module in list(model.named_modules()):
        if name.endswith(("q_proj", "v_proj")):
            assert isinstance(module, nn.Linear)
            model.set_submodule(name, LoraLinear(module))


@right("low-rank adapters on a frozen base")
def test_low_rank_adaptation(tmp_path: Path) -> None:
    run = check(Training(SUBJECTS["llama"], prepare=adapt), tmp_path / "run")
    table = run.parameters
    adapters = np.array([entity.group == "adapter" for entity in table.entities])
    assert adapters.sum() == 8
    assert (table["requires_grad"] == adapters).all()
    assert np.isnan(table["grad_norm"][:, ~adapters]).all()
    assert run.meta["coverage"]["parameters"] == {"expected": 8, "seen": 8}
