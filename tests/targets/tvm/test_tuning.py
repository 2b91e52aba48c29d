"""Tilings: every candidate is exact, one is measured once, and what the file says is what is taken."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import qcompiler
from qcompiler.core import ArtefactError, TargetError
from tests.passes.blocks import HELD_OUT, batches, block
from tests.targets.tvm.kernels import compiled, detect

pytest.importorskip("tvm", reason="Apache TVM is not installed: pip install 'qcompiler[tvm]'")

from qcompiler.targets.tvm import tuning
from qcompiler.targets.tvm.kernels.gemm_int8 import GemmInt8, Tiling


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QCOMPILER_CACHE", str(tmp_path))
    return tmp_path / "tilings.json"


def test_candidates_fit_and_are_exact() -> None:
    isa, rng = detect(), np.random.default_rng(0)
    found = tuning.candidates(isa)
    assert len(found) >= 6
    assert all((t.rows + 1) * t.vectors < isa.registers for t in found)
    weight = rng.integers(-127, 128, (20, 70)).astype(np.int8)
    for tiling in {(t.rows, t.vectors): t for t in found}.values():
        gemm = GemmInt8(20, 70, tiling=tiling)
        kernel = compiled(gemm, isa)
        for m in (1, 7, 101):
            x, y = rng.integers(0, 256, (m, 20)).astype(isa.activation), np.zeros((m, 70), np.float32)
            vectors = (np.zeros(70, np.int32), np.ones(70, np.float32))
            kernel(x, gemm.pack(weight, isa), *(gemm.pad(v, isa) for v in vectors), y)
            np.testing.assert_array_equal(y, x.astype(np.int64) @ weight)


def test_a_shape_is_measured_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "candidates", lambda isa: [Tiling(4, 1, 96), Tiling(4, 2, 96)])
    monkeypatch.setattr(tuning, "ROWS", (1, 5))
    measured = []
    search = tuning.search
    monkeypatch.setattr(tuning, "search", lambda *args: measured.append(args) or search(*args))
    first = tuning.Tuner(detect()).tiling(64, 48)
    assert tuning.Tuner(detect()).tiling(64, 48) == first
    assert len(measured) == 1
    data = json.loads(cache.read_text())
    assert [*data["tilings"].values()] == [{"64x48": [first.rows, first.vectors, first.block]}]
    cache.write_text("[]")
    with pytest.raises(ArtefactError, match=r"tilings\.json is no table of tilings"):
        tuning.Tuner(detect())


def test_compile_takes_what_the_file_says(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is measured where all is known; the numbers do not hang on the tiling."""
    options = {"calibration": batches(), "passes": "annotate,insert,fold", "progress": False}
    plain = qcompiler.compile(block(), target="tvm-llvm", **options)
    tuner = tuning.Tuner(detect())
    taken = []

    def tiling(self: tuning.Tuner, in_features: int, out_features: int) -> Tiling:
        taken.append((in_features, out_features))
        return Tiling(2, 1, 96)

    monkeypatch.setattr(tuning.Tuner, "tiling", tiling)
    tuned = qcompiler.compile(block(), target="tvm-llvm{tune=true}", **options)
    assert taken
    assert tuner.known == {}
    assert tuned.recipe["tables"]["tilings"] == tuning.digest()
    for feeds in HELD_OUT:
        for name, array in plain.run(feeds, threads=1).items():
            np.testing.assert_array_equal(tuned.run(feeds, threads=1)[name], array)


def test_only_this_machine_is_tuned_for() -> None:
    foreign = detect("skylake-avx512" if detect().lanes < 16 else "alderlake")
    with pytest.raises(TargetError, match="tune there"):
        tuning.Tuner(foreign)
