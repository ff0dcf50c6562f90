"""Torn, damaged, foreign and missing logs: read as far as they go, and said what is left out."""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tensorboard.compat.proto import event_pb2, summary_pb2

from gradscope.errors import LogError, LogVersionError, NoRunError
from gradscope.log import framing, schema
from gradscope.log.reader import load
from gradscope.log.writer import RunWriter, run_files
from gradscope.record import Run, Table

# In the fixture's file: the version, the header, then the run.
_HEADER_RECORDS = 2
# Entities of three tables, and two steps, twice; a problem.
_STEP_RECORDS = (6, 7, 11, 12)

Ends = Callable[[bytes], list[int]]
Cells = dict[tuple[str, int], bytes]


def cells(run: Run) -> Cells:
    """What was measured of each entity at each step, as bytes."""
    measured = {
        (name, int(step)): table.values[:, row, column].tobytes()
        for table in (run.parameters, run.modules, run.signals)
        for row, step in enumerate(table.steps)
        for column, name in enumerate(table.names)
        if not np.isnan(table.values[:, row, column]).all()
    }
    counted = {
        (f"histogram of {name}", int(step)): run.histograms[name][row].tobytes()
        for row, step in enumerate(run.histograms.steps)
        for name in run.histograms.names
        if run.histograms[name][row].any()
    }
    return measured | counted


def test_fixture_is_what_this_file_says(event_file: Path, record_ends: Ends) -> None:
    ends = record_ends(event_file.read_bytes())
    assert len(ends) == _HEADER_RECORDS + 2 * (3 + 2) + 1 + 0
    assert ends[-1] == event_file.stat().st_size
    run = load(event_file.parent)
    assert list(run.recorded_steps) == [0, 1, 2, 3]
    assert len([name for name, _ in cells(run) if name.startswith("histogram")]) == 2 * (1 + 2)


# Length and its checksum before the data, a checksum behind them.
_HEAD, _FOOT = 8 + 4, 4


def telling(ends: list[int]) -> list[int]:
    """Every byte around the data, and one in 16 within, which but for their checksum are alike."""
    spans = [(begin + _HEAD, end - _FOOT) for begin, end in pairwise([0, *ends])]
    within = {at for first, last in spans for at in range(first + 1, last - 1)}
    return [at for at in range(ends[-1]) if at not in within or at % 16 == 0]


def read(content: bytes) -> tuple[list[bytes], framing.Leftover]:
    leftover = framing.Leftover()
    return list(framing.records(io.BytesIO(content), leftover)), leftover


def test_records_before_any_cut_are_read(event_file: Path, record_ends: Ends) -> None:
    content = event_file.read_bytes()
    ends = record_ends(content)
    data = [content[begin + _HEAD : end - _FOOT] for begin, end in pairwise([0, *ends])]
    for cut in range(len(content)):
        complete = sum(end <= cut for end in ends)
        left = cut - max([0, *ends[:complete]])
        assert read(content[:cut]) == (data[:complete], framing.Leftover(left, 0)), f"byte {cut}"


def test_records_beside_any_flipped_byte_are_read(event_file: Path, record_ends: Ends) -> None:
    content = event_file.read_bytes()
    ends = record_ends(content)
    spans = list(pairwise([0, *ends]))
    data = [content[begin + _HEAD : end - _FOOT] for begin, end in spans]
    for at in range(len(content)):
        damaged = bytearray(content)
        damaged[at] ^= 0x10
        hit = sum(end <= at for end in ends)
        begin, _ = spans[hit]
        if at < begin + _HEAD:
            # Where the next record begins is not known any more.
            expected = data[:hit], framing.Leftover(len(content) - begin, 0)
        else:
            expected = data[:hit] + data[hit + 1 :], framing.Leftover(0, 1)
        assert read(bytes(damaged)) == expected, f"byte {at}"


def test_torn_tail_anywhere(event_file: Path, record_ends: Ends) -> None:
    content = event_file.read_bytes()
    ends = record_ends(content)
    whole = cells(load(event_file.parent))
    for cut in reversed(telling(ends)):
        os.truncate(event_file, cut)
        complete = sum(end <= cut for end in ends)
        if complete < _HEADER_RECORDS:
            with pytest.raises(LogError, match="no readable beginning"):
                load(event_file.parent)
            continue
        run = load(event_file.parent)
        steps = [step for step, record in enumerate(_STEP_RECORDS) if complete >= record]
        assert list(run.recorded_steps) == steps
        assert list(run.steps) == steps
        assert cells(run) == {key: value for key, value in whole.items() if key[1] in steps}
        if cut in ends:
            assert run.meta["left_out"] == []
        else:
            (left_out,) = run.meta["left_out"]
            assert f"{cut - ends[complete - 1]} bytes" in left_out
            assert event_file.name in left_out


@contextmanager
def damaged(path: Path, at: int) -> Iterator[None]:
    """One bit of the byte there is flipped."""

    def flip() -> None:
        with path.open("r+b") as file:
            file.seek(at)
            (byte,) = file.read(1)
            file.seek(at)
            file.write(bytes([byte ^ 0x10]))

    flip()
    yield
    flip()


def test_flipped_byte_anywhere_is_noticed_and_never_believed(
    event_file: Path, record_ends: Ends
) -> None:
    content = event_file.read_bytes()
    ends = record_ends(content)
    whole = load(event_file.parent)
    expected = cells(whole)
    for at in telling(ends):
        with damaged(event_file, at):
            try:
                run = load(event_file.parent)
            except LogError:
                # Without the header nothing can be read.
                assert at < ends[_HEADER_RECORDS - 1]
                continue
        assert run.meta["left_out"] != [], f"byte {at}"
        # What is still read is what was written, under its own name.
        wrong = {key: v for key, v in cells(run).items() if expected.get(key) != v}
        assert wrong == {}, f"byte {at}"
        for step, loss in zip(run.steps, run.scalars["loss"], strict=True):
            assert np.isnan(loss) or loss == step / 10


def test_garbage_behind_the_run_is_left_out(event_file: Path) -> None:
    with event_file.open("ab") as file:
        file.write(b"\x00" * 100)
    run = load(event_file.parent)
    assert list(run.recorded_steps) == [0, 1, 2, 3]
    assert "100 bytes" in run.meta["left_out"][0]


def test_huge_length_does_not_take_memory(event_file: Path) -> None:
    with event_file.open("ab") as file:
        file.write(b"\xff" * 8 + b"\x00" * 4)
    assert list(load(event_file.parent).recorded_steps) == [0, 1, 2, 3]


# Places without a run.


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(NoRunError, match=r"no folder .*nowhere.*log_dir"):
        load(tmp_path / "nowhere")


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(NoRunError, match="holds no gradscope run"):
        load(tmp_path)


def test_folder_of_runs_names_them(small_run: Path) -> None:
    with pytest.raises(NoRunError, match="its folders small do"):
        load(small_run.parent)


@pytest.mark.parametrize("below", ["", "run"])
def test_file_instead_of_folder(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NoRunError, match=r"file.* is a file.*folder"):
        load(tmp_path / "file" / below)


def test_empty_file_has_no_readable_beginning(event_file: Path) -> None:
    event_file.write_bytes(b"")
    with pytest.raises(LogError, match="no readable beginning"):
        load(event_file.parent)


def test_newer_format_is_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as newer:
        newer.setattr(schema, "FORMAT_VERSION", 99)
        RunWriter(tmp_path, {}).close()
    said = r"version 99.*reads up to 3.*pip install -U"
    with pytest.raises(LogVersionError, match=said) as error:
        load(tmp_path)
    assert isinstance(error.value, LogError)


def test_unknown_records_of_a_run_are_passed_over(small_run: Path, tmp_path: Path) -> None:
    # As a later version of the same format may add them.
    folder = tmp_path / "later"
    folder.mkdir()
    writer = RunWriter(folder, {})
    writer._json("gradscope/from_the_future", {"any": "thing"})
    writer.close()
    assert len(load(folder).steps) == 0
    assert len(load(small_run).steps) == 4


def test_foreign_event_files_are_neither_read_nor_touched(small_run: Path) -> None:
    from torch.utils.tensorboard.writer import SummaryWriter

    before: Table = load(small_run).parameters
    with SummaryWriter(str(small_run)) as writer:
        writer.add_scalar("loss", 1.0, 0)
    (small_run / "events.out.tfevents.garbage").write_bytes(b"garbage")
    (small_run / "notes.gradscope").write_text("mine")
    assert len(list(small_run.iterdir())) == 4
    assert len(run_files(small_run)) == 1
    np.testing.assert_array_equal(load(small_run).parameters.values, before.values)


def test_folder_with_foreign_event_files_only_holds_no_run(tmp_path: Path) -> None:
    (tmp_path / "events.out.tfevents.1700000000.host.1.0").write_bytes(b"garbage")
    with pytest.raises(NoRunError):
        load(tmp_path)


def test_whole_records_that_are_not_understood_are_left_out(event_file: Path) -> None:
    whole = load(event_file.parent)

    def event(*values: schema.Value) -> bytes:
        summary = summary_pb2.Summary(value=list(values))
        data: bytes = event_pb2.Event(step=7, summary=summary).SerializeToString()
        return data

    columns = ["step", "loss"]
    foreign = [
        b"\xff\xff\xff\xff",
        event(schema.array_value(schema.TABLES["parameters"], np.zeros((3, 2), np.float32))),
        event(schema.array_value(schema.TABLES["modules"], np.zeros(5, np.float32))),
        event(schema.pulse_value(columns, np.zeros((2, 3)))),
        event(schema.pulse_value(columns, np.zeros(2))),
        event(schema.json_value(schema.HEADER, {"format_version": 1})),
        event(schema.json_value(schema.ENTITIES, {"table": "parameters"})),
    ]
    with event_file.open("ab") as file:
        for record in foreign:
            file.write(framing.frame(record))
    run = load(event_file.parent)
    assert len(run.meta["left_out"]) == len(foreign)
    assert cells(run) == cells(whole)
    assert run.steps.tolist() == whole.steps.tolist()
