"""Weights quantized one by one: the same bytes as all at once, also after a kill; and every way to resume wrongly."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qcompiler
from qcompiler import quantize, streamed
from qcompiler.core import ArtefactError, OptionError
from qcompiler.runtime.partial import Workplace
from tests.passes.blocks import HELD_OUT, batches, block

SAME = ("model.onnx", "model.onnx.data", "recipe.json", "folds.safetensors")
SCHEME = "w4a16{group_size=16}"


def compiled(output: Path | None, **options: Any) -> qcompiler.CompiledModel:
    return qcompiler.compile(block(), **{"scheme": SCHEME, "progress": False, "output": output, **options})


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in SAME}


def partial(output: Path) -> Path:
    return output.with_name(f"{output.name}.partial")


def interrupt(output: Path, monkeypatch: pytest.MonkeyPatch, after: int = 3, error: type = KeyboardInterrupt) -> None:
    """A compile that is interrupted when so many weights are finished."""
    finish = Workplace.finish

    def stop(self: Workplace, number: int, *rest: Any) -> None:
        finish(self, number, *rest)
        if self.finished == after:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(Workplace, "finish", stop)
        with pytest.raises(error):
            compiled(output)


@pytest.mark.parametrize("scheme", [SCHEME, "w4a8", "w2a16", "w8a16{symmetric=false}", "nf4"])
def test_one_by_one_gives_the_bytes_of_all_at_once(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed_model = compiled(tmp_path / "streamed", scheme=scheme)
    monkeypatch.setattr(quantize, "weight_passes", lambda passes: None)
    whole = compiled(tmp_path / "whole", scheme=scheme)
    assert contents(tmp_path / "streamed") == contents(tmp_path / "whole")
    assert streamed_model.report.rows == whole.report.rows
    assert set(streamed_model.report.notes) == set(whole.report.notes)
    assert not partial(tmp_path / "streamed").exists()


def test_hqq_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = "annotate,insert,hqq,fold"
    notes = set(compiled(tmp_path / "streamed", passes=passes).report.notes)
    monkeypatch.setattr(quantize, "weight_passes", lambda passes: None)
    assert set(compiled(tmp_path / "whole", passes=passes).report.notes) == notes
    assert sum(note.what == "hqq" for note in notes) == 6
    assert contents(tmp_path / "streamed") == contents(tmp_path / "whole")


@pytest.mark.parametrize("scheme", ["w8a8-dynamic", SCHEME])
def test_without_output_it_runs_from_a_temporary_folder(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    got = compiled(None, scheme=scheme)
    monkeypatch.setattr(quantize, "weight_passes", lambda passes: None)
    want = compiled(None, scheme=scheme)
    for feeds in HELD_OUT:
        a, b = got.run(feeds, threads=1), want.run(feeds, threads=1)
        assert all(np.array_equal(a[name], b[name]) for name in b)


_KILLED = """
import os, signal, sys
from pathlib import Path
from qcompiler.runtime.partial import Workplace
from tests.test_streamed import compiled
finish = Workplace.finish
def then_die(self, number, *rest):
    finish(self, number, *rest)
    if self.finished == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
Workplace.finish = then_die
compiled(Path(sys.argv[1]), resume=True)
"""


def test_a_killed_compile_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled(tmp_path / "whole")
    out = tmp_path / "out"
    for after in (2, 4):
        child = subprocess.run([sys.executable, "-c", _KILLED, str(out), str(after)], cwd=Path(__file__).parents[1])
        assert child.returncode == -9
        assert not out.exists()
        assert len(json.loads((partial(out) / "manifest.json").read_text())["blocks"]) == after
    worked = []
    alone = streamed._alone
    monkeypatch.setattr(streamed, "_alone", lambda *rest: worked.append(1) or alone(*rest))
    resumed = compiled(out, resume=True)
    assert len(worked) == 2  # of six Linears
    assert contents(out) == contents(tmp_path / "whole")
    assert not partial(out).exists()
    assert [row.weight for row in resumed.report.rows] == [row.weight for row in compiled(None).report.rows]


def test_what_is_unfinished_is_not_overwritten_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    interrupt(out, monkeypatch)
    with pytest.raises(ArtefactError, match=r"holds an unfinished compile: go on with resume=True .* force=True"):
        compiled(out)
    with pytest.raises(ArtefactError, match="begun with another scheme"):
        compiled(out, scheme="w8a16", resume=True)
    with pytest.raises(ArtefactError, match="begun with another source"):
        qcompiler.compile(block(seed=1), scheme=SCHEME, output=out, resume=True, progress=False)
    compiled(out, force=True)
    assert not partial(out).exists()


def test_damage_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    interrupt(out, monkeypatch)
    with (partial(out) / "block-00001.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ArtefactError, match=r"block-00001.onnx is damaged: start anew with force=True"):
        compiled(out, resume=True)
    (partial(out) / "manifest.json").write_text("{")
    with pytest.raises(ArtefactError, match=r"manifest.json is damaged"):
        compiled(out, resume=True)
    (partial(out) / "manifest.json").unlink()
    with pytest.raises(ArtefactError, match="is no unfinished compile: move it away"):
        compiled(out, resume=True)
    assert (partial(out) / "block-00001.onnx").exists()


def test_an_error_leaves_nothing_and_a_full_disk_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(tmp_path / "out", monkeypatch, error=ValueError)
    assert not partial(tmp_path / "out").exists()
    interrupt(tmp_path / "out", monkeypatch, error=OSError)
    assert partial(tmp_path / "out").exists()


def test_two_compiles_do_not_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    finish = Workplace.finish

    def second(self: Workplace, number: int, *rest: Any) -> None:
        finish(self, number, *rest)
        with pytest.raises(ArtefactError, match="another compile is at work in"):
            Workplace(out, resume=True).begin({})

    monkeypatch.setattr(Workplace, "finish", second)
    compiled(out)


def test_resume_where_nothing_can_be_resumed(tmp_path: Path) -> None:
    compiled(tmp_path / "new", resume=True)  # nothing there: it starts
    with pytest.raises(OptionError, match="give output"):
        compiled(None, resume=True)
    with pytest.raises(OptionError, match="resume goes on weight by weight, which calibration data"):
        compiled(tmp_path / "out", scheme="w8a8", calibration=batches(), resume=True)
