"""What activation checkpointing repeats counts once; values from the first pass, gradients too."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

from tests.setups.support import support
from tests.setups.twins import classified, compared

Run = Callable[..., Any]


def plainly(part: Callable[..., Any], *args: Any) -> Any:
    return part(*args)


class Blocks(nn.Module):
    """Two blocks, each with one layer of its own and one that all share, which runs twice."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.3)) for _ in range(2)
        )
        self.shared = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)
        self.run = run

    def segment(self, block: nn.Module, x: Tensor) -> Tensor:
        once: Tensor = self.shared(block(x)).tanh()
        twice: Tensor = self.shared(once)
        return twice

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = self.run(self.segment, block, x)
        out: Tensor = self.head(x)
        return out


def nested(run: Run) -> Run:
    """A checkpoint within a checkpoint."""

    def outer(segment: Callable[..., Any], block: nn.Module, x: Tensor) -> Any:
        return run(lambda x: segment(partial(run, block), x), x)

    return outer


def keep_products(*args: Any, **kwargs: Any) -> CheckpointPolicy:
    _, op = args[:2]
    del kwargs
    if op == torch.ops.aten.addmm.default:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def selective() -> Run:
    contexts = partial(create_selective_checkpoint_contexts, keep_products)
    return partial(checkpoint, use_reentrant=False, context_fn=contexts)


def without_early_stop(*args: Any) -> Any:
    with set_checkpoint_early_stop(False):
        return checkpoint(*args, use_reentrant=False)


def with_no_grad_inside(run: Run) -> Run:
    """The block also runs in a `no_grad` block of the segment, before and after."""

    def outer(segment: Callable[..., Any], block: nn.Module, x: Tensor) -> Any:
        def noisy(x: Tensor) -> Any:
            with torch.no_grad():
                aim = block(x)
            out = segment(block, x)
            with torch.no_grad():
                aim = aim + block(x)
            return out + aim

        return run(noisy, x)

    return outer


PLAIN = partial(checkpoint, use_reentrant=False)
REENTRANT = partial(checkpoint, use_reentrant=True)
WAYS: dict[str, tuple[Run, Run]] = {
    "activation checkpointing": (PLAIN, plainly),
    "activation checkpointing, re-entrant": (REENTRANT, plainly),
    "selective checkpointing": (selective(), plainly),
    "checkpointing without early stop": (without_early_stop, plainly),
    "checkpoints in checkpoints": (nested(PLAIN), nested(plainly)),
    "checkpoints with `no_grad` inside": (
        with_no_grad_inside(PLAIN),
        with_no_grad_inside(plainly),
    ),
    "re-entrant checkpoints with `no_grad` inside": (
        with_no_grad_inside(REENTRANT),
        with_no_grad_inside(plainly),
    ),
}


# Said of those that repeat forwards without gradients.
NO_CALLS = "functional calls inside re-entrant checkpoints"


def ways() -> Iterator[Any]:
    for way, (run, reference) in WAYS.items():
        shown = support(
            "Autograd", way, parameters="right", outputs="right", output_gradients="right"
        )
        said = (NO_CALLS,) if "re-entrant" in way else ()
        yield pytest.param(run, reference, said, marks=shown, id=way)


@pytest.mark.parametrize(("run", "reference", "said"), list(ways()))
def test_repeated_forwards_count_once(
    run: Run, reference: Run, said: tuple[str, ...], tmp_path: Path
) -> None:
    seen = compared(
        lambda: classified(Blocks(run)),
        tmp_path,
        reference=lambda: classified(Blocks(reference)),
        problems=said,
    )
    # Four uses of the shared layer, each with its own gradient.
    assert {f"shared#{use}" for use in (1, 2, 3)} < set(seen.modules.names)
    assert seen.meta["coverage"]["modules"]["output_gradients_unseen"] == []


@pytest.mark.parametrize("reentrant", [False, True])
@support(
    "Autograd",
    "`checkpoint_sequential`",
    parameters="right",
    outputs="right",
    output_gradients="right",
)
def test_checkpoint_sequential(reentrant: bool, tmp_path: Path) -> None:
    class Chain(nn.Module):
        def __init__(self, *, checkpointed: bool) -> None:
            super().__init__()
            self.first = nn.Linear(6, 8)
            self.chain = nn.Sequential(
                nn.Linear(8, 8),
                nn.ReLU(inplace=True),
                nn.Linear(8, 8),
                nn.Dropout(),
                nn.Linear(8, 5),
            )
            self.checkpointed = checkpointed

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            out: Tensor = (
                checkpoint_sequential(self.chain, 2, x, use_reentrant=reentrant)
                if self.checkpointed
                else self.chain(x)
            )
            return out

    compared(
        lambda: classified(Chain(checkpointed=True)),
        tmp_path,
        reference=lambda: classified(Chain(checkpointed=False)),
    )


@support(
    "Autograd",
    "re-entrant checkpoints in one another",
    parameters="right",
    outputs="unknown",
    output_gradients="unknown",
)
def test_what_is_not_found_again_is_named(tmp_path: Path) -> None:
    inside = [f"blocks.{at}{part}" for at in range(2) for part in ("", ".0", ".1", ".2")]
    run = compared(lambda: classified(Blocks(nested(REENTRANT))), tmp_path, but=[*inside, "shared"])
    said = run.meta["coverage"]["modules"]["reasons"]
    uses = [*inside, "shared", *(f"shared#{use}" for use in (1, 2, 3))]
    assert set(said) == set(uses)
    assert set(said.values()) == {"it ran without gradients"}
