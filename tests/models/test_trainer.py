"""transformers' Trainer, and accelerate within it: the loop is theirs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset

from gradscope.capture.scope import watch
from tests.models.subjects import SUBJECTS, WORDS
from tests.models.twins import STEPS, assert_same_bits, bits
from tests.setups.reference_loops import Received, assert_received
from tests.setups.support import support


class Counting(Dataset[Mapping[str, Tensor]]):
    """Sentences of consecutive words, of different lengths."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Mapping[str, Tensor]:
        words = torch.arange(index, index + 12) % WORDS
        labels = words.where(torch.arange(12) < 4 + index % 8, -100)
        return {"input_ids": words, "labels": labels}


class Following(transformers.TrainerCallback):  # type: ignore[misc]  # read as untyped
    """Stands between the Trainer and its optimizer."""

    def __init__(self, model: nn.Module) -> None:
        self.received = Received(model)

    def on_train_begin(self, *args: Any, optimizer: Any, **kwargs: Any) -> None:
        del args, kwargs
        self.received.follow(optimizer.optimizer)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs
        self.received.step_ends()


def trainer(folder: Path, **settings: object) -> Any:
    torch.manual_seed(0)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=STEPS,
        max_grad_norm=0.5,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **settings,
    )
    return transformers.Trainer(
        model=SUBJECTS["gpt2"].build(),
        args=arguments,
        train_dataset=Counting(),
        eval_dataset=Counting(),
    )


@support(
    "Models",
    "transformers: `Trainer`, also accumulating, checkpointing, in bfloat16",
    parameters="right",
)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"activation_checkpointing": True},
        {"bf16": True},
    ],
    ids=["plain", "accumulated", "checkpointed", "bf16"],
)
def test_the_trainer(settings: dict[str, object], tmp_path: Path) -> None:
    bare = trainer(tmp_path / "bare", **settings)
    following = Following(bare.model)
    bare.add_callback(following)
    bare.train()
    wanted = bits(bare.model)

    watched = trainer(tmp_path / "watched", **settings)
    with watch(watched.model, log_dir=tmp_path / "run", every=1) as scope:
        watched.train()
        assert_same_bits(bits(watched.model), wanted)
        run = scope.run()
    assert run.meta["problems"] == []
    assert_received(run.parameters, following.received)
    logged = [entry["loss"] for entry in watched.state.log_history if "loss" in entry]
    np.testing.assert_allclose(run.scalars["loss"], np.array(logged, np.float64), rtol=1e-4)
