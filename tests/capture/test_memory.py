"""What a scope holds does not grow with the length of the run: the log has it all."""

import gc
import sys
from collections import deque
from pathlib import Path

import pytest
import torch
from torch import nn

from gradscope.capture import display
from gradscope.capture.scope import Scope, watch

EARLY, LATE, EVERY = 1_000, 5_000, 20
# Caches of Python's and torch's own are not equally full: 43 blocks were seen. One number kept of
# every step would be 4 000, one object of every recorded step 200.
SLACK = 120


def train(model: nn.Module, optimizer: torch.optim.Optimizer, scope: Scope, steps: int) -> None:
    x = torch.ones(1, 2)
    for _ in range(steps):
        loss = model(x).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scope.log(loss=loss, accuracy=0.5)


def held(scope: Scope) -> dict[str, int]:
    """Blocks of memory, objects, and entries of containers, in the whole process."""
    # Steps wait for company and for the disk: of how many it is chance.
    scope._settle()
    scope._recorder.flush()
    gc.collect()
    objects = gc.get_objects()
    containers = [known for known in objects if type(known) in {list, dict, set, deque}]
    entries = sum(map(len, containers))
    # The lists made here are not among them.
    counts = {"objects": len(objects), "entries": entries}
    del objects, containers
    return {"blocks": sys.getallocatedblocks(), **counts}


def test_five_thousand_steps_hold_no_more_than_a_thousand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What TensorBoard is shown imports matplotlib.
    monkeypatch.setattr(display, "_EXPECTED", float("inf"))
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with watch(model, optimizer, log_dir=tmp_path, every=EVERY) as scope:
        train(model, optimizer, scope, EARLY)
        early = held(scope)
        train(model, optimizer, scope, LATE - EARLY)
        late = held(scope)
        counts = dict(scope._observer.counts)
    assert counts["closed_steps"] == LATE
    assert counts["recorded_steps"] == LATE // EVERY
    grown = {kind: late[kind] - early[kind] for kind in late}
    assert {kind: amount for kind, amount in grown.items() if amount > SLACK} == {}
