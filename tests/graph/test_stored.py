"""Weights on disk: read as they are, cast, turned, packed, and never mapped for longer than a reader looks."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompiler.graph.edit import add_initializer
from qcompiler.graph.stored import (
    LARGE,
    Spill,
    Stored,
    Unmapped,
    from_file,
    materialise,
    on_disk,
    spill_to,
    transposed,
    unmapped,
)


def external(array: np.ndarray, path: Path, offset: int = 0) -> ir.ExternalTensor:
    tensor = ir.tensor(array)
    path.write_bytes(b"\x07" * offset + tensor.tobytes())
    shape = ir.Shape(array.shape)
    return ir.ExternalTensor(
        path.name, offset, tensor.nbytes, tensor.dtype, shape=shape, name="w", base_dir=path.parent
    )


@given(rows=st.integers(1, 40), columns=st.integers(1, 600), half=st.booleans())
def test_a_transpose_is_made_when_it_is_read(rows: int, columns: int, half: bool) -> None:
    raw = np.random.default_rng(rows * columns).standard_normal((rows, columns)).astype(np.float16 if half else "f4")
    reads = []

    def read() -> np.ndarray:
        reads.append(1)
        return raw

    turned = transposed(Stored(read, ir.DataType.FLOAT, raw.shape))
    assert not reads
    array = turned.numpy()
    assert (array.dtype, array.shape, array.flags.c_contiguous) == (np.float32, (columns, rows), True)
    assert np.array_equal(array, raw.T.astype(np.float32))
    assert np.array_equal(transposed(turned).numpy(), raw.astype(np.float32))
    assert turned.tobytes() == array.tobytes()
    assert len(reads) == 3  # nothing is kept


def test_a_part_of_a_file_and_a_file_that_ends_too_soon(tmp_path: Path) -> None:
    array = np.arange(12, dtype=ml_dtypes.bfloat16)
    path = tmp_path / "numbers"
    path.write_bytes(b"head" + array.tobytes())
    assert np.array_equal(from_file(path, 4, array.dtype, (3, 4)), array.reshape(3, 4))
    with pytest.raises(OSError, match="ends before byte 30"):
        from_file(path, 6, array.dtype, (3, 4))


def test_a_mapped_tensor_is_let_go_after_it_was_turned(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    tensor = external(array, tmp_path / "w", offset=3)
    assert np.array_equal(transposed(tensor).numpy(), array.T)
    assert tensor.raw is None
    seen = tensor.numpy()  # somebody else's map stays open
    assert np.array_equal(transposed(tensor).numpy(), array.T)
    assert np.array_equal(seen, array)


@pytest.mark.parametrize("dtype", [np.float32, np.int8, ml_dtypes.int4, ml_dtypes.uint4])
def test_what_is_read_is_not_mapped(tmp_path: Path, dtype: type) -> None:
    array = (np.arange(15).reshape(3, 5) % 8).astype(dtype)
    tensor = unmapped(external(array, tmp_path / "w", offset=2))
    got = tensor.numpy()
    assert tensor.raw is None
    assert got.dtype == array.dtype
    assert np.array_equal(got, array)
    assert np.array_equal(np.asarray(tensor), array)
    assert tensor.tobytes() == ir.tensor(array).tobytes()
    assert tensor.raw is None


def test_large_constants_of_a_graph_go_to_its_file(tmp_path: Path) -> None:
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 21})
    spill_to(graph, Spill(tmp_path / "file"))
    large = [np.full(LARGE, number, np.uint8) for number in range(2)]
    values = [add_initializer(graph, "large", array) for array in large]
    small = add_initializer(graph, "small", np.arange(3))
    nibbles = add_initializer(graph, "nibbles", np.ones(4 * LARGE, ml_dtypes.int4))
    assert [value.name for value in values] == ["large", "large_2"]
    assert isinstance(small.const_value, ir.Tensor)
    assert isinstance(nibbles.const_value, Unmapped)
    assert (tmp_path / "file").stat().st_size == 4 * LARGE
    for value, array in zip(values, large, strict=True):
        assert isinstance(value.const_value, Unmapped)
        assert np.array_equal(value.const_value.numpy(), array)
    assert (nibbles.const_value.numpy() == 1).all()


def test_materialise_reads_what_is_stored() -> None:
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 21})
    value = add_initializer(graph, "w", np.zeros(2, np.float32))
    value.const_value = Stored(lambda: np.ones(2, np.float16), ir.DataType.FLOAT, (2,), "w")
    assert on_disk(value.const_value)
    materialise(ir.Model(graph, ir_version=10))
    assert isinstance(value.const_value, ir.Tensor)
    assert np.array_equal(value.const_value.numpy(), np.ones(2, np.float32))
