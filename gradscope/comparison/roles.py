"""Which weight matrices a model has: where each lies, what it multiplies, its true fans.

`nn.init` reads fans off a tensor's shape, which misleads for transposed and grouped
convolutions, packed projections and gates, GPT-2's Conv1D and Bilinear.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from gradscope.capture.entities import module_group
from gradscope.capture.names import class_name, named_modules, owned_parameters
from gradscope.comparison.assignment import underlying


class Layout(Enum):
    """How a weight lies in its tensor."""

    ROWS = "a row per output"
    COLUMNS = "a column per output"  # transformers' Conv1D
    KERNEL = "output, input, kernel"
    TRANSPOSED_KERNEL = "input, output, kernel"
    LOOKUP = "a row per index"


@dataclass(frozen=True, slots=True)
class Block:
    """One matrix of a weight: a gate, a projection, or all of it.

    shape is (groups, outputs, inputs, *kernel), the last three of one group. fan_in and fan_out
    count what is summed for one output, and for the gradient of one input.
    """

    key: str
    first_row: int
    shape: tuple[int, ...]
    fan_in: float
    fan_out: float
    # A convolution whose kernels don't overlap is a linear layer of each patch.
    overlaps: bool = False

    @property
    def matrix(self) -> tuple[int, int, int]:
        """(groups, outputs, inputs times kernel)."""
        groups, rows, *columns = self.shape
        return groups, rows, math.prod(columns)


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight that initializations draw.

    default: (distribution, standard deviation) by the module's own reset_parameters.
    gated: the module applies nonlinearities of its own, so no activation's gain concerns it.
    """

    name: str
    owner: nn.Module
    attribute: str
    layout: Layout
    blocks: tuple[Block, ...]
    default: tuple[str, float]
    gated: bool = False
    padding_row: int | None = None

    def view(self, values: Tensor, block: Block) -> Tensor:
        """The block's part of `values`, a tensor like the weight, in the block's shape."""
        groups, rows, inputs, *_ = block.shape
        if self.layout is Layout.TRANSPOSED_KERNEL:
            kernels: Tensor = values.unflatten(0, (groups, inputs))
            return kernels.transpose(1, 2)
        if self.layout is Layout.COLUMNS:
            values = values.t()
        part: Tensor = values.narrow(0, block.first_row, groups * rows)
        matrices: Tensor = part.unflatten(0, (groups, rows))
        return matrices


@dataclass(frozen=True, slots=True)
class Bias:
    """A bias vector. sharers: how many add up; default: the bound of the module's own rule."""

    name: str
    owner: nn.Module
    attribute: str
    default: float = 0.0
    sharers: int = 1
    gated: bool = False
    # An LSTM's forget gate is open because of it: a decision of the model's author.
    kept: slice | None = None


@dataclass(frozen=True, slots=True)
class Roles:
    """left: the parameters that no initialization touches, each with the reason."""

    weights: tuple[Weight, ...]
    biases: tuple[Bias, ...]
    left: dict[str, str]
    notes: tuple[str, ...]


def roles_of(model: nn.Module) -> Roles:
    """The weights and biases of the model's layers; each tied one once."""
    found = [weight for name, module in named_modules(model) for weight in _weights(name, module)]
    # What is tied to a linear layer is multiplied, too, and then larger than what is looked up.
    found.sort(key=lambda weight: weight.layout is Layout.LOOKUP)
    biases = [bias for name, module in named_modules(model) for bias in _biases(name, module)]
    claimed: dict[int, Weight | Bias] = {}
    left: dict[str, str] = {}
    notes = []
    roles: tuple[Weight | Bias, ...] = (*found, *biases)
    for role in roles:
        made_of = underlying(role.owner, role.attribute)
        if not made_of:
            continue
        first = claimed.get(id(made_of[0]))
        if first is None:
            claimed |= {id(parameter): role for parameter in made_of}
            continue
        if isinstance(first, Weight) and isinstance(role, Weight):
            notes.append(f"{role.name} is {first.name}, and drawn once, as that")
            if role.padding_row is not None:
                claimed[id(made_of[0])] = replace(first, padding_row=role.padding_row)
    frozen = set()
    for name, owner, parameter in owned_parameters(model):
        claim = claimed.get(id(parameter))
        if not parameter.requires_grad:
            left[name] = "frozen"
            frozen.add(id(claim))
        elif claim is None:
            left[name] = _why_left(owner, parameter)
    kept = {id(claim): claim for claim in claimed.values() if id(claim) not in frozen}
    return Roles(
        tuple(claim for claim in kept.values() if isinstance(claim, Weight)),
        tuple(claim for claim in kept.values() if isinstance(claim, Bias)),
        left,
        tuple(notes),
    )


def _why_left(owner: nn.Module, parameter: Tensor) -> str:
    kind = class_name(owner)
    if module_group(owner) == "norm":
        return f"{kind} starts as it is"
    if parameter.dim() < 2:  # noqa: PLR2004
        return f"no matrix, but a vector or number of {kind}"
    return f"{kind} is none of the layers whose weights initializations know"


def _weights(name: str, module: nn.Module) -> Iterator[Weight]:
    if isinstance(module, nn.MultiheadAttention):
        yield from _of_attention(name, module)
    elif isinstance(module, nn.RNNBase | nn.RNNCellBase):
        yield from _of_recurrent(name, module)
    elif isinstance(module, _ConvNd):
        yield _of_convolution(name, module)
    elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
        key, shape = _joined(name, "weight"), (1, *module.weight.shape)
        block = Block(key, 0, shape, 1, 1)
        row = module.padding_idx
        yield Weight(
            key, module, "weight", Layout.LOOKUP, (block,), ("normal", 1.0), padding_row=row
        )
    elif isinstance(module, nn.Bilinear):
        outputs, first, second = shape = (
            module.out_features,
            module.in1_features,
            module.in2_features,
        )
        key = _joined(name, "weight")
        # Each input hears of all outputs times the other input; of two, the mean.
        block = Block(key, 0, (1, *shape), first * second, outputs * (first + second) / 2)
        yield Weight(key, module, "weight", Layout.ROWS, (block,), _uniform(first))
    elif isinstance(module, nn.Linear):
        outputs, inputs = module.out_features, module.in_features
        yield _of_matrix(name, module, Layout.ROWS, outputs, inputs)
    elif class_name(module) == "Conv1D" and module_group(module) == "linear":
        # transformers' own: a linear layer whose weight is stored transposed.
        weight: Tensor = module.weight  # type: ignore[assignment]
        inputs, outputs = weight.shape
        yield _of_matrix(name, module, Layout.COLUMNS, outputs, inputs)


def _of_matrix(name: str, module: nn.Module, layout: Layout, outputs: int, inputs: int) -> Weight:
    key = _joined(name, "weight")
    default = _uniform(inputs) if layout is Layout.ROWS else ("normal", 0.02)
    parts = _projections(name.rpartition(".")[2], outputs, inputs)
    return Weight(key, module, "weight", layout, _packed(key, parts, outputs, inputs), default)


def _projections(name: str, outputs: int, inputs: int) -> int:
    """How many projections a linear layer packs: the names that timm and transformers give it."""
    if name in {"qkv", "Wqkv"} and outputs % 3 == 0:
        return 3
    # Two in GPT-2's cross-attention.
    if name == "c_attn" and outputs in {2 * inputs, 3 * inputs}:
        return outputs // inputs
    return 1


def _packed(key: str, parts: int, outputs: int, inputs: int) -> tuple[Block, ...]:
    rows = outputs // parts
    keys = [key] if parts == 1 else [f"{key}[{part}]" for part in range(parts)]
    return tuple(
        Block(own, part * rows, (1, rows, inputs), inputs, rows) for part, own in enumerate(keys)
    )


def _of_convolution(name: str, module: _ConvNd) -> Weight:
    key = _joined(name, "weight")
    groups, kernel, stride = module.groups, module.kernel_size, module.stride
    outputs, inputs = module.out_channels // groups, module.in_channels // groups
    taps = math.prod(kernel)
    transposed = isinstance(module, _ConvTransposeNd)
    # Of a transposed one, each output is reached by one tap in `stride`.
    fan_in = inputs * taps / math.prod(stride) if transposed else inputs * taps
    layout = Layout.TRANSPOSED_KERNEL if transposed else Layout.KERNEL
    shape = (groups, outputs, inputs, *kernel)
    overlaps = not transposed and any(s < k for s, k in zip(stride, kernel, strict=True))
    block = Block(key, 0, shape, fan_in, outputs * taps, overlaps)
    # torch takes the second dimension for the inputs, also where those are the first.
    second = outputs if transposed else inputs
    return Weight(key, module, "weight", layout, (block,), _uniform(second * taps))


def _of_attention(name: str, module: nn.MultiheadAttention) -> Iterator[Weight]:
    width = module.embed_dim
    if module.in_proj_weight is not None:
        key = _joined(name, "in_proj_weight")
        blocks = _packed(key, 3, 3 * width, width)
        # Xavier of the three together.
        default = ("uniform", math.sqrt(2 / (width + 3 * width)))
        yield Weight(key, module, "in_proj_weight", Layout.ROWS, blocks, default)
        return
    for part, inputs in (("q", width), ("k", module.kdim), ("v", module.vdim)):
        key = _joined(name, f"{part}_proj_weight")
        default = ("uniform", math.sqrt(2 / (width + inputs)))
        blocks = _packed(key, 1, width, inputs)
        yield Weight(key, module, f"{part}_proj_weight", Layout.ROWS, blocks, default)


def _of_recurrent(name: str, module: nn.RNNBase | nn.RNNCellBase) -> Iterator[Weight]:
    for attribute in _attributes(module, "weight_"):
        key = _joined(name, attribute)
        made_of = underlying(module, attribute)
        if not made_of:
            continue
        # Of weight_norm's two, the direction has the weight's shape.
        outputs, inputs = max((p.shape for p in made_of), key=math.prod)
        # weight_hr projects the state; the rest is one matrix per gate.
        gates = 1 if attribute.startswith("weight_hr") else outputs // module.hidden_size
        yield Weight(
            key,
            module,
            attribute,
            Layout.ROWS,
            _packed(key, gates, outputs, inputs),
            _uniform(module.hidden_size),
            gated=True,
        )


def _attributes(module: nn.RNNBase | nn.RNNCellBase, prefix: str) -> Iterator[str]:
    if isinstance(module, nn.RNNCellBase):
        yield from (f"{prefix}ih", f"{prefix}hh")
        return
    for names in module._all_weights:  # noqa: SLF001  (also of those that weight_norm replaced)
        yield from (name for name in names if name.startswith(prefix))


def _biases(name: str, module: nn.Module) -> Iterator[Bias]:
    if isinstance(module, nn.MultiheadAttention):
        yield Bias(_joined(name, "in_proj_bias"), module, "in_proj_bias")
    elif isinstance(module, nn.RNNBase | nn.RNNCellBase):
        size = module.hidden_size
        is_lstm = isinstance(module, nn.LSTM | nn.LSTMCell)
        forget = slice(size, 2 * size) if is_lstm else None
        for attribute in _attributes(module, "bias_"):
            yield Bias(
                _joined(name, attribute),
                module,
                attribute,
                _bound(size),
                2,
                gated=True,
                kept=forget,
            )
    else:
        for weight in _weights(name, module):
            # The attention's output layer and transformers' Conv1D start without.
            without = weight.layout is Layout.COLUMNS or (
                class_name(module) == "NonDynamicallyQuantizableLinear"
            )
            bound = 0.0 if without else math.sqrt(3) * weight.default[1]
            yield Bias(_joined(name, "bias"), module, "bias", bound)


def _bound(fan: int) -> float:
    return 1 / math.sqrt(fan) if fan else 0.0


def _uniform(fan: int) -> tuple[str, float]:
    """The rule of torch for most layers: ±1/√fan, whose standard deviation is 1/√(3 fan)."""
    return "uniform", _bound(fan) / math.sqrt(3)


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
