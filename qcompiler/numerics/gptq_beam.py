"""GPTQ with a beam: some ways to round the inputs so far are kept, not only the one that looked best at each.

The output error of a rounding is Σ_k e_k², e_k the error at input k over U_kk (Frantar et al. 2023, equation 2), so it
is known input by input; finding its minimum is the closest vector problem, GPTQ's answer to it Babai's nearest plane
(Chen et al. 2025, arXiv 2507.18553), and a beam the usual next step (the K-best sphere decoder of Guo and Nilsson 2006,
section II).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_NUMBERS = 1 << 24  # of the weights not yet rounded that are held at a time, for all ways together


def eliminate_beam(
    goal: Array, upper: Array, scale: Array, zero_point: Array, limits: tuple[int, int], beam: int, block_size: int
) -> npt.NDArray[np.int32]:
    """The integers [in, out] of the best of ``beam`` roundings of each output channel; rows in elimination order.

    Args:
        goal: the weight, float [in, out].
        upper: U [in, in], with UᵀU the inverse of the Hessian.
        scale, zero_point: of each weight, [in, out].
        limits: smallest and largest integer.
        beam: roundings kept at each input; 1 is GPTQ's own.
        block_size: inputs of a lazy batch.
    """
    integers = np.empty(goal.shape, np.int32)
    step = max(1, _NUMBERS // (len(goal) * beam))
    for start in range(0, goal.shape[1], step):
        part = slice(start, start + step)
        search = _Beam(goal[:, part], scale[:, part], zero_point[:, part], limits, beam)
        for first in range(0, len(goal), block_size):
            search.block(upper, first, min(first + block_size, len(goal)))
        integers[:, part] = search.best()
    return integers


class _Beam:
    """The roundings of some output channels that are kept, each channel's side by side: [channels · kept, …]."""

    def __init__(self, goal: Array, scale: Array, zero_point: Array, limits: tuple[int, int], beam: int) -> None:
        self._rest = np.ascontiguousarray(goal.T)
        self._scale, self._zero_point = scale, zero_point
        self._low, self._high = limits
        self._beam = beam
        self._cost = np.zeros((goal.shape[1], 1), goal.dtype)
        self._steps: list[tuple[Array, Array]] = []  # of each input: the rounding it goes on from, and the integer

    def block(self, upper: Array, start: int, stop: int) -> None:
        """Round the inputs from ``start`` to ``stop``; the later ones make up for their errors all at once."""
        near, later = self._rest[:, : stop - start], self._rest[:, stop - start :]
        errors = []
        for k in range(start, stop):
            parent, error = self._round(k, near[:, 0], upper[k, k])
            near = near[parent, 1:] - error[:, None] * upper[k, k + 1 : stop]
            errors.append((parent, error))
        path = np.arange(len(near))
        for k, (parent, error) in reversed(list(enumerate(errors))):
            errors[k] = parent, error[path]
            path = parent[path]
        self._rest = later[path] - np.stack([error for _, error in errors], axis=1) @ upper[start:stop, stop:]

    def _round(self, k: int, goal: Array, pivot: float) -> tuple[Array, Array]:
        """Keep the best of all roundings so far with input k rounded either way: what each goes on from, its error."""
        channels, kept = self._cost.shape
        scale, zero_point = self._scale[k, :, None], self._zero_point[k, :, None]
        goal = goal.reshape(channels, kept)
        exact = goal / scale + zero_point
        first = np.clip(np.rint(exact), self._low, self._high)
        above = (exact > first) & (first < self._high) | (first == self._low)
        second = np.where(above, first + 1, first - 1)
        q = np.concatenate([first, second], axis=1)
        error = (np.tile(goal, 2) - (q - zero_point) * scale) / pivot
        cost = np.tile(self._cost, 2) + np.square(error)
        chosen = np.broadcast_to(np.arange(2 * kept), cost.shape)
        if 2 * kept > self._beam:
            chosen = np.argpartition(cost, self._beam - 1, axis=1)[:, : self._beam]
        self._cost = np.take_along_axis(cost, chosen, 1)
        parent = (np.arange(channels)[:, None] * kept + chosen % kept).reshape(-1)
        self._steps.append((parent, np.take_along_axis(q, chosen, 1).astype(np.int16).reshape(-1)))
        return parent, np.take_along_axis(error, chosen, 1).reshape(-1)

    def best(self) -> npt.NDArray[np.int32]:
        """The integers [in, channels] of each channel's best rounding."""
        channels, kept = self._cost.shape
        at = np.arange(channels) * kept + np.argmin(self._cost, axis=1)
        integers = np.empty((len(self._steps), channels), np.int32)
        for k, (parent, q) in reversed(list(enumerate(self._steps))):
            integers[k] = q[at]
            at = parent[at]
        return integers
