"""Headers of safetensors files: every tensor found where it lies, and damage told in a sentence."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import save_file

from qcompiler.core import ModelError
from qcompiler.frontends.safetensors_file import entries


def test_every_tensor_is_read_from_its_place(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    first = {"a": rng.standard_normal((3, 5)).astype(np.float16), "b": np.arange(4), "scalar": np.float32([2.5])[0]}
    second = {"c": rng.standard_normal((2, 2)).astype(ml_dtypes.bfloat16)}
    save_file({name: np.asarray(array) for name, array in first.items()}, tmp_path / "1.safetensors", {"format": "pt"})
    save_file(second, tmp_path / "2.safetensors")
    found = entries([tmp_path / "1.safetensors", tmp_path / "2.safetensors"])
    assert set(found) == {"a", "b", "c", "scalar"}
    for name, array in {**first, **second}.items():
        dtype = ir.DataType.INT64 if name == "b" else ir.DataType.FLOAT
        assert np.array_equal(found[name].stored(dtype, name).numpy(), np.asarray(array).astype(dtype.numpy()))


@pytest.mark.parametrize("content", [b"", b"\x00" * 20, b"\xff" * 40, b"\x02" + b"\x00" * 7 + b"[]"])
def test_what_is_no_safetensors_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be loaded"):
        entries([path])


def test_a_file_that_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": np.zeros((8, 8), np.float32)}, path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ModelError, match="cut off within 'w'"):
        entries([path])
