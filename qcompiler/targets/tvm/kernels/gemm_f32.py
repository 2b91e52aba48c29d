"""y = epilogue(x · W) in float32 with a packed weight: the Linears that stay in float."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm.script.ir_builder import tirx as T

from qcompiler.targets.tvm.builder import at, kernel_named, size, spread, store, zeros
from qcompiler.targets.tvm.isa import Isa
from qcompiler.targets.tvm.kernels.epilogue import PLAIN, Epilogue, Finisher
from qcompiler.targets.tvm.kernels.gemm_int8 import blocked, pad


@dataclasses.dataclass(frozen=True)
class GemmF32:
    """One shape of Linear: (x [m, K], weight packed, [bias [padded N]], [residuals [m, N]], [steps], y [m, N])."""

    in_features: int
    out_features: int
    epilogue: Epilogue = PLAIN

    def build(self, isa: Isa, name: str) -> Any:
        """The PrimFunc."""
        (height, vectors), lanes = isa.tile, isa.lanes
        width = lanes * vectors
        panels = -(-self.out_features // width)
        m = size("m")
        with kernel_named(name) as kernel:
            x = kernel.argument("x", (m, self.in_features))
            weight = kernel.argument("weight", (panels, self.in_features, width))
            finisher = Finisher(self.epilogue, kernel, m, isa, self.out_features, panels * width)

            def tile(panel: Any, row: Any, rows: int) -> None:
                sums = [zeros(vectors, lanes) for _ in range(rows)]
                with T.serial(0, self.in_features) as k:
                    columns = [weight[panel, k, at(j * lanes, lanes)] for j in range(vectors)]
                    for r in range(rows):
                        for j in range(vectors):
                            here = at(j * lanes, lanes)
                            store(sums[r], [here], sums[r][here] + spread(x[row + r, k], lanes) * columns[j])
                for r in range(rows):
                    for j in range(vectors):
                        value = sums[r][at(j * lanes, lanes)]
                        finisher.write(row + r, (panel * vectors + j) * lanes, value)

            blocked(m, panels, height, tile)
        return kernel.function


def pack(weight: npt.NDArray[np.float32], isa: Isa) -> npt.NDArray[np.float32]:
    """[K, N] to panels [⌈N / width⌉, K, width] of a tile's width; the padding is zero."""
    in_features, out_features = weight.shape
    width = isa.lanes * isa.tile[1]
    panels = -(-out_features // width)
    whole = np.zeros((in_features, panels * width), np.float32)
    whole[:, :out_features] = weight
    return np.ascontiguousarray(whole.reshape(in_features, panels, width).transpose(1, 0, 2))


def pad_columns(vector: npt.NDArray[Any], isa: Isa) -> npt.NDArray[Any]:
    """[N] to [padded N]."""
    width = isa.lanes * isa.tile[1]
    return pad(vector, -(-len(vector) // width) * width)
