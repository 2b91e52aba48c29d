from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from qcompiler.core import ModelError
from qcompiler.graph.rules import canonicalise
from tests.graph.rules.spelling import counts, normal, raised, spelled

X = {"x": normal(2, 3, 4, seed=5)}


@pytest.mark.parametrize(
    "body",
    [
        "u = Unsqueeze<axes = [1]>(x) s = ReduceSum<axes = [2], keepdims = 0>(u) y = Squeeze<axes = [1]>(s)",
        """m = ReduceMax<axes = [1]>(x) n = ReduceMin<axes = [-1]>(x) a = ReduceL2<axes = [1]>(x) b = Add(m, n)
            y = Add(a, b)""",
        "y = Softmax<axis = 2>(x)",
        "y = LogSoftmax<axis = -1>(x)",
        "a, b = Split<axis = 2, split = [1, 3]>(x) y = Concat<axis = 2>(b, a)",
        "a, b = Split<axis = 2>(x) y = Concat<axis = 2>(b, a)",
        "u = Unsqueeze<axes = [3]>(x) y = Softmax<axis = 2>(u)",
    ],
)
@pytest.mark.parametrize("opset", [11, 12])
def test_old_operators_say_the_same_in_opset_21(body: str, opset: int) -> None:
    model = raised(spelled(f"g (float[2, 3, 4] x) => (float y) {{ {body} }}", opset=opset), X)
    assert model.graph.opset_imports == {"": 21}


def test_the_ratio_of_a_dropout_goes_with_it() -> None:
    body = "d = Dropout<ratio = 0.3>(x) y = Abs(d)"
    assert counts(raised(spelled(f"g (float[2, 3, 4] x) => (float y) {{ {body} }}", opset=11), X)) == {"Abs": 1}


@pytest.mark.parametrize("opset", [13, 14, 15, 16, 17])
def test_reductions_of_the_middle_opsets(opset: int) -> None:
    body = "a = ReduceMean<axes = [1], keepdims = 0>(x) i = Constant<value_ints = [0]>() y = Unsqueeze(a, i)"
    raised(spelled(f"g (float[2, 3, 4] x) => (float y) {{ {body} }}", opset=opset), X)


def test_a_softmax_over_several_axes_is_refused_by_name() -> None:
    model = spelled("g (float[2, 3, 4] x) => (float y) { y = Softmax<axis = 1>(x) }", opset=11)
    with pytest.raises(ModelError, match="over several axes at once"):
        canonicalise(model)


def test_operators_in_subgraphs_are_converted_too() -> None:
    body = """g (float[2, 3, 4] x, bool c) => (float y) { y = If (c) <
        then_branch = t () => (float a) { a = ReduceSum<axes = [1]>(x) }, else_branch = e () => (float b) {
        b = Identity(x) }> }"""
    for condition in (True, False):
        raised(spelled(body, opset=12), {**X, "c": np.array(condition)})


@pytest.mark.parametrize("opset", [10, 24, 7])
def test_other_opsets_are_refused(opset: int) -> None:
    with pytest.raises(ModelError, match=f"opset {opset}; export it"):
        canonicalise(spelled("g (float[4] x) => (float[4] y) { y = Abs(x) }", opset=opset))


def test_a_model_without_standard_operators_is_refused() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["acme": 1]> g (float[4] x) => (float[4] y) { y = acme.Do(x) }'
    )
    with pytest.raises(ModelError, match="no standard ONNX opset"):
        canonicalise(ir.from_proto(proto))


def test_rms_normalization_of_opset_23_is_ours() -> None:
    body = "y = RMSNormalization<axis = -1, epsilon = 0.01>(x, w)"
    model = raised(spelled(f"g (float[2, 3, 4] x) => (float[2, 3, 4] y) {{ {body} }}", {"w": (4,)}, opset=23), X)
    assert counts(model) == {"qcompiler::RMSNorm": 1}


ATTENTIONS = {
    "rank 4": ("float[2, 2, 3, 4]", "float[2, 2, 5, 4]", "", None),
    "scale": ("float[2, 2, 3, 4]", "float[2, 2, 5, 4]", "<scale = 0.3>", None),
    "grouped": ("float[2, 4, 3, 4]", "float[2, 2, 5, 4]", "", None),
    "rank 3": ("float[2, 3, 8]", "float[2, 5, 8]", "<q_num_heads = 2, kv_num_heads = 2>", None),
    "causal": ("float[2, 2, 5, 4]", "float[2, 2, 5, 4]", "<is_causal = 1>", None),
    "float mask": ("float[2, 2, 3, 4]", "float[2, 2, 5, 4]", "", "float[2, 1, 3, 5]"),
    "bool mask": ("float[2, 2, 3, 4]", "float[2, 2, 5, 4]", "", "bool[2, 1, 3, 5]"),
}


@pytest.mark.parametrize("form", ATTENTIONS)
def test_attention_of_opset_23_is_ours(form: str) -> None:
    q, k, attributes, mask = ATTENTIONS[form]
    shapes = {"q": q, "k": k, "v": k} | ({"mask": mask} if mask else {})
    feeds = {name: normal(*_sizes(text), seed=i) for i, (name, text) in enumerate(shapes.items())}
    if mask and mask.startswith("bool"):
        feeds["mask"] = feeds["mask"] > -0.5
        feeds["mask"][..., 0] = True
    inputs = ", ".join(f"{text} {name}" for name, text in shapes.items())
    body = f"g ({inputs}) => ({q} y) {{ y = Attention{attributes}({', '.join(shapes)}) }}"
    model = raised(spelled(body, opset=23), feeds)
    assert sum(n.domain == "qcompiler" and n.op_type.endswith("Attention") for n in model.graph) == 1
    assert "Attention" not in counts(model)


def _sizes(text: str) -> list[int]:
    return [int(size) for size in text[text.index("[") + 1 : -1].split(",")]


def test_attention_with_a_cache_is_refused_by_name() -> None:
    one = "float[2, 2, 3, 4]"
    body = f"g ({one} q, {one} k, {one} v) => ({one} y) {{ y = Attention<softcap = 2.0>(q, k, v) }}"
    with pytest.raises(ModelError, match="cache or softcap"):
        canonicalise(spelled(body, opset=23))


def test_rotary_embedding_of_opset_23_is_ours() -> None:
    body = """g (float[2, 2, 3, 8] x, float[2, 3, 4] cos, float[2, 3, 4] sin) => (float[2, 2, 3, 8] y) {
        y = RotaryEmbedding(x, cos, sin) }"""
    feeds = {"x": normal(2, 2, 3, 8), "cos": normal(2, 3, 4, seed=2), "sin": normal(2, 3, 4, seed=3)}
    model = raised(spelled(body, opset=23), feeds)
    assert counts(model)["qcompiler::RotaryEmbedding"] == 1
