"""Attention's lowering: exact in every layout, and plain operators where something is not understood."""

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.graph.functions import inline_functions
from qcompiler.graph.shapes import concrete_shapes
from qcompiler.targets.ort import LOWERED_OPSET
from qcompiler.targets.ort.attention import lower_attention
from tests.targets.ort.graphs import FLOAT, Graph, decoder, feeds, random_weights, run_optimised, run_plain

B, S, T, H, D = 2, 5, 7, 4, 8


def lower(model):
    notes = lower_attention(model, concrete_shapes(model))
    inline_functions(model)
    model.graph.opset_imports[""] = LOWERED_OPSET
    return notes


def check(model, values, tolerance=1e-5):
    before = run_plain(model, values)
    notes = lower(model)
    np.testing.assert_allclose(run_optimised(model, values), before, rtol=0, atol=tolerance * np.abs(before).max())
    return notes, [node.op_type for node in model.graph]


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def plain_graph(shapes, function="MaskedAttention"):
    """q, k, v (and mask) as graph inputs of these shapes."""
    g = Graph(None, random_weights())
    values = [g.input(name, FLOAT, list(shape)) for name, shape in zip("qkvm", shapes, strict=False)]
    return g, g.op(function, *values, scale=0.3, name="attention")


@pytest.mark.parametrize(
    "mask", [("B", 1, "S", "S"), ("B", H, "S", "S"), (1, 1, "S", "S"), ("S", "S"), ("B", 1, 1, "S")]
)
def test_masks_of_every_shape(mask):
    g, y = plain_graph([("B", H, S, D)] * 3 + [tuple({"S": S}.get(d, d) for d in mask)])
    g.output(y, "y")
    sizes = {"B": B, "S": S}
    mask_values = draw(*(sizes.get(d, d) for d in mask), seed=4)
    mask_values[..., -1] = -np.inf
    values = {name: draw(B, H, S, D, seed=i) for i, name in enumerate("qkv")} | {"m": mask_values}
    notes, operators = check(g.model, values)
    assert notes[0].what == "Attention"
    assert ("Expand" in operators) == (mask not in [("B", 1, "S", "S"), ("B", H, "S", "S"), (1, 1, "S", "S")])


def test_rows_masked_throughout_are_zero():
    g, y = plain_graph([("B", H, S, D)] * 3 + [("B", 1, S, S)])
    g.output(y, "y")
    mask = np.zeros((B, 1, S, S), np.float32)
    mask[0, 0, 1] = -np.inf
    values = {name: draw(B, H, S, D, seed=i) for i, name in enumerate("qkv")} | {"m": mask}
    check(g.model, values)
    assert (run_optimised(g.model, values)[0, :, 1] == 0).all()


def test_unmasked_and_read_by_two():
    g, y = plain_graph([("B", H, "S", D)] * 3, "Attention")
    g.output(g.op("Mul", y, y), "squared")
    g.output(y, "y")
    notes, operators = check(g.model, {name: draw(B, H, S, D, seed=i) for i, name in enumerate("qkv")})
    assert "[B, H, S, D]" in notes[0].why
    assert "Attention" in operators


def test_one_head_of_keys_for_all():
    g, y = plain_graph([("B", H, "S", D), ("B", 1, "S", D), ("B", 1, "S", D)], "Attention")
    g.output(y, "y")
    values = {"q": draw(B, H, S, D), "k": draw(B, 1, S, D, seed=1), "v": draw(B, 1, S, D, seed=2)}
    notes, _ = check(g.model, values)
    assert f"{H} heads sharing 1" in notes[0].why


def test_cross_attention_of_flat_operands():
    g = Graph(None, random_weights())
    x = g.input("x", FLOAT, ["B", S, H * D])
    other = g.input("other", FLOAT, ["B", T, H * D])
    q, k, v = (g.split_heads(value, H, D) for value in (x, other, other))
    mask = g.input("m", FLOAT, ["B", 1, 1, T])
    y = g.op("MaskedAttention", q, k, v, mask, scale=0.3)
    g.output(g.merge_heads(y, H * D), "y")
    values = {"x": draw(B, S, H * D), "other": draw(B, T, H * D, seed=1), "m": draw(B, 1, 1, T, seed=2)}
    _, operators = check(g.model, values)
    assert "Transpose" not in operators


def test_a_norm_between_the_heads_and_the_transpose():
    g = Graph(None, random_weights())
    x = g.input("x", FLOAT, ["B", "S", H * D])
    heads = g.op("Reshape", x, np.array([0, 0, H, D]))
    weight = g.constant(draw(D))
    q, k = (g.op("Transpose", g.op("RMSNorm", heads, weight, epsilon=e), perm=[0, 2, 1, 3]) for e in (1e-5, 1e-2))
    y = g.op("Attention", q, k, g.split_heads(x, H, D), scale=0.3)
    g.output(g.merge_heads(y, H * D), "y")
    _, operators = check(g.model, {"x": draw(B, S, H * D)})
    assert "Transpose" not in operators


def test_flat_operands_with_an_output_that_is_not_merged():
    g = Graph(None, random_weights())
    x = g.input("x", FLOAT, ["B", "S", H * D])
    y = g.op("Attention", *(g.split_heads(x, H, D) for _ in range(3)), scale=0.3)
    g.output(g.op("Neg", y), "y")
    _, operators = check(g.model, {"x": draw(B, S, H * D)})
    assert operators.count("Transpose") == 1


@pytest.mark.parametrize("differ", [False, True])
def test_rotation_is_lowered_only_where_the_halves_are_proved_equal(differ):
    model = decoder(None, halves_differ=differ)
    _, operators = check(model, feeds(model))
    assert ("RotaryEmbedding" in operators) == (not differ)
    assert "Attention" in operators


def test_rotation_tables_that_are_constants():
    g = Graph(None, random_weights())
    x = g.input("x", FLOAT, ["B", S, H * D])
    half = draw(S, D // 2, seed=5)
    table = g.constant(np.concatenate([half, half], -1))
    q = g.op("RotaryEmbedding", g.split_heads(x, H, D), table, table)
    y = g.op("Attention", q, q, g.split_heads(x, H, D), scale=0.3)
    g.output(g.merge_heads(y, H * D), "y")
    _, operators = check(g.model, {"x": draw(B, S, H * D)})
    assert operators.count("RotaryEmbedding") == 1


def test_repeat_in_another_order_is_not_taken_for_gqa():
    """Expand before the heads' axis repeats the whole list of heads, [0, 1, 0, 1], not each head beside itself."""
    g = Graph(None, random_weights())
    x = g.input("x", FLOAT, ["B", S, H * D])
    kv = g.input("kv", FLOAT, ["B", S, 2 * D])

    def tiled(value: ir.Value) -> ir.Value:
        wide = g.op("Expand", g.op("Unsqueeze", value, np.array([1])), np.array([1, H // 2, 1, 1, 1]))
        return g.op("Reshape", wide, np.array([0, H, -1, D]))

    k = tiled(g.split_heads(kv, 2, D))
    y = g.op("Attention", g.split_heads(x, H, D), k, k, scale=0.3)
    g.output(g.merge_heads(y, H * D), "y")
    notes, _ = check(g.model, {"x": draw(B, S, H * D), "kv": draw(B, S, 2 * D, seed=1)})
    assert notes[0].why.startswith(f"{H} heads, ")


def test_what_is_not_understood_stays_in_plain_operators():
    g, y = plain_graph([("B", H, "S", D), (1, H, "S", D), (1, H, "S", D)], "Attention")  # k and v shared by the batch
    g.output(y, "y")
    values = {"q": draw(B, H, S, D), "k": draw(1, H, S, D, seed=1), "v": draw(1, H, S, D, seed=2)}
    notes, operators = check(g.model, values)
    assert notes[0].what == "attention left in plain operators"
    assert "Softmax" in operators


def test_a_rotation_of_a_part_of_the_head_is_lowered_in_place():
    """GPT-NeoX: the first half of each head is rotated, the other is not; only one of q and k here."""
    g = Graph(None, random_weights())
    x = g.input("x", FLOAT, ["B", S, H * D])
    half = draw(S, D // 4, seed=5)
    table = g.constant(np.concatenate([half, half], -1)[None, None])
    heads = g.split_heads(x, H, D)
    first = g.op("Slice", heads, np.array([0]), np.array([D // 2]), np.array([-1]))
    second = g.op("Slice", heads, np.array([D // 2]), np.array([D]), np.array([-1]))
    q = g.op("Concat", g.op("RotaryEmbedding", first, table, table), second, axis=-1)
    y = g.op("Attention", q, heads, heads, scale=0.3)
    g.output(g.merge_heads(y, H * D), "y")
    _, operators = check(g.model, {"x": draw(B, S, H * D)})
    assert operators.count("RotaryEmbedding") == 1
    assert "Neg" not in operators


def test_one_table_for_a_rotation_before_and_one_inside_attention():
    g = Graph(None, random_weights())
    x = g.input("x", FLOAT, ["B", S, H * D])
    half = draw(S, D // 2, seed=5)
    table = g.constant(np.concatenate([half, half], -1))
    k = g.op("Neg", g.op("RotaryEmbedding", g.split_heads(x, H, D), table, table))
    q = g.op("RotaryEmbedding", g.split_heads(x, H, D), table, table)
    y = g.op("Attention", q, k, g.split_heads(x, H, D), scale=0.3)
    g.output(g.merge_heads(y, H * D), "y")
    _, operators = check(g.model, {"x": draw(B, S, H * D)})
    assert operators.count("RotaryEmbedding") == 2
    assert operators.count("Slice") == 1
