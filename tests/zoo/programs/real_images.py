"""Nets of timm, torchvision and diffusers, on pictures of digits."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (everybody's name for it)
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from tests.zoo.case import Faulty, Healthy, Watch
from tests.zoo.data import batches, digits, pictures
from tests.zoo.loop import fit

_STEPS = 200


def _learn(watch: Watch, model: nn.Module, optimizer: Optimizer, side: int) -> None:
    """After ten steps of warm-up."""
    warm_up = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
    data = batches(pictures(side), _STEPS)
    fit(watch, model, optimizer, data, nn.CrossEntropyLoss(), schedule=warm_up)


def vit_on_digits(watch: Watch) -> None:
    """A vision transformer: AdamW, warm-up, decay."""
    from tests.zoo import libraries

    model = libraries.vit()
    _learn(watch, model, AdamW(model.parameters(), 2e-3, weight_decay=0.05), 16)


def mixer_on_digits(watch: Watch) -> None:
    """Patches and channels mixed in turn."""
    from tests.zoo import libraries

    model = libraries.mixer()
    _learn(watch, model, AdamW(model.parameters(), 1e-3, weight_decay=0.05), 16)


def convnext_on_digits(watch: Watch) -> None:
    """Scales of a millionth on the branches, which grow."""
    from tests.zoo import libraries

    model = libraries.convnext()
    _learn(watch, model, AdamW(model.parameters(), 1e-3, weight_decay=0.05), 32)


def efficientnet_on_digits(watch: Watch) -> None:
    """Depthwise convolutions, squeezed and excited."""
    from tests.zoo import libraries

    model = libraries.efficientnet()
    _learn(watch, model, AdamW(model.parameters(), 1e-3), 32)


def resnet_d_on_digits(watch: Watch) -> None:
    """SGD with momentum, up and down in one cycle."""
    from tests.zoo import libraries

    model = libraries.resnet_d()
    optimizer = SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    cycle = OneCycleLR(optimizer, 0.1, total_steps=_STEPS + 1)
    loss = nn.CrossEntropyLoss()
    fit(watch, model, optimizer, batches(pictures(32), _STEPS), loss, schedule=cycle)


def resnet_on_digits(watch: Watch) -> None:
    """ResNet's own rate, and no warm-up."""
    from tests.zoo import libraries

    model = libraries.resnet()
    optimizer = SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    fit(watch, model, optimizer, batches(pictures(16), _STEPS), nn.CrossEntropyLoss())


def densenet_on_digits(watch: Watch) -> None:
    """Each layer sees all before it."""
    from tests.zoo import libraries

    model = libraries.densenet()
    _learn(watch, model, AdamW(model.parameters(), 1e-3), 32)


def swin_on_digits(watch: Watch) -> None:
    """Attention within windows, and a stochastic depth."""
    from tests.zoo import libraries

    model = libraries.swin()
    _learn(watch, model, AdamW(model.parameters(), 1e-3, weight_decay=0.05), 16)


def unet_on_digits(watch: Watch) -> None:
    """A diffusion model's denoiser: it tells the noise from the digit."""
    from tests.zoo import libraries

    model = libraries.unet()
    optimizer = AdamW(model.parameters(), 1e-3)
    kept = torch.linspace(0.9999, 0.02, 1000)[:, None, None, None]
    with watch(model, optimizer) as scope:
        for images, _ in batches(digits(), _STEPS):
            times, noise = torch.randint(1000, (len(images),)), torch.randn(len(images), 1, 8, 8)
            clean = 2 * images.view(-1, 1, 8, 8) - 1
            noisy = kept[times].sqrt() * clean + (1 - kept[times]).sqrt() * noise
            loss = F.mse_loss(model(noisy, times).sample, noise)
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scope.log(loss=loss, grad_norm=norm)


def resnet_without_its_head(watch: Watch, repaired: bool) -> None:
    """A head that starts at zero, and that was forgotten in the groups of the optimizer."""
    from tests.zoo import libraries

    model = libraries.resnet()
    head = model.get_submodule("fc")
    assert isinstance(head, nn.Linear)
    nn.init.zeros_(head.weight)
    groups = [
        {"params": [p for name, p in model.named_parameters() if name.startswith("layer")]},
        {"params": [p for name, p in model.named_parameters() if name.startswith(("conv", "bn"))]},
    ]
    if repaired:
        groups.append({"params": list(head.parameters())})
    optimizer = SGD(groups, 0.05, momentum=0.9, weight_decay=5e-4)
    fit(watch, model, optimizer, batches(pictures(16), _STEPS), nn.CrossEntropyLoss())


class _Softened(nn.Module):
    """Probabilities for the reader, of a net that is trained on scores."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.softmax = net, nn.Softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        shares: Tensor = self.softmax(self.net(x))
        return shares


def vit_with_softmax(watch: Watch, repaired: bool) -> None:
    """Cross-entropy of probabilities."""
    from tests.zoo import libraries

    model = libraries.vit()
    if not repaired:
        model = _Softened(model)
    _learn(watch, model, AdamW(model.parameters(), 2e-3, weight_decay=0.05), 16)


CASES = (
    Healthy("vit_on_digits", "library-images", "timm", vit_on_digits),
    Healthy("mixer_on_digits", "library-images", "timm", mixer_on_digits),
    Healthy("convnext_on_digits", "library-images", "timm", convnext_on_digits),
    Healthy("efficientnet_on_digits", "library-images", "timm", efficientnet_on_digits),
    Healthy("resnet_d_on_digits", "library-images", "timm", resnet_d_on_digits),
    Healthy("resnet_on_digits", "library-images", "torchvision", resnet_on_digits),
    Healthy("densenet_on_digits", "library-images", "torchvision", densenet_on_digits),
    Healthy("swin_on_digits", "library-images", "torchvision", swin_on_digits),
    Healthy("unet_on_digits", "library-images", "diffusers", unet_on_digits),
    Faulty(
        "resnet_without_its_head",
        "not-in-optimizer",
        ("GS004",),
        "torchvision",
        resnet_without_its_head,
    ),
    Faulty(
        "vit_with_softmax",
        "activation-before-logits-loss",
        ("GS604", "GS305"),
        "timm",
        vit_with_softmax,
    ),
)
