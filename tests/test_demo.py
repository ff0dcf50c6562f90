"""The main job: three trainings, three right verdicts, three pages, three TensorBoard runs."""

import io
import subprocess
from contextlib import redirect_stderr
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import gradscope
from gradscope.cli import main
from tests.demo import Demo


def codes(folder: Path, name: str) -> list[tuple[str, tuple[str, ...]]]:
    report = gradscope.analyze(gradscope.load(folder / name))
    assert not [skip for skip in report.skipped if skip.reason.startswith("failed")]
    return [(finding.code, finding.explained_by) for finding in report.findings]


def test_verdicts(demo: Demo) -> None:
    folder, _ = demo
    for name, root in (("sigmoid", "GS101"), ("unscaled-relu", "GS104")):
        (first, *others) = codes(folder, name)
        assert first == (root, ())
        assert all(root in causes for _, causes in others)
    assert "GS102" in dict(codes(folder, "unscaled-relu"))
    assert codes(folder, "residual") == []


def test_what_it_prints(demo: Demo) -> None:
    folder, printed = demo
    order = [
        printed.index(words)
        for words in (
            "vanishing-gradient at linear1",
            "poor-initialization at linear1",
            "exploding-gradient",
            "Healthy: no warning, no error.",
            f"tensorboard --logdir {folder}",
        )
    ]
    assert order == sorted(order)
    for name in ("sigmoid", "unscaled-relu", "residual"):
        assert (folder / f"{name}.html").as_uri() in printed


def test_what_it_says_to_type_works(demo: Demo) -> None:
    folder, printed = demo
    *_, tensorboard, side_by_side = printed.strip().splitlines()
    program = tensorboard.partition("--logdir")[0].strip()
    assert subprocess.run([program, "--version"], check=False).returncode == 0
    # Whether or not the environment is active.
    done = subprocess.run(side_by_side.split(), check=False, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert (folder / "side-by-side.html").stat().st_size > 100_000


def test_pages(demo: Demo) -> None:
    folder, _ = demo
    for name, words in (
        ("sigmoid", "vanishing-gradient"),
        ("unscaled-relu", "poor-initialization"),
        ("residual", "Healthy"),
    ):
        page = (folder / f"{name}.html").read_text(encoding="utf-8")
        assert words in page
        assert len(page) < 1_000_000


def test_tensorboard_runs(demo: Demo) -> None:
    folder, _ = demo
    events = EventAccumulator(str(folder / "sigmoid"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    scalars = events.Tags()["scalars"]
    assert 10 <= len(scalars) <= 22
    run = gradscope.load(folder / "sigmoid")
    points = events.Scalars("gradient/global_norm")
    assert [point.step for point in points] == run.recorded_steps.tolist()
    norms = run.scalars["grad_norm"][run.recorded_steps]
    assert [point.value for point in points] == pytest.approx(norms, rel=1e-5)
    # On a slow machine it is refreshed while training goes on.
    *_, text = events.Tensors("gradscope/findings")
    assert b"GS101 vanishing-gradient at `linear1`" in text.tensor_proto.string_val[0]


def test_report_of_a_recorded_run(
    demo: Demo, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder, _ = demo
    out = tmp_path / "report.html"
    assert main(["report", str(folder / "sigmoid"), "-o", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert "vanishing-gradient" in out.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["report", "nowhere"], "there is no folder 'nowhere'"),
        (["report", "."], "holds no gradscope run"),
        (["report", "RUN", "-o", "x.pdf"], ".html"),
    ],
)
def test_bad_input(
    arguments: list[str], words: str, demo: Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = demo
    monkeypatch.chdir(folder)
    arguments = [argument.replace("RUN", str(folder / "sigmoid")) for argument in arguments]
    said = io.StringIO()
    with redirect_stderr(said):
        assert main(arguments) == 2
    assert words in said.getvalue()
    assert said.getvalue().startswith("gradscope: ")
