"""The cost tables, and the capability made of the one that a processor takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("tvm", reason="Apache TVM is not installed: pip install 'qcompiler[tvm]'")

from qcompiler.presets import PRESETS
from qcompiler.targets.ort.costs import load_costs
from qcompiler.targets.ort.measure import layout
from qcompiler.targets.tvm import TvmLlvm
from qcompiler.targets.tvm import costs as tvm_costs
from qcompiler.targets.tvm.costs import KERNELS, ROWS, costs_of
from qcompiler.targets.tvm.measure import main, measure


@pytest.mark.parametrize("dot", ["vnni", "maddwd"])
def test_the_shipped_tables_are_complete(dot: str) -> None:
    costs = costs_of(dot)
    assert set(costs.kernels) == {
        f"{granularity}/{kernel}" for granularity in KERNELS for kernel in KERNELS[granularity]
    }
    for times in costs.kernels.values():
        assert set(times) == set(costs.floats)
        assert all(0 < time < costs.floats[shape] for shape, time in times.items())  # integers are worth it


def test_tables_are_laid_out_as_measure_writes_them() -> None:
    paths = sorted(Path(tvm_costs.__file__).parent.glob("costs_*.json"))
    assert len(paths) == 2
    for path in paths:
        assert layout(json.loads(path.read_text())) == path.read_text()


@pytest.mark.parametrize(("cpu", "dot"), [("znver4", "vnni"), ("znver3", "maddwd"), ("x86-64", "plain")])
def test_times_and_the_digest_follow_the_processor(cpu: str, dot: str) -> None:
    target, costs = TvmLlvm(cpu=cpu), costs_of(dot)
    scheme, capability = PRESETS["w8a8"], target.capability()
    for name, spec in (("static", scheme.activation), ("per_token", scheme.fallback)):
        known = costs.kernels[f"{name}/{KERNELS[name][0]}"]
        assert capability.microseconds(768, 3072, (scheme.weight, spec)) == known[ROWS, 768, 3072]
    assert capability.microseconds(384, 384, None) == costs.floats[ROWS, 384, 384]
    assert target.tables() == {"costs": costs.sha256}


def test_measuring_gives_a_table_that_loads(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text(layout(measure(shapes=[(4, 32, 16)], repeat=1)))
    [(*features, _)] = load_costs(path).times(4, "static", KERNELS["static"][0])
    assert features == [32, 16]


def test_help_says_what_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--cpu" in capsys.readouterr().out
