"""The cost table and what is chosen from it; the capability made of it."""

import json

import pytest

from qcompiler.core import ArtefactError
from qcompiler.presets import PRESETS
from qcompiler.targets.ort import OrtCpu
from qcompiler.targets.ort.capability import saturates
from qcompiler.targets.ort.costs import DEFAULT, KERNELS, CostTable, load_costs
from qcompiler.targets.ort.measure import layout, main, measure


def table(**kernels):
    shapes = [(1024, 64, 64), (1, 64, 64)]
    times = {name: dict(zip(shapes, values, strict=True)) for name, values in kernels.items()}
    return CostTable({}, dict(zip(shapes, (100.0, 10.0), strict=True)), times, "")


def test_the_shipped_table_is_complete():
    costs = load_costs()
    for granularity, kernels in KERNELS.items():
        for kernel in kernels:
            times = costs.kernels[f"{granularity}/{kernel}"]
            assert set(times) == set(costs.floats)
            assert all(time > 0 for time in times.values())
    assert len(costs.sha256) == 64


@pytest.mark.parametrize("granularity", KERNELS)
def test_integers_are_worth_it_at_many_rows(granularity):
    costs = load_costs()
    kernel = costs.fastest(granularity, 1024, 768, 3072)
    assert kernel == "MatMulIntegerToFloat"
    assert costs.speed(granularity, kernel, 1024, 768, 3072) > 2


def test_the_fastest_at_the_nearest_shape_is_chosen():
    names = {f"per_token/{name}": (50.0, 5.0) for name in KERNELS["per_token"]}
    costs = table(**{**names, "per_token/MatMulNBits.g128": (90.0, 2.0)})
    assert costs.fastest("per_token", 2000, 80, 50) == "MatMulIntegerToFloat"  # first of equals
    assert costs.fastest("per_token", 3, 80, 50) == "MatMulNBits.g128"
    assert costs.speed("per_token", "MatMulNBits.g128", 3, 80, 50) == 5.0


@pytest.mark.parametrize("text", ["{", json.dumps({"version": 99})])
def test_a_table_that_cannot_be_used_is_refused(tmp_path, text):
    path = tmp_path / "costs.json"
    path.write_text(text)
    with pytest.raises(ArtefactError, match=r"costs\.json"):
        load_costs(path)


def test_measuring_gives_a_table_that_loads(tmp_path):
    path = tmp_path / "costs.json"
    path.write_text(layout(measure(shapes=[(4, 32, 16)], repeat=1)))
    costs = load_costs(path)
    assert list(costs.floats) == [(4, 32, 16)]
    assert costs.fastest("static", 1, 1, 1) == "MatMulIntegerToFloat"


def test_help_says_what_is_measured(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--repeat" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "expected"), [("fpu avx2", True), ("fpu avx2 avx_vnni", False), ("avx512f avx512_vnni", False)]
)
def test_saturation_follows_the_vector_unit(tmp_path, monkeypatch, flags, expected):
    path = tmp_path / "cpuinfo"
    path.write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert saturates(path) is expected
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    saturates.cache_clear()
    assert saturates(path) is False
    saturates.cache_clear()


def test_flags_that_cannot_be_read_are_taken_as_unsafe(tmp_path, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert saturates(tmp_path / "none") is True


def test_capability_says_what_runs():
    kernels = OrtCpu(vnni=True).capability().kernels
    assert {k.activation_granularity for k in kernels} == {"per_tensor", "per_token", "per_group", ""}
    assert all(k.speed > 0 for k in kernels if k.name not in ("MatMulNBits", "MatMulBnb4", "MatMul"))
    assert not OrtCpu(vnni=True).capability().reduce_range
    assert OrtCpu(vnni=False).capability().reduce_range


def test_the_shipped_table_is_laid_out_as_measure_writes_it():
    text = DEFAULT.read_text()
    assert layout(json.loads(text)) == text


def test_times_are_of_the_nearest_rows_in_proportion():
    costs = table(**{"static/MatMulIntegerToFloat": (25.0, 8.0)})
    assert costs.times(512, "static", "MatMulIntegerToFloat") == ((64, 64, 12.5),)
    assert costs.times(2, "static", "MatMulIntegerToFloat") == ((64, 64, 16.0),)
    assert costs.times(1024) == ((64, 64, 100.0),)


@pytest.mark.parametrize("rows", [1024, 128, 16, 1])
def test_the_capability_predicts_what_was_measured(rows):
    costs, capability = load_costs(), OrtCpu(rows=rows).capability()
    scheme = PRESETS["w8a8"]
    for k, n in ((384, 1536), (768, 3072)):
        specs = (scheme.activation, scheme.fallback)
        static, dynamic = (capability.microseconds(k, n, (scheme.weight, spec)) for spec in specs)
        per_token = (costs.kernels[f"per_token/{name}"][rows, k, n] for name in KERNELS["per_token"])
        assert capability.microseconds(k, n, None) == pytest.approx(costs.floats[rows, k, n])
        assert static == pytest.approx(costs.kernels["static/MatMulIntegerToFloat"][rows, k, n])
        assert dynamic == pytest.approx(min(per_token))
    assert capability.microseconds(384, 1920, None) == pytest.approx(1.25 * costs.floats[rows, 384, 1536])
