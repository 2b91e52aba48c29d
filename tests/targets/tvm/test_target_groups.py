"""Whole models with weights by group: compiled, run, saved and loaded, and compared with the fake-quant graph."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import qcompiler
from qcompiler.core import TargetError
from qcompiler.graph.embedding import embeddings, folded_rows
from qcompiler.graph.run import Runner
from qcompiler.presets import PRESETS
from tests import families
from tests.targets.ort.test_embeddings import ROWS, language_model
from tests.targets.tvm.test_target import PASSES, check_outputs, compile_family

pytest.importorskip("tvm", reason="Apache TVM is not installed: pip install 'qcompiler[tvm]'")

SLOW = [
    ("gpt2", "w4a8{symmetric=false}"),
    ("qwen3", "w4a16{group_size=64,symmetric=false}"),
    ("bert", "w2a16"),
    ("gemma2", "w4a8{group_size=none}"),
    ("gpt_neox", "w8a16{group_size=none}"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "scheme"), SLOW)
def test_families(name: str, scheme: str) -> None:
    compiled = compile_family(name, scheme)
    check_outputs(name, compiled)
    assert {row.kernel for row in compiled.report.rows} == {
        "GEMM by group" if "a8" in scheme else "float GEMM by group"
    }


def test_a_decoder_in_four_bits(tmp_path: Path) -> None:
    """Saved and loaded it gives the same numbers; all products but attention's are integer."""
    compiled = compile_family("llama", "w4a8")
    check_outputs("llama", compiled)
    assert compiled.report.coverage_body == 1.0
    assert all(row.kernel == "GEMM by group" for row in compiled.report.rows)
    feeds, output = families.feeds("llama", 3, 11, seed=9), families.OUTPUT["llama"]
    got = compiled.run(feeds, threads=1)[output]
    loaded = qcompiler.load(compiled.save(tmp_path / "out"))
    np.testing.assert_array_equal(loaded.run(feeds, threads=2)[output], got)


@pytest.mark.parametrize("scheme", ["w8a8{embedding=8}", "w4a16{embedding=4,symmetric=false}"])
@pytest.mark.parametrize("features", [96, 40])
def test_embeddings_in_groups(scheme: str, features: int) -> None:
    """Rows are what the folded tables' are, also for ids that count from the end; 40 features end in a short group."""
    data = [{"ids": np.array([[1, 20, 3]]), "places": np.array([[0, 1, 2]])}]
    compiled = qcompiler.compile(
        language_model(features), scheme=scheme, passes=PASSES, calibration=data, target="tvm-llvm", progress=False
    )
    assert [folded_rows(found) is not None for found in embeddings(compiled.model)] == [True, True]
    reference, rng = Runner(compiled.model, threads=1), np.random.default_rng(0)
    for shape in ((2, 7), (1, 1)):
        feeds = {"ids": rng.integers(-ROWS, ROWS, shape), "places": rng.integers(0, 5, shape)}
        want, got = reference(feeds)["y"], compiled.run(feeds, threads=1)["y"]
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * abs(want).max())


def test_groups_it_has_not() -> None:
    scheme = PRESETS["w4a16"]
    odd = dataclasses.replace(scheme, weight=dataclasses.replace(scheme.weight, group_size=24))
    with pytest.raises(TargetError, match=r"GEMM by group.*int4 per_group\(24\)"):
        qcompiler.compile(families.exported("llama"), scheme=odd, target="tvm-llvm", progress=False)
