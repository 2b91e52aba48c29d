"""Integer coverage, counted in the optimised graph, the output head apart."""

from qcompiler.targets.lowered import Lowered
from qcompiler.targets.ort import OrtCpu
from qcompiler.targets.ort.readback import integer_coverage
from tests.targets.ort.graphs import decoder, encoder


def coverage(model):
    canonical = model.clone()
    lowered = OrtCpu().lower(model)
    return integer_coverage(model, lowered, canonical)


def test_a_quantized_decoder_is_covered_and_its_head_counted_apart():
    found = coverage(decoder("per_token"))
    assert found.body == 1
    assert found.head == 1
    assert set(found.kernels.values()) == {"MatMulIntegerToFloat"}
    assert len(found.kernels) == 8


def test_a_float_encoder_is_not():
    found = coverage(encoder(None))
    assert found.body == 0
    assert set(found.kernels.values()) == {"MatMul"}


def test_a_linear_left_in_float_lowers_the_share_by_its_work():
    model = decoder("static", size=8, inner=48)
    canonical = model.clone()
    lowered = OrtCpu().lower(model)
    some = {name: node for name, node in lowered.nodes.items() if not name.endswith("down_proj")}
    found = integer_coverage(model, Lowered(some), canonical)
    width = 32
    every = 2 * width * width + 2 * width * 16 + 3 * width * 48
    assert found.body == 1 - width * 48 / every
    assert found.head == 1
