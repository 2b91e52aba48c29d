import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qcompiler.core import OptionError
from qcompiler.graph.functions import ensure_function
from qcompiler.graph.linear import linear_named
from qcompiler.graph.run import Runner
from qcompiler.targets import make_target
from qcompiler.targets.portable import Portable
from tests.graphs_int8 import feeds, float_mlp, quantized_mlp

ACTIVATIONS = ["FakeQuant", "FakeQuantPerToken", "FakeQuantPerTensor"]


def _ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("form", ["qdq", "qoperator"])
@pytest.mark.parametrize("as_deployed", [False, True])
def test_lowered_graph_computes_what_the_fake_quantized_one_does(form: str, activation: str, as_deployed: bool) -> None:
    model = quantized_mlp(activation)
    data = feeds(batch=3, sequence=7)
    want = Runner(model)(data)["y"]
    lowered = Portable(form).lower(model)
    have = Runner(model, as_deployed=as_deployed)(data)["y"]
    # The same integers, summed in another order: float rounding, and at most a few values on the edge of a step.
    step = 4 / 255 * 0.01 if activation == "FakeQuant" else np.abs(want).max() / 127
    assert np.median(np.abs(have - want)) <= 2e-6
    assert np.abs(have - want).max() <= 5 * step
    assert lowered.nodes == {"fc1": "fc1", "fc2": "fc2"}
    assert [note.node for note in lowered.notes] == ["fc1", "fc2"]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("form", ["qdq", "qoperator"])
def test_only_the_standard_is_left(form: str, activation: str) -> None:
    model = quantized_mlp(activation)
    Portable(form).lower(model)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", 21)]
    assert not proto.functions
    ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    weights = [t for t in proto.graph.initializer if t.name.endswith("weight_quantized")]
    assert {t.data_type for t in weights} == {onnx.TensorProto.INT8}
    assert len({n.name for n in proto.graph.node}) == len(proto.graph.node)


def test_each_form_has_its_operators() -> None:
    model = quantized_mlp()
    Portable("qdq").lower(model)
    assert _ops(model).count("MatMul") == 2
    assert _ops(model).count("QuantizeLinear") == 2
    assert _ops(model).count("DequantizeLinear") == 4
    for activation, first in (
        ("FakeQuant", "QuantizeLinear"),
        ("FakeQuantPerTensor", "DynamicQuantizeLinear"),
        ("FakeQuantPerToken", "ReduceMax"),
    ):
        model = quantized_mlp(activation)
        Portable("qoperator").lower(model)
        assert _ops(model).count("MatMulInteger") == 2
        assert "MatMul" not in _ops(model)
        assert _ops(model)[0] == first


def test_the_input_is_quantized_once_for_all_its_readers() -> None:
    model = quantized_mlp("FakeQuantPerTensor")
    fc1 = linear_named(model, "fc1")
    assert fc1.weight_quant is not None
    again = ir.node("MatMul", [fc1.matmul.inputs[0], fc1.weight_quant.outputs[0]], name="fc1_again")
    again.outputs[0].name = "again"
    again.outputs[0].type, again.outputs[0].shape = fc1.matmul.outputs[0].type, fc1.matmul.outputs[0].shape
    model.graph.insert_after(fc1.matmul, again)
    model.graph.outputs.append(again.outputs[0])
    want = Runner(model)(feeds())
    lowered = Portable().lower(model)
    assert set(lowered.nodes) == {"fc1", "fc1_again", "fc2"}
    assert _ops(model).count("DynamicQuantizeLinear") == 2
    have = Runner(model)(feeds())
    np.testing.assert_allclose(have["again"], want["again"], atol=2e-6)


def _chain() -> ir.Model:
    """fc1 without bias straight into the fake-quant of fc2: what QLinearMatMul computes."""
    model = quantized_mlp()
    fc1, fc2 = linear_named(model, "fc1"), linear_named(model, "fc2")
    assert fc2.activation_quant is not None
    fc2.activation_quant.replace_input_with(0, fc1.matmul.outputs[0])
    model.graph.remove([fc2.x.producer(), fc1.add], safe=True)
    return model


def test_qlinear_matmul_where_the_output_is_quantized_anyway() -> None:
    model = _chain()
    data = feeds(batch=4, sequence=16)
    want = Runner(model)(data)["y"]
    lowered = Portable("qoperator").lower(model)
    assert _ops(model) == ["QuantizeLinear", "QLinearMatMul", "MatMulInteger", "Cast", "Mul", "Add"]
    assert lowered.notes[0].what == "QLinearMatMul"
    have = Runner(model)(data)["y"]
    exact = np.isclose(have, want, atol=1e-5).mean()
    assert exact > 0.99  # ties of the requantization may round the other way
    assert np.abs(have - want).max() < 4 / 255


def test_float_and_weight_only_linears_stay_matmul() -> None:
    model = float_mlp()
    assert not Portable().lower(model).nodes
    model = quantized_mlp()
    fc1 = linear_named(model, "fc1")
    fc1.matmul.replace_input_with(0, fc1.x)
    want = Runner(model)(feeds())["y"]
    lowered = Portable("qoperator").lower(model)
    assert "weight-only" in lowered.notes[0].why
    np.testing.assert_allclose(Runner(model)(feeds())["y"], want, atol=1e-5)


def test_functions_of_the_float_part_are_inlined() -> None:
    model = quantized_mlp()
    ensure_function(model, "RMSNorm")
    weight = model.graph.initializers["fc2.bias"]
    y = model.graph.outputs[0]
    norm = ir.node("RMSNorm", [y, weight], attributes={"epsilon": 1e-6}, domain="qcompiler", name="norm")
    norm.outputs[0].name, norm.outputs[0].type, norm.outputs[0].shape = "normed", y.type, y.shape
    model.graph.append(norm)
    model.graph.outputs[0] = norm.outputs[0]
    want = Runner(model)(feeds())["normed"]
    Portable().lower(model)
    assert {node.domain for node in model.graph} == {""}
    assert not model.functions
    np.testing.assert_allclose(Runner(model)(feeds())["normed"], want, atol=1e-6)


def test_spelled_by_name_and_refused_in_a_sentence() -> None:
    assert make_target("onnx{form=qoperator}") == Portable("qoperator")
    with pytest.raises(OptionError, match=r"^unknown form of target 'onnx' 'qdk': did you mean 'qdq'\?[^\n]*\.$"):
        make_target("onnx{form=qdk}")
    kernels = Portable().capability().kernels
    assert {(k.activation_granularity, k.dynamic) for k in kernels} == {
        ("per_tensor", False),
        ("per_tensor", True),
        ("per_token", True),
        ("", False),
    }
