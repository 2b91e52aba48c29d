"""Every family of tests.families, and files of other exporters, from its ``.onnx`` to a saved folder and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import pytest

import qcompiler
from qcompiler.graph.run import Runner, session_options
from qcompiler.report.data import Report
from qcompiler.runtime import artefact
from tests import families, foreign

SAME_BYTES = (artefact.MODEL, artefact.DATA, artefact.RECIPE, artefact.FOLDS)
"""All that is saved, but for the reports: those tell seconds and memory."""

FOLDED = {
    "llama": 15,
    "mistral": 15,
    "opt": 13,
    "bert": 2,
    "gpt2": 7,
    "gemma2": 15,
    "qwen2": 15,
    "qwen3": 15,
    "phi3": 9,
    "cohere": 15,
    "falcon": 7,
    "gpt_neox": 7,
    "bloom": 7,
    "vit": 10,
    "distilbert": 2,
    "t5_encoder": 12,
    "whisper_encoder": 10,
    "mixtral": 9,
}
"""How many Linears take a scale from a norm or a Linear before them; post-LN encoders have only v -> o."""

Arrays = dict[str, npt.NDArray[Any]]


def calibration(name: str) -> list[Arrays]:
    return [families.feeds(name, batch=4, seq=24, seed=seed) for seed in range(3)]


def largest_difference(reference: npt.NDArray[Any], other: npt.NDArray[Any]) -> float:
    """max|a - b| / max|a|."""
    return float(np.abs(reference.astype(np.float64) - other).max() / np.abs(reference).max())


def sqnr_db(name: str, reference: npt.NDArray[Any], other: npt.NDArray[Any]) -> float:
    """10·log10(Σref² / Σerr²) over all that is no padding."""
    mask = families.feeds(name, seed=9).get("attention_mask")
    keep = mask == 1 if mask is not None else np.ones(reference.shape[:-1], bool)
    signal, error = reference[keep].astype(np.float64), other[keep] - reference[keep].astype(np.float64)
    return float(10 * np.log10((signal**2).sum() / (error**2).sum()))


def check_coverage(report: Report, head: bool) -> None:
    """ONNX Runtime runs in integers what the rows call quantized; the rest, if any, is little and has a reason."""
    assert all(row.quantized or row.reason for row in report.rows)
    body = report.rows[:-1] if head else report.rows
    work = [row.in_features * row.out_features for row in body]
    integer = [macs for row, macs in zip(body, work, strict=True) if row.quantized]
    assert report.coverage_body == pytest.approx(sum(integer) / sum(work))
    assert report.coverage_body >= 0.97
    assert report.coverage_head == (1.0 if head else None)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_compile_run_save_and_load(name: str, tmp_path: Path) -> None:
    path = families.exported(name)
    compiled = qcompiler.compile(path, calibration=calibration(name), output=tmp_path / "out", progress=False)
    feeds = families.feeds(name, seed=9)
    output = families.OUTPUT[name]
    got = compiled.run(feeds, threads=1)[output]
    assert sqnr_db(name, Runner(ir.load(path), threads=1)(feeds)[output], got) > 20

    plain = ort.InferenceSession(tmp_path / "out" / artefact.MODEL, session_options(1))
    np.testing.assert_array_equal(plain.run([output], feeds)[0], got)
    loaded = qcompiler.load(tmp_path / "out")
    np.testing.assert_array_equal(loaded.run(feeds, threads=1)[output], got)
    longer = families.feeds(name, batch=5, seq=19, seed=3)
    assert np.isfinite(loaded.run(longer, threads=1)[output]).all()

    report = loaded.report
    assert report.rows == compiled.report.rows
    check_coverage(report, head=name in families.CAUSAL)

    qcompiler.compile(path, calibration=calibration(name), output=tmp_path / "again", progress=False)
    for file in SAME_BYTES:
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


@pytest.mark.parametrize("name", families.FAMILIES)
def test_float_folds_alone_keep_the_outputs(name: str) -> None:
    """With one strength forced at every site, whether it helps or not: all folds, and no rounding."""
    path = families.exported(name)
    passes = "smooth{alpha=0.5,smooth_all_linears=false}"
    smoothed = qcompiler.compile(path, calibration=calibration(name), passes=passes, target="onnx", progress=False)
    folded = {sink for plan in smoothed.plans for sink in plan.sinks}
    assert len(folded) >= FOLDED[name]
    assert all(plan.kind == "fold" and plan.proof <= 1e-5 for plan in smoothed.plans)
    assert not any(row.quantized for row in smoothed.report.rows)
    feeds = families.feeds(name, seed=9)
    output = families.OUTPUT[name]
    reference = Runner(ir.load(path), threads=1)(feeds)[output]
    difference = largest_difference(reference, smoothed.run(feeds, threads=1)[output])
    assert 0 < difference <= 1e-5


@pytest.mark.parametrize("name", foreign.FILES)
def test_files_of_other_exporters(name: str, tmp_path: Path) -> None:
    path = foreign.foreign(name)
    family = foreign.FILES[name].family
    data = [foreign.feeds(name, batch=4, seq=24, seed=seed) for seed in range(3)]
    compiled = qcompiler.compile(path, calibration=data, output=tmp_path / "out", progress=False)
    feeds = foreign.feeds(name, seed=9)
    output = families.OUTPUT[family]
    got = compiled.run(feeds, threads=1)[output]
    assert sqnr_db(family, Runner(ir.load(path), threads=1)(feeds)[output], got) > 20
    np.testing.assert_array_equal(qcompiler.load(tmp_path / "out").run(feeds, threads=1)[output], got)
    check_coverage(compiled.report, head=family in families.CAUSAL)
