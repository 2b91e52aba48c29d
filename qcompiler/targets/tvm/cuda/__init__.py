"""Target ``tvm-cuda``: the CUDA source of kernels for a model's Linears, made where no GPU need be.

What is emitted are the products, not the whole model: the folder holds the source, the packed weights and which Linear
takes which, for a program that has a GPU. The numbers of the report are those of the quantized graph.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy.typing as npt
import onnx_ir as ir

from qcompiler.capability import Capability, Kernel
from qcompiler.core import ArtefactError, Executable, TargetError
from qcompiler.targets.base import Target, block_kernels
from qcompiler.targets.lowered import Coverage, Lowered, coverage_of

DP4A, WEIGHT4 = "dp4a GEMM", "fp16 x int4 GEMM"
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90")
SOURCE, WEIGHTS, TABLE = "kernels.cu", "weights.safetensors", "kernels.json"


@dataclasses.dataclass(frozen=True)
class TvmCuda(Target):
    """Kernels as CUDA source; compiled to a cubin on saving where there is nvcc.

    Attributes:
        arch: of :data:`ARCHITECTURES`.
    """

    name: ClassVar[str] = "tvm-cuda"
    arch: str = "sm_90"

    def __post_init__(self) -> None:
        if importlib.util.find_spec("tvm") is None:
            raise TargetError("target 'tvm-cuda' needs Apache TVM: pip install 'qcompiler[tvm]'.")
        if self.arch not in ARCHITECTURES:
            raise TargetError(
                f"target 'tvm-cuda' has no architecture {self.arch!r}: take one of {list(ARCHITECTURES)}."
            )

    def capability(self) -> Capability:
        """8-bit weights by channel with 8-bit inputs, and 4-bit weights by group with float16 inputs."""
        kernels = [
            Kernel(DP4A, "int8", weight, dtype, granularity, dynamic, None)
            for weight in ("per_channel", "per_tensor")
            for dtype in ("uint8", "int8")
            for granularity, dynamic in (("per_tensor", False), ("per_tensor", True), ("per_token", True))
        ]
        kernels += block_kernels(WEIGHT4, ("float", "", False), {4: (16, 32, 64, 128, 256)})
        return Capability(self.name, tuple(kernels))

    def lower(self, model: ir.Model) -> Lowered:
        """Emit; the model stays the canonical quantized graph."""
        from qcompiler.targets.tvm.cuda.emit import emit
        from qcompiler.targets.tvm.cuda.source import cuda_source

        emitted = emit(model)
        source = cuda_source(emitted.functions, self.arch) if emitted.functions else ""
        kernels = CudaKernels(source, emitted.kernels, emitted.arrays, self.arch)
        return Lowered({name: name for name in emitted.kernels}, emitted.notes, kernels, runs=False)

    def coverage(self, model: ir.Model, lowered: Lowered, canonical: ir.Model) -> Coverage:
        """What has a kernel of ours that multiplies integers; int4 weights are multiplied in float16."""
        assert isinstance(lowered.executable, CudaKernels)
        kernels = lowered.executable.kernels

        def kernel(name: str) -> tuple[str, bool]:
            made = kernels.get(name, "")
            return (DP4A, True) if made.startswith("int8") else (WEIGHT4 if made else "float GEMM", False)

        return coverage_of(canonical, kernel)

    def load(self, folder: Path) -> Executable:
        """What :meth:`CudaKernels.save` wrote.

        Raises:
            ArtefactError: it cannot be read.
        """
        from safetensors.numpy import load_file

        try:
            source = (folder / SOURCE).read_text(encoding="utf-8")
            table = json.loads((folder / TABLE).read_text(encoding="utf-8"))
            return CudaKernels(source, table["kernels"], load_file(folder / WEIGHTS), table["arch"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtefactError(f"{folder} cannot be read: {error!r}.") from error


@dataclasses.dataclass(frozen=True)
class CudaKernels:
    """The source and what it multiplies.

    Attributes:
        source: CUDA.
        kernels: name of a Linear -> name of its kernel.
        arrays: "linear.argument" -> constant arguments.
        arch: for which it was made.
    """

    source: str
    kernels: Mapping[str, str]
    arrays: Mapping[str, npt.NDArray[Any]]
    arch: str

    def run(self, feeds: Mapping[str, npt.NDArray[Any]], threads: int = 0) -> dict[str, npt.NDArray[Any]]:
        """Nothing here runs them.

        Raises:
            TargetError: always, with what to do.
        """
        raise TargetError(
            f"target 'tvm-cuda' emits kernels of {len(self.kernels)} Linears and no whole model: save it and call "
            f"{SOURCE} from a program with a CUDA runtime, or compile for 'tvm-llvm' to run here."
        )

    def save(self, folder: Path) -> None:
        """Write source, weights and table, and the cubin where there is nvcc.

        The table names each Linear's kernel, and each kernel's arguments in the order of its signature.
        """
        from safetensors.numpy import save_file

        from qcompiler.targets.tvm.cuda.source import compile_cubin, nvcc, parameters

        (folder / SOURCE).write_text(self.source, encoding="utf-8")
        save_file(dict(self.arrays), folder / WEIGHTS)
        (folder / WEIGHTS).chmod(0o644)  # save_file makes it readable by its owner only
        table = {"arch": self.arch, "kernels": dict(self.kernels), "parameters": parameters(self.source)}
        (folder / TABLE).write_text(json.dumps(table, indent=1), encoding="utf-8")
        if nvcc() is not None and self.kernels:
            compile_cubin(folder / SOURCE, self.arch)
