"""Carriers against the operators themselves: labels must move as ONNX Runtime moves numbers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from qcompiler.graph.absorb import fold
from qcompiler.graph.carriers import carry
from qcompiler.graph.labels import Labels, Step
from qcompiler.graph.shapes import concrete_shapes
from qcompiler.graph.verify import relative_error
from tests.graph.tiny import feeds_for, outputs, pairs, site_of, tiny

SHAPE = (2, 3, 12)


@st.composite
def layout_op(
    draw: st.DrawFn, shape: tuple[int, ...], count: int
) -> tuple[str, dict[str, np.ndarray], tuple[int, ...]]:
    """The text of one layout operator on a value of that shape, its constants, the shape it gives."""
    kinds = ["reshape", "transpose", "unsqueeze", "slice", "reverse", "gather", "concat", "split", "expand", "gathernd"]
    kind = draw(st.sampled_from(kinds))
    axis = draw(st.integers(0, len(shape) - 1))
    name = f"c{count}"
    if kind == "reshape":
        parts = draw(st.permutations([f for n in shape for f in (2, n // 2) if n % 2 == 0] or list(shape)))
        size = int(np.prod(shape))
        parts = parts if int(np.prod(parts)) == size else [size]
        return f"Reshape({{x}}, {name})", {name: np.array(parts)}, tuple(parts)
    if kind == "transpose":
        perm = draw(st.permutations(range(len(shape))))
        return f"Transpose<perm: ints = {list(perm)}>({{x}})", {}, tuple(shape[i] for i in perm)
    if kind in ("unsqueeze", "expand"):
        new = (*shape[:axis], 1, *shape[axis:])
        if kind == "unsqueeze":
            return f"Unsqueeze({{x}}, {name})", {name: np.array([axis])}, new
        new = (2, *shape)
        return f"Expand({{x}}, {name})", {name: np.array(new)}, new
    if kind == "slice":
        start = draw(st.integers(0, shape[axis] - 1))
        constants = {f"{name}s": np.array([start]), f"{name}e": np.array([2**31]), f"{name}a": np.array([axis])}
        new = (*shape[:axis], shape[axis] - start, *shape[axis + 1 :])
        return f"Slice({{x}}, {name}s, {name}e, {name}a)", constants, new
    if kind == "reverse":
        constants = {f"{name}s": np.array([-1]), f"{name}e": np.array([-(2**31)]), f"{name}a": np.array([axis])}
        return f"Slice({{x}}, {name}s, {name}e, {name}a, {name}s)", constants, shape
    if kind == "gather":
        picks = draw(st.lists(st.integers(-shape[axis], shape[axis] - 1), min_size=1, max_size=4))
        new = (*shape[:axis], len(picks), *shape[axis + 1 :])
        return f"Gather<axis: int = {axis}>({{x}}, {name})", {name: np.array(picks)}, new
    if kind == "gathernd":
        picks = draw(st.lists(st.integers(0, shape[0] - 1), min_size=1, max_size=3))
        return f"GatherND({{x}}, {name})", {name: np.array(picks)[:, None]}, (len(picks), *shape[1:])
    if kind == "concat":
        new = (*shape[:axis], 2 * shape[axis], *shape[axis + 1 :])
        return f"Concat<axis: int = {axis}>({{x}}, {{x}})", {}, new
    if shape[axis] == 1:
        return "Identity({x})", {}, shape
    half = -(-shape[axis] // 2)
    text = f"Split<axis: int = {axis}, num_outputs: int = 2>({{x}})"
    return text, {}, (*shape[:axis], half, *shape[axis + 1 :])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_labels_move_as_numbers_do(data: st.DataObject) -> None:
    shape, lines, constants, x = SHAPE, [], {}, "x"
    for i in range(data.draw(st.integers(1, 5))):
        text, new, shape = data.draw(layout_op(shape, i))
        if np.prod(shape) > 5000 or len(shape) > 6:
            break
        y = f"v{i}"
        lines.append(f"{y}, rest{i} = {text.format(x=x)}" if text.startswith("Split") else f"{y} = {text.format(x=x)}")
        constants |= new
        x = y
    lines.append(f"y = Identity({x})")
    model = tiny(f"g (float[2,3,12] x) => (float[N] y) {{ {' '.join(lines)} }}", constants)
    numbers = np.random.default_rng(0).permutation(72).reshape(SHAPE)
    expected = outputs(rankless(model), {"x": numbers.astype(np.float32)})["y"]
    assert (follow(model, numbers.astype(np.int32)) == expected).all()


def rankless(model: ir.Model) -> ir.Model:
    model.graph.outputs[0].shape = None
    return model


def follow(model: ir.Model, labels: Labels) -> Labels:
    facts = concrete_shapes(model)
    carried: dict[ir.Value, Labels] = {model.graph.inputs[0]: labels}
    for node in model.graph:
        step = Step(node, [carried.get(value) if value is not None else None for value in node.inputs], facts)
        for output, result in zip(node.outputs, carry(step), strict=True):
            assert result is not None
            carried[output] = result
        assert not step.blocked
    return carried[model.graph.outputs[0]]


@pytest.mark.parametrize(
    ("between", "scale", "shift"),
    [
        ("m = Cast<to: int = 1>(v)", True, True),
        ("m = Cast<to: int = 6>(v) c = Cast<to: int = 1>(m)", False, False),
        ("m = Add(v, v)", True, False),
        ("m = Sub(v, v)", True, False),
        ("m = Mul(v, v)", False, False),
        ("m = Mul(v, x)", True, False),
        ("m = Div(v, x)", True, False),
        ("m = Div(x, v)", False, False),
        ("m = Add(v, x)", False, False),
        ("r = Relu(v) m = Add(r, other)", False, False),
        ("i = Identity(v) r = Slice(v, minus, end, two, minus) m = Add(i, r)", False, False),
        ("t = IsNaN(x) m = Where(t, zero, v)", True, False),
        ("t = IsNaN(x) m = Where(t, v, v)", True, True),
        ("t = IsNaN(x) m = Where(t, v, other)", False, False),
        ("t = IsNaN(x) m = Where(t, v, x)", False, False),
        ("m = ReduceMean(v, one)", True, True),
        ("m = ReduceSum(v, one)", True, False),
        ("r = ReduceMean(v, two) m = Mul(r, v)", False, False),
        ("m = Softmax(v)", False, False),
        ("m = LayerNormalization(v, other)", False, False),
        ("m = Exp(v)", False, False),
        ("k = Abs(x) m = Mul(v, k)", True, False),
        ("m = com.example.Unknown(v)", False, False),
        ("s = Shape(v) m = Identity(v)", True, True),
        ("m = Concat<axis: int = 1>(v, x)", False, False),
        ("m = Concat<axis: int = 1>(v, v)", True, True),
        ("d = ArgMax<axis: int = 1, keepdims: int = 0>(x) m = Gather<axis: int = 1>(v, d)", True, True),
    ],
)
def test_what_may_stand_between_a_linear_and_a_linear(between: str, scale: bool, shift: bool) -> None:
    last = "c" if " c = " in between else "m"
    model = tiny(
        f"g (float[B,S,8] x) => (float[B,S,6] y) {{ v = MatMul(x, w1) {between} y = MatMul({last}, w2) }}",
        {
            "w1": [8, 8],
            "w2": [8, 6],
            "other": [8],
            "zero": np.zeros(1, np.float32),
            "one": np.array([1]),
            "two": np.array([2]),
            "minus": np.array([-1]),
            "end": np.array([-(2**31)]),
        },
    )
    assert pairs(model).get("v") == ({"y"} if scale else None)
    if scale:
        assert (not site_of(model, "v").shift_blocked.any()) == shift


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_folds_through_any_layout_keep_the_outputs(data: st.DataObject) -> None:
    """Whatever the layout operators do, what the analysis leaves free folds exactly."""
    shape, lines, constants, x = SHAPE, [], {"w1": [12, 12]}, "v"
    for i in range(data.draw(st.integers(0, 4))):
        text, new, shape = data.draw(layout_op(shape, i))
        if np.prod(shape) > 2000 or len(shape) > 6:
            return
        y = f"v{i}"
        lines.append(f"{y}, rest{i} = {text.format(x=x)}" if text.startswith("Split") else f"{y} = {text.format(x=x)}")
        constants |= new
        x = y
    body = f"v = MatMul(x, w1) {' '.join(lines)} y = MatMul({x}, w2)"
    model = rankless(
        tiny(f"g (float[2,3,12] x) => (float[N] y) {{ {body} }}", {**constants, "w2": [max(shape[-1], 1), 5]})
    )
    site = site_of(model, "v")
    event(f"free share {np.round((~site.scale_blocked).mean(), 1)}")
    feeds = feeds_for(model)
    before = outputs(model, feeds)
    if site.foldable:
        rng = np.random.default_rng(0)
        fold(model, site, np.exp(rng.uniform(-2, 2, 12)), rng.standard_normal(12))
        assert relative_error(before, outputs(model, feeds)) < 1e-5
