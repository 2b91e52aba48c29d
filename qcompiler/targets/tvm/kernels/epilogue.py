"""What happens to the sums of a Linear before they are written: bias, activation, residual, quantization."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from qcompiler.targets.tvm.builder import Kernel, at, cast, f32, lanes_of, local, spread, store
from qcompiler.targets.tvm.isa import Isa
from qcompiler.targets.tvm.vecmath import ACTIVATIONS, round_even

STEPS = (2,)
"""Shape of the argument that a static quantization is given as: float32 (1 / scale, zero_point)."""


def quantize(x: Any, steps: Any, dtype: str) -> Any:
    """0 … 255: round(x · (1 / scale)) + zero_point, ties to even, saturated (before rounding, which is the same).

    A division would take longer than all the rest.

    Args:
        x: a vector.
        steps: the buffer of shape :data:`STEPS`.
        dtype: the type that activations are stored in.
    """
    lanes = lanes_of(x)
    inverse, zero_point = spread(steps[0], lanes), spread(steps[1], lanes)
    inside = tirx.min(tirx.max(x * inverse, f32(0.0, lanes) - zero_point), f32(255.0, lanes) - zero_point)
    return cast(cast(round_even(inside) + zero_point, "int32"), dtype)


def inverse(scale: float) -> np.float32:
    """What is multiplied by."""
    return np.float32(1) / np.float32(scale)


def quantize_reference(x: npt.NDArray[np.float32], scale: float, zero_point: int) -> npt.NDArray[np.float32]:
    """:func:`quantize` in numpy."""
    return np.clip(np.rint(x * inverse(scale)) + zero_point, 0, 255).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """In this order: + bias[n], activation, + residuals[m, n], activation if it is ``late``, quantize.

    Attributes:
        bias: whether the kernel takes a bias [n].
        activation: a name of :data:`qcompiler.targets.tvm.vecmath.ACTIVATIONS`, or "".
        residuals: how many residuals of the output's shape the kernel takes.
        late: whether the activation comes after the residuals.
        quantized: whether the output is quantized by ``steps`` (:data:`STEPS`), an argument; else it is float32.
    """

    bias: bool = False
    activation: str = ""
    residuals: int = 0
    late: bool = False
    quantized: bool = False

    def dtype(self, activation_dtype: str) -> str:
        """Of the output."""
        return activation_dtype if self.quantized else "float32"

    def apply(self, value: Any, residuals: Sequence[Any], steps: Any, dtype: str) -> Any:
        """What follows the bias, of one vector; ``steps`` is None where nothing is quantized."""
        if self.activation and not self.late:
            value = ACTIVATIONS[self.activation](value)
        for residual in residuals:
            value = value + residual
        if self.activation and self.late:
            value = ACTIVATIONS[self.activation](value)
        return quantize(value, steps, dtype) if self.quantized else value


PLAIN = Epilogue()
"""Nothing but writing."""


class Finisher:
    """Binds the arguments of an epilogue and writes one vector of an output [m, N] at a time.

    Args:
        epilogue: what to do.
        kernel, m, isa: where the arguments go; bias is [``padded``], residuals and y are [m, N].
        out_features, padded: N, and N rounded up to whole tiles.
    """

    def __init__(self, epilogue: Epilogue, kernel: Kernel, m: Any, isa: Isa, out_features: int, padded: int) -> None:
        self.epilogue, self.out_features = epilogue, out_features
        self.ragged = padded != out_features
        self.bias = kernel.argument("bias", (padded,)) if epilogue.bias else None
        shape = (m, out_features)
        self.residuals = [kernel.argument(f"residual{i}", shape) for i in range(epilogue.residuals)]
        self.steps = kernel.argument("steps", STEPS) if epilogue.quantized else None
        self.dtype = epilogue.dtype(isa.activation)
        self.y = kernel.argument("y", (m, out_features), self.dtype)

    def write(self, row: Any, column: Any, value: Any) -> None:
        """One vector of sums from this column on, or as much of it as there are columns."""
        lanes = lanes_of(value)
        if self.bias is not None:
            value = value + self.bias[at(column, lanes)]
        if not self.ragged:
            self._store(row, column, lanes, value)
            return
        with T.If(column + lanes <= self.out_features):
            with T.Then():
                self._store(row, column, lanes, value)
            with T.Else():
                rest = local(lanes)
                store(rest, [at(0, lanes)], value)
                with T.serial(0, tirx.max(tirx.IntImm("int64", 0), self.out_features - column)) as lane:
                    self._store(row, column + lane, 1, rest[lane])

    def _store(self, row: Any, column: Any, lanes: int, value: Any) -> None:
        here = [row, at(column, lanes)]
        residuals = [residual[tuple(here)] for residual in self.residuals]
        store(self.y, here, self.epilogue.apply(value, residuals, self.steps, self.dtype))
