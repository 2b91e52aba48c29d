"""Mixtures of experts through whole compiles: each expert's weights are quantized as any other Linear's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import qcompiler
from qcompiler.core import OptionError
from qcompiler.graph.run import Runner
from tests import mixtures

Feeds = dict[str, np.ndarray]
EIGHT = {"hidden": 32, "inner": 48, "experts": 8}


def correlated(count: int, seed: int) -> list[Feeds]:
    """Rows whose channels differ in size and go together, as a model's do."""
    mix = np.random.default_rng(0).standard_normal((32, 32)) @ np.diag(np.geomspace(3, 0.05, 32))
    draws = [np.random.default_rng([seed, i]).standard_normal((count, 32)) for i in range(3)]
    return [{"x": (rows @ mix / 5).astype(np.float32)} for rows in draws]


def sqnr_db(model: ir.Model, compiled: qcompiler.CompiledModel) -> float:
    signal = noise = 0.0
    for feeds in correlated(200, seed=50):
        want = Runner(model, threads=1)(feeds)["y"]
        signal, noise = (
            signal + np.square(want).sum(),
            noise + np.square(want - compiled.run(feeds, threads=1)["y"]).sum(),
        )
    return float(10 * np.log10(signal / noise))


def test_gptq_rounds_each_expert_by_the_rows_that_chose_it() -> None:
    model = mixtures.traced(**EIGHT)
    found = {}
    for passes in ("annotate,insert,fold", "annotate,insert,gptq,fold"):
        compiled = qcompiler.compile(
            model.clone(),
            scheme="w4a16",
            ignore=("*router*",),
            calibration=correlated(400, seed=0),
            passes=passes,
            progress=False,
        )
        assert {row.kernel for row in compiled.report.rows if row.quantized} == {"QMoE"}
        found[passes] = sqnr_db(model, compiled)
    nearest, gptq = found.values()
    assert gptq > nearest + 3  # 15.7 and 22.8 dB


@pytest.mark.parametrize("scheme", ["w4a16", "w4a8", "w8a8", "w8a8-dynamic", "w8a8-o2"])
def test_experts_that_no_calibration_row_chose_are_quantized_too(scheme: str) -> None:
    model = mixtures.traced(32, 48, 8, 1)
    data = correlated(2, seed=0)[:2]
    compiled = qcompiler.compile(model.clone(), scheme=scheme, calibration=data, progress=False)
    experts = [row for row in compiled.report.rows if "experts" in row.name]
    assert len([row for row in experts if row.quantized]) >= 2 * 8
    assert all(row.quantized or row.reason for row in experts)
    assert sqnr_db(model, compiled) > 5
    one = {"x": correlated(1, seed=9)[0]["x"]}  # seven experts compute nothing
    assert np.isfinite(compiled.run(one, threads=1)["y"]).all()


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8-dynamic", "w8a8-o2"])
def test_the_standard_target_has_one_product_an_expert(scheme: str) -> None:
    model = mixtures.traced()
    compiled = qcompiler.compile(model.clone(), scheme=scheme, target="onnx", progress=False)
    assert all(row.quantized for row in compiled.report.rows)
    fast = qcompiler.compile(model.clone(), scheme=scheme, progress=False)
    for count in (1, 9):
        feeds = mixtures.rows(count)
        got = Runner(compiled.model, threads=1)(feeds)["y"]
        np.testing.assert_allclose(got, fast.run(feeds, threads=1)["y"], rtol=1e-3, atol=1e-4)


def test_analyze_tells_of_experts_and_of_outputs() -> None:
    found = qcompiler.analyze(
        mixtures.traced(), scheme="w4a16", calibration=correlated(40, seed=0), passes="annotate,insert", progress=False
    )
    layers = {layer.row.name: layer for layer in found.layers}
    assert layers["mlp.experts.3.gate_up_proj"].alone.sqnr_db > 15
    assert found.outputs["y"].sqnr_db > 5


def test_a_size_budget_counts_each_expert_by_its_share(tmp_path: Path) -> None:
    """Experts share one node, whose bytes are not those of each."""
    model = mixtures.traced(64, 96)
    options = {"scheme": "w4a16", "passes": "annotate,insert,fold", "calibration": wide(), "progress": False}

    def size(name: str, **more: Any) -> int:
        qcompiler.compile(model.clone(), output=tmp_path / name, **options, **more)
        return sum(file.stat().st_size for file in (tmp_path / name).glob("model.onnx*"))

    four, eight = (size(str(bits), bits={"*": bits}) for bits in (4, 8))
    limit = (four + eight) // 2
    assert 0.8 * limit <= size("budget", max_size=limit) <= limit
    with pytest.raises(OptionError, match="cannot be reached") as told:
        size("none", max_size=1000)
    assert int(re.search(r"takes (\d+)", str(told.value))[1]) < four


def wide() -> list[Feeds]:
    return [mixtures.rows(24, 64, seed) for seed in range(2)]
