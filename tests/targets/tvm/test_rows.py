"""Kernels that work row by row: quantization, norms, softmax, attention, activations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tests.targets.tvm.kernels import compiled, here

pytest.importorskip("tvm")

from qcompiler.targets.tvm.kernels.attention import Attention
from qcompiler.targets.tvm.kernels.norm import Norm
from qcompiler.targets.tvm.kernels.pointwise import Pointwise
from qcompiler.targets.tvm.kernels.quantize import Quantize
from qcompiler.targets.tvm.kernels.softmax import Softmax

SCALE, ZERO = np.float32(0.02), 100
STEPS = np.array([1 / SCALE, ZERO], np.float32)


def padded(count: int) -> int:
    return -(-count // here().group) * here().group


def check_integers(q: np.ndarray, x: np.ndarray, scale: Any, zero: Any) -> None:
    """Ties to even, saturated, and zeros behind each row."""
    expected = np.clip(np.rint(x * (np.float32(1) / scale)) + zero, 0, 255)
    np.testing.assert_array_equal(q[:, : x.shape[1]], expected)
    assert not q[:, x.shape[1] :].any()


@pytest.mark.parametrize("count", [64, 37, 3])
@pytest.mark.parametrize("granularity", ["static", "row", "tensor"])
def test_quantize(count: int, granularity: str) -> None:
    kernel, rng = compiled(Quantize(count, granularity), here()), np.random.default_rng(count)
    for m in (1, 5):
        x = (rng.standard_normal((m, count)) * 3).astype(np.float32)
        q = np.full((m, padded(count)), 7, here().activation)
        if granularity == "static":
            kernel(x, STEPS, q)
            check_integers(q, x, SCALE, ZERO)
            continue
        scale, zero = np.zeros(m if granularity == "row" else 1, np.float32), np.zeros(1, np.int32).repeat(m)
        zero = zero[: len(scale)].copy()
        kernel(x, q, scale, zero)
        if granularity == "row":
            np.testing.assert_allclose(scale, np.abs(x).max(1) / 127, rtol=3e-7)
            assert (zero == 128).all()
        else:
            low, high = min(x.min(), 0), max(x.max(), 0)
            np.testing.assert_allclose(scale, (high - low) / 255, rtol=3e-7)
            assert zero[0] == np.rint(-low / scale[0])
        check_integers(q, x, scale[:, None], zero[:, None])


@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_quantize_zeros(granularity: str) -> None:
    """A row of padding may be all zeros: it stays so, and its scale stays finite."""
    x, q = np.zeros((2, 8), np.float32), np.zeros((2, padded(8)), here().activation)
    scale, zero = np.zeros(2 if granularity == "row" else 1, np.float32), np.zeros(1, np.int32)
    zero = np.zeros(len(scale), np.int32)
    compiled(Quantize(8, granularity), here())(x, q, scale, zero)
    assert (q == zero[0]).all()
    assert (scale > 0).all()


@pytest.mark.parametrize("count", [64, 37])
@pytest.mark.parametrize("quantized", ["", "static", "row"])
@pytest.mark.parametrize("centred", [True, False])
def test_norm(count: int, quantized: str, centred: bool) -> None:
    kernel, rng, m = compiled(Norm(count, 1e-5, centred, centred, quantized), here()), np.random.default_rng(0), 5
    x = (rng.standard_normal((m, count)) * 3 + 1).astype(np.float32)
    weight, bias = rng.standard_normal((2, count)).astype(np.float32)
    y, q = np.zeros((m, count), np.float32), np.zeros((m, padded(count)), here().activation)
    scale, zero = np.zeros(m, np.float32), np.zeros(m, np.int32)
    arguments = [x, weight, *([bias] if centred else []), *([STEPS] if quantized == "static" else []), y]
    arguments += [q] if quantized else []
    kernel(*arguments, *([scale, zero] if quantized == "row" else []))
    wide = x.astype(np.float64)
    moved = wide - wide.mean(1, keepdims=True) if centred else wide
    expected = moved / np.sqrt((moved**2).mean(1, keepdims=True) + 1e-5) * weight + (bias if centred else 0)
    np.testing.assert_allclose(y, expected, atol=2e-6)
    if quantized == "static":
        check_integers(q, y, SCALE, ZERO)
    if quantized == "row":
        check_integers(q, y, scale[:, None], 128)


def test_softmax() -> None:
    kernel, rng = compiled(Softmax(), here()), np.random.default_rng(0)
    for m, n in ((1, 1), (3, 17), (2, 64)):
        x, y = (rng.standard_normal((m, n)) * 5).astype(np.float32), np.zeros((m, n), np.float32)
        kernel(x, y)
        e = np.exp(x.astype(np.float64) - x.max(1, keepdims=True))
        np.testing.assert_allclose(y, e / e.sum(1, keepdims=True), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("heads", "widths", "mask", "by_rows", "lengths"),
    [
        ((4, 4), (32, 32), None, (False,) * 4, (17, 17)),
        ((4, 2), (16, 16), (False, True, False, False), (True,) * 4, (12, 29)),
        ((3, 1), (5, 7), (False, False, False, False), (True, False, True, False), (1, 9)),
    ],
    ids=["plain", "grouped", "odd"],
)
def test_attention(heads: Any, widths: Any, mask: Any, by_rows: Any, lengths: Any) -> None:
    (h, g), (d, e), (s, t), b = heads, widths, lengths, 2
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in ((b, h, s, d), (b, g, t, d), (b, g, t, e)))
    kernel = compiled(Attention(h, g, d, e, 0.3, by_rows, mask), here())
    arguments = [a.transpose(0, 2, 1, 3).copy() if rows else a for a, rows in zip((q, k, v), by_rows, strict=False)]
    scores = np.einsum("bhsd,bhtd->bhst", q.astype(np.float64), k.repeat(h // g, 1)) * 0.3
    if mask is not None:
        sizes = [1 if broadcast else n for n, broadcast in zip((b, h, s, t), mask, strict=True)]
        added = np.where(rng.random(sizes) < 0.3, -np.inf, 0).astype(np.float32)
        added[0, 0, 0] = -np.inf  # a row that is masked throughout gives 0
        arguments.append(added)
        scores = scores + added
    top = scores.max(-1, keepdims=True)
    p = np.exp(scores - np.where(np.isfinite(top), top, 0))
    total = p.sum(-1, keepdims=True)
    expected = np.divide(p, total, out=np.zeros_like(p), where=total > 0) @ v.repeat(h // g, 1)
    y = np.zeros((b, s, h, e) if by_rows[3] else (b, h, s, e), np.float32)
    kernel(*arguments, y)
    np.testing.assert_allclose(y.transpose(0, 2, 1, 3) if by_rows[3] else y, expected, atol=3e-6)


EXACT = {
    "relu": lambda x: max(x, 0.0),
    "tanh": math.tanh,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


@pytest.mark.parametrize("name", EXACT)
def test_activations(name: str) -> None:
    x = np.concatenate([np.linspace(-30, 30, 4101), [0.0, 80.0, -80.0]]).astype(np.float32)
    y = np.zeros_like(x)
    compiled(Pointwise(name), here())(x, y)
    expected = np.array([EXACT[name](float(number)) for number in x])
    assert (np.abs(y - expected) <= 1e-6 * np.maximum(1, np.abs(expected))).all()


@pytest.mark.parametrize("granularity", ["static", "row"])
def test_smoothing_inside_the_quantizer(granularity: str) -> None:
    """x · multiplier is what is quantized, alone and behind a norm; the norm's own output stays as it is."""
    rng, m, count = np.random.default_rng(0), 3, 37
    x = rng.standard_normal((m, count)).astype(np.float32)
    multiplier = (rng.random(count) + 0.5).astype(np.float32)
    q, scale, zero = np.zeros((m, padded(count)), here().activation), np.zeros(m, np.float32), np.zeros(m, np.int32)
    after = [q] if granularity == "static" else [q, scale, zero]
    steps = [STEPS] if granularity == "static" else []
    compiled(Quantize(count, granularity, True), here())(x, multiplier, *steps, *after)
    column = (np.full((m, 1), SCALE), ZERO) if granularity == "static" else (scale[:, None], 128)
    check_integers(q, x * multiplier, *column)
    y, weight = np.zeros_like(x), np.ones(count, np.float32)
    kernel = compiled(Norm(count, 1e-5, False, False, granularity, True), here())
    kernel(x, weight, multiplier, *steps, y, *after)
    column = (np.full((m, 1), SCALE), ZERO) if granularity == "static" else (scale[:, None], 128)
    check_integers(q, y * multiplier, *column)
    np.testing.assert_allclose(y, x / np.sqrt((x.astype(np.float64) ** 2).mean(1, keepdims=True) + 1e-5), atol=1e-6)


@pytest.mark.parametrize("middle", [20, 200])
def test_rows_about_another_zero_point(middle: int) -> None:
    """The scale is the least that holds both ends of the row: nothing saturates, and 1 or 255 is reached."""
    rng, m, count = np.random.default_rng(0), 4, 37
    x = (rng.standard_normal((m, count)) + 1).astype(np.float32)
    x[0], x[1] = np.abs(x[0]), -np.abs(x[1])
    q, scale, zero = np.zeros((m, padded(count)), here().activation), np.zeros(m, np.float32), np.zeros(m, np.int32)
    compiled(Quantize(count, "row", zero_point=middle), here())(x, q, scale, zero)
    assert (zero == middle).all()
    expected = np.maximum(x.max(1) / np.float32(255 - middle), x.min(1) / np.float32(1 - middle))
    np.testing.assert_allclose(scale, expected, rtol=3e-7)
    check_integers(q, x, scale[:, None], middle)
    used = q[:, :count]
    assert ((used.max(1) == 255) | (used.min(1) == 1)).all()
