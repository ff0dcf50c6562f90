"""Initializations on models that nobody here wrote, built from their configurations."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import nn
from torchvision.models import ResNet
from torchvision.models.resnet import BasicBlock

from gradscope.comparison.activation import ACTIVATIONS
from gradscope.comparison.draws import Draws
from gradscope.comparison.initialization import INITIALIZATIONS, Initialized, initialize

Run = Callable[[Any], object]


def _pixels(model: Any) -> object:
    return model(torch.randn(2, 3, 64, 64))


def _words(model: Any) -> object:
    return model(input_ids=torch.randint(0, 90, (2, 12)))


def _pairs(model: Any) -> object:
    return model(torch.randn(2, 5, 32), torch.randn(2, 7, 32))


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=90, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2
    )
    model: nn.Module = transformers.GPT2LMHeadModel(config)
    return model


def _bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=90,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    model: nn.Module = transformers.BertForMaskedLM(config)
    return model


# Each with how its residual branches end, by the names of those that wrote it.
MODELS: dict[str, tuple[Callable[[], nn.Module], Run, tuple[str, ...], int]] = {
    "resnet": (lambda: ResNet(BasicBlock, [2, 2, 2, 2]), _pixels, ("bn2.weight",), 8),
    "gpt2": (_gpt2, _words, ("attn.c_proj.weight", "mlp.c_proj.weight"), 4),
    "bert": (_bert, _words, ("output.dense.weight",), 4),
    "vit": (
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2),
        _pixels,
        ("attn.proj.weight", "mlp.fc2.weight"),
        4,
    ),
    "convnext": (lambda: timm.create_model("convnext_atto"), _pixels, ("mlp.fc2.weight",), 12),
    "transformer": (
        lambda: nn.Transformer(32, 2, 1, 2, 64, batch_first=True),
        _pairs,
        ("attn.out_proj.weight", "linear2.weight"),
        8,
    ),
}


def initialized(model: nn.Module, name: str, run: Run) -> Initialized:
    return initialize(
        model, INITIALIZATIONS[name], ACTIVATIONS["relu"], Draws(0), lambda: run(model)
    )


@pytest.mark.parametrize("kind", MODELS)
def test_zeroed_branches_are_those_of_the_authors(kind: str) -> None:
    build, run, ends, count = MODELS[kind]
    model = build()
    result = initialized(model, "zero_residual", run)
    weights = [name for name in result.zeroed if name.endswith("weight")]
    assert len(weights) == count
    assert all(name.endswith(ends) for name in weights)
    assert not any(model.get_parameter(name).any() for name in result.zeroed)


@pytest.mark.parametrize("kind", MODELS)
def test_every_matrix_is_drawn_or_left_for_a_reason(kind: str) -> None:
    build, run, *_ = MODELS[kind]
    model = build()
    before = {name: held.detach().clone() for name, held in model.named_parameters()}
    result = initialized(model, "kaiming_normal", run)
    for name, held in model.named_parameters():
        same = torch.equal(held, before[name])
        # Biases that were zero stay zero.
        assert same == (name in result.left) or not held.any(), name
        if held.dim() > 1 and name in result.left:
            assert name.endswith(("cls_token", "pos_embed", "embeddings.weight", "wpe.weight"))


@pytest.mark.parametrize("kind", ["resnet", "vit", "convnext"])
def test_lsuv_on_a_model_with_norms(kind: str) -> None:
    model = MODELS[kind][0]()
    images = torch.randn(4, 3, 64, 64)
    result = initialized(model, "lsuv", lambda model: model(images))
    assert not result.notes
    variances: dict[str, float] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda _, __, out: variances.update({name: float(out.detach().var())})

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(note(name))
    model(images)
    assert len(variances) > 8
    assert list(variances.values()) == pytest.approx([1.0] * len(variances), abs=0.05)
