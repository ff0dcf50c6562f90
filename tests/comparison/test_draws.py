"""Draws: the same numbers for all, in any order, and nobody else's generator moves."""

import random
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch

from gradscope.capture.trial import same_random_numbers
from gradscope.comparison.draws import Draws


def test_numbers_depend_on_seed_and_key_alone() -> None:
    one, other = Draws(3), Draws(3, kept_bytes=0)
    one.normal("b", (7,))
    first = one.normal("a", (64, 32))
    assert torch.equal(first, other.normal("a", (64, 32)))
    assert one.normal("a", (64, 32)) is first
    assert not torch.equal(first, one.normal("b", (64, 32)))
    assert not torch.equal(first, Draws(4).normal("a", (64, 32)))


def test_what_does_not_fit_is_drawn_again() -> None:
    draws = Draws(0, kept_bytes=4 * 100)
    kept, again = draws.normal("a", (100,)), draws.normal("b", (1,))
    assert draws.normal("a", (100,)) is kept
    assert draws.normal("b", (1,)) is not again
    assert torch.equal(draws.normal("b", (1,)), again)


def test_uniforms_are_the_ranks_of_the_normals() -> None:
    draws = Draws(0)
    normals, uniforms = draws.normal("a", (50,)).tolist(), draws.uniform("a", (50,)).tolist()
    expected = [3**0.5 * (2 * NormalDist().cdf(z) - 1) for z in normals]
    assert uniforms == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (24, 8), (8, 24)])
def test_orthonormal_rows_or_columns(rows: int, columns: int) -> None:
    for matrix in Draws(0).orthogonal("a", rows, columns, count=3).double():
        gram = matrix @ matrix.T if rows <= columns else matrix.T @ matrix
        assert torch.allclose(gram, torch.eye(len(gram), dtype=torch.float64), atol=1e-6)


def test_orthogonal_matrices_are_uniform() -> None:
    # Of a 2 × 2 rotation or reflection, the first column is uniform on the circle: without the
    # signs of R's diagonal, it would be on one half of it.
    corners = Draws(0).orthogonal("a", 2, 2, count=4000)[:, 0, 0]
    assert abs(float(corners.mean())) < 4 * 0.5**0.5 / 4000**0.5


def test_no_generator_moves() -> None:
    numpy_state: Any = np.random.get_state()  # noqa: NPY002
    before = torch.get_rng_state(), random.getstate(), numpy_state[1].copy()
    draws = Draws(0)
    draws.uniform("a", (5, 5))
    draws.orthogonal("a", 5, 5)
    with pytest.raises(ZeroDivisionError), same_random_numbers(torch.nn.Identity()):
        _ = (torch.rand(1), random.random(), np.random.rand(), 1 / 0)  # noqa: NPY002, S311
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    numpy_state = np.random.get_state()  # noqa: NPY002
    assert np.array_equal(numpy_state[1], before[2])
