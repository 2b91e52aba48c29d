"""From kernels to CUDA's language, and by nvcc to a cubin."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi

from qcompiler.core import TargetError

_COMPILE = "tvm_callback_cuda_compile"
_SIGNATURE = re.compile(r"__global__ void (?:__launch_bounds__\(\d+\) )?(\w+)_kernel\(([^)]*)\)")


def cuda_source(functions: Mapping[str, Any], arch: str) -> str:
    """The source of PrimFuncs by name.

    TVM hands its source to a compiler as soon as it has it; here to none, so that none is needed.
    """
    before = tvm_ffi.get_global_func(_COMPILE, allow_missing=True)
    tvm_ffi.register_global_func(_COMPILE, lambda code, _: code, override=True)
    try:
        library = tvm.compile(tvm.IRModule(dict(functions)), target={"kind": "cuda", "arch": arch})
    finally:
        if before is not None:
            tvm_ffi.register_global_func(_COMPILE, before, override=True)
    return "\n".join(str(module.inspect_source("cuda")) for module in library.mod.imports if module.kind == "cuda")


def parameters(source: str) -> dict[str, list[str]]:
    """The arguments of each kernel in the order in which a launch passes them, by the name of its PrimFunc.

    TVM orders them as it likes: pointers under the names of the PrimFunc's arguments, then the symbolic sizes, int64.
    """
    return {
        name: [parameter.split()[-1].removesuffix("_ptr") for parameter in declared.split(",")]
        for name, declared in _SIGNATURE.findall(source)
    }


def nvcc() -> str | None:
    """Where it is."""
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def compile_cubin(source: Path, arch: str) -> Path:
    """Compile to a file beside the source.

    Raises:
        TargetError: there is no nvcc, or it refuses, with its first error.
    """
    compiler = nvcc()
    if compiler is None:
        raise TargetError(f"{source.name} needs nvcc to be compiled: install the CUDA toolkit, 12.0 or later.")
    cubin = source.with_suffix(".cubin")
    command = [compiler, f"-arch={arch}", "-std=c++17", "-cubin", "-o", str(cubin), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise TargetError(
            f"nvcc does not compile {source.name} for {arch}: {lines[0] if lines else 'no reason given'}."
        )
    return cubin
