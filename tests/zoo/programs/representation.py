"""Representations and attention that become one and the same for all inputs."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (everybody's name for it)
from torch.optim import SGD, Adam

from tests.zoo.case import Faulty, Watch
from tests.zoo.data import batches, copies, digits
from tests.zoo.loop import fit
from tests.zoo.models import SmallGpt, mlp, next_token_loss


def _views(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The same images, each with other pixels lost and other noise."""
    kept = [torch.rand_like(inputs) > 0.2 for _ in range(2)]
    first, second = (mask * inputs + 0.1 * torch.randn_like(inputs) for mask in kept)
    return first, second


def _spread(features: Tensor) -> Tensor:
    """The deviation of the features' directions over a batch: 0 where all are one."""
    directions = F.normalize(features.detach(), dim=1)
    return directions.std(0).mean() * math.sqrt(features.shape[1])


class Siamese(nn.Module):
    """An encoder and a predictor, as in SimSiam."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32)
        )
        self.norm = nn.BatchNorm1d(32, affine=False)
        self.predictor = mlp(32, 16, 32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.norm(self.encoder(x))
        return features, self.predictor(features)


def siamese(watch: Watch, repaired: bool) -> None:
    """SimSiam without its stop-gradient, and without the norm that would hide it."""
    model = Siamese()
    if not repaired:
        model.norm = nn.Identity()  # type: ignore[assignment]
    optimizer = SGD(model.parameters(), 0.1, momentum=0.9)
    inputs, labels = digits()
    with watch(model, optimizer, loss_is_progress=False) as scope:
        for images, _ in batches((inputs, labels), 300, 64):
            first, second = _views(images)
            (z1, p1), (z2, p2) = model(first), model(second)
            if repaired:
                z1, z2 = z1.detach(), z2.detach()
            loss = -(F.cosine_similarity(p1, z2) + F.cosine_similarity(p2, z1)).mean() / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scope.log(loss=loss, spread=_spread(z1))


def predicted_features(watch: Watch, repaired: bool) -> None:
    """Two views' features drawn together by a squared error: all of them become zero."""
    model = mlp(64, 64, 16, activation=nn.GELU)
    optimizer = Adam(model.parameters(), 1e-3)
    inputs, labels = digits()
    with watch(model, optimizer, loss_is_progress=False) as scope:
        for images, _ in batches((inputs, labels), 300, 64):
            first, second = map(model, _views(images))
            loss = F.mse_loss(first, second)
            if repaired:
                # VICReg's variance term.
                deviation = (torch.cat([first, second]).var(0) + 1e-4).sqrt()
                loss = loss + (1 - deviation).relu().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scope.log(loss=loss, deviation=first.detach().std(0).mean())


class Variational(nn.Module):
    """A variational autoencoder of the digits."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = mlp(64, 64, 16)
        self.decoder = mlp(8, 64, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        code = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        return self.decoder(code), mean, log_variance


def variational(watch: Watch, repaired: bool) -> None:
    """A prior weighted so much that the code says nothing of the image."""
    model = Variational()
    optimizer = Adam(model.parameters(), 3e-3)
    weight = 1.0 if repaired else 50.0
    with watch(model, optimizer) as scope:
        for images, _ in batches(digits(), 500, 64):
            decoded, mean, log_variance = model(images)
            wrong = F.mse_loss(decoded, images, reduction="none").sum(1).mean() * 5
            prior = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean() / 2
            loss = wrong + weight * prior
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scope.log(loss=loss, reconstruction=wrong, code=mean.detach().std(0).mean())


def attention_at_one_place(watch: Watch, repaired: bool) -> None:
    """Queries and keys forty times too large: each row of attention is one-hot from the start."""
    model = SmallGpt()
    if not repaired:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("query.weight", "key.weight")):
                    parameter.mul_(40.0)
    optimizer = Adam(model.parameters(), 3e-3)
    fit(watch, model, optimizer, copies(200), next_token_loss)


COLLAPSE = "representation-collapse"

CASES = (
    Faulty("siamese", COLLAPSE, ("GS310",), "arXiv:2011.10566", siamese),
    Faulty("predicted_features", COLLAPSE, ("GS310",), "arXiv:2105.04906", predicted_features),
    Faulty(
        "variational", "posterior-collapse", ("GS310", "GS303"), "arXiv:1511.06349", variational
    ),
    Faulty(
        "attention_at_one_place",
        "attention-collapse",
        ("GS306", "GS307", "GS104"),
        "arXiv:2303.06296",
        attention_at_one_place,
    ),
)
