import json
import math

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from qcompiler.core import DataError
from qcompiler.graph.edit import add_initializer
from qcompiler.numerics.metrics import log_softmax
from qcompiler.report import Report
from qcompiler.runtime.compiled import CompiledModel
from qcompiler.runtime.evaluate import evaluate
from tests.graphs_int8 import feeds, float_mlp
from tests.runtime.test_compiled import compiled

VOCABULARY = 11


def _lm(noise: float) -> ir.Model:
    """logits = table[input_ids]: a bigram model."""
    model = ir.from_proto(
        onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 21]>
        g (int64[b, s] input_ids, int64[b, s] attention_mask) => (float[b, s, 11] logits) {
            logits = Gather<axis = 0>(input_ids, input_ids)
        }""")
    )
    r = np.random.default_rng(0)
    table = r.normal(0, 2, (VOCABULARY, VOCABULARY)) + noise * r.normal(0, 1, (VOCABULARY, VOCABULARY))
    next(iter(model.graph)).replace_input_with(0, add_initializer(model.graph, "table", table.astype(np.float32)))
    return model


def _wrap(model: ir.Model, kind: str = "causal-lm") -> CompiledModel:
    return CompiledModel(model, {"version": 1, "source": {"kind": kind}}, Report((), 0, 0))


def _tokens(batch: int = 3, sequence: int = 9, seed: int = 0) -> dict[str, np.ndarray]:
    r = np.random.default_rng(seed)
    mask = np.ones((batch, sequence), np.int64)
    mask[-1, 4:] = 0
    return {"input_ids": r.integers(0, VOCABULARY, (batch, sequence)), "attention_mask": mask}


def test_perplexity_top1_and_kl_are_those_of_the_formulas() -> None:
    reference, model = _lm(0.0), _lm(0.5)
    batches = [_tokens(seed=i) for i in range(3)]
    metrics = evaluate(_wrap(model), reference, batches)
    tables = [m.graph.initializers["table"].const_value.numpy() for m in (reference, model)]
    losses: list[list[float]] = [[], []]
    same, kl = [], []
    for batch in batches:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        for row, keep in zip(ids, mask, strict=True):
            kept = row[: keep.sum()]
            for table, loss in zip(tables, losses, strict=True):
                log_p = log_softmax(table[kept])
                loss += [-log_p[i, token] for i, token in enumerate(kept[1:])]
            p, q = (log_softmax(table[kept]) for table in tables)
            same += list(p.argmax(-1) == q.argmax(-1))
            kl += list((np.exp(p) * (p - q)).sum(-1))
    assert metrics.reference_perplexity == pytest.approx(math.exp(np.mean(losses[0])), rel=1e-5)
    assert metrics.perplexity == pytest.approx(math.exp(np.mean(losses[1])), rel=1e-5)
    assert metrics.outputs["logits"].top1 == pytest.approx(np.mean(same))
    assert 0 < np.mean(same) < 1
    assert metrics.outputs["logits"].kl == pytest.approx(np.mean(kl), rel=1e-4)
    assert metrics.samples == 9


def test_perplexity_is_for_causal_models_only() -> None:
    metrics = evaluate(_wrap(_lm(0.1), "encoder"), _lm(0.0), [_tokens()])
    assert metrics.perplexity is None
    assert metrics.outputs["logits"].kl is not None
    assert evaluate(_wrap(_lm(0.1), "encoder"), _lm(0.0), [_tokens()], causal=True).perplexity is not None


def test_hidden_states_have_sqnr_and_cosine_over_unmasked_rows() -> None:
    data = feeds(batch=4, sequence=6, padded=True)
    model, reference = compiled(), float_mlp()
    metrics = evaluate(model, reference, [data])
    keep = data["attention_mask"] != 0
    want = CompiledModel(reference, {}, model.report).run(data)["y"][keep].astype(np.float64)
    have = model.run(data)["y"][keep]
    expected = 10 * math.log10((want**2).sum() / ((want - have) ** 2).sum())
    output = metrics.outputs["y"]
    assert output.sqnr_db == pytest.approx(expected, abs=1e-3)
    assert 0.99 < output.cosine < 1
    assert output.top1 is None
    again = evaluate(model, reference, [data], logits=["y"]).outputs["y"]
    assert again.top1 is not None
    json.dumps(metrics.to_json(), allow_nan=False)


def test_a_model_against_itself_is_exact_and_json_can_say_so() -> None:
    model = _lm(0.0)
    metrics = evaluate(_wrap(model), model, [_tokens()])
    assert metrics.outputs["logits"].sqnr_db == math.inf
    assert metrics.perplexity == metrics.reference_perplexity
    text = json.dumps(metrics.to_json(), allow_nan=False)
    assert json.loads(text)["outputs"]["logits"]["sqnr_db"] == "inf"


def test_what_does_not_fit_is_refused_in_a_sentence() -> None:
    with pytest.raises(
        DataError, match=r"^the reference has outputs logits and the compiled model y: they share none\.$"
    ):
        evaluate(compiled(), _lm(0.0), [])
    with pytest.raises(DataError, match="the evaluation data is empty"):
        evaluate(_wrap(_lm(0.1)), _lm(0.0), [])
    with pytest.raises(DataError, match="no input_ids, attention_mask, which the reference reads"):
        evaluate(_wrap(_lm(0.1)), _lm(0.0), [{"ids": np.zeros((1, 2), np.int64)}])
