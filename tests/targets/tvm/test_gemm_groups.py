"""Products of weights by group: row counts, widths and depths that leave a remainder of tile, panel or group."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.targets.tvm.kernels import Isa, assembly, compiled, detect, here, runnable

pytest.importorskip("tvm")

from qcompiler.targets.tvm.kernels import gemm_groups, gemm_groups_f32, quantize_groups
from qcompiler.targets.tvm.kernels.epilogue import PLAIN, Epilogue
from qcompiler.targets.tvm.kernels.gemm_groups import GemmGroups
from qcompiler.targets.tvm.kernels.gemm_groups_f32 import GemmGroupsF32
from qcompiler.targets.tvm.kernels.norm import Norm
from qcompiler.targets.tvm.kernels.quantize_groups import QuantizeGroups

ROWS = (1, 2, 3, 7, 97, 257)
FULL = Epilogue(bias=True, activation="relu", residuals=1)
CASES = [  # in_features, out_features, group_size, bits, symmetric
    (64, 64, 32, 4, True),
    (300, 130, 128, 4, False),
    (100, 33, 64, 4, False),
    (50, 70, 256, 4, True),
    (40, 9, 16, 2, False),
    (70, 65, 32, 8, False),
]


def weights(case: tuple[int, int, int, int, bool]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q [K, N], scale and zero [groups, N]: the ends of the range among them."""
    in_features, out_features, group_size, bits, symmetric = case
    rng, groups = np.random.default_rng(in_features), -(-in_features // group_size)
    q = rng.choice([0, 2**bits - 1, 2 ** (bits - 1), 1], (in_features, out_features))
    scale = (rng.random((groups, out_features)) * 1e-2).astype(np.float32)
    zero = rng.integers(0, 2**bits, (groups, out_features))
    return q, scale, np.full_like(zero, 1 << (bits - 1)) if symmetric else zero


def finish(sums: np.ndarray, epilogue: Epilogue, bias: np.ndarray, residual: np.ndarray) -> np.ndarray:
    """FULL or PLAIN in numpy."""
    return np.maximum(sums + bias, 0) + residual if epilogue == FULL else sums


def run_integers(isa: Isa, case: tuple[int, int, int, int, bool], epilogue: Epilogue) -> None:
    in_features, out_features, group_size, bits, symmetric = case
    kernel = compiled(GemmGroups(*case, epilogue), isa)
    q, scale, zero = weights(case)
    rng, groups = np.random.default_rng(0), len(scale)
    constants: list[Any] = [gemm_groups.pack(q, group_size, bits, isa), gemm_groups.pack_groups(scale, isa)]
    constants += [] if symmetric else [gemm_groups.pack_groups(zero.astype(np.uint8), isa)]
    bias = rng.standard_normal(out_features).astype(np.float32)
    for m in ROWS:
        x = np.zeros((m, groups * group_size), np.int8)
        x[:, :in_features] = rng.choice([-127, 127, 5], (m, in_features))
        x_scale = rng.random((m, groups)).astype(np.float32)
        x_sum = x.reshape(m, groups, group_size).sum(-1, dtype=np.int32)
        residual, y = rng.standard_normal((m, out_features)).astype(np.float32), np.zeros((m, out_features), np.float32)
        more = [gemm_groups.pad_panels(bias, isa), residual] if epilogue == FULL else []
        kernel(x, *constants, x_scale, x_sum, *more, y)
        exact = gemm_groups.reference(x, x_scale, q, scale, zero, group_size)
        np.testing.assert_allclose(y, finish(exact, epilogue, bias, residual), rtol=1e-5, atol=2e-6 * abs(exact).max())
        if groups == 1 and epilogue == PLAIN:  # no float addition: the integers themselves
            steps = (exact / (x_scale * scale).astype(np.float64)).round()
            np.testing.assert_array_equal(y, steps.astype(np.float32) * (scale * x_scale))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_integer_products(case: tuple[int, int, int, int, bool]) -> None:
    run_integers(here(), case, PLAIN if case[3] == 4 else FULL)


@pytest.mark.parametrize("isa", [isa for isa in runnable() if isa != here()], ids=lambda isa: f"{isa.cpu}-{isa.dot}")
@pytest.mark.parametrize("case", [(40, 33, 32, 4, False), (40, 9, 32, 8, True)], ids=str)
def test_integer_products_elsewhere(isa: Isa, case: tuple[int, int, int, int, bool]) -> None:
    run_integers(isa, case, PLAIN)


@pytest.mark.parametrize("case", [*CASES, (75, 70, 32, 4, True)], ids=str)
def test_float_products(case: tuple[int, int, int, int, bool]) -> None:
    in_features, out_features, group_size, bits, symmetric = case
    epilogue = PLAIN if bits == 4 else FULL
    isa, rng = here(), np.random.default_rng(0)
    kernel = compiled(GemmGroupsF32(*case, epilogue), isa)
    q, scale, zero = weights(case)
    constants: list[Any] = [gemm_groups_f32.pack(q, group_size, bits, isa), gemm_groups.pack_groups(scale, isa)]
    constants += [] if symmetric else [gemm_groups.pack_groups(zero.astype(np.float32), isa)]
    weight = (q - zero.repeat(group_size, 0)[:in_features]) * scale.repeat(group_size, 0)[:in_features].astype(float)
    bias = rng.standard_normal(out_features).astype(np.float32)
    for m in ROWS:
        x = rng.standard_normal((m, in_features)).astype(np.float32)
        residual, y = rng.standard_normal((m, out_features)).astype(np.float32), np.zeros((m, out_features), np.float32)
        more = [gemm_groups.pad_panels(bias, isa), residual] if epilogue == FULL else []
        kernel(x, *constants, *more, y)
        exact = x @ weight
        np.testing.assert_allclose(y, finish(exact, epilogue, bias, residual), rtol=1e-5, atol=2e-6 * abs(exact).max())


def test_float_products_without_a_table() -> None:
    """Where no register holds a table of sixteen floats."""
    isa, rng = detect("haswell"), np.random.default_rng(0)
    if isa not in runnable():
        pytest.skip("this machine has no AVX2")
    q, scale, zero = weights((75, 40, 32, 4, False))
    kernel = compiled(GemmGroupsF32(75, 40, 32, 4, False), isa)
    x, y = rng.standard_normal((5, 75)).astype(np.float32), np.zeros((5, 40), np.float32)
    packed = [gemm_groups.pack_groups(array, isa) for array in (scale, zero.astype(np.float32))]
    kernel(x, gemm_groups_f32.pack(q, 32, 4, isa), *packed, y)
    exact = x @ ((q - zero.repeat(32, 0)[:75]) * scale.repeat(32, 0)[:75].astype(float))
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=2e-6 * abs(exact).max())


@pytest.mark.parametrize(
    ("cpu", "instruction"), [("znver4", "vpdpbusd"), ("alderlake", "vpdpbusd"), ("haswell", "vpmaddubsw")]
)
def test_the_instruction_of_each_processor(cpu: str, instruction: str) -> None:
    isa = detect(cpu)
    text = assembly(GemmGroups(64, 64, 32), isa)
    assert text.count(instruction) >= gemm_groups.VECTORS * gemm_groups.rows_of_tile(isa)
    assert "AllocWorkspace" not in text  # sums live in registers or on the stack


@pytest.mark.parametrize(("count", "group_size"), [(64, 32), (37, 16), (100, 64), (20, 128)])
def test_quantize_groups(count: int, group_size: int) -> None:
    kernel, rng = compiled(QuantizeGroups(count, group_size), here()), np.random.default_rng(count)
    for m in (1, 5):
        x = (rng.standard_normal((m, count)) * 3).astype(np.float32)
        x[0, :group_size] = 0
        wanted = quantize_groups.reference(x, group_size)
        got = tuple(np.full_like(array, 7) for array in wanted)
        kernel(x, *got)
        for array, expected in zip(got, wanted, strict=True):
            np.testing.assert_array_equal(array, expected)


def test_quantize_groups_smoothed() -> None:
    rng = np.random.default_rng(0)
    x, multiplier = rng.standard_normal((3, 40)).astype(np.float32), rng.random(40).astype(np.float32)
    wanted = quantize_groups.reference(x * multiplier, 32)
    got = tuple(np.full_like(array, 7) for array in wanted)
    compiled(QuantizeGroups(40, 32, smoothed=True), here())(x, multiplier, *got)
    for array, expected in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(array, expected)


def test_norm_with_groups() -> None:
    """Its float output, and the integers of that."""
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((5, 70)).astype(np.float32), rng.standard_normal(70).astype(np.float32)
    y = np.zeros_like(x)
    got = tuple(np.full_like(array, 7) for array in quantize_groups.reference(x, 32))
    compiled(Norm(70, 1e-5, centred=False, quantized="group", group_size=32), here())(x, weight, y, *got)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(y, wide / np.sqrt((wide**2).mean(1, keepdims=True) + 1e-5) * weight, atol=2e-6)
    for array, expected in zip(got, quantize_groups.reference(y, 32), strict=True):
        np.testing.assert_array_equal(array, expected)
