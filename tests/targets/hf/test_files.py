"""Safetensors written tensor by tensor, as safetensors and compressed-tensors themselves read them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from qcompiler.numerics.packing import pack_words
from qcompiler.targets.hf.files import Tensor, copy_beside, write_weights

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(3, dtype=np.int64),
    "c": np.arange(12, dtype=np.int32).reshape(3, 4).T,
    "d": np.arange(5, dtype=np.float16),
    "e": np.array([True, False, True]),
}
CODES = {"float32": "F32", "int64": "I64", "int32": "I32", "float16": "F16", "bool": "BOOL"}


def tensors() -> dict[str, Tensor]:
    return {
        name: Tensor(CODES[array.dtype.name], array.shape, lambda array=array: array, array.nbytes)
        for name, array in ARRAYS.items()
    }


def test_one_file(tmp_path: Path) -> None:
    write_weights(tmp_path, tensors())
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    found = load_file(tmp_path / "model.safetensors")
    assert {name: array.tolist() for name, array in found.items()} == {n: a.tolist() for n, a in ARRAYS.items()}


def test_shards_and_their_index(tmp_path: Path) -> None:
    write_weights(tmp_path, tensors(), shard=60)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in ARRAYS.values())
    assert len(set(index["weight_map"].values())) == len(list(tmp_path.glob("*.safetensors"))) == 3
    for name, file in index["weight_map"].items():
        assert np.array_equal(load_file(tmp_path / file)[name], ARRAYS[name])


def test_a_source_that_shrank(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="a has 1 bytes instead of 4"):
        write_weights(tmp_path, {"a": Tensor("F32", (1,), lambda: b"x")})


def test_what_lies_beside(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "made"
    (source / "1_Pooling").mkdir(parents=True)
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "vocab.txt", "modules.json", "LICENSE", "1_Pooling/config.json"):
        (source / name).write_text(name)
    for name in ("model.safetensors", "pytorch_model.bin", "README.md", "model.safetensors.index.json"):
        (source / name).write_text(name)
    copy_beside(source, folder)
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {"tokenizer.json", "vocab.txt", "modules.json", "LICENSE", "1_Pooling/config.json"}


@given(st.sampled_from([2, 4, 8]), st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**31))
def test_words_are_those_of_compressed_tensors(bits: int, rows: int, columns: int, seed: int) -> None:
    torch = pytest.importorskip("torch")
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    q = np.random.default_rng(seed).integers(0, 2**bits, (rows, columns), dtype=np.uint8)
    signed = torch.from_numpy(q.astype(np.int16) - 2 ** (bits - 1)).to(torch.int8)
    assert np.array_equal(pack_words(q, bits), helpers.pack_to_int32(signed, bits).numpy())
    by_output = helpers.pack_to_int32(signed, bits, packed_dim=0).numpy()
    assert np.array_equal(pack_words(q.T, bits).T, by_output)
