"""A forward of a fused recurrent layer, kept and run again: the gradient along its time steps."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.rnn import PackedSequence

from gradscope.capture.derive import What

# Another one may do more than compute.
_FORWARDS: tuple[Any, ...] = (nn.RNN.forward, nn.LSTM.forward, nn.GRU.forward)


@dataclass(slots=True, eq=False)
class Kept:
    """A tensor of the forward as it was then; of an output also its gradient, once it arrives."""

    value: Tensor
    version: int
    gradient: Tensor | None = None

    @property
    def is_changed(self) -> bool:
        """Whether it was changed in place since then."""
        return self.value._version != self.version  # noqa: SLF001  (no public name)


@dataclass(slots=True, eq=False, weakref_slot=True)
class KeptForward:
    """One forward of a recurrent layer: all that it takes to run it again.

    inputs: the input, then h_0 and c_0 if they were given. outputs: the output, then h_n and c_n.
    packed: the input if it is packed. weights: identity and version of each.
    random: the state of the random numbers before it, where it draws any.
    """

    module: nn.RNNBase
    row: int
    inputs: list[Kept]
    outputs: list[Kept]
    packed: PackedSequence | None
    weights: list[tuple[int, int]]
    random: Tensor | None
    is_training: bool
    autocast: tuple[bool, torch.dtype]
    is_differentiated_twice: bool = False

    def has_arrived(self) -> bool:
        """Whether a gradient has come."""
        return any(output.gradient is not None for output in self.outputs)

    def take(self, index: int, gradient: Tensor) -> None:
        """Note the gradient of an output; those of several backwards add up."""
        self.is_differentiated_twice |= torch.is_grad_enabled()
        output = self.outputs[index]
        with torch.no_grad():
            # A copy: the engine and the user's hooks may write into this one.
            new = gradient.detach().clone()
            output.gradient = new if output.gradient is None else output.gradient + new

    def obstacle(self) -> str | None:
        """Why running it again would not be the same, or would not tell."""
        if self.is_differentiated_twice:
            return "not measured, its backward was to be differentiated (create_graph)"
        if any(tensor.is_changed for tensor in self.inputs):
            return "not measured, its input was changed in place"
        # Of a view that was changed, the gradient goes past the hook.
        if any(output.is_changed and output.gradient is None for output in self.outputs):
            return "not measured, its output was changed in place"
        if self.weights != _weights(self.module):
            return "not measured, its weights changed before the optimizer's step"
        if self.is_training != self.module.training:
            return "not measured, it went from train() to eval() or back before the step"
        return None


def draws(module: nn.Module) -> bool:
    """Whether its forward draws random numbers in training: dropout between its layers."""
    return isinstance(module, nn.RNNBase) and module.dropout > 0 and module.num_layers > 1


def outputs_of(returned: Any) -> list[Tensor]:
    """Of what a recurrent layer returned: the output, h_n, and an LSTM's c_n."""
    return [*_tensors(returned[0]), *_tensors(returned[1])]


def unfit(module: nn.RNNBase, given: Any, random: Tensor | None) -> str | None:
    """Why its forward can't be run again, or not without changing something."""
    if "forward" in vars(module) or type(module).forward not in _FORWARDS:
        return "not measured, its forward is not torch's own"
    if is_parametrized(module):
        return "not measured, its weights are parametrized"
    tensors = [*_tensors(given), *(weight for _, weight in _named_weights(module))]
    if any(type(each) not in {Tensor, nn.Parameter} or each.is_inference() for each in tensors):
        return "not measured, its weights or its input are sharded, or made in inference mode"
    # cuDNN's dropout has a state that can be neither read nor set.
    on_host = all(tensor.device.type == "cpu" for tensor in tensors)
    if draws(module) and module.training and (random is None or not on_host):
        return "not measured, the dropout between its layers can't be repeated on its device"
    return None


def keep(
    module: nn.RNNBase, row: int, given: Any, hidden: Any, returned: Any, *, random: Tensor | None
) -> KeptForward:
    """What a forward was given and what it returned, detached."""
    inputs = [*_tensors(given), *_tensors(hidden)]
    device = inputs[0].device.type
    return KeptForward(
        module,
        row,
        inputs=[_kept(tensor) for tensor in inputs],
        outputs=[_kept(tensor) for tensor in outputs_of(returned)],
        packed=given if isinstance(given, PackedSequence) else None,
        weights=_weights(module),
        random=random,
        is_training=module.training,
        autocast=(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)),
    )


def input_gradients(forward: KeptForward) -> Iterator[Tensor]:
    """∂L/∂x, shaped as the input; of a bidirectional layer that of one direction's outputs each.

    First that of the forward direction, then that of the reverse one. Where there are several
    layers, each direction's goes back through both directions of the layers below.
    """
    tensor = forward.inputs[0].value.detach().requires_grad_()
    outputs = [
        (output, kept.gradient, index > 0)
        for index, (output, kept) in enumerate(
            zip(_run(forward, tensor), forward.outputs, strict=True)
        )
        if kept.gradient is not None
    ]
    directions = 2 if forward.module.bidirectional else 1
    for direction in range(directions):
        (gradient,) = torch.autograd.grad(
            [output for output, _, _ in outputs],
            [tensor],
            [
                gradient
                if directions == 1
                else _of_direction(gradient, direction, is_state=is_state)
                for _, gradient, is_state in outputs
            ],
            retain_graph=direction + 1 < directions,
        )
        yield gradient


def by_time(forward: KeptForward, gradient: Tensor) -> Sequence[Tensor]:
    """One tensor per time step; where there is a batch, it is its first dimension."""
    if forward.packed is not None:
        sizes: list[int] = forward.packed.batch_sizes.tolist()
        return list(gradient.split(sizes))
    is_batched = gradient.dim() == 3  # noqa: PLR2004
    return gradient.unbind(1 if is_batched and forward.module.batch_first else 0)


def ends_and_middle(
    pieces: Sequence[Tensor], *, is_packed: bool, reverse: bool
) -> Iterator[tuple[What, Tensor]]:
    """Of each sequence its own first, middle and last time step, in the order they are read."""
    places: tuple[tuple[What, Callable[[int], int]], ...] = (
        ("time_first", lambda _: 0),
        ("time_middle", lambda length: length // 2),
        ("time_last", lambda length: length - 1),
    )
    lengths = _lengths(pieces) if is_packed else [(len(pieces), slice(None))]
    for what, place in places:
        found = []
        for length, members in lengths:
            at = length - 1 - place(length) if reverse else place(length)
            found.append(pieces[at][members].reshape(-1))
        yield what, torch.cat(found)


def _lengths(pieces: Sequence[Tensor]) -> list[tuple[int, slice]]:
    """The lengths of packed sequences, and which of the batch have each."""
    # The longest come first.
    sizes = itertools.pairwise([*(len(piece) for piece in pieces), 0])
    return [(at + 1, slice(left, now)) for at, (now, left) in enumerate(sizes) if left < now]


def _run(forward: KeptForward, tensor: Tensor) -> list[Tensor]:
    """The outputs again, with a graph that leads to the input."""
    given: Any = tensor
    if forward.packed is not None:
        given = PackedSequence(tensor, *forward.packed[1:])
    states = tuple(kept.value for kept in forward.inputs[1:])
    # Only an LSTM's state is a pair.
    hidden = states if len(states) > 1 else next(iter(states), None)
    is_cast, dtype = forward.autocast
    cast = torch.autocast(tensor.device.type, dtype, is_cast, cache_enabled=False)
    with _random_as(forward.random), cast, torch.enable_grad():
        # Not module(…): that runs the hooks.
        return outputs_of(forward.module.forward(given, hidden))


@contextlib.contextmanager
def _random_as(state: Tensor | None) -> Iterator[None]:
    """With the random numbers that come after this state, and then as if none had been drawn."""
    if state is None:
        yield
        return
    now = torch.get_rng_state()
    torch.set_rng_state(state)
    try:
        yield
    finally:
        torch.set_rng_state(now)


def _of_direction(gradient: Tensor, direction: int, *, is_state: bool) -> Tensor:
    """Of the gradient of the output, or of a final state, what belongs to one direction."""
    kept = torch.zeros_like(gradient)
    if is_state:
        kept[direction::2] = gradient[direction::2]
    else:
        half = gradient.shape[-1] // 2
        part = slice(direction * half, (direction + 1) * half)
        kept[..., part] = gradient[..., part]
    return kept


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, PackedSequence):
        return [value.data]
    return [] if value is None else list(value)


def _kept(tensor: Tensor) -> Kept:
    return Kept(tensor.detach(), tensor._version)  # noqa: SLF001  (no public name)


def _named_weights(module: nn.RNNBase) -> Iterator[tuple[str, Tensor]]:
    # Those that its next forward uses: what was swapped in is not among its parameters.
    for name in module._flat_weights_names:  # noqa: SLF001  (no public name)
        yield name, getattr(module, name)


def _weights(module: nn.RNNBase) -> list[tuple[int, int]]:
    return [(id(weight), weight._version) for _, weight in _named_weights(module)]  # noqa: SLF001
