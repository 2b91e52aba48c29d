"""The artefact where no compiler links it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import qcompiler
from qcompiler.core import ArtefactError
from tests.passes.blocks import batches, block

pytest.importorskip("tvm", reason="Apache TVM is not installed: pip install 'qcompiler[tvm]'")


def test_without_a_compiler_objects_are_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No compiler is called; the warning and the error of loading give the command, and what that links runs."""
    data = batches()
    compiled = qcompiler.compile(
        block(), calibration=data, passes="annotate,insert,fold", target="tvm-llvm", progress=False
    )
    linker = shutil.which("g++")
    with monkeypatch.context() as hidden:
        hidden.setenv("PATH", str(tmp_path))
        with pytest.warns(UserWarning, match=re.escape("no C++ compiler is found: model*.o take the library's place")):
            folder = compiled.save(tmp_path / "out")
    assert not (folder / "model.so").exists()
    objects = sorted(path.name for path in folder.glob("*.o"))
    assert objects == ["model.1.o", "model.o"]
    assert all((folder / name).read_bytes()[:4] == b"\x7fELF" for name in objects)
    with pytest.raises(ArtefactError, match=re.escape("`g++ -shared -o model.so model*.o` in its folder links it")):
        qcompiler.load(folder)
    if linker is None:
        pytest.skip("there is no g++ to link with")
    subprocess.run([linker, "-shared", "-o", "model.so", *objects], cwd=folder, check=True)
    got = qcompiler.load(folder).run(data[0], threads=1)
    for name, array in compiled.run(data[0], threads=1).items():
        np.testing.assert_array_equal(got[name], array)
