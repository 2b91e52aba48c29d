import dataclasses
import io
import json
import math

import numpy as np
import pytest
from rich.console import Console

from qcompiler.core import ArtefactError, FoldPlan, Note
from qcompiler.report import Report, build
from qcompiler.report.render import show, to_markdown
from tests.graphs_int8 import K, N, feeds, float_mlp, quantized_mlp


@dataclasses.dataclass
class _Coverage:
    body: float = 1.0
    head: float | None = None
    kernels: dict[str, str] = dataclasses.field(default_factory=lambda: {"fc1": "QGemm"})


def _report(**changes: object) -> Report:
    plan = FoldPlan("fold", "ln", ("fc1",), np.ones(K, np.float32), why="smooth alpha=0.55, 3.0 dB less error")
    notes = (
        Note("ln", "smooth alpha=0.55", "3.0 dB less error"),
        Note("fc2", "activation uint8 per_token dynamic", "outliers are tokens"),
        Note("ln", "Sum in place of Add", "faster"),
    )
    options = {
        "float_model": float_mlp(),
        "quantized_model": quantized_mlp(),
        "lowered_model": quantized_mlp(),
        "plans": (plan,),
        "notes": notes,
        "coverage": _Coverage(),
        "batches": [feeds()],
        "seconds": {"open": 0.5},
        **changes,
    }
    return build(**options)  # type: ignore[arg-type]


def test_a_row_for_each_linear_says_what_was_done_and_why() -> None:
    report = _report()
    one, two = report.rows
    assert (one.name, one.in_features, one.out_features) == ("fc1", K, N)
    assert (one.weight, one.activation, one.kernel) == ("int8 per_channel static", "uint8 per_tensor static", "QGemm")
    assert one.transform == "fold scale at ln: smooth alpha=0.55, 3.0 dB less error"
    assert two.transform == "activation uint8 per_token dynamic: outliers are tokens"
    assert one.sqnr_db is not None
    assert 25 < one.sqnr_db < 60
    assert report.output_sqnr_db["y"] == pytest.approx(two.sqnr_db, abs=0.1)
    assert report.size_before == (K * N * 2 + K + N) * 4
    assert report.size_after < 0.5 * report.size_before
    assert report.peak_rss > 10_000_000


@pytest.mark.parametrize(
    ("activation", "words"),
    [("FakeQuantPerToken", "uint8 per_token dynamic"), ("FakeQuantPerTensor", "uint8 per_tensor dynamic")],
)
def test_dynamic_specs_are_read_off_the_graph(activation: str, words: str) -> None:
    assert {row.activation for row in _report(quantized_model=quantized_mlp(activation)).rows} == {words}


def test_a_linear_left_in_float_has_a_reason() -> None:
    notes = (Note("fc1", "left in float", "matches ignore glob 'fc*'"),)
    report = _report(quantized_model=float_mlp(), lowered_model=float_mlp(), notes=notes, coverage=None)
    assert [row.reason for row in report.rows] == ["matches ignore glob 'fc*'", "no pass of the pipeline quantizes it"]
    assert not any(row.quantized for row in report.rows)
    assert report.output_sqnr_db == {"y": math.inf}


def test_without_data_nothing_is_measured() -> None:
    report = _report(batches=None)
    assert all(row.sqnr_db is None for row in report.rows)
    assert not report.output_sqnr_db
    assert report.samples == 0


def test_json_there_and_back_even_for_an_error_of_zero() -> None:
    report = _report(quantized_model=float_mlp(), lowered_model=float_mlp())
    text = report.to_text()
    assert "Infinity" not in text
    assert Report.from_json(json.loads(text)) == report
    assert Report.from_json(json.loads(_report().to_text())).rows[0].alone_db is not None


@pytest.mark.parametrize("data", [{"version": 99}, {"version": 1}, {"version": 1, "rows": [{"nome": 1}], "notes": []}])
def test_what_is_no_report_is_refused_in_a_sentence(data: dict[str, object]) -> None:
    with pytest.raises(ArtefactError, match=r"^[^\n]+\.$"):
        Report.from_json(data)


def test_markdown_and_terminal_show_every_row_and_the_totals() -> None:
    report = _report()
    text = to_markdown(report)
    assert "| fc1 | 16x24 | int8 per_channel static |" in text
    assert "Linears quantized: 2 of 2" in text
    assert "`ln`: smooth alpha=0.55" in text
    assert str(report) == text
    out = io.StringIO()
    show(report, Console(file=out, width=200))
    assert "fc2" in out.getvalue()
    assert "integer coverage" in out.getvalue()
