"""What a backward repeats is swapped as it was in the forward."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gradscope.comparison.mitigation import MITIGATIONS, prepare
from gradscope.comparison.sites import find_sites
from gradscope.comparison.swapping import swapping
from gradscope.errors import UsageError
from tests.comparison.models import (
    GELU,
    Parts,
    assert_same,
    forward_of,
    loss_and_gradients,
)


def backward(loss: Tensor, model: nn.Module) -> None:
    del model
    loss.backward()


def backward_of_several(loss: Tensor, model: nn.Module) -> None:
    del model
    torch.autograd.backward([loss])


def backward_twice(loss: Tensor, model: nn.Module) -> None:
    loss.backward(retain_graph=True)
    model.zero_grad()
    loss.backward()


def gradients_asked_for(loss: Tensor, model: nn.Module) -> None:
    parameters = list(model.parameters())
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient


@pytest.mark.parametrize(
    ("reentrant", "differentiate"),
    [
        (False, backward),
        (False, backward_of_several),
        (False, backward_twice),
        (False, gradients_asked_for),
        (True, backward),
        (True, backward_twice),
    ],
)
def test_checkpoints_repeat_the_same_sites(
    reentrant: bool, differentiate: Callable[[Tensor, nn.Module], None]
) -> None:
    torch.manual_seed(0)
    model, inputs = Parts(reentrant), torch.randn(5, 6)
    forward = forward_of(model, inputs)
    sites = find_sites(model, forward)
    assert len(sites.hidden) == 6
    # A norm before each, none like another: a site that is mistaken for another shows.
    norms = MITIGATIONS["layernorm"]
    prepare(model, sites, norms)
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    probed: list[str] = []
    with swapping(
        model, sites, GELU, mitigation=norms, probe=lambda site, *_: probed.append(site.key)
    ) as seen:
        found: list[Tensor] = []
        expected: list[Tensor] = []
        for model.on, gradients in ((True, found), (False, expected)):
            model.zero_grad()
            differentiate(forward(), model)
            gradients += [p.grad for p in model.parameters() if p.grad is not None]
            if model.on:
                repeats = len(probed) - 6
    assert seen.counts == dict.fromkeys(seen.counts, 2)
    # In repeats for what a re-entrant one saves there are gradients, in others none ever.
    assert (repeats > 0) == reentrant
    assert len(found) == 22
    assert_same(found, expected, 1e-6)


def test_a_repeat_that_can_not_be_told_is_an_error_and_not_a_wrong_gradient() -> None:
    class Nested(Parts):
        def forward(self, x: Tensor) -> Tensor:
            return self.part(self.outside, x)

        def outside(self, x: Tensor) -> Tensor:
            result: Tensor = self.layers[3](self.part(self.inside, x))
            return result

    torch.manual_seed(0)
    model, inputs = Nested(False), torch.randn(5, 6)
    sites = find_sites(model, forward_of(model, inputs))
    with swapping(model, sites, GELU), pytest.raises(UsageError, match="inside a checkpoint"):
        loss_and_gradients(model, forward_of(model, inputs))
