"""The whole lowering: the same numbers as the fake-quant graph, in operators that ONNX Runtime runs fast."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qcompiler.core import DOMAIN
from qcompiler.graph.run import Runner
from qcompiler.targets import make_target
from qcompiler.targets.ort import LOWERED_OPSET, OrtCpu
from tests.targets.ort.graphs import decoder, encoder, feeds, run_optimised, run_plain

MAKERS = {"encoder": encoder, "decoder": decoder}


def operators(model):
    return {node.op_type for node in model.graph}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_float_fusions_change_nothing_beyond_rounding(make):
    model = make(None, layers=2)
    values = feeds(model)
    before = run_plain(model, values)
    OrtCpu().lower(model)
    after = run_optimised(model, values)
    assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max()


@pytest.mark.parametrize("kind", ["static", "per_tensor", "per_token"])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_integers_compute_what_fake_quant_says(make, kind):
    model = make(kind)
    values = feeds(model)
    before = run_plain(model, values)
    quantized = {node.name for node in model.graph if node.op_type == "MatMul"}
    lowered = OrtCpu().lower(model)
    after = run_optimised(model, values)
    # A float's last bit may move an activation over a rounding boundary: one step of one number, seen as noise of the
    # size of the quantization error itself, but not often. (Measured: no step at these seeds, 2e-7.)
    assert np.abs(after - before).max() <= 1e-4 * np.abs(before).max()
    assert set(lowered.nodes) == quantized
    assert not operators(model) & {"MatMul", "DequantizeLinear"}
    assert "MatMulIntegerToFloat" in operators(model)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_no_function_of_ours_is_left(make):
    model = make("per_token")
    OrtCpu().lower(model)
    assert not model.functions
    assert {node.domain for node in model.graph} <= {"", "com.microsoft"}
    assert DOMAIN not in model.graph.opset_imports
    assert model.graph.opset_imports[""] == LOWERED_OPSET
    onnx.checker.check_model(ir.to_proto(model))


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 5), (2, 64)])
def test_batch_and_length_stay_free(batch, length):
    model = decoder("static")
    values = feeds(model, batch, length, padding=0)
    before = run_plain(model, values)
    OrtCpu().lower(model)
    assert np.abs(run_optimised(model, values) - before).max() <= 1e-4 * np.abs(before).max()


def test_linears_keep_the_names_of_their_outputs():
    model = encoder("static")
    values = feeds(model)
    name = next(n.outputs[0].name for n in model.graph if n.op_type == "Add")  # the query's biased output
    before = Runner(model, [name])(values)[name]
    OrtCpu().lower(model)
    after = Runner(model, [name])(values)[name]
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5)


def test_operators_of_an_encoder_are_the_fast_ones():
    model = encoder("static")
    notes = OrtCpu().lower(model).notes
    found = [node.op_type for node in model.graph]
    assert found.count("Attention") == 1
    assert found.count("QuantizeLinear") == 4  # q, k and v share one
    assert found.count("Sum") == 2
    assert "Add" not in found
    assert "Transpose" not in found  # heads are split inside the operator
    assert any(note.what == "Attention" for note in notes)


def test_operators_of_a_decoder_are_the_fast_ones():
    model = decoder("static")
    OrtCpu().lower(model)
    found = [node.op_type for node in model.graph]
    assert found.count("RMSNormalization") == 3
    assert found.count("RotaryEmbedding") == 2
    assert found.count("Attention") == 1
    assert found.count("Slice") == 2  # half of cos and sin, once
    assert "Transpose" not in found
    assert "Split" not in found


def test_rows_choose_the_kernel():
    one, many = decoder("per_token"), decoder("per_token")
    make_target("ort-cpu{rows=1}").lower(one)
    make_target("ort-cpu").lower(many)
    assert "MatMulNBits" in operators(one)
    assert "MatMulNBits" not in operators(many)
