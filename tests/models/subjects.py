"""Models that nobody here wrote, small, built from their configurations; a batch for each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm.models
import torch
import transformers
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torchvision.models import DenseNet, ResNet, VisionTransformer
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import BasicBlock
from torchvision.models.segmentation.fcn import FCN, FCNHead

WORDS, CLASSES = 64, 5

Batch = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Subject:
    """A model of a library, how to build it, what it is given, and the loss of that."""

    title: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]


def sentences(*, classes: int | None = None) -> Batch:
    words = torch.randint(1, WORDS, (4, 12))
    labels = words if classes is None else torch.randint(classes, (4,))
    return {"input_ids": words, "attention_mask": torch.ones_like(words), "labels": labels}


def images(size: int, name: str = "pixel_values") -> Batch:
    return {name: torch.randn(4, 3, size, size), "labels": torch.randint(CLASSES, (4,))}


def own_loss(model: nn.Module, batch: Batch) -> Tensor:
    """What a transformers model returns beside its other outputs."""
    loss: Tensor = model(**batch).loss
    return loss


def classification(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["labels"])


def of_transformers(kind: str, config: str, batch: Callable[[], Batch], **settings: Any) -> Subject:
    def build() -> nn.Module:
        model: nn.Module = getattr(transformers, kind)(getattr(transformers, config)(**settings))
        return model

    return Subject(f"transformers: `{kind}`", build, batch, own_loss)


_SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_WIDE = {**_SIZE, "intermediate_size": 64}
_GPT2 = {
    "vocab_size": WORDS,
    "n_positions": 32,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_T5 = {
    "vocab_size": WORDS,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}


def segmentation() -> nn.Module:
    """A fully convolutional net as torchvision puts it together, with its auxiliary output."""
    backbone = ResNet(BasicBlock, [1, 1, 1, 1])
    layers = IntermediateLayerGetter(backbone, {"layer3": "aux", "layer4": "out"})
    net: nn.Module = FCN(layers, FCNHead(512, CLASSES), FCNHead(256, CLASSES))
    return net


def pixels() -> Batch:
    # Of smaller ones the last kernels see mostly their padding.
    return {"x": torch.randn(2, 3, 64, 64), "labels": torch.randint(CLASSES, (2, 64, 64))}


def of_both_outputs(model: nn.Module, batch: Batch) -> Tensor:
    outputs = model(batch["x"])
    assert set(outputs) == {"out", "aux"}
    labels = batch["labels"]
    return F.cross_entropy(outputs["out"], labels) + 0.5 * F.cross_entropy(outputs["aux"], labels)


def unet() -> nn.Module:
    net: nn.Module = UNet2DModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=8,
    )
    return net


def noisy() -> Batch:
    noise = torch.randn(4, 3, 16, 16)
    return {"x": torch.randn(4, 3, 16, 16) + noise, "t": torch.randint(1000, (4,)), "noise": noise}


def denoising(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch["x"], batch["t"]).sample, batch["noise"])


def timm_vit() -> nn.Module:
    net: nn.Module = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=CLASSES
    )
    return net


def convnext() -> nn.Module:
    net: nn.Module = timm.models.ConvNeXt(
        depths=(1, 1, 1, 1), dims=(16, 24, 32, 40), num_classes=CLASSES, drop_path_rate=0.2
    )
    return net


def mixer() -> nn.Module:
    net: nn.Module = timm.models.MlpMixer(
        img_size=32, patch_size=8, num_blocks=2, embed_dim=32, num_classes=CLASSES
    )
    return net


def torchvision_vit() -> nn.Module:
    """Around `nn.MultiheadAttention`."""
    net: nn.Module = VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=CLASSES)
    return net


def resnet() -> nn.Module:
    net: nn.Module = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=CLASSES)
    return net


def densenet() -> nn.Module:
    net: nn.Module = DenseNet(8, (2, 2, 2), 16, num_classes=CLASSES, drop_rate=0.1)
    return net


_photographs = partial(images, 32, "x")

SUBJECTS: dict[str, Subject] = {
    "gpt2": of_transformers("GPT2LMHeadModel", "GPT2Config", sentences, **_GPT2),
    "llama": of_transformers(
        "LlamaForCausalLM",
        "LlamaConfig",
        sentences,
        **_WIDE,
        vocab_size=WORDS,
        num_key_value_heads=2,
    ),
    "mixtral": of_transformers(
        "MixtralForCausalLM",
        "MixtralConfig",
        sentences,
        **_WIDE,
        vocab_size=WORDS,
        num_key_value_heads=2,
        num_local_experts=4,
        output_router_logits=True,
    ),
    "bert": of_transformers(
        "BertForSequenceClassification",
        "BertConfig",
        partial(sentences, classes=CLASSES),
        **_WIDE,
        vocab_size=WORDS,
        num_labels=CLASSES,
    ),
    # One layer, three times over.
    "albert": of_transformers(
        "AlbertForSequenceClassification",
        "AlbertConfig",
        partial(sentences, classes=CLASSES),
        **{**_WIDE, "num_hidden_layers": 3},
        vocab_size=WORDS,
        embedding_size=16,
        num_labels=CLASSES,
    ),
    "t5": of_transformers("T5ForConditionalGeneration", "T5Config", sentences, **_T5),
    "vit": of_transformers(
        "ViTForImageClassification",
        "ViTConfig",
        partial(images, 16),
        **_WIDE,
        image_size=16,
        patch_size=4,
        num_labels=CLASSES,
    ),
    "timm-vit": Subject("timm: `VisionTransformer`", timm_vit, _photographs, classification),
    "convnext": Subject("timm: `ConvNeXt`", convnext, _photographs, classification),
    "mixer": Subject("timm: `MlpMixer`", mixer, _photographs, classification),
    "resnet": Subject("torchvision: `ResNet`", resnet, partial(images, 64, "x"), classification),
    "densenet": Subject(
        "torchvision: `DenseNet`, activations in place", densenet, _photographs, classification
    ),
    "segmentation": Subject(
        "torchvision: `FCN`, a dict of two outputs", segmentation, pixels, of_both_outputs
    ),
    "torchvision-vit": Subject(
        "torchvision: `VisionTransformer`", torchvision_vit, _photographs, classification
    ),
    "unet": Subject("diffusers: `UNet2DModel`", unet, noisy, denoising),
}
