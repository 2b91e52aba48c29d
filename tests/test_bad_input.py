"""Every bad input of a compile: the right kind of error, one sentence, and nothing half-written, in no folder.

What each layer says about its own bad input in detail is tested there (tests/frontends, tests/runtime); the command
line's exit codes in tests/cli. Here the whole way through compile() is what counts.
"""

from __future__ import annotations

import dataclasses
import gc
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import qcompiler
from qcompiler import cli
from qcompiler.core import ArtefactError, DataError, ModelError, OptionError, QCompilerError, TargetError
from qcompiler.presets import PRESETS
from tests.graph.tiny import tiny
from tests.graphs_int8 import K, feeds, float_mlp

Options = dict[str, Any]
Case = tuple[Callable[[Path], Options], type[QCompilerError], str]


def saved(folder: Path, model: ir.Model | None = None, **options: Any) -> Path:
    path = folder / "model.onnx"
    ir.save(model if model is not None else float_mlp(), path, **options)
    return path


def text_file(folder: Path) -> Options:
    (folder / "model.onnx").write_text("this is not a model")
    return {"model": folder / "model.onnx"}


def cut(file: str, keep: float, **options: Any) -> Callable[[Path], Options]:
    def make(folder: Path) -> Options:
        model = saved(folder, **options)
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: int(len(content) * keep)])
        return {"model": model}

    return make


def lost_data(folder: Path) -> Options:
    model = saved(folder, external_data="weights.bin", size_threshold_bytes=0)
    (folder / "weights.bin").unlink()
    return {"model": model}


def opset(number: int) -> Callable[[Path], Options]:
    def make(folder: Path) -> Options:
        proto = onnx.load(saved(folder))
        proto.opset_import[0].version = number
        onnx.save(proto, folder / "model.onnx")
        return {"model": folder / "model.onnx"}

    return make


def graph(text: str, weights: dict[str, Any], x: np.ndarray) -> Callable[[Path], Options]:
    return lambda folder: {"model": tiny(text, weights), "calibration": [{"x": x}]}


def data(**changes: Any) -> Callable[[Path], Options]:
    """The feeds with these arrays changed, in the last of three batches; None: left out."""
    bad = {name: array for name, array in {**feeds(), **changes}.items() if array is not None}
    return lambda folder: {"calibration": [feeds(seed=1), feeds(seed=2), bad]}


def given(**options: Any) -> Callable[[Path], Options]:
    return lambda folder: options


def empty_npz(folder: Path) -> Options:
    np.savez(folder / "data.npz")
    return {"calibration": folder / "data.npz"}


def nothing_unmasked() -> Iterator[Any]:
    for seed in range(2):
        yield {**feeds(seed=seed), "attention_mask": np.zeros((2, 5), np.int64)}


def breaks_off() -> Iterator[Any]:
    yield feeds()
    raise DataError("the disk is gone.")


def occupied(content: str | None) -> Callable[[Path], Options]:
    """The output exists: as a folder that holds this file, or None: as a file."""

    def make(folder: Path) -> Options:
        out = folder / "taken"
        if content is None:
            out.write_text("mine")
        else:
            out.mkdir()
            (out / content).write_text("mine")
        return {"output": out, "force": content == "notes.txt"}

    return make


def under_a_file(folder: Path) -> Options:
    (folder / "file").write_text("mine")
    return {"output": folder / "file" / "out"}


_PER_GROUP = dataclasses.replace(PRESETS["w8a8"].weight, granularity="per_group", group_size=8)
_ROWS = np.ones((2, 4), np.float32)
CASES: dict[str, Case] = {
    "no such file": (given(model="nowhere/model.onnx"), ModelError, "there is no file or folder"),
    "no kind of model": (given(model=3), ModelError, "cannot open a builtins.int"),
    "not an onnx file": (text_file, ModelError, "is not an ONNX file"),
    "truncated file": (cut("model.onnx", 0.6), ModelError, "is cut off or damaged"),
    "empty file": (cut("model.onnx", 0), ModelError, "is empty"),
    "missing external data": (lost_data, ModelError, "weights.bin"),
    "truncated external data": (
        cut("weights.bin", 0.5, external_data="weights.bin", size_threshold_bytes=0),
        ModelError,
        "weights.bin is cut off",
    ),
    "opset too old": (opset(9), ModelError, "uses opset 9: opsets 11 to 23 are supported"),
    "opset too new": (opset(99), ModelError, "uses opset 99"),
    "no linear": (
        graph("g (float[B,4] x) => (float[B,4] y) { y = Relu(x) }", {}, _ROWS),
        ModelError,
        "has no Linear",
    ),
    "unknown operator": (
        graph("g (float[B,4] x) => (float[B,4] y) { h = Nonsense(x)  y = MatMul(h, w) }", {"w": [4, 4]}, _ROWS),
        ModelError,
        "Nonsense",
    ),
    "weights that are not finite": (
        graph(
            "g (float[B,4] x) => (float[B,4] y) { h = MatMul(x, w)  r = Relu(h)  y = MatMul(r, v) }",
            {"w": np.full((4, 4), np.inf, np.float32), "v": [4, 4]},
            _ROWS,
        ),
        DataError,
        "inf",
    ),
    "empty calibration": (given(calibration=[]), DataError, "empty"),
    "empty npz": (empty_npz, DataError, "data.npz"),
    "only padding": (given(calibration=nothing_unmasked()), DataError, "padding"),
    "NaN": (data(x=np.full((2, 5, K), np.nan, np.float32)), DataError, "batch 2: input 'x' holds NaN"),
    "infinity": (data(x=np.full((2, 5, K), -np.inf, np.float32)), DataError, "batch 2: input 'x' holds infinity"),
    "missing name": (data(x=None), DataError, "lacks the input 'x'"),
    "wrong name": (data(x_=np.ones(3, np.float32)), DataError, "'x_'"),
    "wrong rank": (data(x=np.ones((2, K), np.float32)), DataError, "rank 2"),
    "wrong size": (data(x=np.ones((2, 5, K + 1), np.float32)), DataError, "shape [2, 5, 17]"),
    "wrong dtype": (data(attention_mask=np.ones((2, 5), np.float32)), DataError, "dtype float32"),
    "data that breaks off": (given(calibration=breaks_off()), DataError, "the disk is gone"),
    "no such data": (given(calibration="nowhere/data.npz"), DataError, "nowhere"),
    "no calibration": (given(calibration=None), DataError, "give calibration data"),
    "limit": (given(limit=0), DataError, "limit is 0"),
    "scheme": (given(scheme="w8a9"), OptionError, "did you mean 'w8a8'"),
    "target": (given(target="ort-gpu"), OptionError, "did you mean 'ort-cpu'"),
    "target option": (given(target="onnx{from=qdq}"), OptionError, "did you mean 'form'"),
    "target option's value": (given(target="onnx{form=qd}"), OptionError, "'qdq'"),
    "two targets": (given(target="onnx,ort-cpu"), OptionError, "one target is wanted"),
    "pass": (given(passes="smoth,insert"), OptionError, "did you mean 'smooth'"),
    "pass option": (given(passes="smooth{alfa=1}"), OptionError, "did you mean 'alpha'"),
    "pass option's value": (given(passes="fold{bias=int8}"), OptionError, "'int32'"),
    "observer": (
        given(
            scheme=dataclasses.replace(
                PRESETS["w8a8-o3"], activation=dataclasses.replace(PRESETS["w8a8-o3"].activation, observer="minmix")
            )
        ),
        OptionError,
        "did you mean 'minmax'",
    ),
    "ignore": (given(ignore=("nothing.*",)), OptionError, "matches no Linear"),
    "bits": (given(bits={"nothing.*": 16}), OptionError, "bits='nothing.*' matches no Linear"),
    "bits of no kernel": (given(bits={"*": 4}), TargetError, "takes weight int4 per_channel static"),
    "target cannot run the scheme": (
        given(scheme=dataclasses.replace(PRESETS["w8a8"], name="mine", weight=_PER_GROUP)),
        TargetError,
        "cannot run scheme 'mine'",
    ),
    "output exists": (occupied("recipe.json"), ArtefactError, "--force"),
    "output is a file": (occupied(None), ArtefactError, "is not a folder"),
    "output is somebody's": (occupied("notes.txt"), ArtefactError, "holds no compiled model"),
    "output below a file": (under_a_file, ArtefactError, "file"),
}


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files of the process go for the time of a test."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("case", CASES)
def test_one_sentence_of_the_right_kind_and_nothing_left(case: str, scratch: Path) -> None:
    make, kind, words = CASES[case]
    options: Options = {
        "model": float_mlp(),
        "calibration": [feeds(seed=seed) for seed in range(3)],
        "output": scratch / "out",
        "progress": False,
        **make(scratch),
    }
    before = {path: path.read_bytes() if path.is_file() else None for path in scratch.rglob("*")}
    with pytest.raises(QCompilerError) as raised:
        qcompiler.compile(options.pop("model"), **options)
    assert type(raised.value) is kind, raised.value
    message = str(raised.value)
    del raised  # its traceback holds what was open
    gc.collect()
    assert words in message
    assert "\n" not in message
    assert "Traceback" not in message
    assert len(message) < 500
    assert {path: path.read_bytes() if path.is_file() else None for path in scratch.rglob("*")} == before


@pytest.mark.parametrize(
    "failure", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk", "ctrl-c"]
)
def test_a_save_that_fails_leaves_nothing(
    failure: BaseException, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are written already when the disk is full, or the user has had enough."""

    def fail(*arguments: object, **options: object) -> None:
        raise failure

    monkeypatch.setattr("qcompiler.runtime.artefact.save_plans", fail)
    expected = ArtefactError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        qcompiler.compile(float_mlp(), calibration=[feeds()], output=scratch / "out", progress=False)
    assert [path.name for path in scratch.rglob("*")] == ["scratch"]


def test_a_failing_replacement_leaves_the_old_model(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = scratch / "out"
    qcompiler.compile(float_mlp(), calibration=[feeds()], output=out, progress=False)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(DataError):
        qcompiler.compile(float_mlp(), calibration=[], output=out, force=True, progress=False)
    monkeypatch.setattr("qcompiler.runtime.artefact.save_plans", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(ArtefactError):
        qcompiler.compile(float_mlp(seed=1), calibration=[feeds()], output=out, force=True, progress=False)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in scratch.iterdir()) == ["out", "scratch"]


def test_the_command_line_says_what_compile_says(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = saved(scratch)
    np.savez(scratch / "data.npz", **{**feeds(), "x": np.full((2, 5, K), np.nan, np.float32)})
    with pytest.raises(DataError) as raised:
        qcompiler.compile(model, calibration=scratch / "data.npz", progress=False)
    assert cli.main(["compile", str(model), "-o", "out", "--calibration", "data.npz", "--quiet"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"qcompiler: {raised.value}\n"
    assert not (scratch / "out").exists()
