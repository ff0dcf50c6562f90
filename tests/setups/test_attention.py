"""How sharp attention is, against its logits and weights computed by hand in float64."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradscope.record import Run
from tests.capture.reference import F64
from tests.setups.calls import calls, recorded, value
from tests.setups.gpt import CALLS, GPT, LENGTH, VOCABULARY
from tests.setups.received import assert_describes, entries
from tests.setups.support import support

SAMPLES, HEADS, TOKENS, SIZE = 3, 2, 5, 4
WIDTH = HEADS * SIZE
CAUSAL = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
BIAS = torch.linspace(-1, 2, TOKENS).expand(TOKENS, TOKENS)


def numpy(tensor: Tensor) -> F64:
    return tensor.detach().numpy().astype(np.float64)


def softmax(logits: F64) -> F64:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights: F64 = powers / powers.sum(axis=-1, keepdims=True)
    return weights


def entropies(weights: F64) -> F64:
    """Of each row in nats, over the keys that it may see."""
    logarithms = np.log(weights, out=np.zeros_like(weights), where=weights > 0)
    rows: F64 = -(weights * logarithms).sum(axis=-1)
    return rows


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Projections into heads, and any attention between them."""

    def __init__(self, attend: Attend, key_heads: int = HEADS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q = nn.Linear(WIDTH, WIDTH)
        self.k = nn.Linear(WIDTH, key_heads * SIZE)
        self.v = nn.Linear(WIDTH, key_heads * SIZE)
        self.attend = attend

    def heads(self, x: Tensor) -> list[Tensor]:
        layers = (self.q, self.k, self.v)
        return [layer(x).unflatten(-1, (-1, SIZE)).transpose(1, 2) for layer in layers]

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(*self.heads(x))

    def logits(self, x: Tensor) -> F64:
        q, k, _ = (numpy(part) for part in self.heads(x))
        k = k.repeat(q.shape[1] // k.shape[1], axis=1)
        products: F64 = q @ k.swapaxes(-1, -2)
        return products


def sequences(scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(SAMPLES, TOKENS, WIDTH, generator=generator) * scale


@dataclass(frozen=True)
class Spelling:
    """A way of writing attention's weights, and the logits that they are of."""

    attend: Attend
    logits: Callable[[F64], F64]
    name: str = "(root)/softmax#0"


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-2, -1) / SIZE**0.5, dim=-1) @ v


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.mT).mul(0.5)
    return F.dropout(scores.masked_fill(~CAUSAL, -torch.inf).softmax(-1), 0.3).matmul(v)


def with_finite_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.mT) / SIZE**0.5
    scores = torch.where(CAUSAL, scores, torch.finfo(scores.dtype).min)
    return F.softmax(scores, -1, dtype=torch.float64).to(q.dtype) @ v


def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT) * 0.5
    scores += BIAS
    scores[:, :, 0, 1:] = -torch.inf
    return scores.softmax(3) @ v


def of_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k)
    return torch.einsum("bhqk,bhkd->bhqd", F.softmax(scores, dim=-1), v)


def flattened(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (part.flatten(0, 1) for part in (q, k, v))
    scores = torch.baddbmm(BIAS.expand(len(q), -1, -1), q, k.mT, alpha=0.5)
    scores = scores.view(SAMPLES, HEADS, TOKENS, TOKENS) + 0.0
    return torch.bmm(scores.softmax(-1).flatten(0, 1), v)


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (2.0 * torch.tanh(q @ k.mT / 2.0)).softmax(-1) @ v


def one_row_without_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = CAUSAL.clone()
    mask[0] = False
    scores = (q @ k.mT).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v


class SoftmaxModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = self.softmax(q @ k.mT) @ v
        return out


def hidden(logits: F64, mask: Tensor = CAUSAL) -> F64:
    return np.where(mask.numpy(), logits, -np.inf)


def first_row_hidden(logits: F64) -> F64:
    biased = logits / 2 + numpy(BIAS)
    biased[:, :, 0, 1:] = -np.inf
    return biased


SPELLINGS: dict[str, Spelling] = {
    "plain": Spelling(plain, lambda s: s / 2),
    "causal": Spelling(causal, lambda s: hidden(s / 2)),
    "finite mask": Spelling(with_finite_mask, lambda s: hidden(s / 2)),
    "in place": Spelling(in_place, first_row_hidden),
    "einsum": Spelling(of_einsum, lambda s: s),
    "flattened": Spelling(flattened, lambda s: s / 2 + numpy(BIAS)),
    "capped": Spelling(capped, lambda s: 2 * np.tanh(s / 2)),
    "a row without keys": Spelling(one_row_without_keys, lambda s: hidden(s)[:, :, 1:]),
    "nn.Softmax": Spelling(SoftmaxModule(), lambda s: s, "attend.softmax/softmax#0"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_logits_and_entropy(spelling: str, tmp_path: Path) -> None:
    written = SPELLINGS[spelling]
    model = Attention(written.attend)
    logits = written.logits(model.logits(sequences()))
    run = recorded(model, [sequences()], tmp_path)
    assert calls(run) == [written.name]
    entity = run.modules.entities[run.modules.names.index(written.name)]
    assert (entity.group, entity.type) == ("attention", "Softmax")
    assert_sharpness(run, written.name, logits)
    assert np.isnan(value(run, "attention_logit_bound", written.name))
    assert run.meta["problems"] == []


def assert_sharpness(run: Run, name: str, *logits: F64) -> None:
    """The largest logit of all, and the mean over all rows."""
    largest = max(part.max() for part in logits)
    rows = np.concatenate([entropies(softmax(part)).reshape(-1) for part in logits])
    assert value(run, "attention_logit_max", name) == pytest.approx(largest, rel=1e-4)
    assert value(run, "attention_entropy", name) == pytest.approx(rows.mean(), rel=1e-4)


def test_micro_batches_are_one_sample(tmp_path: Path) -> None:
    model = Attention(plain)
    batches = [sequences(), sequences(9.0)[:1]]
    run = recorded(model, batches, tmp_path, micro=True)
    assert_sharpness(run, "(root)/softmax#0", *(model.logits(x) / 2 for x in batches))


@support(
    "Functional calls",
    "softmax of scores: largest logit and entropy, too",
    outputs="right",
    output_gradients="right",
)
def test_weights_and_their_gradient(tmp_path: Path) -> None:
    model = Attention(plain)
    q, k, v = model.heads(sequences())
    weights = torch.softmax(q @ k.mT / 2, -1)
    gradient = torch.autograd.grad((weights @ v).square().sum(), weights)[0]
    run = recorded(model, [sequences()], tmp_path)
    assert_describes(run.modules, "output_", 0, "(root)/softmax#0", entries(weights))
    assert_describes(run.modules, "output_grad_", 0, "(root)/softmax#0", entries(gradient))


def test_collapse_is_seen(tmp_path: Path) -> None:
    uniform, collapsed = (
        recorded(Attention(plain), [sequences(scale)], tmp_path / str(scale))
        for scale in (1e-3, 1e3)
    )
    name = "(root)/softmax#0"
    assert value(uniform, "attention_entropy", name) == pytest.approx(np.log(TOKENS), rel=1e-3)
    assert value(collapsed, "attention_entropy", name) < 1e-3
    assert value(collapsed, "attention_logit_max", name) > 1e4


FUSED: dict[str, tuple[Attend, float, Tensor | None, int]] = {
    "plain": (F.scaled_dot_product_attention, 0.5, None, HEADS),
    "causal": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        0.5,
        None,
        HEADS,
    ),
    "scale": (
        lambda q, k, v: F.scaled_dot_product_attention(query=q, key=k, value=v, scale=2.0),
        2.0,
        None,
        HEADS,
    ),
    "bias": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, BIAS), 0.5, BIAS, HEADS),
    "mask": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, CAUSAL), 0.5, None, HEADS),
    "shared keys": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        0.5,
        None,
        1,
    ),
}


@support(
    "Functional calls",
    "`scaled_dot_product_attention`",
    outputs="right",
    output_gradients="right",
    note="of the logits only a bound is known, and called one",
)
@pytest.mark.parametrize("kind", FUSED)
def test_bound_where_the_kernel_is_fused(kind: str, tmp_path: Path) -> None:
    attend, scale, bias, key_heads = FUSED[kind]
    model = Attention(attend, key_heads)
    run = recorded(model, [sequences()], tmp_path)
    name = "(root)/scaled_dot_product_attention#0"
    assert calls(run) == [name]
    q, k, _ = (
        np.linalg.norm(numpy(part), axis=-1).max(axis=-1) for part in model.heads(sequences())
    )
    shift = 0.0 if bias is None else float(bias.max())
    limit = value(run, "attention_logit_bound", name)
    assert limit == pytest.approx((q * k).max() * scale + shift, rel=1e-5)
    largest = (model.logits(sequences()) * scale + (0.0 if bias is None else numpy(bias))).max()
    assert 0 < largest <= limit
    for quantity in ("attention_logit_max", "attention_entropy"):
        assert np.isnan(value(run, quantity, name))
    output = entries(attend(*model.heads(sequences())))
    assert_describes(run.modules, "output_", 0, name, output)
    assert_describes(run.modules, "output_grad_", 0, name, 2 * output)


@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention(need_weights: bool, tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.attention = nn.MultiheadAttention(WIDTH, HEADS, 0.1, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.zeros(TOKENS, TOKENS).masked_fill(~CAUSAL, -torch.inf)
            out: Tensor = self.attention(x, x, x, attn_mask=mask, need_weights=need_weights)[0]
            return out

    model = Model()
    layer = model.attention
    parts = F.linear(sequences(), layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1)
    q, k = (numpy(p.unflatten(-1, (HEADS, SIZE)).transpose(1, 2)) for p in parts[:2])
    run = recorded(model, [sequences()], tmp_path)
    if need_weights:
        assert calls(run) == ["attention/softmax#0"]
        logits = hidden(q @ k.swapaxes(-1, -2) / 2)
        assert_sharpness(run, "attention/softmax#0", logits)
    else:
        name = "attention/scaled_dot_product_attention#0"
        assert calls(run) == [name]
        lengths = [np.linalg.norm(part, axis=-1).max(axis=-1) for part in (q, k)]
        expected = (lengths[0] * lengths[1]).max() / 2
        assert value(run, "attention_logit_bound", name) == pytest.approx(expected, rel=1e-5)


EXPERTS = nn.Parameter(torch.randn(1, 1, SIZE, SIZE))
NO_ATTENTION: dict[str, Attend] = {
    # Classes of every token, and experts: products with weights.
    "classes": lambda q, _, v: F.softmax(F.linear(q, torch.eye(SIZE)), dim=-1) + v,
    "weights": lambda q, _, v: F.softmax(q @ torch.eye(SIZE), dim=-1) + v,
    "parameter": lambda q, _, v: F.softmax(q @ EXPERTS, dim=-1) + v,
    "along queries": lambda q, k, v: F.softmax(q @ k.mT, dim=-2) @ v,
}


@pytest.mark.parametrize("kind", NO_ATTENTION)
def test_only_what_surely_is_attention_counts(kind: str, tmp_path: Path) -> None:
    run = recorded(Attention(NO_ATTENTION[kind]), [sequences()], tmp_path)
    for quantity in ("attention_logit_max", "attention_logit_bound", "attention_entropy"):
        assert np.isnan(run.modules[quantity]).all()
    assert not [entity for entity in run.modules.entities if entity.group == "attention"]


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_rows_that_are_not_finite_are_left_out(bad: float, tmp_path: Path) -> None:
    factors = torch.ones(TOKENS, 1).index_fill(0, torch.tensor([2]), bad)

    def broken_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.mT) * factors).softmax(-1) @ v

    def broken_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q * factors, k, v)

    model = Attention(broken_scores)
    logits = np.delete(model.logits(sequences()), 2, axis=2)
    run = recorded(model, [sequences()], tmp_path / "scores")
    mean = entropies(softmax(logits)).mean()
    assert value(run, "attention_entropy", "(root)/softmax#0") == pytest.approx(mean, rel=1e-4)
    model = Attention(broken_query)
    q, k = (numpy(part) for part in model.heads(sequences())[:2])
    lengths = [np.linalg.norm(part, axis=-1).max(axis=-1) for part in (np.delete(q, 2, 2), k)]
    run = recorded(model, [sequences()], tmp_path / "query")
    found = value(run, "attention_logit_bound", "(root)/scaled_dot_product_attention#0")
    assert found == pytest.approx((lengths[0] * lengths[1]).max() / 2, rel=1e-5)


def test_gpt(tmp_path: Path) -> None:
    torch.manual_seed(0)
    run = recorded(GPT(), [torch.randint(0, VOCABULARY, (4, LENGTH))], tmp_path)
    assert set(calls(run)) == CALLS
    # The first query sees one key, the last all.
    possible = np.mean([np.log(keys) for keys in range(1, LENGTH + 1)])
    assert 0.5 * possible < value(run, "attention_entropy", "blocks.1/softmax#0") < possible
    assert value(run, "attention_logit_bound", "blocks.0/scaled_dot_product_attention#0") > 0
