"""Attention: which softmax is one, and what is measured of its logits and its weights."""

import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradscope.capture.precision import widest

# The fused one: neither logits nor weights leave the kernel.
FUSED: Callable[..., Any] = F.scaled_dot_product_attention
FUSED_NAME = "scaled_dot_product_attention"

_PRODUCTS: frozenset[Callable[..., Any]] = frozenset(
    {
        torch.matmul,
        torch.bmm,
        torch.baddbmm,
        torch.einsum,
        Tensor.matmul,
        Tensor.bmm,
        Tensor.baddbmm,
        Tensor.__matmul__,
    }
)
# Rows of queries, columns of keys, and at least one batch dimension.
_FEWEST_DIMS = 3

# As much of the weights at a time as stays in the cache, or is worth a launch.
_PIECE = 65_536
_LARGE_PIECE = 4_194_304


class Scores:
    """The tensors of a forward that hold the products of queries and keys, known weakly.

    A product of two batches of activations, and what is made of it entry by entry: scaled,
    masked, reshaped. A product with a weight is a layer's output, whatever softmax follows.
    """

    def __init__(self) -> None:
        self._known: dict[int, weakref.ref[Tensor]] = {}

    def clear(self) -> None:
        """Another forward begins."""
        self._known = {}

    def __contains__(self, tensor: object) -> bool:
        known = self._known.get(id(tensor))
        return known is not None and known() is tensor

    def concern(self, function: Callable[..., Any]) -> bool:
        """Whether what the function returns may be scores."""
        return bool(self._known) or function in _PRODUCTS

    def follow(self, function: Callable[..., Any], args: tuple[Any, ...], result: object) -> None:
        """Note the result of a call if it holds scores."""
        if not isinstance(result, Tensor) or result.dim() < _FEWEST_DIMS:
            return
        if function in _PRODUCTS:
            factors = list(_tensors(args))[-2:]
            made = all(f.dim() >= _FEWEST_DIMS for f in factors) and not any(
                isinstance(f, nn.Parameter) for f in factors
            )
        else:
            made = any(
                tensor in self
                and tensor.numel() == result.numel()
                and tensor.shape[-1] == result.shape[-1]
                for tensor in _tensors(args)
            )
        if made and result not in self:
            self._add(result)

    def _add(self, tensor: Tensor) -> None:
        key, known = id(tensor), self._known
        known[key] = weakref.ref(tensor, lambda _: known.pop(key, None))


def _tensors(args: tuple[Any, ...]) -> Iterator[Tensor]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, (tuple, list)):
            yield from (part for part in arg if isinstance(part, Tensor))


def is_over_keys(scores: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether softmax was called for the last dimension."""
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    return dim in {-1, scores.dim() - 1}


def entropy(weights: Tensor) -> Tensor:
    """(Σ of the rows' entropies in nats, their number): of shape (2,).

    A key that the mask forbids has a weight of zero, and adds nothing: the entropy is over the
    allowed ones. Rows with an entry that is not finite, as without any allowed key, are left out.
    """
    total = torch.zeros(2, dtype=widest(weights.device), device=weights.device)
    for piece in _pieces(weights):
        rows = torch.special.entr(piece.to(total.dtype)).sum(-1)
        known = torch.isfinite(rows)
        total[0] += torch.where(known, rows, 0.0).sum()
        total[1] += known.sum()
    return total


def largest(logits: Tensor) -> Tensor:
    """The largest finite entry: of shape (1,), -inf if none is finite."""
    result = torch.full((1,), -torch.inf, dtype=widest(logits.device), device=logits.device)
    for piece in _pieces(logits):
        finite = torch.where(torch.isfinite(piece), piece, -torch.inf)
        result = torch.maximum(result, finite.amax().to(result.dtype))
    return result


def bound(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What no logit exceeds, as scaled_dot_product_attention was called: of shape (1,).

    The largest max‖q‖·max‖k‖ of all heads and samples, times the scale (1/√d where none is
    given), plus the largest entry of an additive mask. -inf if nothing is finite; None if
    there is nothing.
    """
    given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | dict(kwargs)
    query, key, mask = given["query"].detach(), given["key"].detach(), given.get("attn_mask")
    if query.numel() == 0 or key.numel() == 0:
        return None
    longest_query, longest_key = (_longest_row(tensor) for tensor in (query, key))
    if given.get("enable_gqa"):
        heads = longest_query.shape[-1] // longest_key.shape[-1]
        longest_key = longest_key.repeat_interleave(heads, -1)
    scale = given.get("scale")
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else abs(float(scale))
    known = torch.isfinite(longest_query) & torch.isfinite(longest_key)
    product = longest_query * longest_key * factor
    product = torch.where(known, product, -torch.inf).amax().reshape(1)
    if isinstance(mask, Tensor) and mask.is_floating_point() and mask.numel():
        product = product + largest(mask.detach().reshape(-1, mask.shape[-1]))
    return product


def _longest_row(tensor: Tensor) -> Tensor:
    """Per head and sample; rows that are not finite are left out, -inf where all are."""
    norms = torch.linalg.vector_norm(tensor, dim=-1, dtype=widest(tensor.device))
    return torch.where(torch.isfinite(norms), norms, -torch.inf).amax(-1)


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The rows, a few at a time."""
    flat = tensor.detach().reshape(-1, tensor.shape[-1])
    size = _PIECE if flat.device.type == "cpu" else _LARGE_PIECE
    yield from flat.split(max(1, size // max(1, flat.shape[1])))
