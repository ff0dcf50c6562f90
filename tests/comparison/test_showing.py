"""How a comparison shows itself, on one that is written by hand."""

import io
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gradscope.comparison.page import render
from gradscope.comparison.ranking import ranked
from gradscope.comparison.result import Cell, Comparison, Name, Verification
from gradscope.comparison.tensorboard import write_hparams
from gradscope.comparison.text import as_text
from gradscope.comparison.wording import disagreements, recommendation, verdict
from gradscope.errors import ConfigError

EVIL = "<script>alert(1)</script>"


def _cells(name: Name, slope: float, *, failure: str | None = None) -> list[Cell]:
    return [
        Cell(
            name,
            seed,
            gradient=np.linspace(-slope * 5, 0, 11) + 0.001 * seed,
            slope=slope + 0.001 * seed,
            failure=failure,
        )
        for seed in range(3)
    ]


def written_by_hand(*, tried: Verification | None = None, missing: int = 0) -> Comparison:
    cells = [
        *_cells(Name("kaiming_normal", "relu"), 0.01),
        *_cells(Name("xavier_uniform", "relu"), -0.69),
        *_cells(Name(EVIL, "relu"), 3.0, failure="the loss is nan"),
        *_cells(Name("own", "tanh", "residual"), math.nan),
    ]
    made = ranked(
        cells,
        {Name("kaiming_normal", "relu"): "a < b\nc\n"},
        lambda name, _: (-0.6 if name.initialization == "xavier_uniform" else math.nan, ""),
    )
    return Comparison(
        "Net",
        made,
        tuple(f"layers.{i}" for i in range(11)),
        (0, 1, 2),
        left_out={Name("critical", "sigmoid"): "no critical point"},
        left={"embed.weight": "an embedding"},
        notes=("a note",),
        verification=tried,
        missing=missing,
    )


def test_the_frame_is_best_first_and_says_factors_of_the_norm() -> None:
    frame = written_by_hand().frame()
    assert list(frame.columns[:4]) == ["initialization", "activation", "mitigation", "tier"]
    assert frame["initialization"].tolist()[:2] == ["kaiming_normal", "xavier_uniform"]
    xavier = frame[frame["initialization"] == "xavier_uniform"].iloc[0]
    assert xavier["growth_per_layer"] == pytest.approx(math.exp(-0.689 / 2))
    assert xavier["theory"] == pytest.approx(math.exp(-0.3))
    assert xavier["decades"] == pytest.approx(-0.689 * 10 / (2 * math.log(10)))
    assert xavier["first_to_last"] == pytest.approx(math.exp(0.69 * 5))
    assert math.isinf(frame[frame["initialization"] == EVIL]["score"].iloc[0])


def test_the_text_says_what_leads_what_fails_and_what_was_left_out() -> None:
    text = as_text(written_by_hand(missing=2), 80)
    assert max(map(len, text.splitlines())) <= 80
    for words in (
        "kaiming_normal + relu carries the gradient best.",
        "the loss is nan",
        "2 measurements are missing",
        "critical + sigmoid: no critical point",
        "embed.weight: an embedding",
        "a note",
        "It was not tried in a training",
    ):
        assert words in " ".join(text.split())


@pytest.mark.parametrize(
    ("tried", "words", "has_code"),
    [
        (Verification(10, 1, 0.5, 2.3, better=True), "Take kaiming_normal + relu", True),
        (Verification(10, 1, 2.4, 2.3, better=False), "Keep what the model has", False),
        (None, "It was not tried", True),
    ],
)
def test_code_is_shown_unless_training_spoke_against_it(
    tried: Verification | None, words: str, *, has_code: bool
) -> None:
    comparison = written_by_hand(tried=tried)
    assert words in recommendation(comparison)
    assert ("a &lt; b\nc" in render(comparison)) == has_code
    assert ("a < b\nc" in as_text(comparison)) == has_code


def test_theory_is_named_where_it_is_outside_the_interval() -> None:
    told = disagreements(written_by_hand())
    assert len(told) == 1
    assert told[0].startswith("xavier_uniform + relu: theory says 0.741 per layer")


def test_the_page_holds_names_as_text_and_asks_for_nothing() -> None:
    page = render(written_by_hand())
    assert page.count("<script") == 1
    assert EVIL not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
    assert "http" not in page.replace("http-equiv", "")
    assert page.count('class="line') == 4


def test_all_or_nothing_can_be_alike() -> None:
    broken = ranked(
        _cells(Name("one"), 0.0, failure="the loss is nan"), {}, lambda *_: (math.nan, "")
    )
    comparison = Comparison("Net", broken, ("a",), (0,))
    assert verdict(comparison) == "No configuration can train."
    assert recommendation(comparison) == "There is nothing to recommend."
    assert "No configuration can train." in render(comparison)


def _alike(*, early: float) -> Comparison:
    cells = [
        replace(cell, early=early + place)
        for place, name in enumerate(("slow", "fast", "other"))
        for cell in _cells(Name(name), 0.01 * (3 - place))
    ]
    made = ranked(cells, {}, lambda *_: (math.nan, ""))
    return Comparison("Net", made, tuple("abcdefghijk"), (0, 1, 2))


def test_where_the_gradient_tells_nothing_apart_training_is_proposed() -> None:
    untrained = _alike(early=math.nan)
    assert verdict(untrained) == "All 3 configurations carry the gradient alike."
    assert "train_steps=30" in recommendation(untrained)
    trained = _alike(early=1.0)
    assert verdict(trained) == "3 configurations carry the gradient; slow + own trains fastest."
    assert "train_steps" not in recommendation(trained)
    assert "train_steps" not in recommendation(written_by_hand())


def test_too_few_layers_leave_it_to_the_first_losses() -> None:
    cells = [*_cells(Name("slow"), math.nan), *_cells(Name("fast"), math.nan)]
    losses = {"slow": 2.0, "fast": 1.0}
    for of, said in (
        (dict.fromkeys(losses, math.nan), "slope: nothing is told apart."),
        (losses, "slope; fast + own trains fastest."),
    ):
        trained = [replace(cell, early=of[cell.name.initialization]) for cell in cells]
        made = ranked(trained, {}, lambda *_: (math.nan, ""))
        assert verdict(Comparison("Net", made, ("a",), (0, 1, 2))).endswith(said)


def test_where_nothing_arrives_nothing_is_praised() -> None:
    cells = [
        *_cells(Name("lost"), -1.0),
        *_cells(Name("more_lost"), -2.0),
    ]
    made = ranked(cells, {}, lambda *_: (math.nan, ""))
    comparison = Comparison("Net", made, tuple("abcdefghijk"), (0, 1, 2))
    assert verdict(comparison).startswith("In no configuration does the gradient arrive")
    assert "lost + own comes closest." in verdict(comparison)
    assert 'class="arrives' not in render(comparison)
    assert 'class="arrives' in render(written_by_hand())


def test_files_are_what_their_suffix_says(tmp_path: Path) -> None:
    comparison = written_by_hand()
    read = pd.read_csv(io.StringIO(comparison.write(tmp_path / "new/a.csv").read_text()))
    assert read["tier"].tolist() == comparison.frame()["tier"].tolist()
    assert comparison.write(tmp_path / "a.html").read_text().startswith("<!doctype html>")
    assert "carries" in comparison.write(str(tmp_path / "a.txt")).read_text()
    with pytest.raises(ConfigError, match=r"\.html, \.csv, \.txt"):
        comparison.write(tmp_path / "a.pdf")


def test_hparams_have_one_folder_per_configuration(tmp_path: Path) -> None:
    comparison = written_by_hand()
    for _ in range(2):
        write_hparams(comparison, tmp_path)
    folders = sorted(path for path in tmp_path.iterdir() if path.is_dir())
    assert len(folders) == 4
    assert not any(path.is_dir() for folder in folders for path in folder.iterdir())
    events = EventAccumulator(str(tmp_path / "xavier_uniform+relu"))
    events.Reload()
    assert len(list(tmp_path.glob("xavier_uniform+relu/events*"))) == 1
    (growth,) = events.Scalars("compare/growth_per_layer")
    assert growth.value == pytest.approx(math.exp(-0.689 / 2))
    assert "_hparams_/session_start_info" in events.summary_metadata


def test_what_no_float_holds_is_still_told() -> None:
    made = ranked(_cells(Name("steep"), -4000.0 / 11), {}, lambda *_: (math.nan, ""))
    assert "10^790 times smaller" in render(Comparison("Net", made, ("a",), (0, 1, 2)))


def test_a_terminal_may_know_ascii_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", told)
    replace(written_by_hand(), notes=("\u03c7 is 1",)).print()
    told.flush()
    assert b"? is 1" in told.buffer.getvalue()


def test_like_names_have_folders_of_their_own(tmp_path: Path) -> None:
    names = ("a/b", "a:b", "long" * 90)
    cells = [cell for name in names for cell in _cells(Name(name), 0.1)]
    made = ranked(cells, {}, lambda *_: (math.nan, ""))
    write_hparams(Comparison("Net", made, ("a",), (0, 1, 2)), tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
