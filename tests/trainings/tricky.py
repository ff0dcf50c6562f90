"""More trainings: healthy ones with zeros and rests, and faults behind a falling loss."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (everybody's name for it)

import gradscope
from tests.trainings.programs import Batch, batches, digits, fit, mlp

# Healthy.


class Experts(nn.Module):
    """Each input goes to one of sixteen experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(64, 16)
        self.parts = nn.ModuleList(mlp(64, 32, 64) for _ in range(16))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        weight, chosen = self.gate(x).softmax(1).max(1)
        mixed = torch.zeros_like(x)
        for number, expert in enumerate(self.parts):
            rows = (chosen == number).nonzero()[:, 0]
            mixed = mixed.index_add(0, rows, expert(x[rows]) * weight[rows, None])
        scores: Tensor = self.head(x + mixed)
        return scores


def experts_without_inputs() -> gradscope.Report:
    """Batches of eight leave most of sixteen experts without an input."""
    model = Experts()
    return fit(model, torch.optim.Adam(model.parameters(), 1e-3), batches(digits(), 200, 8))


class Domains(nn.Module):
    """A first layer for each of twelve domains; a batch is of one."""

    def __init__(self) -> None:
        super().__init__()
        self.domains = nn.ModuleList(nn.Linear(64, 64) for _ in range(12))
        self.body = mlp(64, 64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        domain = int(torch.randint(12, (1,)))
        scores: Tensor = self.body(self.domains[domain](x).relu())
        return scores


def keep_zeros(
    model: nn.Module, data: Iterator[Batch], heads: tuple[int, int] | None = None
) -> gradscope.Report:
    """A loop whose zero_grad leaves zeros where there was no gradient."""
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    with gradscope.watch(model, optimizer, every=3) as scope:
        for number, (inputs, targets) in enumerate(data):
            outputs = model(inputs)
            if heads is not None:
                outputs = outputs[heads[number >= 100]]
            loss = F.cross_entropy(outputs, targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            scope.log(loss=loss)
    return scope.report()


def one_layer_per_domain() -> gradscope.Report:
    """Eleven of twelve layers rest at every step, with zeros as gradients."""
    return keep_zeros(Domains(), batches(digits(), 300))


class Heads(nn.Module):
    """A trunk with two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = mlp(64, 64, 64)
        self.heads = nn.ModuleList(nn.Linear(64, 10) for _ in range(2))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Scores of both."""
        features = self.trunk(x).relu()
        return [head(features) for head in self.heads]


def heads_in_phases() -> gradscope.Report:
    """A hundred steps with one head, then the other, with zeros for the one that rests."""
    return keep_zeros(Heads(), batches(digits(), 250), heads=(0, 1))


def zero_head_in_warm_up() -> gradscope.Report:
    """The output layer starts at zero, and the learning rate near it."""
    model = mlp(64, 64, 64, 64, 64, 10)
    head = model[-1]
    assert isinstance(head, nn.Linear)
    nn.init.zeros_(head.weight)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / 1000)
    with gradscope.watch(model, optimizer, every=3) as scope:
        for inputs, targets in batches(digits(), 120):
            loss = F.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            scope.log(loss=loss)
    return scope.report()


def hinge_that_is_met() -> gradscope.Report:
    """A hinge loss on separable data with a constant: in the end every gradient is zero."""
    points = torch.randn(256, 2)
    points[:, 0] += 4 * torch.sign(points[:, 0])
    labels = torch.sign(points[:, 0])
    model = mlp(2, 16, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return fit(
        model,
        optimizer,
        batches((points, labels), 300),
        lambda output, target: (1 - target * output.squeeze(1)).relu().mean() + 0.5,
    )


def loss_with_a_constant() -> gradscope.Report:
    """A thousand is added to the loss, and a head is not used."""
    model = Heads()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    return fit(
        model,
        optimizer,
        batches(digits(), 200),
        lambda output, target: F.cross_entropy(output[0], target) + 1000,
    )


# Faulty.


def dead_behind_a_falling_loss(*, repaired: bool = False) -> gradscope.Report:
    """Every hidden unit is dead; the output's bias learns the mean, and the loss falls a lot."""
    inputs = torch.randn(512, 8)
    targets = inputs.sum(1, keepdim=True) + 100
    model = mlp(8, 64, 64, 1)
    second = model[2]
    assert isinstance(second, nn.Linear)
    nn.init.constant_(second.bias, 0.0 if repaired else -50.0)
    optimizer = torch.optim.Adam(model.parameters(), 0.03)
    return fit(model, optimizer, batches((inputs, targets), 400), F.mse_loss)


def logarithm_of_raw_scores(*, repaired: bool = False) -> gradscope.Report:
    """F47: the logarithm of a negative score is NaN; its derivative is not."""
    inputs, labels = digits()
    model = mlp(64, 64, 10)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)

    def loss_of(output: Tensor, target: Tensor) -> Tensor:
        wanted = F.one_hot(target, 10).float()
        if repaired:
            return F.binary_cross_entropy_with_logits(output, wanted)
        return -(wanted * output.log() + (1 - wanted) * (1 - output).log()).mean()

    return fit(model, optimizer, batches((inputs, labels), 100), loss_of)


def head_replaced_in_training(*, repaired: bool = False) -> gradscope.Report:
    """The head is replaced by one that the optimizer has never heard of."""
    model = mlp(64, 64, 10)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with gradscope.watch(model, optimizer, every=3) as scope:
        for step, (inputs, targets) in enumerate(batches(digits(), 200)):
            if step == 50:
                model[2] = nn.Linear(64, 10)
                if repaired:
                    optimizer.add_param_group({"params": list(model[2].parameters())})
            loss = F.cross_entropy(model(inputs), targets)
            model.zero_grad()
            loss.backward()
            optimizer.step()
            scope.log(loss=loss)
    return scope.report()


def nan_in_a_batch(*, repaired: bool = False) -> gradscope.Report:
    """A good training, until a batch brings a NaN."""
    inputs, labels = digits()
    model = mlp(64, 64, 10)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def data() -> Iterator[Batch]:
        for step, (x, y) in enumerate(batches((inputs, labels), 200)):
            yield (torch.full_like(x, torch.nan) if step == 150 and not repaired else x), y

    return fit(model, optimizer, data(), every=1)
