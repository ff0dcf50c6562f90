"""What the net gives out, and what the loss takes it for."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (everybody's name for it)
from torch.optim import SGD, Adam, RMSprop

from tests.zoo.case import Faulty, Watch
from tests.zoo.data import batches, circles, diabetes, digits, regression, whole
from tests.zoo.loop import fit
from tests.zoo.models import cnn, mlp


def _one_hot(labels: Tensor) -> Tensor:
    return F.one_hot(labels, 10).float()


# An activation at the output that is not the loss's.


def softmax_over_one_unit(watch: Watch, repaired: bool) -> None:
    """F02: the softmax of a single score is 1, whatever the score."""
    targets = torch.randint(2, (2000, 1)).float()
    model = mlp(128, 50, 50, 1)
    model.insert(2, nn.Dropout(0.2))
    model.append(nn.Sigmoid() if repaired else nn.Softmax(dim=1))
    optimizer = RMSprop(model.parameters(), 1e-3)
    data = batches((targets.expand(-1, 128), targets), 300)
    fit(watch, model, optimizer, data, nn.BCELoss())


def softmax_over_one_channel(watch: Watch, repaired: bool) -> None:
    """A segmentation with one channel, and a softmax over channels."""
    images = digits()[0]
    noisy = (images + 0.2 * torch.randn_like(images)).unflatten(1, (1, 8, 8))
    masks = (images > 0.5).float().unflatten(1, (1, 8, 8))
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 1, 3, padding=1),
        nn.Sigmoid() if repaired else nn.Softmax(dim=1),
    )
    optimizer = Adam(model.parameters(), 1e-2)
    fit(watch, model, optimizer, batches((noisy, masks), 200, 16), nn.MSELoss())


def softmax_over_the_batch(watch: Watch, repaired: bool) -> None:
    """The softmax runs over the samples, not over the classes."""
    model = mlp(64, 64, 10)

    def loss_of(output: Tensor, target: Tensor) -> Tensor:
        return F.nll_loss(output.softmax(1 if repaired else 0).clamp_min(1e-9).log(), target)

    fit(watch, model, Adam(model.parameters(), 1e-3), batches(digits(), 300), loss_of)


def relu_before_the_logarithm(watch: Watch, repaired: bool) -> None:
    """F12: outputs that may all be zero, normalized: 0/0."""
    model = cnn() if repaired else cnn(nn.ReLU())

    def loss_of(output: Tensor, target: Tensor) -> Tensor:
        shares = output / output.sum(1, keepdim=True)
        return F.nll_loss(shares.clamp(1e-7, 1 - 1e-7).log(), target)

    optimizer = Adam(model.parameters(), 1e-3)
    loss = F.cross_entropy if repaired else loss_of
    fit(watch, model, optimizer, batches(digits(), 300, 50), loss)


def softmax_before_cross_entropy(watch: Watch, repaired: bool) -> None:
    """F34: probabilities are taken for scores; the loss can't fall below ln(e + 9) − 1."""
    model = cnn() if repaired else cnn(nn.Softmax(dim=1))
    fit(watch, model, SGD(model.parameters(), 0.1), batches(digits(), 300))


def softmax_in_the_loop(watch: Watch, repaired: bool) -> None:
    """The same, outside of the model."""
    model = mlp(64, 64, 64, 10)

    def loss_of(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output if repaired else F.softmax(output, dim=1), target)

    fit(watch, model, SGD(model.parameters(), 0.1, momentum=0.5), batches(digits(), 300), loss_of)


def sigmoid_before_logits_loss(watch: Watch, repaired: bool) -> None:
    """A sigmoid, and a loss that has one: no output is below one half."""
    model = mlp(2, 32, 32, 1)
    if not repaired:
        model.append(nn.Sigmoid())
    optimizer = Adam(model.parameters(), 5e-3)
    fit(watch, model, optimizer, batches(circles(), 300), nn.BCEWithLogitsLoss())


def sigmoid_before_cross_entropy(watch: Watch, repaired: bool) -> None:
    """Scores between 0 and 1."""
    model = cnn() if repaired else cnn(nn.Sigmoid())
    fit(watch, model, Adam(model.parameters(), 1e-3), batches(digits(), 300), nn.CrossEntropyLoss())


def tanh_for_hundreds(watch: Watch, repaired: bool) -> None:
    """Targets around 300, and an output in (−1, 1)."""
    inputs, targets = regression()
    data = (inputs, targets if repaired else 100 * targets + 300)
    model = mlp(8, 64, 64, 1, activation=nn.Tanh)
    if not repaired:
        model.append(nn.Tanh())
    fit(watch, model, Adam(model.parameters(), 3e-3), batches(data, 400), nn.MSELoss())


def relu_for_negative_targets(watch: Watch, repaired: bool) -> None:
    """All targets lie below zero, where the output can't go."""
    inputs, targets = regression()
    model = mlp(8, 64, 64, 1)
    if not repaired:
        model.append(nn.ReLU())
    data = batches((inputs, -1 - 2 * targets.abs()), 400)
    fit(watch, model, Adam(model.parameters(), 3e-3), data, nn.MSELoss())


def sigmoid_for_degrees(watch: Watch, repaired: bool) -> None:
    """Temperatures up to 30, and an output in (0, 1)."""
    inputs, targets = diabetes()
    model = mlp(10, 32, 1)
    if not repaired:
        model.append(nn.Sigmoid())
    optimizer = Adam(model.parameters(), 1e-2)
    fit(watch, model, optimizer, batches((inputs, 5 + 25 * targets), 400), nn.SmoothL1Loss())


# A loss that is another than was meant.


def absolute_error_of_a_sigmoid(watch: Watch, repaired: bool) -> None:
    """F01: XOR; the gradient of a saturating output under MAE is a few 1e-4."""
    inputs = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    data = (inputs, torch.tensor([[0.0], [1.0], [1.0], [0.0]]))
    if repaired:
        model = mlp(2, 8, 1, activation=nn.Tanh)
        fit(watch, model, Adam(model.parameters(), 0.03), whole(data, 600), nn.BCEWithLogitsLoss())
        return
    model = mlp(2, 4, 1, activation=nn.Sigmoid).append(nn.Sigmoid())
    optimizer = SGD(model.parameters(), 0.05, momentum=0.11, nesterov=True)
    fit(watch, model, optimizer, whole(data, 1000), nn.L1Loss())


def logarithm_of_raw_scores(watch: Watch, repaired: bool) -> None:
    """F47: the logarithm of a negative score."""
    model = mlp(64, 512, 10, activation=nn.Sigmoid)
    for layer in (model[0], model[2]):
        nn.init.normal_(cast("nn.Linear", layer).weight, std=0.1 if repaired else 1.0)

    def loss_of(output: Tensor, target: Tensor) -> Tensor:
        wanted = _one_hot(target)
        if repaired:
            return F.binary_cross_entropy_with_logits(output, wanted)
        return -(wanted * output.log() + (1 - wanted) * (1 - output).log()).mean()

    rate = 0.5 if repaired else 0.05
    fit(watch, model, SGD(model.parameters(), rate, momentum=0.9), batches(digits(), 300), loss_of)


def probabilities_for_nll(watch: Watch, repaired: bool) -> None:
    """nll_loss of probabilities that never were made logarithms: it falls to −1 and stays."""
    model = mlp(64, 64, 64, 10).append(nn.LogSoftmax(dim=1) if repaired else nn.Softmax(dim=1))
    fit(
        watch,
        model,
        SGD(model.parameters(), 0.05, momentum=0.5),
        batches(digits(), 300),
        nn.NLLLoss(),
    )


def sum_of_losses(watch: Watch, repaired: bool) -> None:
    """F39: a batch of 64 makes the rate 64 times what it says."""
    model = cnn()
    loss = nn.CrossEntropyLoss(reduction="mean" if repaired else "sum")
    fit(watch, model, SGD(model.parameters(), 0.1), batches(digits(), 300, 64), loss)


def sum_of_squares(watch: Watch, repaired: bool) -> None:
    """The squares of 128 errors, summed."""
    model = mlp(8, 64, 64, 1)
    loss = nn.MSELoss(reduction="mean" if repaired else "sum")
    optimizer = SGD(model.parameters(), 0.02, momentum=0.9)
    fit(watch, model, optimizer, batches(regression(), 400, 128), loss)


def sums_accumulated(watch: Watch, repaired: bool) -> None:
    """Sums over batches of 32, added up over eight of them."""
    model = mlp(64, 64, 64, 10)
    optimizer = SGD(model.parameters(), 0.1, momentum=0.9)
    share = 32 * 8 if repaired else 1
    with watch(model, optimizer) as scope:
        for number, (inputs, targets) in enumerate(batches(digits(), 800), start=1):
            loss = F.cross_entropy(model(inputs), targets, reduction="sum")
            (loss / share).backward()
            scope.log(loss=loss.detach() / 32 if repaired else loss)
            if number % 8 == 0:
                optimizer.step()
                optimizer.zero_grad()


# Shapes that broadcast.


def columns_against_rows(watch: Watch, repaired: bool) -> None:
    """F40: [B, 1] minus [B] is [B, B]: every output learns the mean of the targets."""
    inputs, targets = regression()
    model = mlp(8, 64, 64, 1)

    def loss_of(output: Tensor, target: Tensor) -> Tensor:
        return ((output - (target[:, None] if repaired else target)) ** 2).mean()

    data = batches((inputs, targets[:, 0]), 400)
    fit(watch, model, Adam(model.parameters(), 3e-3), data, loss_of)


def rows_against_columns(watch: Watch, repaired: bool) -> None:
    """The output is squeezed, the target is not."""
    inputs, targets = regression()
    model = mlp(8, 64, 64, 1, activation=nn.Tanh)
    optimizer = Adam(model.parameters(), 3e-3)
    with watch(model, optimizer) as scope:
        for x, y in batches((inputs, targets), 400, 64):
            output = model(x).squeeze(1)
            loss = (output - (y.squeeze(1) if repaired else y)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scope.log(loss=loss, target=y)


def broadcast_labels(watch: Watch, repaired: bool) -> None:
    """Every score of a batch is held against every label."""
    model = mlp(2, 32, 32, 1)

    def loss_of(output: Tensor, target: Tensor) -> Tensor:
        labels = target if repaired else target[:, 0]
        return (F.softplus(output) - output * labels).mean()

    fit(watch, model, Adam(model.parameters(), 1e-2), batches(circles(), 300), loss_of)


MISMATCH, SUM = "output-activation-mismatch", "sum-reduction"
ONE, TWICE, BROADCAST = (
    "softmax-over-one-unit",
    "activation-before-logits-loss",
    "loss-shape-broadcast",
)

CASES = (
    Faulty(
        "softmax_over_one_unit",
        ONE,
        ("GS604",),
        "SO 31880720 (DeepLocalize, DeepFD, DeepDiagnosis)",
        softmax_over_one_unit,
    ),
    Faulty("softmax_over_one_channel", ONE, ("GS604",), "own", softmax_over_one_channel),
    Faulty(
        "softmax_over_the_batch",
        "softmax-over-the-batch",
        ("GS604",),
        "own",
        softmax_over_the_batch,
    ),
    Faulty(
        "relu_before_the_logarithm",
        MISMATCH,
        ("GS604", "GS501"),
        "SO 47352366",
        relu_before_the_logarithm,
    ),
    Faulty(
        "softmax_before_cross_entropy",
        TWICE,
        ("GS604", "GS305"),
        "TheDeepChecker redundant_softmax; SO 50032197, 57605741",
        softmax_before_cross_entropy,
    ),
    Faulty("softmax_in_the_loop", TWICE, ("GS604", "GS305"), "own", softmax_in_the_loop),
    Faulty("sigmoid_before_logits_loss", TWICE, ("GS604",), "own", sigmoid_before_logits_loss),
    Faulty("sigmoid_before_cross_entropy", TWICE, ("GS604",), "own", sigmoid_before_cross_entropy),
    Faulty("tanh_for_hundreds", MISMATCH, ("GS604", "GS602"), "own", tanh_for_hundreds),
    Faulty("relu_for_negative_targets", MISMATCH, ("GS604",), "own", relu_for_negative_targets),
    Faulty("sigmoid_for_degrees", MISMATCH, ("GS604", "GS602"), "own", sigmoid_for_degrees),
    Faulty(
        "absolute_error_of_a_sigmoid",
        "wrong-loss",
        ("GS402", "GS604"),
        "SO 31556268 (DeepLocalize, DeepFD)",
        absolute_error_of_a_sigmoid,
    ),
    Faulty(
        "logarithm_of_raw_scores",
        "loss-needs-probabilities",
        ("GS604", "GS501"),
        "TheDeepChecker IPS_7",
        logarithm_of_raw_scores,
    ),
    Faulty(
        "probabilities_for_nll", "loss-needs-logarithms", ("GS604",), "own", probabilities_for_nll
    ),
    Faulty(
        "sum_of_losses",
        SUM,
        ("GS401", "GS603"),
        "TheDeepChecker wrong_loss_function; SO 43611745",
        sum_of_losses,
    ),
    Faulty("sum_of_squares", SUM, ("GS401", "GS603"), "own", sum_of_squares),
    Faulty("sums_accumulated", SUM, ("GS401", "GS603"), "own", sums_accumulated),
    Faulty(
        "columns_against_rows",
        BROADCAST,
        ("GS605",),
        "TheDeepChecker wrong_loss_function2; SO 38447935",
        columns_against_rows,
    ),
    Faulty("rows_against_columns", BROADCAST, ("GS605",), "own", rows_against_columns),
    Faulty("broadcast_labels", BROADCAST, ("GS605",), "own", broadcast_labels),
)
