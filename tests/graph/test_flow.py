from __future__ import annotations

import numpy as np
import onnx.helper
import onnx.parser
import onnx_ir as ir

from qcompiler.graph.flow import analyse
from tests.graph.tiny import HEADER, pairs, site_of, tiny

WEIGHTS = {"g": [8], "b": [8], "w": [8, 6]}


def test_a_value_read_inside_a_subgraph_is_blocked() -> None:
    model = tiny(
        """g (float[B,S,8] x, bool c) => (float[B,S,6] y, float[B,S,8] t) {
            h = LayerNormalization(x, g, b)
            y = MatMul(h, w)
            t = If (c) <
                then_branch = yes () => (float[B,S,8] th) { th = Identity(h) },
                else_branch = no () => (float[B,S,8] el) { el = Identity(x) }
            >
        }""",
        WEIGHTS,
    )
    site = site_of(model, "h")
    assert site.scale_blocked.all()
    assert "read inside a subgraph" in site.blockers[0].why


def test_a_weight_that_the_caller_may_feed_is_no_constant() -> None:
    """ONNX lets a graph input have an initializer as its default: its numbers may be others in any run."""
    proto = onnx.parser.parse_model(
        HEADER
        + """g (float[B,S,8] x, float[8,6] w) => (float[B,S,6] y, float[B,S,6] z) {
            h = LayerNormalization(x, g)
            y = MatMul(h, w)
            z = MatMul(h, w2)
        }"""
    )
    for name, shape in {"g": (8,), "w": (8, 6), "w2": (8, 6)}.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(shape, np.float32), name))
    model = ir.from_proto(proto)
    for node in model.graph:
        node.name = node.outputs[0].name
    assert pairs(model) == {}
    assert site_of(model, "h").blockers[0].why == "MatMul with a weight that is not constant"


def test_what_holds_for_one_input_size_only_is_blocked() -> None:
    """With sequence 3 the slice takes channels 0, 1 and 2; with another length it takes others."""
    model = tiny(
        """g (float[B,S,8] x) => (float[B,S,6] y) {
            h = LayerNormalization(x, g, b)
            shape = Shape(x)
            s = Slice(shape, one, two)
            end = Add(s, two)
            part = Slice(h, s, end, two)
            y = MatMul(part, w)
        }""",
        {"g": [8], "b": [8], "w": [2, 6], "one": np.array([1]), "two": np.array([2])},
    )
    site = site_of(model, "h")
    assert site.scale_blocked.all()
    assert site.blockers[-1].why == "what reads it depends on the input's size"


def test_a_norm_over_another_axis_is_no_source() -> None:
    text = """g (float[B,6,8] x) => (float[B,6,5] y) {
        h = LayerNormalization<axis: int = 1>(x, g)
        y = MatMul(h, w)
    }"""
    assert analyse(tiny(text, {"g": [6, 8], "w": [8, 5]})) == []


def test_rms_norm_followed_by_a_constant_add_takes_a_shift() -> None:
    model = tiny(
        """g (float[B,S,8] x) => (float[B,S,6] y) {
            n = qcompiler.RMSNorm<epsilon: float = 1e-6>(x, g)
            h = Add(b, n)
            y = MatMul(h, w)
        }""",
        WEIGHTS,
    )
    assert not site_of(model, "h").shift_blocked.any()


def test_blocked_channels_are_as_good_as_unlabelled() -> None:
    """v + relu(v): nothing blocks. v + tanh(v): the channels that tanh blocks are free of scale on both sides."""
    model = tiny(
        """g (float[B,S,8] x) => (float[B,S,6] y) {
            v = MatMul(x, w1)
            low, high = Split<axis: int = -1, num_outputs: int = 2>(v)
            t = Tanh(low)
            m = Mul(t, low)
            r = Relu(high)
            gate = Mul(m, r)
            y = MatMul(gate, w)
        }""",
        {"w1": [8, 16], "w": [8, 6]},
    )
    site = site_of(model, "v")
    assert site.scale_blocked.tolist() == [True] * 8 + [False] * 8
    assert site.sinks[0].columns.tolist() == list(range(8, 16))
