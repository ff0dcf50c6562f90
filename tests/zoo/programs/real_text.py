"""Language models of libraries, on Python's manual.

A model of bytes has learned something when its loss is clearly below the 3.25 nats that the
frequencies of the bytes say (tests/zoo/outcome.py).
"""

import math
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (everybody's name for it)
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from tests.zoo.case import Faulty, Healthy, Watch
from tests.zoo.data import batches, chapters, excerpts

_STEPS = 200
_WORDS, _CHAPTERS = 512, 4


def _warmed_up(optimizer: Optimizer) -> LambdaLR:
    """Twenty steps up, and half a cosine down to a tenth."""

    def share(step: int) -> float:
        return min((step + 1) / 20, 0.55 + 0.45 * math.cos(math.pi * min(step / _STEPS, 1.0)))

    return LambdaLR(optimizer, share)


def _train(
    watch: Watch, model: nn.Module, optimizer: Optimizer, data: Iterable[Mapping[str, Tensor]]
) -> None:
    """With the loss that the model computes, a schedule, and clipping to a norm of one."""
    schedule = _warmed_up(optimizer)
    with watch(model, optimizer) as scope:
        for batch in data:
            loss = model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            scope.log(loss=loss, grad_norm=norm)


def _sentences(count: int = 16, length: int = 32) -> Iterator[Mapping[str, Tensor]]:
    for letters in excerpts(count, length, _STEPS):
        yield {"input_ids": letters, "labels": letters}


def gpt2_on_text(watch: Watch) -> None:
    """GPT-2: AdamW, warm-up, clipping."""
    from tests.zoo import libraries

    model = libraries.gpt2()
    _train(watch, model, AdamW(model.parameters(), 1e-3), _sentences())


def gpt2_at_three_tenths(watch: Watch, repaired: bool) -> None:
    """A rate for SGD, given to AdamW."""
    from tests.zoo import libraries

    model = libraries.gpt2()
    _train(watch, model, AdamW(model.parameters(), 1e-3 if repaired else 0.3), _sentences())


def llama_on_text(watch: Watch) -> None:
    """Llama with the decay and the second moment's memory that such models are trained with."""
    from tests.zoo import libraries

    model = libraries.llama()
    optimizer = AdamW(model.parameters(), 1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    _train(watch, model, optimizer, _sentences())


def mixtral_on_text(watch: Watch) -> None:
    """Experts that are chosen for each byte."""
    from tests.zoo import libraries

    model = libraries.mixtral()
    _train(watch, model, AdamW(model.parameters(), 1e-3), _sentences())


def t5_on_text(watch: Watch) -> None:
    """The encoder reads, the decoder goes on; T5 takes a higher rate than others."""
    from tests.zoo import libraries

    model = libraries.t5()
    data = (
        {"input_ids": letters[:, :16], "labels": letters[:, 16:].contiguous()}
        for letters in excerpts(16, 48, _STEPS)
    )
    _train(watch, model, AdamW(model.parameters(), 3e-3), data)


def _chapters() -> Iterator[Mapping[str, Tensor]]:
    for words, labels in batches(chapters(_CHAPTERS, vocabulary=_WORDS), _STEPS):
        yield {"input_ids": words, "labels": labels}


def bert_on_chapters(watch: Watch) -> None:
    """BERT says from which chapter 32 words are."""
    from tests.zoo import libraries

    model = libraries.bert(_WORDS, _CHAPTERS)
    _train(watch, model, AdamW(model.parameters(), 2e-3), _chapters())


class _OnFeatures(nn.Module):
    """A new head on BERT, as written by hand."""

    def __init__(self, bert: nn.Module, *, cut: bool) -> None:
        super().__init__()
        self.encoder = bert.get_submodule("bert")
        self.head = nn.Linear(64, _CHAPTERS)
        self.cut = cut

    def forward(self, words: Tensor) -> Tensor:
        features = self.encoder(words).last_hidden_state[:, 0]
        scores: Tensor = self.head(features.detach() if self.cut else features)
        return scores


def bert_detached(watch: Watch, repaired: bool) -> None:
    """The head learns from features that were detached to be looked at."""
    from tests.zoo import libraries

    model = _OnFeatures(libraries.bert(_WORDS, _CHAPTERS), cut=not repaired)
    optimizer = AdamW(model.parameters(), 2e-3)
    schedule = _warmed_up(optimizer)
    with watch(model, optimizer) as scope:
        for words, labels in batches(chapters(_CHAPTERS, vocabulary=_WORDS), _STEPS):
            loss = F.cross_entropy(model(words), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            scope.log(loss=loss)


class _Remembering(nn.Module):
    """Two LSTMs over bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.letters = nn.Embedding(256, 64)
        self.core = nn.LSTM(64, 96, num_layers=2, batch_first=True, dropout=0.1)
        self.head = nn.Linear(96, 256)

    def forward(self, letters: Tensor) -> Tensor:
        scores: Tensor = self.head(self.core(self.letters(letters))[0])
        return scores


def lstm_on_text(watch: Watch) -> None:
    """Recurrent nets take a higher rate, and clipping."""
    model = _Remembering()
    optimizer = Adam(model.parameters(), 4e-3)
    with watch(model, optimizer) as scope:
        for letters in excerpts(16, 32, _STEPS):
            scores = model(letters[:, :-1])
            loss = F.cross_entropy(scores.flatten(0, 1), letters[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scope.log(loss=loss, grad_norm=norm)


CASES = (
    Healthy("gpt2_on_text", "library-text", "transformers", gpt2_on_text),
    Healthy("llama_on_text", "library-text", "transformers", llama_on_text),
    Healthy("mixtral_on_text", "library-text", "transformers", mixtral_on_text),
    Healthy("t5_on_text", "library-text", "transformers", t5_on_text),
    Healthy("bert_on_chapters", "library-text", "transformers", bert_on_chapters),
    Healthy("lstm_on_text", "library-text", "torch", lstm_on_text),
    Faulty(
        "gpt2_at_three_tenths",
        "learning-rate-too-high",
        ("GS401", "GS307"),
        "transformers",
        gpt2_at_three_tenths,
    ),
    Faulty("bert_detached", "graph-cut", ("GS002",), "transformers", bert_detached),
)
