"""What a compile keeps in memory is a few weights, whatever the model holds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.bounded_memory import METHODS, Shape, write_model

SHAPE = Shape(layers=6, hidden=1024, intermediate=2752, heads=8, vocabulary=2048)
"""160 MB in float16, 320 in float32; the largest weight has 11 in float32."""

_GROWTH = """
import json, resource, sys
import qcompiler

def compiled(folder, passes):
    qcompiler.compile(folder, output=f"{folder}-{len(passes)}", scheme="w4a16", passes=passes, progress=False)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

tiny, model, *methods = sys.argv[1:]
peaks = [compiled(tiny, methods[-1])]  # whatever is imported and made once
peaks += [compiled(model, passes) for passes in methods]
print(json.dumps(peaks))
"""


@pytest.mark.slow
def test_memory_is_bounded(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    write_model(tmp_path / "tiny", Shape(layers=1, hidden=64, intermediate=64, heads=2, vocabulary=32))
    size = write_model(tmp_path / "model", SHAPE)
    assert size > 150e6
    arguments = [str(tmp_path / "tiny"), str(tmp_path / "model"), *METHODS.values()]
    child = subprocess.run([sys.executable, "-c", _GROWTH, *arguments], capture_output=True, text=True, check=True)
    before, *peaks = json.loads(child.stdout.splitlines()[-1])
    growth = {method: (peak - before) / size for method, peak in zip(METHODS, peaks, strict=True)}
    assert max(growth.values()) < 0.75, growth  # whole in float32 it would be 2
