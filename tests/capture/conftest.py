"""What the tests of findings during training share."""

from types import SimpleNamespace

import pytest

from gradscope.analysis import analyzer
from gradscope.capture import live
from tests.capture.telling import GetJudge, Judge, Script


@pytest.fixture
def analysis_clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time as the analyses see it: of each what it takes, and what has passed."""
    now = SimpleNamespace(seconds=0.0, cost=0.001)
    times = SimpleNamespace(monotonic=lambda: now.seconds, thread_time=lambda: now.cost)
    monkeypatch.setattr(live, "time", times)
    return now


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> GetJudge:
    def judge(script: Script) -> Judge:
        made = Judge(script, [], [])
        monkeypatch.setattr(analyzer, "analyze", made)
        return made

    return judge
