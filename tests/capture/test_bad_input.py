"""What can't work is refused in words that name it and the way out, and leaves nothing behind."""

import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import SGD
from torch.optim import optimizer as torch_optimizer

from gradscope.capture import scope as scopes
from gradscope.capture.scope import watch
from gradscope.errors import ConfigError, ConfigTypeError, GradscopeWarning, LogError
from gradscope.log.reader import load
from gradscope.log.writer import RunWriter
from tests.capture.trainings import mlp_model, sgd, vectors


@pytest.fixture
def model() -> nn.Module:
    return mlp_model()


def hooks_of(model: nn.Module) -> int:
    every = [vars(module) for module in model.modules()]
    every += [vars(torch_optimizer), vars(nn.modules.module)]
    return sum(
        len(value)
        for attributes in every
        for name, value in attributes.items()
        if "hook" in name and isinstance(value, dict)
    )


@pytest.fixture
def nothing_left(model: nn.Module, tmp_path: Path) -> Iterator[None]:
    """Neither a hook nor a file."""
    before = hooks_of(model)
    yield
    assert hooks_of(model) == before
    assert [path for path in tmp_path.rglob("*") if ".gradscope" in path.name] == []


def frozen_model() -> nn.Module:
    return mlp_model().requires_grad_(False)


def square(x: torch.Tensor) -> torch.Tensor:
    return x * x


# Arguments, the error, and what its message has to name.
Refused = tuple[dict[str, Any], type[Exception], tuple[str, ...]]
REFUSED: dict[str, Refused] = {
    "model is a function": ({"model": square}, TypeError, ("function", "nn.Module")),
    "model is None": ({"model": None}, TypeError, ("None", "nn.Module")),
    "model is a class": ({"model": nn.Linear}, TypeError, ("nn.Module",)),
    "nothing trainable": (
        {"model": frozen_model()},
        ConfigError,
        ("Sequential", "no trainable parameters", "requires_grad=True"),
    ),
    "no parameters": (
        {"model": nn.ReLU()},
        ConfigError,
        ("ReLU", "no trainable parameters", "requires_grad"),
    ),
    "optimizer of another model": (
        {"optimizer": SGD(nn.Linear(2, 2).parameters(), lr=0.1)},
        ConfigError,
        ("SGD", "none of the Sequential's parameters", "model.parameters()"),
    ),
    "no optimizers": ({"optimizer": []}, ConfigError, ("optimizer=[]", "leave it out")),
    "optimizer is a string": ({"optimizer": "adam"}, TypeError, ("str", "ptimizer")),
    "optimizer is a class": ({"optimizer": SGD}, TypeError, ("ptimizer",)),
    "optimizer is a number": ({"optimizer": 3}, TypeError, ("int", "optimizer")),
    "one of the optimizers is none": ({"optimizer": [None]}, TypeError, ("NoneType", "ptimizer")),
    "optimizer is the parameters": (
        {"optimizer": list(nn.Linear(2, 2).parameters())},
        TypeError,
        ("Parameter", "Optimizer"),
    ),
    "criterion is a function": (
        {"criterion": F.cross_entropy},
        TypeError,
        ("cross_entropy", "nn.Module", "scope.log(loss=loss)"),
    ),
    "every=0": ({"every": 0}, ConfigError, ("every=0", "1 records each step")),
    "every=-3": ({"every": -3}, ConfigError, ("every=-3",)),
    "every=2.5": ({"every": 2.5}, TypeError, ("every=2.5", "whole number")),
    "every=True": ({"every": True}, TypeError, ("every=True", "whole number")),
    "every='10'": ({"every": "10"}, TypeError, ("every='10'", "whole number")),
    "every and budget": (
        {"every": 2, "budget": 0.01},
        ConfigError,
        ("every=2", "budget=0.01", "give one"),
    ),
    "no budget": ({"budget": 0.0}, ConfigError, ("budget=0.0", "above 0", "0.01 is 1 %")),
    "budget in percent": ({"budget": 1}, ConfigError, ("budget=1", "below 1", "every=1")),
    "budget is nan": ({"budget": float("nan")}, ConfigError, ("budget=nan", "below 1")),
    "budget in words": ({"budget": "1%"}, TypeError, ("budget='1%'", "share")),
    "scaler is none": ({"scaler": 1024.0}, TypeError, ("scaler=1024.0", "torch.amp.GradScaler")),
    "on_finding": (
        {"on_finding": "abort"},
        ConfigError,
        ("on_finding='abort'", "choose 'stop'", "function"),
    ),
    "on_finding is a number": ({"on_finding": 3}, TypeError, ("on_finding=3", "'stop'")),
    "resume without a folder": (
        {"resume": True, "log_dir": None},
        ConfigError,
        ("resume=True", "log_dir"),
    ),
    "resume is a folder": ({"resume": "runs/first"}, TypeError, ("runs/first", "True or False")),
    "level unknown": ({"level": "ful"}, ConfigError, ("level='ful'", "parameters, full, deep")),
    "include is a number": ({"include": [3]}, TypeError, ("include=[3]", "pattern")),
    "include is no sequence": ({"include": 3}, TypeError, ("include=3", "pattern")),
    "include matches nothing": (
        {"include": "typo.*"},
        ConfigError,
        ("include='typo.*'", "no parameter and no module", "Sequential", "0.weight"),
    ),
    "one of the patterns matches nothing": (
        {"include": ["0.*", "2.wieght"]},
        ConfigError,
        ("include='2.wieght'", "near are: 2.weight"),
    ),
    "exclude leaves nothing": (
        {"exclude": "*"},
        ConfigError,
        ("exclude='*'", "left to be watched", "0.weight"),
    ),
    "include and exclude leave nothing": (
        {"include": "0.*", "exclude": ["9.*", "0.[wb]*"]},
        ConfigError,
        ("include='0.*' and exclude='9.*', '0.[wb]*'", "left to be watched", "0.weight"),
    ),
    "exclude is a number": ({"exclude": [None]}, TypeError, ("exclude=[None]", "pattern")),
}


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("case", REFUSED)
def test_is_refused(case: str, model: nn.Module, tmp_path: Path) -> None:
    changed, error, named = REFUSED[case]
    arguments = {"model": model, "log_dir": tmp_path / "run", **changed}
    with pytest.raises(error) as raised:
        watch(**arguments)
    assert isinstance(raised.value, (ConfigError, ConfigTypeError))
    for words in named:
        assert words in str(raised.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("level", ["parameters", "full", "deep"])
def test_all_levels_are_accepted(level: str, model: nn.Module, tmp_path: Path) -> None:
    optimizer = sgd(model)
    with watch(model, optimizer, log_dir=tmp_path, every=1, level=level) as scope:
        train(model, optimizer, 2)
        run = scope.run()
    assert (run.parameters["grad_norm"] > 0).all()
    assert bool(run.modules.names) == (level != "parameters")


@pytest.mark.parametrize(
    ("patterns", "parameters"),
    [
        ({"include": "0.*"}, {"0.weight", "0.bias"}),
        ({"include": ["0.weight", "2"]}, {"0.weight"}),
        ({"include": "0.*", "exclude": ["nothing.of.the.kind", "*.bias"]}, {"0.weight"}),
    ],
)
def test_patterns_that_choose_something_are_accepted(
    patterns: dict[str, Any], parameters: set[str], model: nn.Module, tmp_path: Path
) -> None:
    optimizer = sgd(model)
    with watch(model, optimizer, log_dir=tmp_path, every=1, **patterns) as scope:
        train(model, optimizer, 2)
        assert set(scope.run().parameters.names) == parameters


@pytest.mark.parametrize("patterns", [{"include": "1"}, {"include": ["*/relu#*", "1"]}])
def test_modules_alone_are_accepted_and_the_report_says_what_is_missing(
    patterns: dict[str, Any], model: nn.Module, tmp_path: Path
) -> None:
    optimizer = sgd(model)
    with watch(model, optimizer, log_dir=tmp_path, every=1, **patterns) as scope:
        train(model, optimizer, 2)
        report = scope.report()
    assert set(report.run.modules.names) == {"1"}
    (finding,) = report.findings
    assert finding.code == "GS001"
    assert "none of the parameters that are watched is trainable" in finding.message


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        x, y = vectors()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


# Folders.


def no_folder(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("mine")
    return tmp_path / "file"


def under_a_file(tmp_path: Path) -> Path:
    return no_folder(tmp_path) / "run"


def where_nothing_can_be_made(tmp_path: Path) -> Path:
    del tmp_path
    return Path("/proc/self/no-such-folder")


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("make", [no_folder, under_a_file, where_nothing_can_be_made])
def test_folder_that_can_not_be_is_refused(
    make: Callable[[Path], Path], model: nn.Module, tmp_path: Path
) -> None:
    wanted = make(tmp_path)
    with pytest.raises(LogError, match=re.escape(repr(str(wanted)))):
        watch(model, log_dir=wanted)
    if (tmp_path / "file").exists():
        assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.usefixtures("nothing_left")
def test_folder_that_is_not_writable_is_refused(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Permissions do not stop root: the refusal is made by hand.
    given = Path.open

    def refuse(path: Path, *args: Any, **options: Any) -> Any:
        if path.is_relative_to(tmp_path):
            raise PermissionError(13, "Permission denied", str(path))
        return given(path, *args, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(LogError, match=f"{re.escape(repr(str(tmp_path)))}.*not writable"):
        watch(model, log_dir=tmp_path)


def test_folder_with_a_run_gets_a_sibling_and_one_warning(model: nn.Module, tmp_path: Path) -> None:
    optimizer = sgd(model)
    folders = []
    for number in range(3):
        if number == 0:
            scope = watch(model, optimizer, log_dir=tmp_path / "first", every=1)
        else:
            with pytest.warns(GradscopeWarning, match=f"first-{number + 1}") as said:
                scope = watch(model, optimizer, log_dir=tmp_path / "first", every=1)
            assert len(said) == 1
        train(model, optimizer, number + 1)
        scope.close()
        folders.append(scope.log_dir.name)
    assert folders == ["first", "first-2", "first-3"]
    assert [len(load(tmp_path / name).steps) for name in folders] == [1, 2, 3]


def test_current_folder_with_a_run_gets_a_sibling_too(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    watch(model, log_dir=".").close()
    with pytest.warns(GradscopeWarning, match="holds a run already"):
        scope = watch(model, log_dir=".")
    scope.close()
    assert scope.log_dir.resolve() == tmp_path / "here-2"


def test_folder_with_foreign_files_is_used_as_it_is(model: nn.Module, tmp_path: Path) -> None:
    foreign = tmp_path / "events.out.tfevents.1700000000.host.1.0"
    foreign.write_bytes(b"mine")
    scope = watch(model, log_dir=tmp_path)
    scope.close()
    assert scope.log_dir == tmp_path
    assert foreign.read_bytes() == b"mine"


def test_refused_second_watch_leaves_the_first_alone(model: nn.Module, tmp_path: Path) -> None:
    optimizer = sgd(model)
    with watch(model, optimizer, log_dir=tmp_path / "first", every=1) as scope:
        train(model, optimizer, 1)
        with pytest.raises(LogError):
            watch(model, optimizer, log_dir=no_folder(tmp_path))
        train(model, optimizer, 2)
        assert list(scope.run().steps) == [0, 1, 2]


# Whatever fails while a watch begins, in the order in which it is used.


def fail(*_: object, **__: object) -> NoReturn:
    message = "out of luck"
    raise RuntimeError(message)


class Unhookable(SGD):
    """An optimizer that fails when all other hooks are in place."""

    register_step_post_hook = fail


def assert_nothing_was_begun(model: nn.Module, folder: Path) -> None:
    assert not [thread for thread in threading.enumerate() if thread.name == "gradscope"]
    assert not folder.exists()
    # And the next one finds no trace of it.
    optimizer = sgd(model)
    with watch(model, optimizer, log_dir=folder, every=1) as scope:
        train(model, optimizer, 2)
    assert scope.log_dir == folder
    assert list(load(folder).recorded_steps) == [0, 1]


@pytest.mark.parametrize(
    "name",
    [
        *("Observer", "described", "run_folder", "RunWriter", "Recorder", "Display", "Hooks"),
        *("attach", "is_compiled", "close_at_exit"),
    ],
)
def test_a_watch_that_fails_to_begin_leaves_nothing(
    name: str, model: nn.Module, tmp_path: Path
) -> None:
    before, folder = hooks_of(model), tmp_path / "runs" / "first"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scopes, name, fail)
        with pytest.raises(RuntimeError, match="out of luck"):
            watch(model, sgd(model), log_dir=folder)
    assert hooks_of(model) == before
    assert not folder.parent.exists()
    assert_nothing_was_begun(model, folder)


def test_an_optimizer_that_can_not_be_hooked_leaves_nothing(
    model: nn.Module, tmp_path: Path
) -> None:
    optimizer = Unhookable(model.parameters(), lr=0.1)
    before = hooks_of(model) + hooks_of_optimizer(optimizer)
    with pytest.raises(RuntimeError, match="out of luck"):
        watch(model, optimizer, log_dir=tmp_path / "run")
    assert hooks_of(model) + hooks_of_optimizer(optimizer) == before
    assert_nothing_was_begun(model, tmp_path / "run")


def hooks_of_optimizer(optimizer: torch.optim.Optimizer) -> int:
    return len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


def test_a_full_disk_at_the_beginning_leaves_nothing(model: nn.Module, tmp_path: Path) -> None:
    folder, before = tmp_path / "run", hooks_of(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunWriter, "_json", fail)
        with pytest.raises(RuntimeError, match="out of luck"):
            watch(model, log_dir=folder)
    assert hooks_of(model) == before
    assert_nothing_was_begun(model, folder)


def test_a_folder_that_was_there_stays(model: nn.Module, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scopes, "attach", fail)
        with pytest.raises(RuntimeError, match="out of luck"):
            watch(model, log_dir=tmp_path)
    assert tmp_path.is_dir()
    assert list(tmp_path.iterdir()) == []


class Foreign(torch.optim.Optimizer):
    """Not built by torch, and wraps nothing."""

    def __init__(self, model: nn.Module) -> None:
        self.param_groups = [{"params": list(model.parameters())}]


@pytest.mark.usefixtures("nothing_left")
def test_an_optimizer_without_hooks_is_refused(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ConfigTypeError, match="Foreign is an Optimizer that torch did not build"):
        watch(model, Foreign(model), log_dir=tmp_path)
