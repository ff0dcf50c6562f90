"""How evenly a network's Jacobian stretches: dynamical isometry (Pennington et al. 2017)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gradscope.comparison.trunk import Output, Point

# Three more passes through the model; of a larger one they would cost more than all else.
_MOST_PARAMETERS = 300_000
_FEWEST = 3


def conditioning(
    model: nn.Module, read_at: Sequence[Point], outputs: Sequence[Output], samples: int | None
) -> float:
    """m₂ / m₁² of the squared singular values of J, from the first layer to the last but one.

    1 where all are equal; L + 1 for L linear layers of normal weights. By one random vector per
    sample (Hutchinson's trace estimate): ‖Jᵀv‖² has the mean tr JJᵀ, ‖JJᵀv‖² that of its square.
    NaN for large models, and where the ends are no layers or the samples aren't rows.
    """
    tensors = {output.node: output.tensor for output in outputs}
    if len(read_at) < _FEWEST or sum(p.numel() for p in model.parameters()) > _MOST_PARAMETERS:
        return float("nan")
    first, last = tensors.get(read_at[0].node), tensors.get(read_at[-2].node)
    if first is None or last is None or not samples or {len(first), len(last)} != {samples}:
        return float("nan")
    generator = torch.Generator().manual_seed(0)
    # Of one length, so that an isometry comes out as one.
    signs = 2.0 * torch.randint(2, last.shape, generator=generator) - 1
    vector = signs.to(last).requires_grad_()
    try:
        (back,) = torch.autograd.grad(last, first, vector, create_graph=True)
        (forth,) = torch.autograd.grad(back, vector, back.detach(), retain_graph=True)
    except RuntimeError:
        # An operation without a second derivative, a checkpoint, or no way between the two.
        return float("nan")
    units = last[0].numel()
    first_moment = _squares(back) / units
    second_moment = _squares(forth) / units
    return float((second_moment.mean() / first_moment.mean().square()).item())


def _squares(values: Tensor) -> Tensor:
    return values.detach().double().flatten(1).square().sum(dim=1)
