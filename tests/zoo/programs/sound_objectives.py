"""Healthy: objectives whose loss or gradients do not go the usual way."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (everybody's name for it)
from torch.optim import SGD, Adam, AdamW

from tests.zoo.case import Healthy, Watch
from tests.zoo.data import batches, circles, digits, moons, standardized
from tests.zoo.loop import accuracy, fit
from tests.zoo.models import cnn, mlp
from tests.zoo.programs.representation import Variational, siamese


class Adversaries(nn.Module):
    """A generator, and a discriminator that judges what it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = mlp(2, 64, 64, 2)
        self.discriminator = mlp(2, 64, 64, 1, activation=lambda: nn.LeakyReLU(0.2))

    def forward(self, noise: Tensor) -> Tensor:
        score: Tensor = self.discriminator(self.generator(noise))
        return score


def adversaries(watch: Watch) -> None:
    """T07: the discriminator's loss sits at 2 ln 2, and neither loss falls."""
    data = standardized(moons())
    model = Adversaries()
    optimizers = [
        Adam(part.parameters(), 1e-3, betas=(0.5, 0.999))
        for part in (model.generator, model.discriminator)
    ]
    bce = F.binary_cross_entropy_with_logits
    ones, zeros = torch.ones(64, 1), torch.zeros(64, 1)
    with watch(model, optimizers, loss_is_progress=False) as scope:
        for real, _ in batches((data, data), 600, 64):
            fake = model.generator(torch.randn(64, 2)).detach()
            loss = bce(model.discriminator(real), ones) + bce(model.discriminator(fake), zeros)
            model.zero_grad()
            loss.backward()
            optimizers[1].step()
            model.zero_grad()
            bce(model(torch.randn(64, 2)), ones).backward()
            optimizers[0].step()
            scope.log(loss=loss, deviation=fake.std(0).mean(), centre=fake.mean(0).norm())


def variational_digits(watch: Watch) -> None:
    """A VAE: two terms against each other, and noise in the middle."""
    model = Variational()
    optimizer = AdamW(model.parameters(), 3e-3)
    with watch(model, optimizer) as scope:
        for images, _ in batches(digits(), 500, 64):
            decoded, mean, log_variance = model(images)
            wrong = F.mse_loss(decoded, images, reduction="none").sum(1).mean() * 10
            prior = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean() / 2
            loss = wrong + prior
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scope.log(loss=loss, reconstruction=wrong, code=mean.detach().std(0).mean())


def diffused_moons(watch: Watch) -> None:
    """Noise is predicted from noisy points: the loss has a floor not far below its start."""
    data = standardized(moons(2048))
    model = mlp(3, 128, 128, 2, activation=nn.SiLU)
    optimizer = AdamW(model.parameters(), 2e-3)
    with watch(model, optimizer) as scope:
        for points, _ in batches((data, data), 500, 128):
            time, noise = torch.rand(128, 1), torch.randn(128, 2)
            angle = math.pi / 2 * time
            noisy = angle.cos() * points + angle.sin() * noise
            loss = F.mse_loss(model(torch.cat([noisy, time], 1)), noise)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scope.log(loss=loss)


def stopped_gradient(watch: Watch) -> None:
    """SimSiam as it should be: a cosine that falls from 0 towards −1."""
    siamese(watch, repaired=True)


def contrasted_pairs(watch: Watch) -> None:
    """InfoNCE: each image against its noisy twin, among the others of its batch."""
    model = mlp(64, 128, 32)
    optimizer = Adam(model.parameters(), 1e-3)
    with watch(model, optimizer, loss_is_progress=False) as scope:
        for images, _ in batches(digits(), 300, 64):
            views = [images + 0.3 * torch.randn_like(images) for _ in range(2)]
            first, second = (F.normalize(model(view), dim=1) for view in views)
            scores = first @ second.T / 0.1
            loss = F.cross_entropy(scores, torch.arange(64))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scope.log(loss=loss)


def triplets(watch: Watch) -> None:
    """A margin that most triplets soon keep: their gradients are exactly zero."""
    inputs, labels = digits()
    model = mlp(64, 64, 16)
    optimizer = SGD(model.parameters(), 0.05, momentum=0.9)
    loss_of = nn.TripletMarginLoss(margin=0.5)
    members = [torch.nonzero(labels == label)[:, 0] for label in range(10)]
    with watch(model, optimizer, loss_of):
        for _ in range(200):
            own = torch.randint(10, (32,))
            other = (own + torch.randint(1, 10, (32,))) % 10
            anchor, positive, negative = (
                inputs[[int(members[c][torch.randint(len(members[c]), ())]) for c in classes]]
                for classes in (own.tolist(), own.tolist(), other.tolist())
            )
            loss = loss_of(model(anchor), model(positive), model(negative))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def rewarded(watch: Watch) -> None:
    """REINFORCE: the loss says nothing; the reward rises."""
    answers = torch.randint(4, (16,))
    model = mlp(16, 32, 4, activation=nn.Tanh)
    optimizer = Adam(model.parameters(), 5e-3)
    baseline = torch.tensor(0.25)
    with watch(model, optimizer, loss_is_progress=False) as scope:
        for _ in range(400):
            state = torch.randint(16, (64,))
            policy = torch.distributions.Categorical(logits=model(F.one_hot(state, 16).float()))
            action = policy.sample()
            reward = (action == answers[state]).float()
            loss = -(policy.log_prob(action) * (reward - baseline)).mean()
            baseline = 0.95 * baseline + 0.05 * reward.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scope.log(loss=loss, reward=reward.mean())


def against_attacks(watch: Watch) -> None:
    """Adversarial training: each batch is moved to where the net is worst."""
    model = cnn()
    optimizer = SGD(model.parameters(), 0.05, momentum=0.9)
    data = digits()
    with watch(model, optimizer) as scope:
        for inputs, targets in batches(data, 250):
            moved = inputs.clone().requires_grad_()
            (slope,) = torch.autograd.grad(F.cross_entropy(model(moved), targets), moved)
            loss = F.cross_entropy(model(inputs + 0.05 * slope.sign()), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scope.log(loss=loss)
        scope.log(accuracy=accuracy(model, data))


def distilled(watch: Watch) -> None:
    """A student learns a teacher's scores: the divergence starts small, and gets smaller."""
    data = digits()
    teacher, student = mlp(64, 128, 10), mlp(64, 32, 10)
    teaching = Adam(teacher.parameters(), 2e-3)
    for inputs, targets in batches(data, 300):
        teaching.zero_grad()
        F.cross_entropy(teacher(inputs), targets).backward()
        teaching.step()
    optimizer = Adam(student.parameters(), 3e-3)
    with watch(student, optimizer) as scope:
        for inputs, _ in batches(data, 300):
            with torch.no_grad():
                told = (teacher(inputs) / 4).log_softmax(1)
            told_by_student = (student(inputs) / 4).log_softmax(1)
            loss = F.kl_div(told_by_student, told, log_target=True, reduction="batchmean")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scope.log(loss=loss)


def differential_equation(watch: Watch) -> None:
    """A spring that swings, from 0 with speed 1: a loss on derivatives of the output."""
    model = mlp(1, 32, 32, 1, activation=nn.Tanh)
    optimizer = Adam(model.parameters(), 1e-2)
    with watch(model, optimizer) as scope:
        for _ in range(300):
            time = (2 * torch.rand(64, 1)).requires_grad_()
            start = torch.zeros(1, 1, requires_grad=True)
            u, u0 = model(torch.cat([time, start])).split([64, 1])
            (first,) = torch.autograd.grad(u.sum(), time, create_graph=True)
            (second,) = torch.autograd.grad(first.sum(), time, create_graph=True)
            (slope,) = torch.autograd.grad(u0.sum(), start, create_graph=True)
            loss = (second + u).square().mean() + u0.square().mean() + (slope - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scope.log(loss=loss)


def weights_pulled_to_zero(watch: Watch) -> None:
    """An L1 penalty that leaves most weights of the first layer at nearly zero."""
    inputs, labels = circles()
    inputs = torch.cat([inputs, torch.randn(len(inputs), 30)], 1)
    model = mlp(32, 32, 1)
    optimizer = Adam(model.parameters(), 5e-3)

    def loss_of(output: Tensor, target: Tensor) -> Tensor:
        penalty = sum(p.abs().sum() for p in model[0].parameters())
        return F.binary_cross_entropy_with_logits(output, target) + 1e-3 * penalty

    fit(watch, model, optimizer, batches((inputs, labels), 500), loss_of)


class Quality(nn.Module):
    """The values of four actions."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(10, 32, 2)

    def forward(self, state: Tensor) -> Tensor:
        values: Tensor = self.net(F.one_hot(state, 10).float())
        return values


def moving_goal(watch: Watch) -> None:
    """Q-learning on a chain of ten states: the loss rises while rewards are found."""
    model, target = Quality(), Quality()
    target.load_state_dict(model.state_dict())
    optimizer = Adam(model.parameters(), 5e-3)
    with watch(model, optimizer, loss_is_progress=False) as scope:
        for step in range(500):
            state, action = torch.randint(10, (64,)), torch.randint(2, (64,))
            following = (state + 2 * action - 1).clamp(0, 9)
            reward = (following == 9).float()
            with torch.no_grad():
                goal = reward + 0.9 * (1 - reward) * target(following).max(1).values
            loss = F.smooth_l1_loss(model(state).gather(1, action[:, None])[:, 0], goal)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 25 == 0:
                target.load_state_dict(model.state_dict())
            with torch.no_grad():
                right = model(torch.arange(9)).argmax(1).float().mean()
            scope.log(loss=loss, right=right)


CASES = (
    Healthy("adversaries", "adversarial", "arXiv:1406.2661", adversaries),
    Healthy("against_attacks", "adversarial", "arXiv:1412.6572", against_attacks),
    Healthy("variational_digits", "variational", "arXiv:1312.6114", variational_digits),
    Healthy("diffused_moons", "diffusion", "arXiv:2006.11239", diffused_moons),
    Healthy("stopped_gradient", "contrastive", "arXiv:2011.10566", stopped_gradient),
    Healthy("contrasted_pairs", "contrastive", "arXiv:1807.03748", contrasted_pairs),
    Healthy("triplets", "contrastive", "own", triplets),
    Healthy("rewarded", "reinforcement", "own", rewarded),
    Healthy("moving_goal", "reinforcement", "own", moving_goal),
    Healthy("distilled", "distillation", "arXiv:1503.02531", distilled),
    Healthy("differential_equation", "physics", "own", differential_equation),
    Healthy("weights_pulled_to_zero", "sparse-weights", "own", weights_pulled_to_zero),
)
