"""The examples of published results, in a smaller setting: what was published holds."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.published import (
    glorot_2010,
    hanin_nica_2020,
    he_2015,
    pennington_2017,
    schoenholz_2017,
    xiong_2020,
    yang_2019,
)

_ROOT = Path(__file__).parents[1]


@pytest.fixture
def picture(tmp_path: Path) -> Iterator[Path]:
    """Where the example is to draw, which it then has."""
    path = tmp_path / "picture.png"
    yield path
    assert path.read_bytes().startswith(b"\x89PNG")


def test_every_example_is_in_the_docs() -> None:
    page = (_ROOT / "docs/published.md").read_text(encoding="utf-8")
    names = {path.stem for path in (_ROOT / "examples/published").glob("*.py")}
    assert len(names) == 7
    for name in names:
        assert f"examples/published/{name}.py" in page
        assert f"(images/published/{name}.png)" in page
        assert (_ROOT / f"docs/images/published/{name}.png").exists()


def test_glorot(picture: Path) -> None:
    found = glorot_2010.main(picture, width=400)
    # The gradient shrinks with the standard initialization, and hardly with theirs.
    assert found["standard"].growth < 1 / math.sqrt(3)
    assert 0.85 < found["normalized"].growth < 1
    for name, published in (("standard", 0.5), ("normalized", 0.8)):
        assert found[name].singular_value == pytest.approx(published, abs=0.05)
        assert found[name].growth == pytest.approx(found[name].expected_growth, rel=0.02)


def test_he(picture: Path) -> None:
    found = he_2015.main(picture, steps=200, seeds=1, depths=(30,))
    xavier, he = found[30, "xavier_normal"], found[30, "kaiming_normal"]
    assert he.learned is not None
    assert he.loss[-20:].mean() < math.log(10) / 2
    # Not better than chance.
    assert xavier.learned is None
    assert xavier.loss[-20:].mean() == pytest.approx(math.log(10), rel=0.02)
    # Half of the squared norm per layer, over 28 layers.
    assert xavier.gain / he.gain == pytest.approx(2**-14, rel=0.2)


def test_schoenholz(picture: Path) -> None:
    found = schoenholz_2017.main(picture, variances=(0.5, 1.0), depths=(5, 10, 20, 40))
    # ξ = −1 / ln χ where small differences die out, with χ = 0.759032 at σ_w² = 1.
    assert found.published[1] == pytest.approx(-6 / math.log(0.759032), rel=1e-4)
    for variance, limit in zip(found.variances, found.published, strict=True):
        assert limit / 2 < found.deepest(variance) < 2 * limit
    # Not better than chance at more than twice 6 ξ.
    assert found.accuracy[2:, 0] == pytest.approx(0.1, abs=0.05)


def test_pennington(picture: Path) -> None:
    found = pennington_2017.main(picture, width=128, seeds=3)
    assert found["ReLU, orthogonal"][0] == pytest.approx(10)
    assert found["ReLU, Gaussian"][0] == pytest.approx(20)
    # Neither orthogonal ReLU nor Gaussian tanh is near an isometry; orthogonal tanh is.
    assert found.pop("tanh, q = 0.02, orthogonal")[1] < 0.05
    for published, own in found.values():
        assert own == pytest.approx(published, rel=0.2)


def test_hanin_and_nica(picture: Path) -> None:
    found = hanin_nica_2020.main(picture, nets=400)
    for width in (64, 128):
        own = found[width]
        published = 5 * 49 / width
        assert own.theory == pytest.approx(published, rel=1e-9)
        assert own.variance[-1] == pytest.approx(published, abs=3 * own.error)
        # The mean's standard error is √(variance / nets).
        within = 3 * math.sqrt(published / 400)
        assert own.log_gain[:, -1].mean() == pytest.approx(-published / 2, abs=within)


def test_yang(picture: Path) -> None:
    found = yang_2019.main(picture, width=256, batches=(16, 64, 256), seeds=2)
    assert found["relu, batch of 256"] == pytest.approx(1.46694, rel=0.02)
    # The smaller the batch the faster; the variance of the weights doesn't count.
    assert found["relu, batch of 16"] > found["relu, batch of 64"] > found["relu, batch of 256"]
    assert found["relu, σ_w² = 0.1"] == pytest.approx(found["relu, batch of 256"], rel=2e-3)
    assert found["tanh"] > 1.1
    assert found["selu"] > 1.03
    assert found["linear"] == pytest.approx(1, abs=0.02)


def test_xiong(picture: Path) -> None:
    found = xiong_2020.main(picture, depths=(2, 6, 18), width=64)
    assert found["post-LN"].power == pytest.approx(0, abs=0.05)
    assert found["pre-LN"].power == pytest.approx(-0.5, abs=0.1)
    assert (found["post-LN"].last > found["pre-LN"].last).all()
