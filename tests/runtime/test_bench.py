import json

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from qcompiler.core import DataError, OptionError
from qcompiler.runtime.bench import bench
from qcompiler.runtime.compiled import CompiledModel
from qcompiler.runtime.synthetic import default_shapes, make_feeds
from tests.graphs_int8 import feeds, float_mlp
from tests.runtime.test_compiled import compiled
from tests.runtime.test_evaluate import VOCABULARY, _lm, _wrap


def test_both_are_timed_for_each_shape() -> None:
    result = bench(compiled(), float_mlp(), shapes=[(2, 8), (1, 3)], repeats=5)
    assert [timing.shape for timing in result.timings] == [(2, 8), (1, 3)]
    assert result.clock == "CPU"
    assert result.threads == 1
    for timing in result.timings:
        assert timing.reference_ms > 0
        assert timing.compiled_ms > 0
        assert timing.ratio > 0
    json.dumps(result.to_json(), allow_nan=False)


def test_a_model_twice_as_long_takes_longer() -> None:
    def chain(length: int) -> ir.Model:
        body = "\n".join(f"h{i + 1} = MatMul(h{i}, h{i})" for i in range(length))
        text = f"""<ir_version: 10, opset_import: ["" : 21]> g (float[n, 128, 128] x) => (float[n, 128, 128] y) {{
            h0 = Tanh(x)
            {body}
            y = Tanh(h{length})
        }}"""
        return ir.from_proto(onnx.parser.parse_model(text))

    long = CompiledModel(chain(40), {}, compiled().report)
    result = bench(long, chain(4), shapes=[(1,)], repeats=9)
    assert result.timings[0].ratio > 2


def test_given_feeds_and_more_threads() -> None:
    result = bench(compiled(), float_mlp(), feeds=[feeds(batch=3, sequence=4)], threads=2, repeats=1)
    assert result.timings[0].shape == (3, 4, 16)
    assert result.clock == "wall"


def test_shapes_by_kind() -> None:
    text = _wrap(_lm(0.0)).inputs
    assert default_shapes("causal-lm", text) == [(1, 512), (1, 1)]
    assert default_shapes("encoder", text) == [(8, 128), (1, 16)]
    assert default_shapes("vision", text) == [(1,)]
    image = ir.Value(name="pixels", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", 3, 32, 32]))
    assert default_shapes("graph", {"pixels": image}) == [(1,)]
    assert make_feeds({"pixels": image}, (2,))["pixels"].shape == (2, 3, 32, 32)


def test_made_up_ids_stay_below_the_vocabulary_and_masks_are_ones() -> None:
    model = _lm(0.0)
    made = make_feeds(_wrap(model).inputs, (50, 4), model=model)
    assert made["input_ids"].dtype == np.int64
    assert made["input_ids"].max() == VOCABULARY - 1
    assert made["input_ids"].min() == 0
    assert made["attention_mask"].all()


def test_impossible_options_are_refused() -> None:
    with pytest.raises(OptionError, match=r"repeats=0 and threads=1"):
        bench(compiled(), float_mlp(), repeats=0)
    with pytest.raises(DataError, match=r"open axis 1, and shape \(2,\) says no size for it"):
        bench(compiled(), float_mlp(), shapes=[(2,)])
