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
from qcompiler.targets.base import Target, block_kernels
from qcompiler.targets.lowered import Coverage, Lowered, coverage_of
from qcompiler.targets.tvm.costs import ROWS, costs_of
from qcompiler.targets.tvm.kernels import BY_GROUP, FLOAT, FLOAT_BY_GROUP, INT8, INTEGERS

GROUP_SIZES = (16, 32, 64, 128, 256)
TABLES = ("int4", "uint4", "int8", "uint8")
"""Of embeddings in groups."""


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

        dot = detect(self.cpu).dot
        costs = costs_of(dot)
        kernels = [
            Kernel(INT8, "int8", weight, dtype, granularity, dynamic, None, times=costs.times(ROWS, name, INT8))
            for weight in ("per_channel", "per_tensor")
            for dtype in ("uint8", "int8")
            for name, granularity, dynamic in (
                ("static", "per_tensor", False),
                ("per_tensor", "per_tensor", True),
                ("per_token", "per_token", True),
            )
        ]
        sizes = dict.fromkeys((2, 4, 8), GROUP_SIZES)
        kernels += block_kernels(FLOAT_BY_GROUP, ("float", "", False), sizes)
        kernels += block_kernels(BY_GROUP, ("int8", "per_group", True), sizes)
        narrow = dot == "maddwd" and not self.full_range
        return Capability(
            self.name, tuple(kernels), narrow, costs.times(ROWS), embeddings=dict.fromkeys(TABLES, GROUP_SIZES)
        )

    def tables(self) -> Mapping[str, str]:
        """The digests of the cost table, and of the measured tilings where they are asked for."""
        from qcompiler.targets.tvm.isa import detect

        found = {"costs": costs_of(detect(self.cpu).dot).sha256}
        if self.tune:
            from qcompiler.targets.tvm.tuning import digest

            found["tilings"] = digest()
        return found

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
