"""Whatever modules return and however they are used: what is recorded is what they were."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parametrizations, parametrize
from torch.optim import SGD, Adam

from tests.capture.trainings import Cnn, images, tokens, vectors
from tests.setups.support import support
from tests.setups.twins import Applied, Layers, Subject, classified, compared, trained

# In place.


def in_place_by_the_user() -> Subject:
    """Three ways to write into what a module returned."""

    def between(model: Any, x: Tensor) -> Tensor:
        x += 1
        x.relu_()
        x = model.mid(x)
        x[:, 2:4].mul_(3)
        return x

    return classified(Layers(between, mid=nn.Linear(8, 8)))


class Clamping(nn.Module):
    """Writes into its input and returns it."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp_(-0.5, 0.5)


def module_that_writes_into_its_input() -> Subject:
    return classified(Layers(lambda m, x: m.clamp(x), clamp=Clamping()))


class Viewing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(-1, 2, 4)


def views() -> Subject:
    return classified(Layers(lambda m, x: m.flat(m.view(x) * 2), view=Viewing(), flat=nn.Flatten()))


# Structures.


class Pair(NamedTuple):
    mask: Tensor
    hidden: Tensor


@dataclass
class Record:
    loss: Tensor | None
    hidden: Tensor
    index: Tensor


class Output(dict[str, Any]):
    """As model libraries have them: a dict whose keys are attributes too."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class Wrapping(nn.Linear):
    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__(8, 8)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(super().forward(x))


STRUCTURES: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tuple": (lambda x: (torch.tensor(0.0), x, 3), lambda v: v[1]),
    "chunked": (lambda x: x.chunk(2, -1), lambda v: torch.cat(v, -1)),
    "list": (lambda x: [None, x], lambda v: v[1]),
    "dict": (lambda x: {"n": 3, "hidden": x}, lambda v: v["hidden"]),
    "named tuple": (lambda x: Pair(torch.arange(3), x), lambda v: v.hidden),
    "dataclass": (lambda x: Record(None, x, torch.arange(3)), lambda v: v.hidden),
    "`ModelOutput`-like": (lambda x: Output(loss=None, hidden=x), lambda v: v.hidden),
    "nested": (lambda x: {"a": ([torch.tensor(1.0)], (x,))}, lambda v: v["a"][1][0]),
}


def structured(kind: str) -> Subject:
    wrap, unwrap = STRUCTURES[kind]
    return classified(Layers(lambda m, x: unwrap(m.mid(x)), mid=Wrapping(wrap)))


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5)

    def forward(self, *, hidden: Tensor, labels: Tensor) -> Output:
        logits = self.linear(input=hidden)
        return Output(loss=F.cross_entropy(logits, labels), logits=logits)


def keywords_only() -> Subject:
    model = Keywords()

    def loss_of() -> Tensor:
        x, y = vectors()
        loss: Tensor = model(hidden=x, labels=y).loss
        return loss

    return trained(model, loss_of)


# One module in many places, or none.


class Shared(nn.Module):
    """One ReLU behind 64 and 256 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Conv2d(3, 64, 1), nn.Conv2d(64, 256, 1)
        self.act = nn.ReLU()
        self.head = nn.Linear(256, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.wide(self.act(self.narrow(x))))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def same_tensor_returned() -> Subject:
    """An identity, and a dropout that is switched off, return what they were given."""
    dropout = nn.Dropout(0.5)
    subject = classified(nn.Sequential(nn.Linear(6, 5), nn.Identity(), dropout))
    dropout.eval()
    return subject


def hostile_names() -> Subject:
    """Torch takes anything without a dot."""
    names = ["a b", "ünïcödé", "a/b", "x#1", "log", "#", "0", "(root)?", "\n", "<b>"]

    def between(model: Any, x: Tensor) -> Tensor:
        for name in names:
            x = getattr(model, name)(x)
        return x

    return classified(Layers(between, **{name: nn.Linear(8, 8) for name in names}))


def replaced() -> Subject:
    """A layer is exchanged in mid-training."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
    optimizer = SGD(model.parameters(), lr=0.1)

    def body(number: int) -> None:
        if number == 1:
            model[1] = nn.Tanh()
        x, y = vectors()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return Subject(model, [optimizer], body)


# What is not float32 with a dimension.


def complex_outputs() -> Subject:
    def between(model: Any, x: Tensor) -> Tensor:
        mixed: Tensor = torch.fft.irfft(model.mix(model.spectrum(x)), n=8)
        return mixed

    spectrum, mix = Applied(torch.fft.rfft), nn.Linear(5, 5, dtype=torch.complex64)
    return classified(Layers(between, spectrum=spectrum, mix=mix))


class Table(nn.Module):
    """Returns its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 8))

    def forward(self) -> Tensor:
        return self.weight


def parameter_returned() -> Subject:
    return classified(Layers(lambda m, x: x * m.table(), table=Table()))


def leaf_passed_on() -> Subject:
    """An input that requires gradients, through an identity."""
    model = nn.Sequential(nn.Identity(), nn.Linear(6, 5))

    def loss_of() -> Tensor:
        x, y = vectors()
        return F.cross_entropy(model(x.requires_grad_()), y)

    return trained(model, loss_of)


class Logged(Tensor):
    """A subclass as users write them: it notes what is done to it."""

    done: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.done.append(str(func))
        return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]


def subclasses() -> Subject:
    """As an output and as the model's input."""
    model = nn.Sequential(nn.Linear(6, 8), Applied(lambda x: x * 2), nn.Linear(8, 5))
    Logged.done.clear()

    def plain_loss() -> Tensor:
        x, y = vectors()
        out: Tensor = model(x.as_subclass(Logged))
        return F.cross_entropy(out.as_subclass(Tensor), y)

    subject = trained(model, plain_loss)
    subject.kept = lambda: list(Logged.done)
    return subject


def frozen_first() -> Subject:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    model[0].requires_grad_(False)
    return classified(model)


# Weights that are made of others.


def normed(norm: Callable[[nn.Module], nn.Module]) -> Subject:
    return classified(nn.Sequential(norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 5)))


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).transpose(-1, -2)


def parametrized() -> Subject:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5))
    parametrize.register_parametrization(model[1], "weight", Symmetric())
    return classified(model)


def tied() -> Subject:
    model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 5, bias=False))
    model[1].weight = model[0].weight
    return classified(model, tokens)


def attention() -> Subject:
    """Evaluated in between, where torch takes another path."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    optimizer = Adam(model.parameters())
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    kept: list[Tensor] = []

    def evaluate() -> None:
        model.eval()
        with torch.inference_mode():
            kept.append(model(torch.randn(2, 5, 8) * 100, src_key_padding_mask=padding))
        model.train()

    def body(number: int) -> None:
        del number
        evaluate()
        loss = model(torch.randn(2, 5, 8), src_key_padding_mask=padding).square().mean()
        evaluate()
        optimizer.zero_grad()
        loss.backward()
        evaluate()
        optimizer.step()

    return Subject(model, [optimizer], body, lambda: kept)


KINDS: dict[str, Callable[[], Subject]] = {
    "in-place activations": lambda: classified(Cnn(), images),
    "outputs written into by the user": in_place_by_the_user,
    "inputs written into": module_that_writes_into_its_input,
    "outputs that are views": views,
    **{f"{kind} outputs": lambda kind=kind: structured(kind) for kind in STRUCTURES},  # type: ignore[misc]
    "keyword-only forward": keywords_only,
    "one ReLU behind 64 and 256 channels": lambda: classified(Shared(), images),
    "`nn.Identity`, dropout in eval mode": same_tensor_returned,
    "names with spaces, slashes, `#`, …": hostile_names,
    "modules replaced in mid-training": replaced,
    "complex outputs": complex_outputs,
    "outputs that are a parameter": parameter_returned,
    "outputs that are the model's input": leaf_passed_on,
    "outputs of a subclass of Tensor": subclasses,
    "frozen layers": frozen_first,
    "`weight_norm`": lambda: normed(parametrizations.weight_norm),
    "`weight_norm` of `torch.nn.utils`": lambda: normed(nn.utils.weight_norm),
    "`spectral_norm`": lambda: normed(parametrizations.spectral_norm),
    "parametrized weights": parametrized,
    "tied weights": tied,
    "`nn.TransformerEncoder`, its fast path in between": attention,
}


def kinds() -> Iterator[Any]:
    for kind, build in KINDS.items():
        shown = support(
            "Modules", kind, parameters="right", outputs="right", output_gradients="right"
        )
        yield pytest.param(build, marks=shown, id=kind)


# Torch's own, of what it has newer ways for.
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning", "ignore:.*nested tensors")
@pytest.mark.parametrize("build", list(kinds()))
def test_is_recorded_as_it_was(build: Callable[[], Subject], tmp_path: Path) -> None:
    # What the model returns beside its loss has no gradient from there.
    but = ["(root)"] if build is keywords_only else []
    run = compared(build, tmp_path, but=but)
    coverage = run.meta["coverage"]["modules"]
    assert coverage["output_gradients_unseen"] == []
    assert coverage["reasons"] == {}


def test_names_are_those_of_what_is_trained(tmp_path: Path) -> None:
    run = compared(lambda: normed(parametrizations.weight_norm), tmp_path)
    wanted = {
        "0.bias",
        "0.parametrizations.weight.original0",
        "0.parametrizations.weight.original1",
    }
    assert wanted == {name for name in run.parameters.names if name.startswith("0.")}


def test_each_use_has_statistics_of_its_own(tmp_path: Path) -> None:
    table = compared(KINDS["one ReLU behind 64 and 256 channels"], tmp_path).modules
    shapes = {entity.name: entity.shape for entity in table.entities}
    assert shapes["act"] == (4, 64, 6, 6)
    assert shapes["act#1"] == (4, 256, 6, 6)
