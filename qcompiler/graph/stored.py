"""Weights that stay on disk: read anew each time somebody looks at them, and kept by nobody.

An ``ir.ExternalTensor`` maps its file: pages that were looked at count as resident until the map is closed, and it
cannot be closed while an array still looks at it. What is read into memory of its own goes when the array goes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]

LARGE = 1 << 16
"""Bytes from which on a constant is worth a place on disk."""
_TILE = 256  # columns that are turned into rows at a time: all rows of a tile fit the cache
_SPILL = "qcompiler.spill"


class Stored(ir.LazyTensor):
    """Numbers that ``read`` makes anew for each reader, in any float type and memory order.

    Attributes:
        read: gives the array of this shape; ``numpy()`` has it in the tensor's own dtype, C order.
    """

    def __init__(
        self, read: Callable[[], Array], dtype: ir.DataType, shape: tuple[int, ...], name: str | None = None
    ) -> None:
        self.read = read
        super().__init__(functools.partial(_cast, read, dtype), dtype, ir.Shape(shape), name=name)


def _cast(read: Callable[[], Array], dtype: ir.DataType) -> ir.TensorProtocol:
    array = read()
    wanted = dtype.numpy()
    if array.ndim == 2 and array.flags.f_contiguous and not array.flags.c_contiguous:
        return ir.tensor(_turned(array, wanted), dtype=dtype)
    return ir.tensor(np.asarray(array, wanted, order="C"), dtype=dtype)


def _turned(array: Array, dtype: np.dtype[Any]) -> Array:
    """A transposed view as an array of its own: read in its order, written tile by tile."""
    out = np.empty(array.shape, dtype)
    for start in range(0, array.shape[1], _TILE):
        out[:, start : start + _TILE] = array[:, start : start + _TILE]
    return out


def from_file(path: Path, offset: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    """Read an array of ``dtype`` [shape] that starts at byte ``offset`` of a file."""
    count = int(np.prod(shape, dtype=np.int64))
    array = np.fromfile(path, dtype, count, offset=offset)
    if len(array) != count:
        raise OSError(f"{path} ends before byte {offset + count * dtype.itemsize}")
    return array.reshape(shape)


def on_disk(tensor: ir.TensorProtocol | None) -> bool:
    """Whether a tensor's numbers are read from disk when they are asked for."""
    return isinstance(tensor, Stored | ir.ExternalTensor)


def transposed(tensor: ir.TensorProtocol, name: str | None = None) -> Stored:
    """The transpose of a matrix on disk, without reading it now."""
    rows, columns = (int(size) for size in tensor.shape.numpy())
    return Stored(functools.partial(_transpose, _reader(tensor)), tensor.dtype, (columns, rows), name)


def converted(tensor: ir.TensorProtocol, dtype: ir.DataType) -> Stored:
    """The numbers of a tensor on disk in another float type, without reading them now."""
    return Stored(_reader(tensor), dtype, tuple(int(size) for size in tensor.shape.numpy()))


def _reader(tensor: ir.TensorProtocol) -> Callable[[], Array]:
    return tensor.read if isinstance(tensor, Stored) else functools.partial(_copied, tensor)


def item(tensor: ir.TensorProtocol, index: int, name: str | None = None) -> Stored:
    """One matrix of a tensor [n, rows, columns] on disk, without reading it now."""
    _, rows, columns = (int(size) for size in tensor.shape.numpy())
    if isinstance(tensor, ir.ExternalTensor) and tensor.dtype.itemsize >= 1:
        length = round(rows * columns * tensor.dtype.itemsize)
        part = ir.ExternalTensor(
            tensor.location,
            (tensor.offset or 0) + index * length,
            length,
            tensor.dtype,
            shape=ir.Shape((rows, columns)),
            name=tensor.name,
            base_dir=tensor.base_dir,
        )
        part.meta.update(tensor.meta)
        return Stored(functools.partial(_copied, part), tensor.dtype, (rows, columns), name)
    read = tensor.read if isinstance(tensor, Stored) else functools.partial(_copied, tensor)
    return Stored(functools.partial(_item, read, index), tensor.dtype, (rows, columns), name)


def _item(read: Callable[[], Array], index: int) -> Array:
    return np.array(read()[index])


def _transpose(read: Callable[[], Array]) -> Array:
    return read().T


def _copied(tensor: ir.TensorProtocol) -> Array:
    """An array of its own from a tensor that maps its file; the map is closed, unless it was open before."""
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor.numpy()
    mapped = tensor.raw is not None
    array = np.array(tensor.numpy())
    if not mapped:
        tensor.release()
    return array


def materialise(model: ir.Model) -> None:
    """Read all stored initializers into memory: for passes that look at weights many times over."""
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, Stored):
            value.const_value = ir.tensor(value.const_value.numpy(), name=value.name)


class Unmapped(ir.ExternalTensor):
    """A tensor in a file that is read and not mapped; 4 and 2 bits are packed there, as in an ONNX external file."""

    def numpy(self) -> Array:
        try:
            return np.array(super().numpy())
        finally:
            self.release()

    def __array__(self, dtype: Any = None) -> Array:
        return self.numpy().__array__(dtype)

    def tobytes(self) -> bytes:
        try:
            return super().tobytes()
        finally:
            self.release()


def unmapped(tensor: ir.ExternalTensor) -> Unmapped:
    """The same tensor, read and not mapped."""
    made = Unmapped(
        tensor.location,
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=tensor.shape,
        name=tensor.name,
        base_dir=tensor.base_dir,
    )
    made.meta.update(tensor.meta)
    return made


class Spill:
    """A file that new constants of a graph go to, so that they need no memory; see :func:`spill_to`.

    Args:
        path: the file; what it holds is overwritten.
        owner: is kept alive as long as any tensor of the file.
    """

    def __init__(self, path: Path, owner: object = None) -> None:
        self._path, self._owner = path, owner
        path.write_bytes(b"")

    def keep(self, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        """The tensor, in the file if it is large."""
        if tensor.nbytes < LARGE or on_disk(tensor):
            return tensor
        with self._path.open("ab") as file:
            offset = file.tell()
            file.write(tensor.tobytes())
        kept = Unmapped(
            self._path.name,
            offset,
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=tensor.name or "",
            base_dir=self._path.parent,
        )
        kept.meta["qcompiler.scratch"] = self._owner
        return kept


def spill_to(graph: ir.Graph, spill: Spill) -> None:
    """Let ``edit.add_initializer`` put the large constants of this graph, and of its clones, into a file."""
    graph.meta[_SPILL] = spill


def kept(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The tensor, where the graph wants its new constants."""
    spill: Spill | None = graph.meta.get(_SPILL)
    return tensor if spill is None else spill.keep(tensor)
