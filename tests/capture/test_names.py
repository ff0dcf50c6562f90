"""Names, and cadences, that need one process only."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from gradscope.capture import arguments, distributed
from gradscope.capture.cadence import Cadence
from gradscope.capture.names import class_name, named_modules, owned_parameters, unwrapped


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 3), nn.ReLU()))


def wrapped() -> nn.Module:
    model = net()
    model[0] = checkpoint_wrapper(model[0])
    block: Any = torch.compile(checkpoint_wrapper(model[1]))
    model[1] = block
    compiled: Any = torch.compile(model)
    assert isinstance(compiled, nn.Module)
    return compiled


# Importing the compiler warns.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wrappers_leave_no_trace_in_names() -> None:
    plain, model = net(), wrapped()
    assert any("_orig_mod" in name for name, _ in model.named_modules())
    assert [name for name, _ in named_modules(model)] == [n for n, _ in plain.named_modules()]
    assert [name for name, _, _ in owned_parameters(model)] == [
        name for name, _ in plain.named_parameters()
    ]
    assert type(unwrapped(model)) is nn.Sequential


def test_a_shared_module_has_its_first_name() -> None:
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, checkpoint_wrapper(layer))
    assert [name for name, _ in named_modules(model)] == ["", "0"]


def test_the_class_is_the_users() -> None:
    class FSDPModule(nn.Module):
        pass

    class FSDPLinear(FSDPModule):
        pass

    assert class_name(nn.Linear(2, 2)) == "Linear"
    assert class_name(FSDPLinear()) == "Linear"


def test_one_process_is_nobodys_partner() -> None:
    assert distributed.processes() is None
    arguments.check_model(net())


@pytest.mark.parametrize("every", [1, 3, 10])
def test_cadence_goes_by_its_own_proposals_as_it_is_described(every: int) -> None:
    cadence = Cadence(every)
    due = []
    for step in range(45):
        if cadence.due(step):
            due.append(step)
            cadence.agree(cadence.propose(step))
    assert due == [step for step in range(45) if step % every == 0]


def test_what_is_not_agreed_stays_due() -> None:
    cadence = Cadence(5)
    assert cadence.due(0)
    assert cadence.due(1)
    cadence.agree(7)
    assert [step for step in range(10) if cadence.due(step)] == [7, 8, 9]


@pytest.mark.parametrize(("first", "due", "expected"), [(23, False, 30), (23, True, 23)])
def test_cadence_of_a_resumed_run(first: int, due: bool, expected: int) -> None:
    cadence = Cadence(10)
    cadence.begin_at(first, due=due)
    assert next(step for step in range(first, 60) if cadence.due(step)) == expected
