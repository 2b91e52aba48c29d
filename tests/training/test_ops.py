"""Each operator of the tables, with the attributes and the missing inputs that ONNX allows, against ONNX Runtime."""

from __future__ import annotations

import re

import numpy as np
import pytest

from qcompiler.graph.run import Runner
from tests.graph.tiny import tiny

pytest.importorskip("torch")
from qcompiler.training import rebuild
from qcompiler.training.ops import OPS
from tests.training.twins import relative

INPUTS = "float[2,3,4] x, float[2,3,4] u, int64[2,3] i, bool[2,3,4] b, float[3,4] m, float[2,4,9,7] image"
RNG = np.random.default_rng(0)
FEEDS = {
    "x": RNG.standard_normal((2, 3, 4)).astype(np.float32),
    "u": RNG.uniform(0.5, 2, (2, 3, 4)).astype(np.float32),
    "i": np.array([[5, -7, 4], [-1, 2, 1]]),
    "b": RNG.random((2, 3, 4)) < 0.5,
    "m": RNG.standard_normal((3, 4)).astype(np.float32),
    "image": RNG.standard_normal((2, 4, 9, 7)).astype(np.float32),
}
CONSTANTS = {
    "zero": np.array(0),
    "one": np.array(1),
    "two": np.array(2),
    "seven": np.array(7),
    "v0": np.array([0]),
    "v1": np.array([1]),
    "v2": np.array([2]),
    "last": np.array([-1]),
    "nothing": np.array([], np.int64),
    "ends": np.array([1, -1]),
    "mixed": np.array([0, -1, 2]),
    "parts": np.array([1, 2]),
    "flat": np.array([4, 3, 2]),
    "stops": np.array([5, 3]),
    "repeats": np.array([1, 2, 3]),
    "around": np.array([1, -1]),
    "threes": np.array([3, 0, 2]),
    "far": np.array([1 << 60]),
    "back": np.array([-(1 << 60)]),
    "minus": np.array([-2]),
    "pads": np.array([1, 0, 2, 0, 1, 3]),
    "places": np.array([[0, 2], [1, -1]]),
    "rows": np.array([[[1, -1, 0, 0]], [[2, 0, -3, 1]]]),
    "wide": np.array([5, 2, 3, 4]),
    "half": np.array(0.5, np.float32),
    "low": np.array(-0.2, np.float32),
    "kernel": RNG.standard_normal((6, 2, 3, 2)).astype(np.float32),
    "kernel1": RNG.standard_normal((5, 3, 2)).astype(np.float32),
    "six": RNG.standard_normal(6).astype(np.float32),
    "four": RNG.standard_normal(4).astype(np.float32),
    "square": RNG.standard_normal((4, 4)).astype(np.float32),
}
FLOAT = """Abs(x) Add(x, m) Ceil(x) Cos(x) Div(x, u) Erf(x) Exp(x) Floor(x) Log(u) Mul(x, m) Neg(x) Pow(u, x)
Reciprocal(u) Round(x) Sign(x) Sin(x) Sqrt(u) Sub(m, x) Max(x, m, u) Min(x, u) Where(b, x, m) Mod<fmod = 1>(x, u)
Clip(x) Clip(x, low) Clip(x, low, half) Clip(x, , half) CumSum(x, one)
ReduceMax(x) ReduceMean<keepdims = 0>(x, last) ReduceMin(x, ends) ReduceSum(x, nothing) ReduceL2(x, v1)
ReduceSum<noop_with_empty_axes = 1>(x) ReduceSum<noop_with_empty_axes = 1, keepdims = 0>(x, v0)
CastLike(b, x) Cast<to = 1>(b) Cast<to = 1>(i) Concat<axis = -2>(x, u, x) ConstantOfShape(threes) Expand(x, wide)
Expand(m, v1) Flatten(image) Flatten<axis = 0>(x) Flatten<axis = -1>(image) Gather<axis = 1>(x, mixed)
Gather<axis = -1>(x, places) Gather(m, places) Gather<axis = 1>(x, two) GatherElements<axis = 1>(x, rows)
GatherND(x, places) Identity(x) Pad(x, pads) Pad(x, pads, half) Pad(x, ends, , v1) Reshape(x, mixed)
Reshape<allowzero = 1>(x, flat) Slice(x, v1, far) Slice(x, ends, stops, ends) Slice(x, last, back, v1, minus)
Slice(x, v0, far, last, v2) Slice(x, v2, v1, v1) Squeeze(thin) Squeeze(thin, v1) Squeeze(thin, last) Tile(x, repeats)
Transpose(x) Transpose<perm = [1, 0, 2]>(x) Trilu(x) Trilu<upper = 0>(x, one) Unsqueeze(x, ends) Unsqueeze(x, v0)
Gelu(x) Gelu<approximate = "tanh">(x) Gemm(m, square, four) Gemm<alpha = 0.5, transA = 1, transB = 1>(square, m)
Gemm<beta = 2.0>(m, square, four) LayerNormalization(x, four) LayerNormalization<axis = 1, epsilon = 0.1>(x, m, four)
LeakyRelu(x) LeakyRelu<alpha = 0.3>(x) LogSoftmax<axis = 1>(x) MatMul(x, square) Relu(x) Sigmoid(x) Softmax(x)
Softmax<axis = 0>(x) Tanh(x) Conv(x, kernel1) Conv<group = 2>(image, kernel, six)
Conv<group = 2, pads = [1, 2, 1, 2], strides = [2, 1], kernel_shape = [3, 2]>(image, kernel)
Conv<group = 2, pads = [0, 2, 1, 0], dilations = [2, 3]>(image, kernel)"""
OTHER = {
    "int64": """Shape(x) Shape<start = 1>(x) Shape<start = -2, end = -1>(x) Size(x) Range(one, seven, two)
        Div(i, two) Mod(i, two) Mod<fmod = 1>(i, two) ReduceSum(i) ReduceMax(i) Cast<to = 7>(x) Neg(i) Abs(i)""",
    "bool": """And(b, nan) Or(b, nan) Xor(b, nan) Not(b) Equal(x, x) Greater(x, u) GreaterOrEqual(x, x) Less(x, u)
        LessOrEqual(x, u) IsNaN(x) Cast<to = 9>(i)""",
}
BEFORE = "thin = Unsqueeze(m, around) nan = Greater(x, half)"
CASES = [
    (kind, call)
    for kind, calls in {"float": FLOAT, **OTHER}.items()
    for call in re.findall(r"\w+(?:<[^>]*>)?\([^)]*\)", calls)
]
SEVERAL = {
    "Split<axis = 1>(x, parts)": 2,
    "Split<axis = -2, num_outputs = 2>(x)": 2,
    "Split<num_outputs = 2>(x)": 2,
    "TopK<axis = 1>(x, v2)": 2,
    "TopK<largest = 0>(x, v2)": 2,
}


@pytest.mark.parametrize(("kind", "call"), CASES, ids=[call for _, call in CASES])
def test_an_operator_computes_the_same(kind: str, call: str) -> None:
    model = tiny(f"g ({INPUTS}) => ({kind}[] y) {{ {BEFORE} y = {call} }}", CONSTANTS)
    want = Runner(model, threads=1)(FEEDS)["y"]
    got = rebuild(model)(**FEEDS)["y"].numpy()
    assert relative(want, got) <= 2e-6


@pytest.mark.parametrize(("call", "count"), SEVERAL.items())
def test_an_operator_of_several_outputs_computes_the_same(call: str, count: int) -> None:
    names = [f"y{index}" for index in range(count)]
    kinds = ["int64" if call.startswith("TopK") and index else "float" for index in range(count)]
    outputs = ", ".join(f"{kind}[] {name}" for kind, name in zip(kinds, names, strict=True))
    model = tiny(f"g ({INPUTS}) => ({outputs}) {{ {', '.join(names)} = {call} }}", CONSTANTS)
    want, got = Runner(model, threads=1)(FEEDS), rebuild(model)(**FEEDS)
    assert set(want) == set(names)
    assert max(relative(want[name], got[name].numpy()) for name in names) == 0


def test_no_operator_is_left_out() -> None:
    """Standard ones here; those of our own domain in test_rebuild, test_families and test_fake_quant."""
    called = {re.match(r"\w+", call).group() for call in [*SEVERAL, *(call for _, call in CASES)]}
    assert called == {name for domain, name in OPS if domain == ""}
