"""The grid of integers that a weight is rounded to, with one scale and zero point for each group of its inputs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.core import OptionError
from qcompiler.numerics.affine import integer_range, scale_zero_point
from qcompiler.scheme import TensorSpec

Array = npt.NDArray[Any]
FindScale = Callable[[Array], tuple[Array, Array]]
_CHUNK = 1 << 20  # numbers that are rounded at a time: small temporaries, however large the weight


@dataclasses.dataclass(frozen=True, eq=False)
class Grid:
    """The integers a weight [in, out] is rounded to: w ≈ (q - zero_point) · scale with low <= q <= high.

    Attributes:
        low, high: smallest and largest integer.
        group_size: inputs of one output channel that share a scale; None: all of them. The last group may be short.
        scale: [out], a scalar, or with groups [ceil(in / group_size), out]; None: found by ``find``, group by group,
            from the weights as the groups before have left them (with ``act_order``: from the weight as given, because
            a group's inputs are then rounded at different times).
        zero_point: of the shape of ``scale``; None: zeros.
        find: scale and zero point [out] of the weights [n, out] of one group; None: max|w| / high, symmetric.
    """

    low: int
    high: int
    group_size: int | None = None
    scale: Array | None = None
    zero_point: Array | None = None
    find: FindScale | None = None

    def nearest(self, weight: Array) -> npt.NDArray[np.int32]:
        """The integers [in, out] nearest to a weight; the scales must be known."""
        q = np.empty(weight.shape, np.int32)
        for rows, grid in self._parts(weight.shape):
            scale, zero_point = grid.spread(len(weight[rows]))
            with np.errstate(over="ignore"):
                nearest = np.rint(weight[rows] / scale)
            q[rows] = np.clip(nearest + zero_point, self.low, self.high)
        return q

    def squared_error(self, weight: Array) -> float:
        """Σ(w - ŵ)² of a weight [in, out] rounded to nearest, in float64."""
        return sum(
            float(np.square(weight[rows] - grid.rounded(weight[rows]), dtype=np.float64).sum())
            for rows, grid in self._parts(weight.shape)
        )

    def _parts(self, shape: tuple[int, ...]) -> Iterator[tuple[slice, Grid]]:
        """Slices of a weight's inputs, whole groups that need little memory, and the grid of each."""
        group = self.group_size or 1
        step = group * max(1, _CHUNK // (group * math.prod((1, *shape[1:]))))
        for start in range(0, shape[0], step):
            rows = slice(start, start + step)
            yield rows, self._of_rows(rows)

    def _of_rows(self, rows: slice) -> Grid:
        """The part of the grid that some whole groups have."""
        if self.group_size is None or self.scale is None:
            return self
        groups = slice(rows.start // self.group_size, rows.stop // self.group_size)
        zero_point = None if self.zero_point is None else self.zero_point[groups]
        return dataclasses.replace(self, scale=self.scale[groups], zero_point=zero_point)

    def dequantized(self, q: Array) -> Array:
        """(q - zero_point) · scale, in the precision of the scales."""
        scale, zero_point = self.spread(len(q))
        return np.asarray((np.asarray(q, scale.dtype) - zero_point) * scale)

    def rounded(self, weight: Array) -> Array:
        """The values on the grid that are nearest to a weight."""
        return self.dequantized(self.nearest(weight))

    def in_double(self) -> Grid:
        """The same grid with scales in float64."""
        assert self.scale is not None
        return dataclasses.replace(self, scale=np.asarray(self.scale, np.float64))

    def spread(self, rows: int) -> tuple[Array, Array]:
        """Scale and zero point of each of ``rows`` inputs, [rows, out], or as they are where there are no groups."""
        assert self.scale is not None
        zero_point = np.zeros_like(self.scale) if self.zero_point is None else self.zero_point
        zero_point = np.asarray(zero_point, self.scale.dtype)
        if self.group_size is None:
            return self.scale, zero_point
        scale, zero_point = (np.repeat(a, self.group_size, axis=0)[:rows] for a in (self.scale, zero_point))
        return scale, zero_point


def weight_grid(weight: Array, spec: TensorSpec, reduce_range: bool = False) -> Grid:
    """The grid whose scales cover each group's weights, from the least to the largest: rounding to nearest's own.

    Args:
        weight: float [in, out].
        spec: per_tensor, per_channel or per_group; symmetric or not.

    Returns:
        scale float32 and zero_point: [], [out] or [ceil(in / group_size), out].

    Raises:
        OptionError: a spec that weights cannot have.
    """
    if spec.dynamic or spec.granularity == "per_token":
        raise OptionError(f"weights cannot be quantized {spec.granularity} at run time.")
    weight = np.asarray(weight, np.float32)
    if spec.granularity == "per_tensor":
        low, high = weight.min(initial=0.0), weight.max(initial=0.0)
    else:
        starts = np.arange(0, len(weight), spec.group_size or max(len(weight), 1))
        low, high = (extreme.reduceat(weight, starts, axis=0) for extreme in (np.minimum, np.maximum))
        if spec.group_size is None:
            low, high = low[0], high[0]
    scale, zero_point = scale_zero_point(low, high, spec, reduce_range)
    bottom, top = integer_range(spec, reduce_range)
    return Grid(bottom, top, spec.group_size, scale, zero_point)
