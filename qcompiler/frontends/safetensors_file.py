"""What lies where in safetensors files: a header of names, and tensors that are read one at a time.

The layout: eight bytes with the length of the header, the header as JSON (dtype, shape, and begin and end within what
follows, by name), the numbers (https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from qcompiler.core import ModelError
from qcompiler.graph.stored import Stored, from_file

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_LONGEST = 100_000_000  # bytes of a header that the format allows


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a file: ``nbytes`` bytes from ``offset`` on.

    ``code`` is the format's name of its type, and ``dtype`` is numpy's; None where numpy has none.
    """

    path: Path
    offset: int
    nbytes: int
    code: str
    dtype: np.dtype[Any] | None
    shape: tuple[int, ...]

    def stored(self, dtype: ir.DataType, name: str) -> Stored:
        """The tensor, cast to ``dtype`` when it is read."""
        assert self.dtype is not None
        read = functools.partial(from_file, self.path, self.offset, self.dtype, self.shape)
        return Stored(read, dtype, self.shape, name)

    def raw(self) -> bytes:
        """What the file holds."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.nbytes)


def entries(paths: Iterable[Path]) -> dict[str, Entry]:
    """All tensors of these files by name.

    Raises:
        ModelError: a file that is no safetensors file, or is cut off.
    """
    found: dict[str, Entry] = {}
    for path in paths:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST):
                raise ModelError(f"{path} cannot be loaded: it is no safetensors file, or cut off.")
            header = file.read(length)
        try:
            for name, entry in json.loads(header).items():
                if name != "__metadata__":
                    begin, end = entry["data_offsets"]
                    dtype = DTYPES.get(entry["dtype"])
                    start = 8 + length + begin
                    if 8 + length + end > size:
                        raise ModelError(f"{path} cannot be loaded: it is cut off within {name!r}.")
                    found[name] = Entry(
                        path,
                        start,
                        end - begin,
                        entry["dtype"],
                        np.dtype(dtype) if dtype else None,
                        tuple(entry["shape"]),
                    )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{path} cannot be loaded: its header is damaged ({error}).") from error
    return found
