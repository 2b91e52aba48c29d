"""split is the identity in float; it finds the channels that a few tokens make large, and takes them out."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.graph.canonical import check
from qcompiler.graph.edit import array_of
from qcompiler.graph.linear import linear_named
from qcompiler.graph.run import Runner
from qcompiler.passes.base import Pass
from qcompiler.passes.fold import Fold
from qcompiler.passes.smooth import Smooth
from qcompiler.passes.split import Split
from tests.graph.tiny import tiny
from tests.passes.blocks import apply, context, error, quantize

WIDTH = 64
LOUD = [3, 17]
GRAPH = f"""g (float[B,S,{WIDTH}] x) => (float[B,S,24] y, float[B,S,16] z) {{
    a = Gelu(x)
    y0 = MatMul(a, w1)  y1 = Add(y0, b1)  y = Mul(y1, y1)
    z0 = MatMul(a, w2)  z = Mul(z0, z0)
}}"""
"""Squares, because a Linear that is read as it is counts as an output head."""
TWO = Split(channels=2)


def model_of(seed: int = 0) -> ir.Model:
    rng = np.random.default_rng(seed)
    shapes = {"w1": (WIDTH, 24), "w2": (WIDTH, 16), "b1": (24,)}
    return tiny(GRAPH, {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()})


def tokens(seed: int, loud: float = 100.0) -> list[dict[str, npt.NDArray[np.float32]]]:
    """Normal rows; in one of twenty the loud channels are ``loud`` times as large."""
    rng = np.random.default_rng(seed)
    batches = []
    for _ in range(3):
        x = rng.standard_normal((8, 16, WIDTH)).astype(np.float32)
        rows = rng.random((8, 16)) < 0.05
        for channel in LOUD:
            x[rows, channel] = loud * (1 + rng.random(rows.sum()))
        batches.append({"x": x})
    return batches


def run(model: ir.Model, data: list[dict[str, npt.NDArray[np.float32]]]) -> dict[str, npt.NDArray[np.float32]]:
    runner = Runner(model, threads=1)
    results = [runner(feeds) for feeds in data]
    return {name: np.concatenate([result[name] for result in results]) for name in results[0]}


def test_the_loud_channels_leave_and_the_outputs_stay() -> None:
    model, data = model_of(), tokens(1)
    before = run(model, data)
    result = apply(TWO, model, context(), data)
    check(model)
    after = run(model, data)
    for name, reference in before.items():
        assert np.abs(after[name] - reference).max() <= 1e-5 * np.abs(reference).max()
    assert {note.node for note in result.notes} == {"y0", "z0"}
    assert all("channels 3, 17 in float" in note.why for note in result.notes)
    np.testing.assert_array_equal(array_of(linear_named(model, "y0").weight)[LOUD], 0)
    np.testing.assert_array_equal(
        array_of(linear_named(model, "y0.outliers").weight), array_of(model_of().graph.initializers["w1"])[LOUD]
    )


@pytest.mark.parametrize("scheme", ["w8a8-o3", "w8a8-dynamic"])
@pytest.mark.parametrize("then", [(), (Smooth(),)], ids=["alone", "smoothed"])
def test_integers_lose_less_without_them(scheme: str, then: tuple[Pass, ...]) -> None:
    """On tokens that calibration did not see; the rest of the row no longer shares a scale with its outlier."""
    held_out, ctx = tokens(2), context(scheme)
    reference = run(model_of(), held_out)
    plain, split = model_of(), model_of()
    quantize(plain, ctx, *then, data=tokens(1))
    quantize(split, ctx, TWO, *then, data=tokens(1))
    for model in (plain, split):
        apply(Fold(), model, ctx)
    quiet = np.concatenate([np.abs(feeds["x"]).max(-1) < 50 for feeds in held_out])
    for name, exact in reference.items():
        noisy, better = (run(model, held_out)[name] for model in (plain, split))
        if scheme == "w8a8-o3":  # per token, a quiet row has a scale of its own anyway
            assert 2 * error(exact[quiet], better[quiet]) < error(exact[quiet], noisy[quiet])
        assert 2 * error(exact[~quiet], better[~quiet]) < error(exact[~quiet], noisy[~quiet])


def test_the_small_product_stays_in_float_with_its_reason() -> None:
    model, data = model_of(), tokens(1)
    *_, annotated, _ = quantize(model, context(), TWO, data=data)
    reasons = {note.node: note.why for note in annotated.notes if note.what == "left in float"}
    assert reasons == {f"{name}.outliers": "outlier channels, kept in float by split" for name in ("y0", "z0")}
    assert linear_named(model, "y0.outliers").weight_quant is None
    assert linear_named(model, "y0").weight_quant is not None


def test_even_channels_are_left_alone() -> None:
    model = model_of()
    weights = {name: array_of(value).copy() for name, value in model.graph.initializers.items()}
    result = apply(TWO, model, context(), tokens(1, loud=1.0))
    assert not result.changed
    assert len(model.graph) == 6
    for name, array in weights.items():
        np.testing.assert_array_equal(array_of(model.graph.initializers[name]), array)


def test_an_output_head_is_left_alone() -> None:
    text = f"g (float[B,S,{WIDTH}] x) => (float[B,S,24] y) {{ y = MatMul(x, w1) }}"
    weight = np.random.default_rng(0).standard_normal((WIDTH, 24)).astype(np.float32)
    assert not apply(TWO, tiny(text, {"w1": weight}), context(), tokens(1)).changed


def test_shared_weights_are_left_shared() -> None:
    text = f"""g (float[B,S,{WIDTH}] x) => (float[B,S,{WIDTH}] y) {{
        y1 = MatMul(x, w1)  y2 = MatMul(y1, w1)  y = Mul(y2, y2)
    }}"""
    weight = np.random.default_rng(0).standard_normal((WIDTH, WIDTH)).astype(np.float32)
    assert not apply(TWO, tiny(text, {"w1": weight}), context(), tokens(1)).changed


def test_an_input_of_few_channels_is_left_alone() -> None:
    assert not apply(Split(channels=8), model_of(), context(), tokens(1)).changed


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**16), count=st.integers(1, 4))
def test_any_split_is_the_identity_in_float(seed: int, count: int) -> None:
    """x W = (m * x) (m * W) + x[:, o] W[o, :], whatever the outlier channels o are."""
    model, data = model_of(seed), tokens(seed, loud=10.0)[:1]
    before = run(model, data)
    assert apply(Split(channels=count, gain=0.0), model, context(), data).changed
    for name, after in run(model, data).items():
        assert np.abs(after - before[name]).max() <= 1e-5 * np.abs(before[name]).max()
