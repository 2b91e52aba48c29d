"""rebuild(): names, taps, gradients, the way back, and what is refused."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.core import DataError, ModelError, OptionError
from qcompiler.graph.edit import array_of
from qcompiler.graph.run import Runner
from tests.graph.tiny import feeds_for, tiny
from tests.passes.blocks import block

torch = pytest.importorskip("torch")
from qcompiler.training import rebuild, write_back  # noqa: E402
from tests.training.twins import nodes_apart, outputs_apart, relative  # noqa: E402

NORM_AND_ATTENTION = """g (float[B,4,S,8] x, float[B,1,S,S] mask) => (float[B,4,S,8] y) {
    h = qcompiler.RMSNorm <epsilon = 1e-5> (x, gain)
    q0 = MatMul(h, wq)
    q = qcompiler.RotaryEmbedding(q0, c, s)
    a = qcompiler.MaskedAttention <scale = 0.3> (q, h, h, mask)
    g = Sigmoid(a)
    m = Mul(a, g)
    t = Add(m, x)
    y = LayerNormalization <epsilon = 1e-6> (t, gain2, b)
}"""
SHAPES = {"gain": (8,), "wq": (8, 8), "c": (1, 1, 5, 8), "s": (1, 1, 5, 8), "gain2": (8,), "b": (8,)}


def test_outputs_taps_and_inputs_go_by_name() -> None:
    model = block()
    feeds = feeds_for(model)
    got = rebuild(model, taps=["p", "h", "x"])(**feeds)
    assert set(got) == {"y", "logits", "p", "h", "x"}
    want = Runner(model, ["p", "h"], threads=1)(feeds)
    assert max(relative(want[name], got[name].numpy()) for name in want) <= 1e-6
    assert torch.equal(got["x"], torch.from_numpy(feeds["x"]))


def test_weights_are_the_float_initializers_and_the_modules_parameters() -> None:
    model = block()
    rebuilt = rebuild(model)
    assert set(rebuilt.weights) == {
        name for name, v in model.graph.initializers.items() if array_of(v).dtype.kind == "f"
    }
    assert {id(p) for p in rebuilt.weights.values()} == {id(p) for p in rebuilt.module.parameters()}
    assert not any(parameter.requires_grad for parameter in rebuilt.weights.values())
    np.testing.assert_array_equal(rebuilt.weights["wq"].numpy(), array_of(model.graph.initializers["wq"]))


def test_names_that_python_does_not_take() -> None:
    """Dots, digits, keywords, and names that become one where the dots go."""
    model = block()
    model.graph.inputs[0].name = "in.0:x"
    for old, new in (("wq", "layer.0/w"), ("wk", "layer_0_w"), ("wu", "lambda"), ("b", "0")):
        value = model.graph.initializers.pop(old)
        value.name = new
        model.graph.register_initializer(value)
    feeds = {"in.0:x": feeds_for(block())["x"]}
    assert outputs_apart(model, feeds) <= 1e-6
    assert {"layer.0/w", "layer_0_w", "lambda", "0"} <= set(rebuild(model).weights)
    two = tiny("g (float[2] self, float[2] a_b) => (float[2] y) { y = Sub(self, a_b) }", {})
    two.graph.inputs[0].name = "a.b"
    got = rebuild(two)(**{"a.b": np.float32([5, 6]), "a_b": np.float32([1, 2])})
    assert got["y"].tolist() == [4, 4]


def test_gradients_of_a_float_graph() -> None:
    """By finite differences, in float64, with a row that is masked throughout."""
    rebuilt = rebuild(tiny(NORM_AND_ATTENTION, SHAPES))
    rebuilt.module.double()
    rng = np.random.default_rng(0)
    x = torch.tensor(rng.standard_normal((2, 4, 5, 8)), requires_grad=True)
    mask = torch.zeros(2, 1, 5, 5, dtype=torch.float64)
    mask[0, 0, 2] = mask[1, 0, :, 3:] = -torch.inf
    weights = list(rebuilt.weights.values())
    for weight in weights:
        weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: rebuilt(x=x, mask=mask)["y"], (x, *weights), fast_mode=True)


def test_a_row_that_is_masked_throughout_is_zero() -> None:
    model = tiny(NORM_AND_ATTENTION, SHAPES)
    feeds = feeds_for(model)
    feeds["mask"] = np.zeros((3, 1, 5, 5), np.float32)
    feeds["mask"][0, 0, 2] = -np.inf
    apart = nodes_apart(model, feeds)
    assert set(apart) >= {"a", "y"}
    assert max(apart.values()) <= 1e-6
    rebuilt = rebuild(model, taps=["a"])
    assert not rebuilt(**feeds)["a"][0, :, 2].any()


def test_what_is_trained_is_written_back_and_nothing_else() -> None:
    model, feeds = block(), feeds_for(block())
    before = {name: array_of(value).copy() for name, value in model.graph.initializers.items()}
    rebuilt = rebuild(model)
    for name in ("wq", "gain2"):
        rebuilt.weights[name].requires_grad_()
    optimizer = torch.optim.SGD([rebuilt.weights["wq"], rebuilt.weights["gain2"]], lr=0.1)
    loss = rebuilt(**feeds)["y"].square().mean()
    loss.backward()
    optimizer.step()
    assert set(write_back(rebuilt, model)) == {"wq", "gain2"}
    changed = {name for name, value in model.graph.initializers.items() if (array_of(value) != before[name]).any()}
    assert changed == {"wq", "gain2"}
    assert outputs_apart(model, feeds) <= 1e-6
    with torch.no_grad():
        assert rebuilt(**feeds)["y"].square().mean() < loss
    want = Runner(model, threads=1)(feeds)["y"]
    assert relative(want, rebuilt(**feeds)["y"].detach().numpy()) <= 1e-6


def test_what_is_written_back_does_not_change_with_further_training() -> None:
    model = block()
    rebuilt = rebuild(model)
    rebuilt.weights["wq"].requires_grad_()
    write_back(rebuilt, model)
    before = array_of(model.graph.initializers["wq"]).copy()
    with torch.no_grad():
        rebuilt.weights["wq"] += 1
    np.testing.assert_array_equal(array_of(model.graph.initializers["wq"]), before)


@pytest.mark.parametrize("kind", [ml_dtypes.bfloat16, np.float16])
def test_weights_of_16_bits_are_computed_with_trained_and_written_back(kind: type) -> None:
    text = "g (float[B,8] x) => (float[B,8] y) { wide = Cast<to = 1>(w) h = MatMul(x, wide) y = Add(h, b) }"
    model = tiny(text, {"w": (8, 8), "b": (8,)})
    weight = model.graph.initializers["w"]
    weight.const_value = ir.tensor(array_of(weight).astype(kind), name="w")
    weight.dtype = weight.const_value.dtype
    feeds = feeds_for(model)
    assert outputs_apart(model, feeds) <= 1e-6
    rebuilt, before = rebuild(model), array_of(weight).copy()
    rebuilt.weights["w"].requires_grad_()
    rebuilt(**feeds)["y"].sum().backward()
    with torch.no_grad():
        rebuilt.weights["w"] -= rebuilt.weights["w"].grad
    assert write_back(rebuilt, model) == ["w"]
    after = array_of(model.graph.initializers["w"])
    assert after.dtype == before.dtype == kind
    assert (after != before).all()
    assert outputs_apart(model, feeds) <= 1e-6


def test_a_data_type_that_torch_does_not_compute_with_is_refused() -> None:
    model = tiny("g (float[B,8] x) => (float[B,8] y) { w = Cast<to = 1>(q) y = MatMul(x, w) }", {"q": (8, 8)})
    model.graph.initializers["q"].const_value = ir.tensor(np.ones((8, 8), ml_dtypes.int4), name="q")
    with pytest.raises(ModelError, match=r"^numbers of type INT4 cannot be trained through"):
        rebuild(model)


def test_an_operator_without_a_torch_function_is_refused_by_name() -> None:
    model = tiny("g (float[B,4] x) => (float[B,4] y) { z = Hardmax(x) y = Add(z, x) }", {})
    with pytest.raises(
        ModelError, match=r"^node 'z' cannot be trained through: operator Hardmax has no torch function"
    ):
        rebuild(model)


def test_an_operator_of_a_foreign_domain_is_named_with_it() -> None:
    model = tiny("g (float[B,4] x) => (float[B,4] y) { y = Relu(x) }", {})
    model.graph[0].domain = "com.microsoft"
    with pytest.raises(ModelError, match=r"operator com\.microsoft::Relu has"):
        rebuild(model)


def test_an_attribute_that_the_function_does_not_hold_for_is_refused() -> None:
    text = "g (float[B,4] x, int64 axis) => (float[B,4] y) { y = CumSum <exclusive = 1> (x, axis) }"
    with pytest.raises(ModelError, match=r"^node 'y' cannot be trained through: CumSum with exclusive=1 has no"):
        rebuild(tiny(text, {}))


def test_taps_and_inputs_that_do_not_exist() -> None:
    with pytest.raises(OptionError, match="tap 'nowhere' is no value"):
        rebuild(block(), taps=["nowhere"])
    with pytest.raises(DataError, match="input 'x' of the rebuilt graph is missing: it takes x"):
        rebuild(block())()
