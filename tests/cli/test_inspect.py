"""cli.inspect of a source."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.calls import told_as_json


def test_inspect_describes_a_source(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told_as_json(capsys, "inspect", model)
    assert [(row["in_features"], row["out_features"], row["bias"]) for row in found["linears"]] == [
        (16, 24, True),
        (24, 16, True),
    ]
    assert [row["head"] for row in found["linears"]] == [False, True]
    (site,) = found["sites"]
    assert (site["kind"], site["free"], site["sinks"]) == ("linear", 24, [found["linears"][1]["name"]])  # through Relu
    assert found["norms"] == {}
    assert found["inputs"] == {"x": "float32[batch, sequence, 16]", "attention_mask": "int64[batch, sequence]"}
