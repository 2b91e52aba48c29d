"""Target ``tvm-llvm``: machine code from our own schedules, by TVM and LLVM.

TVM is imported when a model is compiled, run or loaded, and not before.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

from qcompiler.capability import Capability, Kernel
from qcompiler.core import Executable, TargetError
from qcompiler.targets.base import Coverage, Lowered, Target, block_kernels, coverage_of
from qcompiler.targets.tvm.kernels import BY_GROUP, FLOAT, FLOAT_BY_GROUP, INT8, INTEGERS

TIMES = {
    ("per_tensor", False): (1734.0, 6943.9, 7379.4, 32659.8, 59066.4),
    ("per_tensor", True): (1794.9, 7152.0, 7693.5, 34366.0, 57367.6),
    ("per_token", True): (1855.4, 7095.8, 7768.2, 31896.5, 58352.0),
}
"""Microseconds of quantizing 1024 rows and multiplying them, for each of :data:`SHAPES`: one thread's CPU time, AVX2
(znver3, maddubs). A scale for each token costs next to nothing here, whatever the processor."""
GROUP_SIZES = (16, 32, 64, 128, 256)

SHAPES = ((384, 384), (384, 1536), (1536, 384), (768, 3072), (2048, 2048))


@dataclasses.dataclass(frozen=True)
class TvmLlvm(Target):
    """A shared library of fused kernels.

    Attributes:
        cpu: LLVM's name of the processor to compile for, e.g. "znver4"; None: this machine's.
        full_range: keep all 8 bits of weights where the processor has no VNNI; the kernel for 7 bits is faster there.
        tune: measure how each shape of 8-bit Linear is best cut, once a processor: seconds for each new shape.
    """

    name: ClassVar[str] = "tvm-llvm"
    runs_graph: ClassVar[bool] = False
    cpu: str | None = None
    full_range: bool = False
    tune: bool = False

    def __post_init__(self) -> None:
        if importlib.util.find_spec("tvm") is None:
            raise TargetError("target 'tvm-llvm' needs Apache TVM: pip install 'qcompiler[tvm]'.")
        # TVM's thread pool takes its size when it is imported, and can only be narrowed later.
        os.environ.setdefault("TVM_NUM_THREADS", str(os.cpu_count() or 1))

    def capability(self) -> Capability:
        """int8 weights with static or dynamic inputs; weights of 2, 4 and 8 bits by group with int8 or float ones."""
        from qcompiler.targets.tvm.isa import detect

        kernels = [
            Kernel(INT8, "int8", weight, dtype, granularity, dynamic, None, times=_times(granularity, dynamic))
            for weight in ("per_channel", "per_tensor")
            for dtype in ("uint8", "int8")
            for granularity, dynamic in (("per_tensor", False), ("per_tensor", True), ("per_token", True))
        ]
        sizes = dict.fromkeys((2, 4, 8), GROUP_SIZES)
        kernels += block_kernels(FLOAT_BY_GROUP, ("float", "", False), sizes)
        kernels += block_kernels(BY_GROUP, ("int8", "per_group", True), sizes)
        narrow = detect(self.cpu).dot == "maddwd" and not self.full_range
        return Capability(self.name, tuple(kernels), reduce_range=narrow)

    def tables(self) -> Mapping[str, str]:
        """The digest of the measured tilings, where they are asked for."""
        if not self.tune:
            return {}
        from qcompiler.targets.tvm.tuning import digest

        return {"tilings": digest()}

    def lower(self, model: ir.Model) -> Lowered:
        """Compile; the model stays the canonical quantized graph.

        Raises:
            TargetError: a node that cannot be compiled, by name; or a processor to tune for that is not this one.
            ArtefactError: the file of tilings cannot be read.
        """
        from qcompiler.targets.tvm.emit.graph import emit
        from qcompiler.targets.tvm.engine import build
        from qcompiler.targets.tvm.isa import detect

        emitted = emit(model, detect(self.cpu), self.tune)
        nodes = {name: kernel for name, kernel in emitted.nodes.items() if kernel != FLOAT}
        return Lowered(nodes, emitted.notes, build(model, emitted))

    def coverage(self, model: ir.Model, lowered: Lowered, canonical: ir.Model) -> Coverage:
        """What the emitted module multiplies in integers: nothing rewrites it afterwards."""

        def kernel(name: str) -> tuple[str, bool]:
            found = lowered.nodes.get(name, FLOAT)
            return found, found in INTEGERS

        return coverage_of(canonical, kernel)

    def load(self, folder: Path) -> Executable:
        """The library in a saved folder.

        Raises:
            ArtefactError: it cannot be read, or was compiled for another processor.
        """
        from qcompiler.targets.tvm.engine import load

        return load(folder)


def _times(granularity: str, dynamic: bool) -> tuple[tuple[int, int, float], ...]:
    pairs = zip(SHAPES, TIMES[granularity, dynamic], strict=True)
    return tuple((rows, columns, microseconds) for (rows, columns), microseconds in pairs)
