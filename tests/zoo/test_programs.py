"""The zoo's trainings do, unwatched, what the catalogue says: fail, or learn.

A tenth of the quick ones here, chosen by a hash of the name; `python -m tests.zoo.survey` trains
them all.
"""

import hashlib
import re
from collections import Counter

import pytest
import torch

from tests.zoo.catalogue import ALL, FAULTY, HEALTHY, SLOW
from tests.zoo.outcome import FAILED, LEARNED, failed, learned, outcome
from tests.zoo.split import half


def _chosen(names: dict[str, object]) -> list[str]:
    quick = [name for name in names if name not in SLOW]
    return [name for name in quick if hashlib.sha256(name.encode()).digest()[0] % 10 == 0]


def test_names_are_unique() -> None:
    assert len({case.name for case in ALL}) == len(ALL)
    assert len(FAULTY) + len(HEALTHY) == len(ALL)


def test_a_family_is_of_one_kind() -> None:
    faulty = {case.family for case in FAULTY.values()}
    healthy = {case.family for case in HEALTHY.values()}
    assert not faulty & healthy
    for family in faulty | healthy:
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", family)


def test_both_halves_have_enough_faults() -> None:
    halves = Counter(half(case.family) for case in FAULTY.values() if case.observable)
    assert min(halves["tuning"], halves["test"]) >= 20


def test_criteria_are_of_cases() -> None:
    assert set(FAILED) <= set(FAULTY)
    assert set(LEARNED) <= set(FAULTY) | set(HEALTHY)


def test_accepted_codes_are_codes() -> None:
    for case in FAULTY.values():
        assert case.accepts, case.name
        assert all(re.fullmatch(r"GS[0-6]\d\d", code) for code in case.accepts), case.name


@pytest.mark.parametrize("name", _chosen({**FAULTY}))
def test_fails_and_learns_once_repaired(name: str) -> None:
    torch.set_num_threads(1)
    broken = outcome(FAULTY[name], seed=0)
    assert failed(name, broken), broken
    repaired = outcome(FAULTY[name], seed=0, repaired=True)
    assert learned(name, repaired), repaired


@pytest.mark.parametrize("name", _chosen({**HEALTHY}))
def test_learns(name: str) -> None:
    torch.set_num_threads(1)
    found = outcome(HEALTHY[name], seed=0)
    assert learned(name, found), found
