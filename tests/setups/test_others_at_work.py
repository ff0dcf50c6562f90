"""Who else takes part: hooks of the user's that change gradients, and `nn.DataParallel`."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tests.capture.trainings import mlp_model, vectors
from tests.setups.support import support
from tests.setups.twins import Layers, Subject, classified, compared, loss_of, stepped

# Hooks of the user's.


def hooked_parameters() -> Subject:
    model = mlp_model()
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: gradient.sign())

        def clamp(parameter: Tensor) -> None:
            assert parameter.grad is not None
            parameter.grad.clamp_(-0.5, 0.25)

        parameter.register_post_accumulate_grad_hook(clamp)
    return classified(model)


def hooked_modules() -> Subject:
    """Full backward hooks change what goes in and out."""
    model = mlp_model()

    def double(module: nn.Module, gradients: Any) -> Any:
        del module
        return tuple(gradient * 2 for gradient in gradients)

    def halve(module: nn.Module, inner: Any, outer: Any) -> Any:
        del module, outer
        return tuple(None if gradient is None else gradient / 3 for gradient in inner)

    model[2].register_full_backward_pre_hook(double)
    model[2].register_full_backward_hook(halve)
    return classified(model)


def hooked_between() -> Subject:
    """A hook on a tensor that no module returns, and one that keeps a gradient."""

    def between(model: Any, x: Tensor) -> Tensor:
        x = x * 2
        x.register_hook(lambda gradient: gradient * 0.1)
        hidden: Tensor = model.mid(x)
        hidden.retain_grad()
        return hidden

    return classified(Layers(between, mid=nn.Linear(8, 8)))


def in_data_parallel() -> Subject:
    """On the CPU it calls the model as it is."""
    model = mlp_model()
    wrapped = nn.DataParallel(model)
    return stepped(model, lambda _: loss_of(wrapped).backward())


WAYS: dict[str, Callable[[], Subject]] = {
    "hooks that change parameters' gradients": hooked_parameters,
    "full backward hooks that change gradients": hooked_modules,
    "tensor hooks that change gradients": hooked_between,
    "`DataParallel` on the CPU": in_data_parallel,
}


def ways() -> Iterator[Any]:
    for way, build in WAYS.items():
        shown = support(
            "Autograd", way, parameters="right", outputs="right", output_gradients="right"
        )
        yield pytest.param(build, marks=shown, id=way)


@pytest.mark.parametrize("build", list(ways()))
def test_is_recorded_as_it_was(build: Callable[[], Subject], tmp_path: Path) -> None:
    run = compared(build, tmp_path)
    assert run.meta["coverage"]["modules"]["output_gradients_unseen"] == []


def test_hook_of_the_user_on_an_output_comes_behind(tmp_path: Path) -> None:
    """What arrived is recorded of the output, what was made of it of the parameters."""

    def between(model: Any, x: Tensor) -> Tensor:
        del model
        x.register_hook(lambda gradient: gradient * 0.1)
        return x

    def build() -> Subject:
        return classified(Layers(between))

    table = compared(build, tmp_path, but=["first"]).modules
    torch.manual_seed(0)
    model: Any = build().model
    torch.manual_seed(100)
    x, y = vectors()
    hidden = model.first(x)
    F.cross_entropy(model.last(hidden), y).backward(inputs=[hidden])
    assert hidden.grad is not None
    found = table["output_grad_norm"][0, table.names.index("first")]
    np.testing.assert_allclose(found, float(hidden.grad.norm()), rtol=1e-4)


@support(
    "Autograd",
    "`DataParallel` with replicas",
    parameters="right",
    outputs="unknown",
    output_gradients="unknown",
)
def test_replicas_in_threads(tmp_path: Path) -> None:
    """As `nn.DataParallel` runs them on several devices."""

    def replica_of(module: Any) -> Any:
        copied = module._replicate_for_data_parallel()
        for name, child in module._modules.items():
            setattr(copied, name, replica_of(child))
        for name, parameter in module._parameters.items():
            setattr(copied, name, parameter * 1)
        return copied

    def differentiate(model: nn.Module) -> None:
        x, y = vectors()
        outputs: dict[int, Tensor] = {}
        halves = list(zip((replica_of(model), replica_of(model)), x.chunk(2), strict=True))

        def apply(at: int, replica: nn.Module, half: Tensor) -> None:
            outputs[at] = replica(half)

        threads = [
            threading.Thread(target=apply, args=(at, *half)) for at, half in enumerate(halves)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        F.cross_entropy(torch.cat([outputs[0], outputs[1]]), y).backward()

    names = ["(root)", *(str(at) for at in range(5))]
    run = compared(
        lambda: stepped(mlp_model(), differentiate),
        tmp_path,
        but=names,
        problems=["runs as replicas of itself"],
    )
    assert run.meta["coverage"]["modules"]["never_ran"] == names
    assert run.meta["coverage"]["modules"]["output_gradients_expected"] == 0
