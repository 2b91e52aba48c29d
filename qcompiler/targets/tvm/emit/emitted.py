"""A Relax module of our kernels, and what it needs to run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from qcompiler.core import Note
from qcompiler.targets.tvm.emit.dims import Size, symbol
from qcompiler.targets.tvm.isa import Isa

AXES = ("batch", "sequence")


@dataclasses.dataclass(frozen=True)
class Emitted:
    """A module and what it needs to run.

    Attributes:
        module: with one function, ``main(inputs, constants)``, whose result is a tuple of the outputs.
        constants: by name, in the order of the parameters.
        limits: open sizes, as polynomials over axes, that must not grow beyond a number.
        nodes: name of each Linear -> the kernel that computes it, one of :data:`qcompiler.targets.tvm.kernels.LINEAR`.
        notes: what became of each Linear.
        isa: what the kernels were made for.
    """

    module: Any
    constants: Mapping[str, npt.NDArray[Any]]
    limits: tuple[tuple[Size, int], ...]
    nodes: Mapping[str, str]
    notes: tuple[Note, ...]
    isa: Isa


def input_sizes(value: ir.Value) -> tuple[Size, ...]:
    """A graph input's shape; open axes are named by their place: all batches are one, all sequences are one."""
    assert value.shape is not None
    return tuple(d if isinstance(d, int) else symbol(axis_name(i)) for i, d in enumerate(value.shape))


def axis_name(axis: int) -> str:
    """The name of an open axis."""
    return AXES[axis] if axis < len(AXES) else f"axis{axis}"
