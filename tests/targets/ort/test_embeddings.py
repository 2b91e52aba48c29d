"""Embedding tables in 4 and 8 bits, and a head that shares its numbers with one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import qcompiler
from qcompiler.core import OptionError, TargetError
from qcompiler.graph.canonical import check
from qcompiler.graph.embedding import embeddings
from qcompiler.graph.run import Runner
from qcompiler.numerics.grids import weight_grid
from qcompiler.passes.annotate import Annotate
from qcompiler.passes.base import Context
from qcompiler.passes.fold import Fold
from qcompiler.passes.insert import Insert
from qcompiler.presets import resolve
from qcompiler.scheme import Scheme
from qcompiler.targets.ort import OrtCpu
from tests.graph.tiny import tiny

ROWS, IDS = 21, np.array([[1, 20, 3], [0, 7, 7]], np.int64)


def language_model(features: int, tied: bool = True, seed: int = 0) -> ir.Model:
    """Embedding, position embedding, a norm, and a head of the embedding's weight or of its own."""
    rng = np.random.default_rng(seed)
    weights = {name: rng.standard_normal((ROWS, features)).astype(np.float32) for name in ("wte", "head")}
    text = f"""g (int64[B,S] ids, int64[B,S] places) => (float[B,S,{ROWS}] y) {{
        e = Gather(wte, ids)  m = qcompiler.RMSNorm<epsilon = 0.001>(e, g)
        p = Gather(wpe, places)  s = Add(e, p)  h = Add(s, m)  n = LayerNormalization(h, g, b)  y = MatMul(n, w)
    }}"""
    head = np.ascontiguousarray(weights["wte" if tied else "head"].T)
    return tiny(text, {"wte": weights["wte"], "wpe": [5, features], "g": [features], "b": [features], "w": head})


FEEDS = {"ids": IDS, "places": np.array([[0, 1, 2]] * 2, np.int64)}


def lowered(model: ir.Model, scheme: Scheme) -> ir.Model:
    """Through all stages, each of which computes the same."""
    ctx = Context(scheme, OrtCpu().capability())
    for item in (Annotate(), Insert()):
        item.run(model, {}, ctx)
    check(model)
    expected = Runner(model)(FEEDS)["y"]
    Fold().run(model, {}, ctx)
    check(model)
    np.testing.assert_allclose(Runner(model)(FEEDS)["y"], expected, rtol=1e-5, atol=1e-5)
    OrtCpu().lower(model)
    np.testing.assert_allclose(Runner(model, as_deployed=True)(FEEDS)["y"], expected, rtol=1e-4, atol=1e-4)
    return model


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("spelling", ["w4a16{embedding=4", "w8a16{embedding=8", "nf4{embedding=8", "w4a8{embedding=4"])
@pytest.mark.parametrize("rest", ["}", ",symmetric=false}", ",group_size=16}"])
@pytest.mark.parametrize("features", [64, 50, 33])
def test_rows_are_gathered_from_integers(spelling: str, rest: str, features: int) -> None:
    if spelling.startswith("nf4") and "symmetric" in rest:
        return
    scheme = resolve(spelling + rest)
    model = lowered(language_model(features, tied=False), scheme)
    odd = features % 2 and scheme.embedding.bits == 4
    assert operators(model).count("GatherBlockQuantized") == (0 if odd else 2)
    assert operators(model).count("Gather") == (2 if odd else 0)


@pytest.mark.parametrize("options", ["", ",symmetric=false", ",group_size=16,symmetric=false"])
@pytest.mark.parametrize("features", [96, 50])  # the head's last block is filled up, a row of the table is not
def test_a_tied_head_and_embedding_are_one_initializer(options: str, features: int) -> None:
    model = lowered(language_model(features), resolve(f"w4a16{{embedding=4{options}}}"))
    product = next(node for node in model.graph if node.op_type == "MatMulNBits")
    gather = next(node for node in model.graph if node.op_type == "GatherBlockQuantized")
    view = gather.inputs[0].producer()
    assert (view.inputs[0].producer() or view).inputs[0] is product.inputs[1]
    assert gather.inputs[2] is product.inputs[2]
    if "symmetric=false" in options:
        assert gather.inputs[3] is product.inputs[3]
    assert not any(value.shape.numpy() == (ROWS, features) for value in model.graph.initializers.values())


def test_where_the_head_was_rounded_otherwise_each_has_its_own() -> None:
    for model in (
        lowered(language_model(96, tied=False), resolve("w4a16{embedding=4}")),
        lowered(language_model(96), resolve("w4a16{embedding=8}")),
    ):
        assert "Reshape" not in operators(model)


def test_tables_that_multiply_are_no_embeddings() -> None:
    text = """g (int64[B,S] ids, float[B,S,8] x) => (float[B,S,8] y, float[B,S,8] z) {
        c = Gather(cos, ids)  y = Mul(x, c)  e = Gather(wte, ids)  s = Mul(e, k)  z = Add(s, x)
    }"""
    model = tiny(text, {"cos": [9, 8], "wte": [9, 8], "k": []})
    assert [found.name for found in embeddings(model)] == ["wte"]


def test_the_fake_quant_is_the_grid_of_each_row() -> None:
    model = language_model(40)
    table = ir.convenience.get_const_tensor(embeddings(model)[0].table).numpy()
    scheme = resolve("w4a16{embedding=4,symmetric=false}")
    Insert().run(model, {}, Context(scheme, OrtCpu().capability()))
    quant = embeddings(model)[0].quant
    got = Runner(model, taps=[quant.outputs[0].name])(FEEDS)[quant.outputs[0].name]
    np.testing.assert_array_equal(got, weight_grid(table.T, scheme.embedding).rounded(table.T).T)


def test_compiled_the_file_has_the_tied_weight_once(tmp_path: Path) -> None:
    sizes = {}
    for options in ("{embedding=4}", ""):
        out = tmp_path / f"out{len(options)}"
        compiled = qcompiler.compile(
            ir.to_proto(language_model(96)), scheme=f"w4a16{options}", output=out, progress=False
        )
        model = onnx.load(out / "model.onnx")
        sizes[options] = sum(onnx.numpy_helper.to_array(t).nbytes for t in model.graph.initializer)
        told = [note.why for note in compiled.report.notes if note.what.startswith("GatherBlockQuantized")]
        assert told == (["the numbers of w.blocks, in the file once", "4-bit rows"] if options else [])
    assert sizes[""] - sizes["{embedding=4}"] > 0.95 * ROWS * 96 * 4  # the float table is gone, nothing came for it


def test_what_no_kernel_gathers_is_refused() -> None:
    model = ir.to_proto(language_model(64))
    with pytest.raises(TargetError, match="gathers no rows"):
        qcompiler.compile(model, scheme="w4a16{embedding=2}", progress=False)
    with pytest.raises(TargetError, match="float tables only"):
        qcompiler.compile(model, scheme="w4a16{embedding=4}", target="onnx", progress=False)
    with pytest.raises(OptionError, match="unknown dtype 'int3'"):
        resolve("w4a16{embedding=3}")
