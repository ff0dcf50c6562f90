"""Code to paste that makes an initialization of a model's Linear and Conv layers in plain torch."""

import textwrap

from gradscope.comparison.filling import Rule

_HEAD = """\
import math

import torch
from torch import nn


@torch.no_grad()
def initialize(model):
    for module in model.modules():
        if not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            continue
"""
_TAIL = """

initialize(model)
"""
_FAN_OUT = """\
# nn.init takes the fan_out of a grouped convolution for `groups` times as large.
fan_out = module.weight[:, 0].numel() // getattr(module, "groups", 1)
"""
_DELTA = """\
weight = module.weight
centre = [slice(None)] * 2
if weight.dim() > 2 and any(s < k for s, k in zip(module.stride, module.kernel_size)):
    centre += [(size - 1) // 2 for size in weight.shape[2:]]
    nn.init.zeros_(weight)
for part in weight.chunk(getattr(module, "groups", 1)):
    drawn = torch.empty_like(part[tuple(centre)], memory_format=torch.contiguous_format)
    part[tuple(centre)] = nn.init.orthogonal_(drawn, gain={gain})
"""

OF_OWN = "# The model's own initialization: nothing to change.\n"

OF_DEFAULT = """\
for module in model.modules():
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()
"""

OF_UNIT_VARIANCE = """

@torch.no_grad()
def to_unit_variance(module, args, output):
    std = output.std(correction=0)
    module.weight /= std
    return output / std


hooks = [
    module.register_forward_hook(to_unit_variance)
    for module in model.modules()
    if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
]
model(inputs)  # a batch of yours: each layer's output gets variance 1
for hook in hooks:
    hook.remove()
"""


def of_rule(rule: Rule) -> str:
    """The drawing of weights and biases."""
    bias = (
        f"nn.init.normal_(module.bias, std={rule.bias_std!r})"
        if rule.bias_std
        else ("nn.init.zeros_(module.bias)")
    )
    body = f"{_weight(rule)}if module.bias is not None:\n    {bias}\n"
    return _HEAD + textwrap.indent(body, " " * 8) + _TAIL


def of_zeroed(names: tuple[str, ...]) -> str:
    """What follows for residual branches; without names, where to write them."""
    given = names or ("blocks.0.norm2.weight",)
    listed = "".join(f"    {name!r},\n" for name in given)
    hint = "" if names else "# The last norm or weight of each residual branch of your model:\n"
    return f"\n{hint}for name in (\n{listed}):\n    nn.init.zeros_(model.get_parameter(name))\n"


def _weight(rule: Rule) -> str:
    scale = rule.scale
    if rule.distribution == "constant":
        return f"nn.init.constant_(module.weight, {scale!r})\n"
    if rule.distribution == "orthogonal":
        return (
            'for part in module.weight.chunk(getattr(module, "groups", 1)):\n'
            f"    nn.init.orthogonal_(part, gain={scale!r})\n"
        )
    if rule.distribution == "delta_orthogonal":
        return _DELTA.format(gain=repr(scale))
    fan_in = "fan_in = module.weight[0].numel()\n"
    variance = repr(round(scale**2, 12)).removesuffix(".0")
    std = {
        "in": f"{fan_in}std = math.sqrt({variance} / fan_in)\n",
        "out": f"{_FAN_OUT}std = math.sqrt({variance} / fan_out)\n",
        "mean": f"{fan_in}{_FAN_OUT}std = math.sqrt(2 / (fan_in + fan_out))\n",
        "none": f"std = {scale!r}\n",
    }[rule.fan]
    if rule.distribution == "normal":
        return f"{std}nn.init.normal_(module.weight, std=std)\n"
    return f"{std}bound = math.sqrt(3) * std\nnn.init.uniform_(module.weight, -bound, bound)\n"
