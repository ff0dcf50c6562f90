"""Scope.tensorboard(): what is shown of single layers, the limits, what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tensorboard.backend.event_processing import event_file_loader
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util
from torch import nn
from torch.nn import functional as F  # noqa: N812

import gradscope
from gradscope.capture.scope import Scope, watch
from gradscope.errors import ConfigError, ConfigTypeError, GradscopeWarning, UsageError
from gradscope.log.writer import run_files
from tests.capture.trainings import mlp_model, sgd, vectors


def train(scope: Scope, model: nn.Module, steps: int) -> list[dict[str, NDArray[np.float64]]]:
    """The gradients of each step, by name."""
    optimizer = sgd(model)
    seen = []
    for _ in range(steps):
        x, y = vectors()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        named = model.named_parameters()
        seen.append({n: p.grad.double().numpy().copy() for n, p in named if p.grad is not None})
        optimizer.step()
        scope.log(loss=loss)
    return seen


def shown(log_dir: Path) -> EventAccumulator:
    """As TensorBoard reads it."""
    read = EventAccumulator(str(log_dir), {"scalars": 0, "histograms": 0, "tensors": 0})
    read.Reload()
    return read


def points(log_dir: Path, tag: str) -> dict[int, float]:
    return {event.step: event.value for event in shown(log_dir).Scalars(tag)}


def tags(log_dir: Path, beginning: str) -> list[str]:
    listed: dict[str, Any] = shown(log_dir).Tags()
    return sorted(
        tag
        for kind in ("scalars", "histograms", "tensors")
        for tag in listed[kind]
        if tag.startswith(beginning)
    )


def test_layers_have_the_norm_of_their_gradient_and_the_update_ratio(tmp_path: Path) -> None:
    model = mlp_model()
    with watch(model, log_dir=tmp_path, every=1) as scope:
        scope.tensorboard(layers=["0.*", "4.weight"])
        seen = train(scope, model, 4)
    names = ["0.bias", "0.weight", "4.weight"]
    assert tags(tmp_path, "layer/") == sorted(
        f"layer/{name}/{quantity}" for name in names for quantity in ("grad_norm", "update_ratio")
    )
    for name in names:
        norms = {step: np.linalg.norm(gradients[name]) for step, gradients in enumerate(seen)}
        assert points(tmp_path, f"layer/{name}/grad_norm") == pytest.approx(norms, rel=1e-6)
    run = gradscope.load(tmp_path)
    column = run.parameters["update_ratio"][:, run.parameters.names.index("4.weight")]
    ratios = points(tmp_path, "layer/4.weight/update_ratio")
    assert list(ratios.values()) == column.tolist()


def test_later_calls_add_and_hold_from_then_on(tmp_path: Path) -> None:
    model = mlp_model()
    with watch(model, log_dir=tmp_path, every=1) as scope:
        train(scope, model, 2)
        scope.tensorboard(layers="0.weight")
        # The second step is closed by the first of these; what it was is recorded already.
        train(scope, model, 2)
        scope.tensorboard(layers="2.weight", margin_charts=True)
        scope.tensorboard(layers="2.weight", margin_charts=True)
        train(scope, model, 2)
    assert {2, 3, 4, 5} <= set(points(tmp_path, "layer/0.weight/grad_norm")) <= {1, 2, 3, 4, 5}
    assert {4, 5} <= set(points(tmp_path, "layer/2.weight/grad_norm")) <= {3, 4, 5}
    assert len(shown(tmp_path).Tensors("custom_scalars__config__")) == 1


def buckets_by_step(log_dir: Path, tag: str) -> dict[int, list[list[float]]]:
    """Step → (left, right, count) of each bin, as TensorBoard hands them to its plugins."""
    (path,) = run_files(log_dir)
    return {
        event.step: tensor_util.make_ndarray(value.tensor).tolist()
        for event in event_file_loader.EventFileLoader(str(path)).Load()
        for value in event.summary.value
        if value.tag == tag
    }


def test_histograms_count_the_magnitudes_of_the_gradient(tmp_path: Path) -> None:
    model = mlp_model()
    with watch(model, log_dir=tmp_path, every=1) as scope:
        scope.tensorboard(histograms="0.weight")
        seen = train(scope, model, 3)
    assert tags(tmp_path, "log10_gradient") == ["log10_gradient/0.weight"]
    histograms = buckets_by_step(tmp_path, "log10_gradient/0.weight")
    assert list(histograms) == [0, 1, 2]
    for step, buckets in histograms.items():
        magnitudes = np.abs(seen[step]["0.weight"])
        magnitudes = magnitudes[magnitudes > 0]
        # By octaves; TensorBoard's axis is log10.
        octaves, counts = np.unique(np.floor(np.log2(magnitudes)), return_counts=True)
        held = {left: count for left, _, count in buckets if count}
        expected = dict(zip((octaves * np.log10(2)).tolist(), counts.tolist(), strict=True))
        assert sorted(held) == pytest.approx(sorted(expected), abs=1e-5)
        assert [held[left] for left in sorted(held)] == [expected[k] for k in sorted(expected)]
        for left, right, _ in buckets:
            assert right - left == pytest.approx(np.log10(2), abs=1e-5)


def test_a_gradient_of_zeros_has_no_histogram(tmp_path: Path) -> None:
    model = mlp_model()
    with watch(model, log_dir=tmp_path, every=1) as scope:
        scope.tensorboard(histograms="*")
        optimizer = sgd(model)
        for _ in range(2):
            (model(torch.ones(2, 6)).sum() * 0).backward()
            optimizer.step()
    assert tags(tmp_path, "log10_gradient") == []
    assert gradscope.load(tmp_path).meta["problems"] == []


def test_limits_are_kept_over_all_calls_and_said(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(40)))
    scope = watch(model, log_dir=tmp_path, every=1)
    scope.tensorboard(histograms="0.*")
    with pytest.warns(GradscopeWarning) as first:
        scope.tensorboard(layers="*.weight", histograms=["0.*", "1?.weight"])
    with pytest.warns(GradscopeWarning) as second:
        scope.tensorboard(layers="*.bias")
    optimizer = sgd(model)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    scope.close()
    said = [*second, *first]
    curves, histograms = (str(warning.message) for warning in said)
    assert "layers: TensorBoard gets 50 of the parameters" in curves
    assert "30 further ones not: 10.bias, 11.bias, 12.bias, 13.bias, 14.bias and 25 more" in curves
    assert "histograms: TensorBoard gets 8" in histograms
    assert "4 further ones not: 16.weight, 17.weight, 18.weight, 19.weight" in histograms
    assert len(tags(tmp_path, "layer/")) == 100
    assert len(tags(tmp_path, "log10_gradient")) == 8
    problems = gradscope.load(tmp_path).meta["problems"]
    assert len([p for p in problems if p["part"] == "TensorBoard"]) == 2


def test_what_can_not_work_is_refused_and_asks_for_nothing(tmp_path: Path) -> None:
    model = mlp_model()
    refused: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ConfigError, r"layers='0\.wieght' matches no watched parameter; near are: 0\.weight",
         {"layers": "0.wieght"}),
        (ConfigError, r"histograms='zzz' matches no .*there are: 0\.weight, 0\.bias, 4\.weight",
         {"layers": "0.weight", "histograms": ["0.*", "zzz"]}),
        (ConfigError, r"layers='2\.weight' matches no watched", {"layers": "2.weight"}),
        (ConfigTypeError, r"layers=3 must be a pattern", {"layers": 3}),
        (ConfigTypeError, r"histograms=\[None\] must be a pattern", {"histograms": [None]}),
        (ConfigTypeError, r"margin_charts='yes' must be True or False", {"margin_charts": "yes"}),
    ]  # fmt: skip
    with watch(model, log_dir=tmp_path, every=1, exclude="2.*") as scope:
        for error, message, arguments in refused:
            with pytest.raises(error, match=message):
                scope.tensorboard(**arguments)
        train(scope, model, 1)
    assert tags(tmp_path, "layer/") == tags(tmp_path, "log10") == []
    with pytest.raises(UsageError, match="after close"):
        scope.tensorboard(layers="0.weight")


def test_where_nobody_finds_the_run_it_says_so() -> None:
    scope = watch(mlp_model())
    with pytest.warns(GradscopeWarning, match="no effect without watch"):
        scope.tensorboard(layers="0.weight")
    scope.close()


def test_layers_that_come_late_are_shown_from_then_on(tmp_path: Path) -> None:
    model = nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.Linear(16, 5))
    with watch(model, log_dir=tmp_path, every=1) as scope:
        scope.tensorboard(layers="0.weight")
        model(torch.ones(1, 6))
        seen = train(scope, model, 2)
    expected = {step: np.linalg.norm(grads["0.weight"]) for step, grads in enumerate(seen)}
    assert points(tmp_path, "layer/0.weight/grad_norm") == pytest.approx(expected, rel=1e-6)


def test_many_names_of_the_users_own(tmp_path: Path) -> None:
    model = mlp_model()
    names = [f"metric{number:03}" for number in range(60)]
    metrics: dict[str, Any] = {**dict.fromkeys(names, 3.0), "nothing": None}
    with watch(model, log_dir=tmp_path, every=1) as scope:
        scope.log(first=1.0, loss_scale=2.0)
        train(scope, model, 2)
        with pytest.warns(GradscopeWarning) as said:
            scope.log(**metrics)
        # Once is enough.
        scope.log(**metrics, late=4.0)
    (warning,) = said
    assert str(warning.message) == (
        "gradscope: TensorBoard shows the first 40 names given to log(), not metric039, "
        "metric040, metric041, metric042, metric043, metric044, metric045, metric046, metric047, "
        "metric048 and 11 more, nor any further one; the run holds them all"
    )
    assert warning.filename == __file__
    assert tags(tmp_path, "user/") == ["user/first", *(f"user/{name}" for name in names[:39])]
    assert points(tmp_path, "training/loss_scale") == {0: 2.0}
    run = gradscope.load(tmp_path)
    assert {"first", "late", "metric059"} <= set(run.scalars)
