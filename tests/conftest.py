"""What all tests share: golden files, one thread, no pictures of every training."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

from gradscope.reporters import tensorboard
from tests.demo import Demo, demo_once

# How long an example takes says nothing where others share the cores.
hypothesis.settings.register_profile("gradscope", deadline=None)
hypothesis.settings.load_profile("gradscope")

# Small tensors on two threads in each of two processes wait for one another, a hundredfold.
# Read by torch when it is imported, here and in the programs that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write what is made to tests/golden/"
    )


@pytest.fixture
def check_golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with its golden file, or write the file when asked to."""
    update = bool(request.config.getoption("--update-golden"))

    def check(name: str, made: str) -> None:
        path = GOLDEN / name
        if update:
            path.parent.mkdir(exist_ok=True)
            path.write_text(made, encoding="utf-8")
        assert made == path.read_text(encoding="utf-8"), (
            "run pytest --update-golden, then read the diff"
        )

    return check


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    return demo_once(tmp_path_factory)


_PICTURES = tensorboard.pictures


@pytest.fixture(scope="session", autouse=True)
def no_pictures() -> Iterator[None]:
    """TensorBoard's pictures, drawn as a scope closes, take ten times as long as a short training.

    They are drawn where a test asks for `pictures`, and in programs of their own.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensorboard, "pictures", lambda _: {})
        yield


@pytest.fixture(scope="module")
def pictures(no_pictures: None) -> Iterator[None]:
    """TensorBoard's pictures are drawn as for a user."""
    del no_pictures
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensorboard, "pictures", _PICTURES)
        yield
