"""What the programs train on: ships with a dependency, or is drawn."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from pydoc_data.topics import topics

import torch
from sklearn.datasets import load_diabetes, load_digits, load_wine
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (everybody's name for it)

Batch = tuple[Tensor, Tensor]


def digits() -> Batch:
    """1 797 images of 8×8 as vectors in [0, 1], 10 classes."""
    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)


def pictures(side: int, channels: int = 3) -> Batch:
    """The digits as pictures of that size, standardized as a whole."""
    images, labels = digits()
    images = F.interpolate(images.view(-1, 1, 8, 8), size=side, mode="bilinear")
    return ((images - images.mean()) / images.std()).expand(-1, channels, -1, -1), labels


def wine() -> Batch:
    """178 wines, 13 features as measured (up to 1 680), 3 classes."""
    data = load_wine()
    return torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target)


def diabetes() -> Batch:
    """442 patients, 10 standardized features; the progression as one column, in [0, 1]."""
    data = load_diabetes(scaled=True)
    progression = torch.tensor(data.target, dtype=torch.float32)[:, None] / 346
    return standardized(torch.tensor(data.data, dtype=torch.float32)), progression


def circles(count: int = 1000, noise: float = 0.1) -> Batch:
    """Points on a circle (0) and on one inside it (1); labels as a column of floats."""
    labels = torch.randint(2, (count, 1)).float()
    angle = 2 * math.pi * torch.rand(count, 1)
    points = torch.cat([angle.cos(), angle.sin()], 1) * (1 - 0.6 * labels)
    return points + noise * torch.randn(count, 2), labels


def moons(count: int = 512, noise: float = 0.05) -> Tensor:
    """Points on two half circles that reach into each other, centred."""
    upper = torch.rand(count, 1) < 0.5
    angle = math.pi * torch.rand(count, 1)
    x, y = angle.cos(), angle.sin()
    points = torch.where(upper, torch.cat([x, y], 1), torch.cat([1 - x, 0.5 - y], 1))
    return points - torch.tensor([0.5, 0.25]) + noise * torch.randn(count, 2)


def regression(count: int = 512, features: int = 8) -> Batch:
    """A smooth function of three directions of normal features, standardized."""
    inputs = torch.randn(count, features)
    mixed = inputs @ torch.randn(features, 3) / math.sqrt(features)
    targets = mixed[:, :1].sin() + mixed[:, 1:2] * mixed[:, 2:].tanh() + 0.7 * mixed[:, :1]
    return inputs, standardized(targets)


def repeats(count: int, tokens: int = 16, length: int = 8) -> Tensor:
    """Random tokens, repeated once: the second half can be told from the first."""
    half = torch.randint(tokens, (count, length))
    return half.repeat(1, 2)


def copies(steps: int) -> Iterator[Batch]:
    """Batches of repeated tokens: all but the last, and all."""
    for _ in range(steps):
        tokens = repeats(16)
        yield tokens[:, :-1], tokens


def first_of_sequence(count: int, length: int) -> Batch:
    """Noise over time, one feature; the target is its first value."""
    inputs = torch.randn(count, length, 1)
    return inputs, inputs[:, 0]


def text() -> Tensor:
    """Python's manual as bytes, 465 thousand below 256, of 3.25 nats each by their frequency."""
    return torch.tensor(list("".join(topics.values()).encode()))


def excerpts(count: int, length: int, steps: int) -> Iterator[Tensor]:
    """Random excerpts of the manual, (count, length), a new batch for each step."""
    whole_text = text()
    for _ in range(steps):
        starts = torch.randint(len(whole_text) - length, (count, 1))
        yield whole_text[starts + torch.arange(length)]


def chapters(count: int, words: int = 32, vocabulary: int = 512) -> Batch:
    """Runs of words from the longest chapters of the manual; the target is the chapter.

    Words are numbered by frequency from 1; 0 is any that is not in the vocabulary.
    """
    read = sorted((re.findall(r"\w+|[^\w\s]", topic.lower()) for topic in topics.values()), key=len)
    known = Counter(word for topic in read for word in topic).most_common(vocabulary - 1)
    numbers = {word: number for number, (word, _) in enumerate(known, start=1)}
    runs = [
        torch.tensor([numbers.get(word, 0) for word in topic]).unfold(0, words, words // 2)
        for topic in read[-count:]
    ]
    labels = [torch.full((len(run),), label) for label, run in enumerate(runs)]
    return torch.cat(runs), torch.cat(labels)


def standardized(values: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 for each feature."""
    return (values - values.mean(0)) / values.std(0)


def batches(data: Batch, steps: int, size: int = 32) -> Iterator[Batch]:
    """Random batches."""
    inputs, targets = data
    for _ in range(steps):
        drawn = torch.randint(len(inputs), (size,))
        yield inputs[drawn], targets[drawn]


def whole(data: Batch, steps: int) -> Iterator[Batch]:
    """All of it at every step."""
    for _ in range(steps):
        yield data
