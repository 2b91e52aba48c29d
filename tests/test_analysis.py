"""analyze(): figures against the two graphs run apart, sites before and after, and every way to ask wrongly."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

import qcompiler
from qcompiler.core import DataError, OptionError
from qcompiler.report.analysis import Analysis
from tests import models
from tests.passes.blocks import WIDTH, batches, block

OUTLIERS = 40.0
LINEARS = ("wq", "wk", "wu", "wd", "wp", "wh")


@pytest.fixture(scope="module")
def found() -> Analysis:
    """Folds at the first norm, insertions behind the second."""
    return qcompiler.analyze(block(OUTLIERS), calibration=list(batches()), progress=False)


def test_every_linear_has_its_errors(found: Analysis) -> None:
    assert tuple(layer.row.name for layer in found.layers) == LINEARS
    for layer in found.layers:
        assert layer.alone is not None
        assert layer.accumulated is not None
        assert 15 < layer.accumulated.sqnr_db < 70
        assert 0.95 < layer.accumulated.cosine < 1
        assert layer.accumulated.mse > 0
        assert layer.accumulated.custom is None
        assert layer.bits == (8, 8)
    first = found.layers[0]
    assert first.alone is not None
    assert first.accumulated is not None
    assert first.alone.sqnr_db == pytest.approx(first.accumulated.sqnr_db, abs=0.01)  # nothing upstream is quantized
    assert set(found.outputs) == {"y", "logits"}


def test_errors_are_those_that_compile_reports(found: Analysis) -> None:
    compiled = qcompiler.compile(block(OUTLIERS), calibration=list(batches()), progress=False)
    for layer, row in zip(found.layers, compiled.report.rows, strict=True):
        assert layer.accumulated is not None
        assert layer.accumulated.sqnr_db == pytest.approx(row.sqnr_db, abs=1e-3)
        assert (layer.row.weight, layer.row.activation, layer.row.transform) == (
            row.weight,
            row.activation,
            row.transform,
        )


def test_sites_tell_the_outliers_before_and_after(found: Analysis) -> None:
    by_linear = {name: site for site in found.sites for name in site.linears}
    site = by_linear["wq"]
    assert site.linears == ("wq", "wk")
    assert site.before is not None
    assert site.before.outliers == (3, 17)
    assert len(site.before.absmax) == WIDTH
    assert len(site.after.outliers) < 2
    assert site.after.ratio < site.before.ratio / 3
    assert any(part.startswith("fold scale at") for part in site.transform)
    assert by_linear["wu"].before is not None


def test_ranges_are_those_of_the_data() -> None:
    data = list(batches())
    found = qcompiler.analyze(block(), calibration=data, passes="annotate,insert,fold", progress=False)
    site = next(site for site in found.sites if "wq" in site.linears)
    h = _layer_norm(np.concatenate([feeds["x"] for feeds in data]))
    np.testing.assert_allclose(site.after.absmax, np.abs(h).max((0, 1)), rtol=1e-3)
    assert site.after.low == pytest.approx(h.min(), rel=1e-3)
    assert site.after.high == pytest.approx(h.max(), rel=1e-3)
    assert site.before is not None
    np.testing.assert_array_equal(site.before.absmax, site.after.absmax)
    assert site.transform == ()


def _layer_norm(x: np.ndarray) -> np.ndarray:
    model = block()
    gain, bias = (model.graph.initializers[name].const_value.numpy() for name in ("gain", "b"))
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-5) * gain + bias


def test_other_data_than_calibration(found: Analysis) -> None:
    other = [{"x": 0.5 * feeds["x"]} for feeds in batches()][:1]
    apart = qcompiler.analyze(block(OUTLIERS), calibration=list(batches()), data=other, progress=False)
    assert apart.samples == len(other[0]["x"])
    assert [layer.row for layer in apart.layers] == [layer.row for layer in found.layers]  # quantized alike
    assert [layer.accumulated for layer in apart.layers] != [layer.accumulated for layer in found.layers]


def test_metrics_rank() -> None:
    data = list(batches())

    def worst_channel(reference: np.ndarray, got: np.ndarray) -> float:
        return float(np.abs(reference - got).max())

    for metric in ("sqnr", "mse", "cosine", worst_channel):
        found = qcompiler.analyze(block(), calibration=data, metric=metric, progress=False)
        errors = [layer.alone for layer in found.worst()]
        values = [error.by(found.metric) for error in errors if error is not None]
        assert len(values) == len(LINEARS)
        assert values == sorted(values, reverse=metric not in ("sqnr", "cosine"))
    assert found.metric_name == "worst_channel"
    assert all(error is not None and error.custom is not None and error.custom > 0 for error in errors)
    assert "worst_channel" in found.to_html()


def test_float_linears_have_a_reason_and_no_error() -> None:
    found = qcompiler.analyze(block(), calibration=list(batches()), ignore=["wk", "wp"], progress=False)
    left = {layer.row.name: layer for layer in found.layers if layer.accumulated is None}
    assert set(left) == {"wk", "wp"}
    assert all("ignored" in layer.row.reason and layer.bits == (32, 32) for layer in left.values())
    assert len(found.worst()) == len(LINEARS) - 2


@pytest.mark.parametrize(
    ("scheme", "bits", "decibels"), [("w8a8-dynamic", (8, 8), 30), ("w4a8", (4, 8), 15), ("w2a16", (2, 32), 1)]
)
def test_every_kind_of_scheme_is_told_alone_too(scheme: str, bits: tuple[int, int], decibels: float) -> None:
    found = qcompiler.analyze(block(), scheme=scheme, data=list(batches()), progress=False)
    for layer in found.layers:
        assert layer.bits == bits
        assert layer.alone is not None
        assert decibels < layer.alone.sqnr_db < decibels + 20


def test_json_is_plain_and_the_same_every_time(found: Analysis) -> None:
    text = found.to_text()
    data = json.loads(text, parse_constant=lambda word: pytest.fail(word))
    assert data["version"] == 1
    assert data["outlier_threshold"] == 6.0
    assert {layer["name"] for layer in data["layers"]} == set(LINEARS)
    site = next(site for site in data["sites"] if "wq" in site["linears"])
    assert site["before"]["outlier_channels"] == [3, 17]
    assert len(site["after"]["channel_absmax"]) == WIDTH
    again = qcompiler.analyze(block(OUTLIERS), calibration=list(batches()), progress=False)
    assert again.to_text() == text
    assert again.to_html() == found.to_html()


def test_a_model_left_in_float_is_told_too() -> None:
    found = qcompiler.analyze(block(), calibration=list(batches()), ignore=["*"], progress=False)
    assert found.worst() == []
    assert all(math.isinf(errors.sqnr_db) for errors in found.outputs.values())
    assert '"inf"' in found.to_text()
    assert "<svg" in found.to_html()


def test_wrong_questions_get_one_sentence() -> None:
    data = list(batches())
    with pytest.raises(OptionError, match="did you mean 'cosine'"):
        qcompiler.analyze(block(), calibration=data, metric="cosin")
    with pytest.raises(OptionError, match="nothing to measure on"):
        qcompiler.analyze(block(), scheme="w8a8-dynamic")
    nan = [{"x": np.full((1, 2, WIDTH), np.nan, np.float32)}]
    with pytest.raises(DataError, match="NaN"):
        qcompiler.analyze(block(), calibration=data, data=nan, progress=False)
    with pytest.raises(DataError, match="activation statistics"):
        qcompiler.analyze(block(), data=data, progress=False)  # a static scheme wants calibration
    with pytest.raises(OptionError, match="returned nan"):
        qcompiler.analyze(block(), calibration=data, metric=lambda ref, got: math.nan, progress=False)


@pytest.mark.slow
def test_minilm_shows_where_its_error_comes_from(minilm: Path) -> None:
    """Static everywhere; measured: alone 29.5 dB at the worst, layer 0's second MLP Linear; the output 28.2 dB."""
    from benchmarks import protocol

    models.data("stsb/dev.csv")
    sentences = protocol.minilm_calibration()[:64]
    found = qcompiler.analyze(minilm, scheme="w8a8-o3", calibration=sentences, progress=False)
    assert 26 < found.outputs["last_hidden_state"].sqnr_db < 31
    worst = found.worst(3)
    assert [layer.row.name for layer in worst] == [f"encoder.layer.{i}.output.dense" for i in range(3)]
    assert worst[0].alone is not None
    assert 27 < worst[0].alone.sqnr_db < 32
    site = found.worst_sites(1)[0]
    assert site.before is not None
    assert site.before.ratio > 20
    assert site.after.ratio < 6
    assert site.transform[0].startswith("split")
    assert len(found.to_html()) < 1.5e6
