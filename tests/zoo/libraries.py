"""Architectures of transformers, timm, torchvision and diffusers, small, from configurations.

These are an extra and slow to import: a program imports this file when it trains.
"""

# Before the libraries, which it lets work offline.
import tests.models  # noqa: F401, I001
import timm
import timm.models
import torchvision.models
import transformers
from diffusers import UNet2DModel
from torch import nn

_LETTERS = 256
_WIDTH = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def gpt2() -> nn.Module:
    """Of bytes; the head is the embedding, and a tenth of everything is dropped."""
    config = transformers.GPT2Config(
        vocab_size=_LETTERS,
        n_positions=32,
        n_embd=64,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    model: nn.Module = transformers.GPT2LMHeadModel(config)
    return model


def llama() -> nn.Module:
    """Of bytes: rotated positions, RMS norms, gated units, half as many keys as queries."""
    config = transformers.LlamaConfig(
        **_WIDTH, vocab_size=_LETTERS, intermediate_size=160, num_key_value_heads=2
    )
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def mixtral() -> nn.Module:
    """Of bytes: two of four experts for each, and a loss for how evenly they are used."""
    config = transformers.MixtralConfig(
        **_WIDTH,
        vocab_size=_LETTERS,
        intermediate_size=96,
        num_key_value_heads=2,
        num_local_experts=4,
        output_router_logits=True,
    )
    model: nn.Module = transformers.MixtralForCausalLM(config)
    return model


def t5() -> nn.Module:
    """Of bytes, from an encoder to a decoder."""
    config = transformers.T5Config(
        vocab_size=_LETTERS,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    model: nn.Module = transformers.T5ForConditionalGeneration(config)
    return model


def bert(words: int, classes: int) -> nn.Module:
    """A classifier of words."""
    config = transformers.BertConfig(
        **_WIDTH,
        vocab_size=words,
        intermediate_size=128,
        max_position_embeddings=64,
        num_labels=classes,
    )
    model: nn.Module = transformers.BertForSequenceClassification(config)
    return model


def vit() -> nn.Module:
    """timm's, of pictures of 16×16, with a class token."""
    model: nn.Module = timm.models.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=64, depth=3, num_heads=4, num_classes=10
    )
    return model


def mixer() -> nn.Module:
    """timm's, of pictures of 16×16."""
    model: nn.Module = timm.models.MlpMixer(
        img_size=16, patch_size=4, num_blocks=3, embed_dim=64, num_classes=10
    )
    return model


def convnext() -> nn.Module:
    """timm's, of pictures of 32×32: branches start at a millionth, and some are dropped."""
    model: nn.Module = timm.models.ConvNeXt(
        patch_size=2, depths=(1, 2, 2, 1), dims=(16, 32, 48, 64), num_classes=10, drop_path_rate=0.1
    )
    return model


def efficientnet() -> nn.Module:
    """timm's, the one that it tests with."""
    model: nn.Module = timm.create_model("test_efficientnet", num_classes=10, drop_rate=0.1)
    return model


def resnet_d() -> nn.Module:
    """timm's: a deep stem, averaged shortcuts, branches that start at zero."""
    model: nn.Module = timm.models.ResNet(
        timm.models.resnet.BasicBlock,
        (1, 1, 1, 1),
        num_classes=10,
        stem_type="deep",
        stem_width=8,
        avg_down=True,
        channels=(16, 32, 64, 128),
    )
    return model


def resnet() -> nn.Module:
    """torchvision's ResNet-18 without its last stage, as is usual for small pictures."""
    block = torchvision.models.resnet.BasicBlock
    model = torchvision.models.ResNet(block, [2, 2, 1, 1])
    model.layer4 = nn.Identity()
    model.fc = nn.Linear(256, 10)
    net: nn.Module = model
    return net


def densenet() -> nn.Module:
    """torchvision's, with activations in place."""
    model: nn.Module = torchvision.models.DenseNet(8, (2, 2, 2), 16, num_classes=10)
    return model


def swin() -> nn.Module:
    """torchvision's, of pictures of 16×16: windows of 4×4, shifted in every other block."""
    model: nn.Module = torchvision.models.SwinTransformer(
        patch_size=[2, 2],
        embed_dim=32,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=[4, 4],
        stochastic_depth_prob=0.1,
        num_classes=10,
    )
    return model


def unet() -> nn.Module:
    """diffusers', of grey pictures of 8×8, with attention at half of that."""
    model: nn.Module = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=8,
    )
    return model
