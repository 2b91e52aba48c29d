"""Compile one kernel and call it with numpy arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

tvm = pytest.importorskip("tvm", reason="Apache TVM is not installed: pip install 'qcompiler[tvm]'")

from qcompiler.targets.tvm.isa import Isa, detect, runs_here, with_narrow_weights  # noqa: E402

Array = npt.NDArray[Any]


def here() -> Isa:
    """This machine's, with the fastest dot for 7-bit weights."""
    return with_narrow_weights(detect())


def runnable() -> list[Isa]:
    """Each dot that this machine runs."""
    own = detect()
    candidates = [own, with_narrow_weights(own), detect("haswell"), with_narrow_weights(detect("haswell"))]
    return list(dict.fromkeys(isa for isa in [*candidates, detect("x86-64")] if runs_here(isa)))


def compiled(kernel: Any, isa: Isa) -> Callable[..., None]:
    """The kernel; arrays that it writes are changed in place."""
    function = tvm.compile(kernel.build(isa, "kernel"), target=isa.target())["kernel"]

    def call(*arrays: Array) -> None:
        tensors = [tvm.runtime.tensor(np.asarray(array, order="C")) for array in arrays]
        function(*tensors)
        for array, tensor in zip(arrays, tensors, strict=True):
            array[...] = tensor.numpy()

    return call


def assembly(kernel: Any, isa: Isa) -> str:
    """The machine code as text."""
    return str(tvm.compile(kernel.build(isa, "kernel"), target=isa.target()).mod.inspect_source("asm"))
