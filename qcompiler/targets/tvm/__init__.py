"""Target ``tvm-llvm``: machine code from our own schedules, by TVM and LLVM.

TVM is imported when a model is compiled, run or loaded, and not before.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

from qcompiler.core import Capability, Executable, Kernel, TargetError
from qcompiler.targets.base import Coverage, Lowered, Target, coverage_of

KERNEL = "int8 GEMM"


@dataclasses.dataclass(frozen=True)
class TvmLlvm(Target):
    """A shared library of fused kernels.

    Attributes:
        cpu: LLVM's name of the processor to compile for, e.g. "znver4"; None: this machine's.
        full_range: keep all 8 bits of weights where the processor has no VNNI; the kernel for 7 bits is faster there.
    """

    name: ClassVar[str] = "tvm-llvm"
    cpu: str | None = None
    full_range: bool = False

    def __post_init__(self) -> None:
        if importlib.util.find_spec("tvm") is None:
            raise TargetError("target 'tvm-llvm' needs Apache TVM: pip install 'qcompiler[tvm]'.")
        # TVM's thread pool takes its size when it is imported, and can only be narrowed later.
        os.environ.setdefault("TVM_NUM_THREADS", str(os.cpu_count() or 1))

    def capability(self) -> Capability:
        """Static per-tensor, dynamic per-tensor and dynamic per-token activations; weights by channel or by tensor."""
        from qcompiler.targets.tvm.isa import detect

        kernels = [
            Kernel(KERNEL, "int8", weight, dtype, granularity, dynamic, None)
            for weight in ("per_channel", "per_tensor")
            for dtype in ("uint8", "int8")
            for granularity, dynamic in (("per_tensor", False), ("per_tensor", True), ("per_token", True))
        ]
        narrow = detect(self.cpu).dot == "maddwd" and not self.full_range
        return Capability(self.name, tuple(kernels), reduce_range=narrow)

    def lower(self, model: ir.Model) -> Lowered:
        """Compile; the model stays the canonical quantized graph.

        Raises:
            TargetError: a node that cannot be compiled, by name.
        """
        from qcompiler.targets.tvm.emit.graph import emit
        from qcompiler.targets.tvm.engine import build
        from qcompiler.targets.tvm.isa import detect

        emitted = emit(model, detect(self.cpu))
        nodes = {name: name for name, kind in emitted.nodes.items() if kind == "int8"}
        return Lowered(nodes, emitted.notes, build(model, emitted))

    def coverage(self, model: ir.Model, lowered: Lowered, canonical: ir.Model) -> Coverage:
        """What the emitted module multiplies in integers: nothing rewrites it afterwards."""
        return coverage_of(canonical, lambda name: (KERNEL, True) if name in lowered.nodes else ("float GEMM", False))

    def load(self, folder: Path) -> Executable:
        """The library in a saved folder.

        Raises:
            ArtefactError: it cannot be read, or was compiled for another processor.
        """
        from qcompiler.targets.tvm.engine import load

        return load(folder)
