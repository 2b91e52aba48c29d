import math

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.graph.edit import write_input
from qcompiler.graph.linear import linear_named, linears
from qcompiler.graph.run import Runner
from qcompiler.report.errors import layer_errors, output_errors, sliced, unmasked
from qcompiler.report.side_by_side import row_sums, side_by_side
from tests.graphs_int8 import feeds, float_mlp, quantized_mlp


def _sqnr(reference: np.ndarray, other: np.ndarray) -> float:
    return 10 * math.log10(np.square(reference, dtype=np.float64).sum() / np.square(other - reference).sum())


@pytest.mark.parametrize("activation", ["FakeQuant", "FakeQuantPerToken", "FakeQuantPerTensor"])
def test_accumulated_error_is_that_of_the_two_graphs_run_apart(activation: str) -> None:
    reference, quantized = float_mlp(), quantized_mlp(activation)
    data = feeds()
    errors, samples = layer_errors(reference, quantized, [data], samples=8)
    taps = [linear.output.name or "" for linear in linears(reference)]
    want, have = Runner(reference, taps)(data), Runner(quantized, taps)(data)
    assert samples == 2
    for linear in linears(reference):
        name = linear.output.name
        assert errors[linear.name].accumulated == pytest.approx(_sqnr(want[name], have[name]), abs=0.01)


def test_alone_error_has_a_float_input() -> None:
    reference, quantized = float_mlp(), quantized_mlp()
    data = feeds()
    errors, _ = layer_errors(reference, quantized, [data], samples=8)
    assert errors["fc1"].alone == pytest.approx(errors["fc1"].accumulated, abs=1e-3)  # nothing upstream
    assert errors["fc2"].alone is not None
    assert errors["fc2"].alone > errors["fc2"].accumulated
    h = Runner(reference, ["h2", "y"])(data)
    fc2 = linear_named(quantized, "fc2")
    scale, zero = np.float32(4 / 255), 3
    x = (np.clip(np.rint(h["h2"] / scale) + zero, 0, 255) - zero) * scale
    weight = fc2.weight.const_value.numpy() * quantized.graph.initializers["s2"].const_value.numpy()
    y = x @ weight + quantized.graph.initializers["fc2.bias"].const_value.numpy()
    assert errors["fc2"].alone == pytest.approx(_sqnr(h["y"], y), abs=0.01)


def test_alone_error_is_not_told_against_another_weight() -> None:
    reference = float_mlp()
    fc2 = linear_named(reference, "fc2")
    write_input(fc2.matmul, 1, fc2.weight.const_value.numpy() * 3)
    errors, _ = layer_errors(reference, quantized_mlp(), [feeds()], samples=8)
    assert errors["fc2"].alone is None
    assert errors["fc1"].alone is not None


def test_padding_rows_do_not_count() -> None:
    clean = feeds(padded=True)
    dirty = {**clean, "x": np.where(clean["attention_mask"][..., None] != 0, clean["x"], 50).astype(np.float32)}
    reference, quantized = float_mlp(), quantized_mlp()
    assert layer_errors(reference, quantized, [clean], 8) == layer_errors(reference, quantized, [dirty], 8)
    assert output_errors(reference, quantized, [clean], 8) == output_errors(reference, quantized, [dirty], 8)


def test_each_pair_is_compared_before_the_next_layer_runs() -> None:
    merged, pairs = side_by_side(float_mlp(), quantized_mlp())
    row_sums(merged, pairs)
    names = [node.name for node in merged.graph]
    assert names.index("noise:0") < names.index("fc2")
    assert names.index("alone_error:0") < names.index("quantized:fc2")


def test_graphs_are_left_as_they_were() -> None:
    reference, quantized = float_mlp(), quantized_mlp()
    before = [[(n.name, n.op_type, len(n.inputs)) for n in m.graph] for m in (reference, quantized)]
    names = [list(m.graph.initializers) for m in (reference, quantized)]
    layer_errors(reference, quantized, [feeds()], samples=8)
    assert before == [[(n.name, n.op_type, len(n.inputs)) for n in m.graph] for m in (reference, quantized)]
    assert names == [list(m.graph.initializers) for m in (reference, quantized)]
    Runner(quantized)(feeds())


def test_sums_stream() -> None:
    data = [feeds(batch=3, seed=i) for i in range(3)]
    whole = {name: np.concatenate([d[name] for d in data]) for name in data[0]}
    reference, quantized = float_mlp(), quantized_mlp()
    apart, seen = layer_errors(reference, quantized, data, samples=100)
    together, _ = layer_errors(reference, quantized, [whole], samples=100)
    assert seen == 9
    assert apart["fc2"].accumulated == pytest.approx(together["fc2"].accumulated, abs=1e-3)


def test_slices_stop_at_the_sample_count_and_bound_the_rows() -> None:
    parts = list(sliced([feeds(batch=7, sequence=4)] * 3, samples=9, rows=8))
    assert [p["x"].shape[0] for p in parts] == [2, 2, 2, 1, 2]
    assert [p["x"].shape[0] for p in sliced([feeds(batch=7, sequence=4)] * 3, samples=99, rows=8, total=33)] == [
        2,
        2,
        2,
        1,
        2,
    ]
    scalar = {"x": np.zeros((2, 3), np.float32), "flag": np.array(True)}
    assert list(sliced([scalar], samples=1, rows=1)) == [scalar]  # cannot be cut along a batch axis


def test_a_model_of_one_batch_size_gets_whole_batches() -> None:
    reference, quantized = float_mlp(), quantized_mlp()
    for model in (reference, quantized):
        for value in (*model.graph.inputs, *model.graph.outputs):
            value.shape = ir.Shape([8, *list(value.shape)[1:]])
    data = [feeds(batch=8, sequence=128, seed=seed) for seed in range(2)]
    errors, seen = layer_errors(reference, quantized, data, samples=9)
    assert seen == 16
    assert set(errors) == {"fc1", "fc2"}
    assert set(output_errors(reference, quantized, data, samples=9)) == {"y"}


def test_mask_of_another_shape_masks_nothing() -> None:
    data = feeds(batch=2, sequence=3, padded=True)
    assert unmasked(data, (2,)).tolist() == [True, True]
    assert unmasked(data, (2, 3)).sum() == 2
