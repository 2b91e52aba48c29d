"""The products, exactly: every row count and width leaves a remainder of the tile somewhere."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tests.targets.tvm.kernels import Isa, assembly, compiled, detect, here, runnable

pytest.importorskip("tvm")

from qcompiler.targets.tvm.isa import fits_maddubs
from qcompiler.targets.tvm.kernels import gemm_f32, gemm_int8
from qcompiler.targets.tvm.kernels.batch_matmul import BatchMatMul
from qcompiler.targets.tvm.kernels.epilogue import PLAIN, Epilogue, inverse, quantize_reference

ROWS = (1, 2, 3, 7, 96, 97, 257)
STEPS = (0.03, 100)
FULL = Epilogue(bias=True, activation="gelu", residuals=1)
LATE = Epilogue(bias=True, activation="gelu", residuals=2, late=True)
QUANTIZED = Epilogue(bias=True, activation="relu", quantized=True)


def finished(sums: np.ndarray, epilogue: Epilogue, bias: np.ndarray, residual: np.ndarray) -> np.ndarray:
    """The epilogue in numpy."""
    y = sums + bias if epilogue.bias else sums
    y = y + residual * epilogue.residuals if epilogue.late else y
    if epilogue.activation == "gelu":
        y = (0.5 * y * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))).astype(np.float32)
    if epilogue.activation == "relu":
        y = np.maximum(y, 0)
    y = y + residual if epilogue.residuals and not epilogue.late else y
    return quantize_reference(y, *STEPS) if epilogue.quantized else y


def run_int8(isa: Isa, shape: tuple[int, int], scales: str, epilogue: Epilogue, reach: int) -> None:
    in_features, out_features = shape
    rng = np.random.default_rng(in_features)
    gemm = gemm_int8.GemmInt8(in_features, out_features, scales, epilogue)
    kernel = compiled(gemm, isa)
    weight = rng.integers(-reach, reach + 1, shape).astype(np.int8)
    w_scale = (rng.random(out_features) * 1e-3).astype(np.float32)
    bias = rng.standard_normal(out_features).astype(np.float32)
    for m in ROWS:
        x = rng.integers(0, 256, (m, in_features))
        stored = np.zeros((m, gemm.padded(isa)[0]), isa.activation)
        stored[:, :in_features] = x
        count = m if scales == "row" else 1
        x_scale, x_zero = (rng.random(count) * 0.1).astype(np.float32), rng.integers(0, 256, count).astype(np.int32)
        sums = ((x - x_zero[:, None]) @ weight.astype(np.int64)).astype(np.float32) * (w_scale * x_scale[:, None])
        columns, residual = weight.sum(0, dtype=np.int32), rng.standard_normal((m, out_features)).astype(np.float32)
        static = scales == "static"
        vectors = [columns * x_zero, w_scale * x_scale] if static else [columns, w_scale]
        arguments: list[Any] = [stored, gemm.pack(weight, isa)]
        arguments += [gemm.pad(vector, isa) for vector in vectors]
        arguments += [] if static else [x_scale, x_zero]
        arguments += [gemm.pad(bias, isa)] if epilogue.bias else []
        arguments += [residual] * epilogue.residuals
        arguments += [np.array([inverse(STEPS[0]), STEPS[1]], np.float32)] if epilogue.quantized else []
        y = np.zeros((m, out_features), epilogue.dtype(isa.activation))
        kernel(*arguments, y)
        expected = finished(sums, epilogue, bias, residual)
        np.testing.assert_allclose(y, expected, rtol=1e-6, atol=2e-6)
        if epilogue == PLAIN:
            np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("isa", runnable(), ids=lambda isa: f"{isa.cpu}-{isa.dot}")
def test_int8_products_are_exact(isa: Isa) -> None:
    """At the ends of the range: what saturates in 16 bits would show."""
    run_int8(isa, (37, 45), "static", PLAIN, 64 if isa.dot == "maddubs" else 127)


@pytest.mark.parametrize(
    ("shape", "scales", "epilogue"),
    [
        ((64, 64), "row", FULL),
        ((5, 3), "tensor", FULL),
        ((66, 31), "static", QUANTIZED),
        ((9, 31), "static", LATE),
        ((64, 48), "row", QUANTIZED),
    ],
    ids=["row", "tensor", "static", "late", "row-quantized"],
)
def test_int8_epilogues(shape: tuple[int, int], scales: str, epilogue: Epilogue) -> None:
    run_int8(here(), shape, scales, epilogue, 64)


@pytest.mark.parametrize(
    ("cpu", "instruction"),
    [("znver4", "vpdpbusd"), ("sapphirerapids", "vpdpbusd"), ("alderlake", "vpdpbusd"), ("skylake-avx512", "vpmaddwd")],
)
def test_the_instruction_of_each_processor(cpu: str, instruction: str) -> None:
    isa = detect(cpu)
    text = assembly(gemm_int8.GemmInt8(64, 64), isa)
    assert text.count(instruction) >= 16
    assert ("zmm" in text) == (isa.lanes == 16)


def test_maddubs_is_taken_only_where_no_pair_saturates() -> None:
    weight = np.full((3, 2), 64, np.int8)
    assert fits_maddubs(weight)
    weight[2, 1] = -128
    assert fits_maddubs(weight)  # alone in its pair: 255 · 128 still fits
    weight[1, 0] = -65
    assert not fits_maddubs(weight)


@pytest.mark.parametrize("shape", [(64, 64), (37, 45)])
def test_float_products(shape: tuple[int, int]) -> None:
    isa, rng = here(), np.random.default_rng(0)
    kernel = compiled(gemm_f32.GemmF32(*shape, FULL), isa)
    weight, bias = rng.standard_normal(shape).astype(np.float32), rng.standard_normal(shape[1]).astype(np.float32)
    for m in ROWS:
        x = rng.standard_normal((m, shape[0])).astype(np.float32)
        residual, y = rng.standard_normal((m, shape[1])).astype(np.float32), np.zeros((m, shape[1]), np.float32)
        kernel(x, gemm_f32.pack(weight, isa), gemm_f32.pad_columns(bias, isa), residual, y)
        expected = finished((x.astype(np.float64) @ weight).astype(np.float32), FULL, bias, residual)
        np.testing.assert_allclose(y, expected, atol=1e-5)


def test_products_of_two_activations() -> None:
    rng = np.random.default_rng(0)
    kernel = compiled(BatchMatMul(), here())
    for b, m, k, n in ((1, 1, 1, 1), (2, 7, 5, 19), (3, 16, 33, 32)):
        a, c = rng.standard_normal((b, m, k)).astype(np.float32), rng.standard_normal((b, k, n)).astype(np.float32)
        y = np.zeros((b, m, n), np.float32)
        kernel(a, c, y)
        np.testing.assert_allclose(y, a.astype(np.float64) @ c, atol=1e-5)
