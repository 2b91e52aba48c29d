"""The merged graph tells of each pair what the two graphs run apart would."""

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.capability import Capability
from qcompiler.graph.edit import array_of, write_input
from qcompiler.graph.linear import linears
from qcompiler.graph.run import Runner
from qcompiler.numerics.metrics import cosine, sqnr_db
from qcompiler.passes.annotate import Annotate
from qcompiler.passes.base import Context
from qcompiler.passes.insert import Insert
from qcompiler.presets import resolve
from qcompiler.report.errors import error_meters
from qcompiler.report.side_by_side import ACCUMULATED, ALONE, OUTPUT, side_by_side, whole
from tests import mixtures
from tests.graphs_int8 import K, feeds, float_mlp, quantized_mlp


def _apart(model: ir.Model, data: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    runner = Runner(model, [linear.output.name or "" for linear in linears(model)])
    results = runner(data)
    return {linear.name: results[linear.output.name or ""] for linear in linears(model)}


@pytest.mark.parametrize("activation", ["FakeQuant", "FakeQuantPerToken"])
def test_meters_are_those_of_whole_arrays(activation: str) -> None:
    reference, quantized = float_mlp(), quantized_mlp(activation)
    data = feeds(batch=4)
    halves = [{name: array[part] for name, array in data.items()} for part in (slice(0, 2), slice(2, 4))]
    meters, seen = error_meters(reference, quantized, halves, cosine=True, outputs=True)
    want, have = _apart(reference, data), _apart(quantized, data)
    assert seen == 4
    for name in want:
        meter = meters[name, ACCUMULATED]
        assert meter.mse == pytest.approx(np.square(want[name] - have[name], dtype=np.float64).mean(), rel=1e-4)
        assert meter.db == pytest.approx(sqnr_db(want[name], have[name]), abs=1e-3)
        assert 1 - meter.cosine == pytest.approx(1 - cosine(want[name], have[name]), rel=1e-3)
    assert meters["y", OUTPUT].db == meters["fc2", ACCUMULATED].db  # the last Linear's output is the model's
    assert meters["y", OUTPUT].channels == K


def test_whole_outputs_are_those_of_the_two_graphs() -> None:
    reference, quantized = float_mlp(), quantized_mlp()
    data = feeds()
    merged, pairs = side_by_side(reference, quantized)
    taps = whole(merged, pairs)
    results = Runner(merged)(data)
    want, have = _apart(reference, data), _apart(quantized, data)
    for pair, (signal, got) in zip(pairs, taps, strict=True):
        np.testing.assert_allclose(results[signal], want[pair.name], rtol=1e-6)
        if pair.kind == ACCUMULATED:
            np.testing.assert_allclose(results[got], have[pair.name], atol=1e-5)
    assert {(pair.name, pair.kind) for pair in pairs} == {(n, k) for n in ("fc1", "fc2") for k in (ACCUMULATED, ALONE)}


def test_only_those_asked_for_are_compared() -> None:
    _, pairs = side_by_side(float_mlp(), quantized_mlp(), only={"fc2"})
    assert {pair.name for pair in pairs} == {"fc2"}


def test_cosine_is_not_summed_unless_asked_for() -> None:
    meters, _ = error_meters(float_mlp(), quantized_mlp(), [feeds()])
    assert np.isnan(meters["fc1", ACCUMULATED].cosine)
    assert meters["fc1", ACCUMULATED].mse > 0


def test_experts_are_compared_on_the_rows_that_chose_them_in_float() -> None:
    """A rounded router sends rows elsewhere: that shows at the outputs, and is no error of an expert's rounding."""
    reference = mixtures.canonical(32, 48, 4, 2)
    quantized = reference.clone()
    context = Context(resolve("w4a16", (), {}), Capability("none", ()))
    for item in (Annotate(), Insert()):
        item.run(quantized, {}, context)
    [router] = [linear for linear in linears(quantized) if linear.name == "mlp.router"]
    weight = array_of(router.weight)
    assert weight is not None
    assert router.weight_quant is not None
    write_input(router.weight_quant, 0, weight[:, ::-1].copy())  # every choice is another
    meters, _ = error_meters(reference, quantized, [mixtures.rows(20)], outputs=True)
    experts = [meter for (name, _), meter in meters.items() if ".gate_up_proj" in name]
    assert len(experts) == 2 * 4
    assert min(meter.db for meter in experts) > 15
    want, have = (Runner(model)(mixtures.rows(20))["y"] for model in (reference, quantized))
    assert meters["y", OUTPUT].db == pytest.approx(sqnr_db(want, have), abs=1e-3)
    assert meters["y", OUTPUT].db < 10
