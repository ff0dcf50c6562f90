"""What the optimizer holds, is given, and does with it."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (everybody's name for it)
from torch.optim import SGD, Adam, AdamW, RMSprop

from tests.zoo.case import Faulty, Watch
from tests.zoo.data import batches, circles, digits, regression
from tests.zoo.loop import fit
from tests.zoo.models import RowTransformer, cnn, mlp

# Gradients that are never cleared.


def never_cleared(watch: Watch, repaired: bool) -> None:
    """F52: each step is taken on the sum of all gradients so far."""
    model = mlp(64, 64, 64, 10)
    optimizer = SGD(model.parameters(), 0.05)
    fit(watch, model, optimizer, batches(digits(), 300), clear=repaired)


def never_cleared_with_adam(watch: Watch, repaired: bool) -> None:
    """Adam divides the growth away; what remains is a direction of long ago."""
    model = cnn()
    optimizer = Adam(model.parameters(), 2e-3)
    fit(watch, model, optimizer, batches(digits(), 250), nn.CrossEntropyLoss(), clear=repaired)


def never_cleared_in_regression(watch: Watch, repaired: bool) -> None:
    """The same with momentum and a squared error."""
    model = mlp(8, 64, 64, 1, activation=nn.Tanh)
    optimizer = SGD(model.parameters(), 0.03, momentum=0.5)
    fit(watch, model, optimizer, batches(regression(), 400), F.mse_loss, clear=repaired)


# Parameters that the optimizer does not hold.


def head_only_in_optimizer(watch: Watch, repaired: bool) -> None:
    """F53: the optimizer is given the last layer."""
    model = mlp(64, 64, 64, 10)
    held = model if repaired else model[-1]
    fit(watch, model, SGD(held.parameters(), 0.1), batches(digits(), 300))


class Encoded(nn.Module):
    """An encoder and a head."""

    def __init__(self, *, cut: str | None = None) -> None:
        super().__init__()
        self.encoder = mlp(2, 32, 32, activation=nn.Tanh)
        self.head = mlp(32, 1)
        self.cut = cut

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.cut != "no_grad"):
            features = self.encoder(x)
        score: Tensor = self.head(features.detach() if self.cut == "detach" else features)
        return score


def encoder_not_in_optimizer(watch: Watch, repaired: bool) -> None:
    """The encoder's parameters were left out."""
    model = Encoded()
    held = list(model.parameters()) if repaired else list(model.head.parameters())
    fit(watch, model, Adam(held, 1e-2), batches(circles(), 250), nn.BCEWithLogitsLoss())


def bottleneck_not_in_optimizer(watch: Watch, repaired: bool) -> None:
    """The first layer was forgotten: eight features go through four random ones."""
    model = mlp(8, 4, 64, 64, 1, activation=nn.Tanh)
    held = model if repaired else model[2:]
    optimizer = AdamW(held.parameters(), 5e-3)
    fit(watch, model, optimizer, batches(regression(), 500), F.mse_loss)


def head_replaced_after_the_optimizer(watch: Watch, repaired: bool) -> None:
    """A trained and frozen net gets a new head; the optimizer was built for the old one."""
    data = digits()
    model = mlp(64, 64, 10)
    pretraining = Adam(model.parameters(), 3e-3)
    for inputs, targets in batches(data, 150):
        pretraining.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        pretraining.step()
    model.zero_grad()
    model[0].requires_grad_(False)
    optimizer = SGD(model[-1].parameters(), 0.1)
    model[-1] = nn.Linear(64, 10)
    if repaired:
        optimizer = SGD(model[-1].parameters(), 0.1)
    fit(watch, model, optimizer, batches(data, 250))


def head_replaced_in_training(watch: Watch, repaired: bool) -> None:
    """Another task begins; its head starts at zero, and is in no optimizer."""
    model = cnn()
    model[-1] = nn.Linear(64, 2)
    optimizer = Adam(model.parameters(), 2e-3)
    with watch(model, optimizer) as scope:
        for step, (x, y) in enumerate(batches(digits(), 300)):
            if step == 60:
                head = nn.Linear(64, 10)
                nn.init.zeros_(head.weight)
                model[-1] = head
                if repaired:
                    optimizer.add_param_group({"params": list(head.parameters())})
            loss = F.cross_entropy(model(x), y % 2 if step < 60 else y)
            model.zero_grad()
            loss.backward()
            optimizer.step()
            scope.log(loss=loss)


def backbone_frozen_by_mistake(watch: Watch, repaired: bool) -> None:
    """A random encoder that may not learn; a pretrained one looks the same."""
    model = Encoded()
    model.encoder.requires_grad_(repaired)
    optimizer = Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    fit(watch, model, optimizer, batches(circles(), 250), nn.BCEWithLogitsLoss())


# A graph that is cut.


def detached_features(watch: Watch, repaired: bool) -> None:
    """A detach between encoder and head."""
    model = Encoded(cut=None if repaired else "detach")
    fit(
        watch,
        model,
        Adam(model.parameters(), 1e-2),
        batches(circles(), 250),
        nn.BCEWithLogitsLoss(),
    )


def encoder_without_grad(watch: Watch, repaired: bool) -> None:
    """The encoder runs under no_grad."""
    model = Encoded(cut=None if repaired else "no_grad")
    optimizer = SGD(model.parameters(), 0.3)
    fit(watch, model, optimizer, batches(circles(), 400), F.binary_cross_entropy_with_logits)


def loss_made_anew(watch: Watch, repaired: bool) -> None:
    """The loss is wrapped in a new tensor that requires a gradient, to silence an error."""
    model = mlp(64, 64, 10)
    optimizer = SGD(model.parameters(), 0.1, momentum=0.9)

    def loss_of(output: Tensor, target: Tensor) -> Tensor:
        loss = F.cross_entropy(output, target)
        return loss if repaired else loss.detach().requires_grad_()

    fit(watch, model, optimizer, batches(digits(), 250), loss_of)


# Ascent.


def negated_gradients(watch: Watch, repaired: bool) -> None:
    """F27: the sign is flipped between backward and step."""
    model = cnn()

    def negate() -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.neg_()

    optimizer = SGD(model.parameters(), 0.1)
    fit(watch, model, optimizer, batches(digits(), 300), adjust=None if repaired else negate)


def maximized_loss(watch: Watch, repaired: bool) -> None:
    """The optimizer was told to maximize."""
    model = mlp(8, 64, 64, 1)
    optimizer = Adam(model.parameters(), 3e-3, maximize=not repaired)
    fit(watch, model, optimizer, batches(regression(), 300), nn.MSELoss())


def backward_of_minus_the_loss(watch: Watch, repaired: bool) -> None:
    """The loss is logged as it is, and negated for backward."""
    model = mlp(64, 64, 10, activation=nn.GELU)
    optimizer = AdamW(model.parameters(), 1e-3)
    with watch(model, optimizer) as scope:
        for inputs, targets in batches(digits(), 300):
            loss = F.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            (loss if repaired else -loss).backward()
            scope.log(loss=loss)
            optimizer.step()


# Steps that something else than the gradient decides.


def decay_of_a_tenth(watch: Watch, repaired: bool) -> None:
    """F33: weights shrink faster than they learn."""
    model = cnn()
    optimizer = SGD(model.parameters(), 0.1, weight_decay=1e-5 if repaired else 0.1)
    fit(watch, model, optimizer, batches(digits(), 300))


def decoupled_decay_of_ten(watch: Watch, repaired: bool) -> None:
    """A tenth of each weight goes at each step."""
    model = RowTransformer()
    optimizer = AdamW(model.parameters(), 2e-3, weight_decay=0.01 if repaired else 50.0)
    fit(watch, model, optimizer, batches(digits(), 250))


def decay_in_adam(watch: Watch, repaired: bool) -> None:
    """An L2 term far larger than the gradient; Adam makes a direction of it."""
    model = mlp(8, 64, 64, 1)
    optimizer = Adam(model.parameters(), 3e-3, weight_decay=0.0 if repaired else 3.0)
    fit(watch, model, optimizer, batches(regression(), 400), nn.MSELoss())


def epsilon_of_ten(watch: Watch, repaired: bool) -> None:
    """AdamW's ε hides the second moment: what is left is SGD at 1e-3."""
    model = mlp(64, 64, 64, 10)
    optimizer = AdamW(model.parameters(), 1e-3, eps=1e-8 if repaired else 10.0)
    fit(watch, model, optimizer, batches(digits(), 300))


def epsilon_in_rmsprop(watch: Watch, repaired: bool) -> None:
    """The same where the gradients are small."""
    model = mlp(8, 64, 1, activation=nn.Tanh)
    optimizer = RMSprop(model.parameters(), 3e-3, eps=1e-8 if repaired else 100.0)
    fit(watch, model, optimizer, batches(regression(), 400), nn.MSELoss())


def clipped_to_nothing(watch: Watch, repaired: bool) -> None:
    """A norm of 1e-6 is left of every gradient."""
    model = mlp(64, 64, 10)
    optimizer = SGD(model.parameters(), 0.1)
    with watch(model, optimizer) as scope:
        for inputs, targets in batches(digits(), 300):
            loss = F.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            limit = 1.0 if repaired else 1e-6
            norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
            optimizer.step()
            scope.log(loss=loss, grad_norm=norm)


def values_clipped_to_nothing(watch: Watch, repaired: bool) -> None:
    """Each entry is clipped to 1e-6, and nobody says so."""
    model = cnn()
    limit = 1.0 if repaired else 1e-6

    def clip() -> None:
        nn.utils.clip_grad_value_(model.parameters(), limit)

    optimizer = SGD(model.parameters(), 0.05, momentum=0.9)
    fit(watch, model, optimizer, batches(digits(), 250), nn.CrossEntropyLoss(), adjust=clip)


UNCLEARED, LEFT_OUT = "gradients-not-cleared", "not-in-optimizer"
CUT, ASCENT = "graph-cut", "gradient-ascent"
DECAY, EPSILON, CLIPPED = "weight-decay-dominates", "epsilon-too-large", "clipped-to-nothing"

CASES = (
    Faulty("never_cleared", UNCLEARED, ("GS006",), "SO 60335387 (TrainCheck)", never_cleared),
    Faulty("never_cleared_with_adam", UNCLEARED, ("GS006",), "own", never_cleared_with_adam),
    Faulty(
        "never_cleared_in_regression", UNCLEARED, ("GS006",), "own", never_cleared_in_regression
    ),
    Faulty(
        "head_only_in_optimizer",
        LEFT_OUT,
        ("GS004",),
        "PyTorch forum 84911 (TrainCheck)",
        head_only_in_optimizer,
    ),
    Faulty("encoder_not_in_optimizer", LEFT_OUT, ("GS004",), "own", encoder_not_in_optimizer),
    Faulty("bottleneck_not_in_optimizer", LEFT_OUT, ("GS004",), "own", bottleneck_not_in_optimizer),
    Faulty(
        "head_replaced_after_the_optimizer",
        "stale-optimizer-parameters",
        ("GS008", "GS004"),
        "own",
        head_replaced_after_the_optimizer,
    ),
    Faulty(
        "head_replaced_in_training",
        "stale-optimizer-parameters",
        ("GS008", "GS004"),
        "own",
        head_replaced_in_training,
    ),
    Faulty(
        "backbone_frozen_by_mistake",
        "frozen-by-mistake",
        ("GS005",),
        "own",
        backbone_frozen_by_mistake,
        observable=False,
    ),
    Faulty("detached_features", CUT, ("GS002",), "own", detached_features),
    Faulty("encoder_without_grad", CUT, ("GS002",), "own", encoder_without_grad),
    Faulty("loss_made_anew", CUT, ("GS002", "GS001"), "own", loss_made_anew),
    Faulty(
        "negated_gradients", ASCENT, ("GS007",), "TheDeepChecker flipped_sign", negated_gradients
    ),
    Faulty("maximized_loss", ASCENT, ("GS007",), "own", maximized_loss),
    Faulty("backward_of_minus_the_loss", ASCENT, ("GS007",), "own", backward_of_minus_the_loss),
    Faulty(
        "decay_of_a_tenth",
        DECAY,
        ("GS403",),
        "TheDeepChecker over_regularisation; SO 51028324",
        decay_of_a_tenth,
    ),
    Faulty("decoupled_decay_of_ten", DECAY, ("GS403",), "own", decoupled_decay_of_ten),
    Faulty("decay_in_adam", DECAY, ("GS403",), "own", decay_in_adam),
    Faulty("epsilon_of_ten", EPSILON, ("GS404",), "own", epsilon_of_ten),
    Faulty("epsilon_in_rmsprop", EPSILON, ("GS404",), "own", epsilon_in_rmsprop),
    Faulty("clipped_to_nothing", CLIPPED, ("GS204", "GS402"), "own", clipped_to_nothing),
    Faulty(
        "values_clipped_to_nothing", CLIPPED, ("GS204", "GS402"), "own", values_clipped_to_nothing
    ),
)
