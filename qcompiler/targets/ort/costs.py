"""The cost table: what each kernel takes on the machine where it was measured, and which one to choose.

``costs.json`` is part of the package, so that the same model compiles to the same operators anywhere; another table is
measured with ``python -m qcompiler.targets.ort.measure``.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qcompiler.capability import Times
from qcompiler.core import ArtefactError

VERSION = 1
DEFAULT = Path(__file__).with_name("costs.json")

KERNELS: Mapping[str, tuple[str, ...]] = {
    "static": ("MatMulIntegerToFloat",),
    "per_tensor": ("MatMulIntegerToFloat",),
    "per_token": ("MatMulIntegerToFloat", "MatMulNBits.g32", "MatMulNBits.g128", "MatMulNBits.g256"),
}
"""Kernels that compute a Linear, by how its activation is quantized; quantizing the activation is part of each."""

Shape = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class CostTable:
    """Microseconds of one thread, the activation's quantization included.

    Attributes:
        machine: where it was measured.
        floats: (rows, in_features, out_features) -> µs of the float MatMul + Add.
        kernels: "granularity/kernel" -> the same for that kernel.
        sha256: of the file.
    """

    machine: Mapping[str, Any]
    floats: Mapping[Shape, float]
    kernels: Mapping[str, Mapping[Shape, float]]
    sha256: str

    def speed(self, granularity: str, kernel: str, rows: int, in_features: int, out_features: int) -> float:
        """Speed against the float product at the nearest measured shape (in the logarithms); higher is faster."""
        times = self.kernels[f"{granularity}/{kernel}"]
        wanted = (rows, in_features, out_features)
        nearest = min(
            times, key=lambda shape: (sum(math.log(a / b) ** 2 for a, b in zip(shape, wanted, strict=True)), shape)
        )
        return self.floats[nearest] / times[nearest]

    def times(self, rows: int, granularity: str | None = None, kernel: str = "") -> Times:
        """(in_features, out_features, µs) of one kernel, or of the float product (None), for that many rows.

        Of the nearest measured number of rows, in proportion.
        """
        times = self.floats if granularity is None else self.kernels[f"{granularity}/{kernel}"]
        nearest = min({shape[0] for shape in times}, key=lambda measured: (abs(math.log(measured / rows)), measured))
        return tuple((k, n, time * rows / measured) for (measured, k, n), time in times.items() if measured == nearest)

    def fastest(self, granularity: str, rows: int, in_features: int, out_features: int) -> str:
        """The kernel to use; the first of equals in :data:`KERNELS`."""
        return max(
            KERNELS[granularity], key=lambda kernel: self.speed(granularity, kernel, rows, in_features, out_features)
        )


@functools.cache
def load_costs(path: Path = DEFAULT) -> CostTable:
    """Read a cost table.

    Raises:
        ArtefactError: no table, or one of another version.
    """
    try:
        text = path.read_bytes()
        data = json.loads(text)
    except (OSError, ValueError) as error:
        raise ArtefactError(f"cost table {path.name} cannot be read: {error}.") from error
    if data.get("version") != VERSION:
        raise ArtefactError(
            f"cost table {path.name} is of version {data.get('version')!r}; version {VERSION} is wanted."
        )
    shapes = [(int(m), int(k), int(n)) for m, k, n in data["shapes"]]
    return CostTable(
        machine=data["machine"],
        floats=dict(zip(shapes, data["float"], strict=True)),
        kernels={name: dict(zip(shapes, times, strict=True)) for name, times in data["kernels"].items()},
        sha256=hashlib.sha256(text).hexdigest(),
    )
