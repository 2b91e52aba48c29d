"""LLM.int8(): which channels stay in float, and that what runs is exactly that split."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import qcompiler
from qcompiler.core import DataError, OptionError
from qcompiler.numerics.affine import quantize_weight
from qcompiler.presets import resolve
from qcompiler.scheme import TensorSpec
from qcompiler.targets.ort import OrtCpu
from tests.graph.tiny import tiny

WIDTH = 64
TEXT = f"""g (float[B,{WIDTH}] x) => (float[B,40] y, float[B,24] z) {{
    a0 = MatMul(x, wa)  a = Add(a0, b)  y = Mul(a, a)  c = MatMul(x, wc)  z = Mul(c, c)
}}"""
"""Squares, because a Linear that is read as it is counts as an output head."""


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"wa": (WIDTH, 40), "wc": (WIDTH, 24), "b": (40,)}
    return {name: rng.standard_normal(shape).astype(np.float32) / 8 for name, shape in shapes.items()}


def rows(loud: dict[int, float], count: int = 32, seed: int = 1) -> np.ndarray:
    """Rows within (-3, 3); the loud channels reach the given magnitude in one row each."""
    x = np.random.default_rng(seed).uniform(-3, 3, (count, WIDTH)).astype(np.float32)
    for row, (channel, magnitude) in enumerate(loud.items()):
        x[row, channel] = magnitude
    return x


def split_of(x: np.ndarray, weight: np.ndarray, outliers: list[int], reduce_range: bool) -> np.ndarray:
    """Section 3.2: the outlier channels in float, the rest in int8, by row of x and column of the weight."""
    rest, others = x.copy(), weight.copy()
    rest[:, outliers], others[outliers] = 0, 0
    scale = np.abs(rest).max(1, keepdims=True) / np.float32(127)
    q = np.rint(rest / scale).astype(np.int32)
    q_weight, weight_scale = quantize_weight(others, TensorSpec("int8", granularity="per_channel"), reduce_range)
    product = (q @ q_weight.astype(np.int32)) * weight_scale * scale
    return product + x[:, outliers] @ weight[outliers]


@settings(max_examples=8, deadline=None, phases=[Phase.generate])
@given(st.dictionaries(st.integers(0, WIDTH - 1), st.floats(6, 90), max_size=5), st.floats(5.0, 6.0))
def test_what_runs_is_exactly_the_split(loud: dict[int, float], threshold: float) -> None:
    outliers = sorted(loud)
    calibration, given_weights = rows(loud), weights()
    compiled = qcompiler.compile(
        ir.to_proto(tiny(TEXT, given_weights)),
        scheme=f"llm-int8{{threshold={threshold}}}",
        calibration=[{"x": calibration}],
        progress=False,
    )
    integers = [node for node in compiled.model.graph if node.op_type == "MatMulIntegerToFloat"]
    floats = [node for node in compiled.model.graph if node.op_type == "MatMul"]
    assert len(integers) == 2
    assert [list(node.inputs[1].shape.numpy()) for node in floats] == (
        [[len(loud), 40], [len(loud), 24]] if loud else []
    )
    # Other rows than those calibrated on, with the outliers elsewhere, and one that calibration did not see.
    x = rows({**loud, (outliers[0] + 1) % WIDTH if loud else 5: 20.0}, seed=2)[::-1].copy()
    reduce_range = OrtCpu().capability().reduce_range
    got = compiled.run({"x": x})
    for name, key, bias in (("y", "wa", given_weights["b"]), ("z", "wc", np.float32(0))):
        expected = split_of(x, given_weights[key], outliers, reduce_range) + bias
        np.testing.assert_allclose(got[name], expected**2, rtol=1e-4, atol=1e-5 * (expected**2).max())


def test_the_report_tells_of_each_split_and_the_threshold_counts() -> None:
    model, calibration = ir.to_proto(tiny(TEXT, weights())), [{"x": rows({3: -6.0, 9: 5.99})}]
    compiled = qcompiler.compile(model, scheme="llm-int8", calibration=calibration, progress=False)
    told = {note.node: note.why for note in compiled.report.notes if note.what == "split"}
    assert told == dict.fromkeys(("wa", "wc"), "1 of 64 channels reach 6 and stay in float")
    assert {row.name for row in compiled.report.rows if not row.quantized} == {"wa.outliers", "wc.outliers"}


def test_a_linear_of_outliers_only_stays_in_float() -> None:
    model, calibration = ir.to_proto(tiny(TEXT, weights())), [{"x": np.full((2, WIDTH), 7, np.float32)}]
    compiled = qcompiler.compile(model, scheme="llm-int8", calibration=calibration, progress=False)
    assert [row.reason for row in compiled.report.rows] == ["all 64 channels of its input reach 6"] * 2


def test_it_needs_calibration_data() -> None:
    with pytest.raises(DataError, match="give calibration data"):
        qcompiler.compile(ir.to_proto(tiny(TEXT, weights())), scheme="llm-int8", progress=False)


@pytest.mark.parametrize(
    ("text", "message"), [("llm-int8{threshold=0}", "no magnitude"), ("w8a8{threshold=6}", "has no threshold")]
)
def test_thresholds_that_mean_nothing_are_refused(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        resolve(text)


def test_the_head_stays_in_float() -> None:
    text = f"""g (float[B,{WIDTH}] x) => (float[B,40] y) {{ n = LayerNormalization(x, g, g)  y = MatMul(n, wa) }}"""
    model = tiny(text, {"g": [WIDTH], "wa": weights()["wa"]})
    compiled = qcompiler.compile(ir.to_proto(model), scheme="llm-int8", calibration=[{"x": rows({})}], progress=False)
    assert compiled.report.rows[0].reason == "an output head; the scheme leaves it"
