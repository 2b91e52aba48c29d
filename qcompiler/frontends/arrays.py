"""Arrays by input name whose first axis counts samples: a dict of arrays in memory, or an ``.npz`` read as a stream."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.core import DataError
from qcompiler.frontends.inputs import as_array

Chunk = dict[str, npt.NDArray[Any]]


def batches_of(arrays: Mapping[str, Any], batch_size: int) -> Generator[Chunk, None, None]:
    """Cut a dict of arrays into batches.

    Raises:
        DataError: the arrays do not agree on the number of samples.
    """
    whole = {name: as_array(arrays[name]) for name in arrays.keys()}  # noqa: SIM118  (BatchEncoding)
    samples = _samples({name: array.shape for name, array in whole.items()}, "the calibration dict")
    for start in range(0, samples, batch_size):
        yield {name: array[start : start + batch_size] for name, array in whole.items()}


def batches_of_npz(path: Path, batch_size: int) -> Generator[Chunk, None, None]:
    """Read an ``.npz`` batch by batch, so that its size does not matter.

    Raises:
        DataError: no npz file, or arrays that do not agree on the number of samples or hold Python objects.
    """
    try:
        with zipfile.ZipFile(path) as archive, contextlib.ExitStack() as stack:
            members = {
                name.removesuffix(".npy"): _Member(stack.enter_context(archive.open(name)))
                for name in archive.namelist()
                if name.endswith(".npy")
            }
            samples = _samples({name: member.shape for name, member in members.items()}, str(path))
            for start in range(0, samples, batch_size):
                yield {name: member.rows(min(batch_size, samples - start)) for name, member in members.items()}
    except (zipfile.BadZipFile, EOFError, ValueError) as error:
        raise DataError(f"{path} is not a readable .npz file: {error}.") from error


class _Member:
    """One array of an npz, read from its first row to its last (numpy's own reader takes it whole)."""

    def __init__(self, file: Any) -> None:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        self.shape, fortran, self._dtype = read(file)
        if self._dtype.hasobject:
            raise ValueError("it holds Python objects, not numbers")
        self._file = file
        # Column order has no rows to stream.
        self._whole: npt.NDArray[Any] | None = self._take(self.shape[::-1]).T if fortran else None
        self._next = 0

    def rows(self, count: int) -> npt.NDArray[Any]:
        self._next += count
        if self._whole is not None:
            return self._whole[self._next - count : self._next]
        return self._take((count, *self.shape[1:]))

    def _take(self, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        need = int(np.prod(shape)) * self._dtype.itemsize
        content = self._file.read(need)
        if len(content) < need:
            raise EOFError("it is cut off")
        return np.frombuffer(content, dtype=self._dtype).reshape(shape)


def _samples(shapes: Mapping[str, tuple[int, ...]], what: str) -> int:
    lengths = {name: shape[0] if shape else None for name, shape in shapes.items()}
    if not lengths:
        raise DataError(f"{what} holds no arrays.")
    if None in lengths.values() or len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} {list(shapes[name])}" for name in shapes)
        raise DataError(f"{what}: the arrays do not agree on the number of samples, their first axis: {told}.")
    (samples,) = set(lengths.values())
    assert samples is not None
    return samples
