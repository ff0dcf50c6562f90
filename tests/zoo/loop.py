"""The loop of programs that need no other."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (everybody's name for it)
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tests.zoo.case import Watch
from tests.zoo.data import Batch

Loss = Callable[[Tensor, Tensor], Tensor]


def fit(
    watch: Watch,
    model: nn.Module,
    optimizer: Optimizer,
    data: Iterable[Batch],
    loss_of: Loss = F.cross_entropy,
    *,
    schedule: LRScheduler | None = None,
    adjust: Callable[[], object] | None = None,
    clear: bool = True,
) -> None:
    """Train. `adjust` is called between backward and step; gradients are cleared, or not.

    A loss that is a module is given to `watch`; of any other the value is logged.
    """
    criterion = loss_of if isinstance(loss_of, nn.Module) else None
    with watch(model, optimizer, criterion) as scope:
        for inputs, targets in data:
            if clear:
                optimizer.zero_grad()
            loss = loss_of(model(inputs), targets)
            loss.backward()
            if adjust is not None:
                adjust()
            optimizer.step()
            if schedule is not None:
                schedule.step()
            if criterion is None:
                scope.log(loss=loss)


@torch.no_grad()
def accuracy(model: nn.Module, data: Batch) -> float:
    """Of the model as used later, in evaluation mode; its mode is restored."""
    was_training = model.training
    model.eval()
    inputs, labels = data
    right = (model(inputs).argmax(1) == labels).float().mean()
    model.train(was_training)
    return float(right)
