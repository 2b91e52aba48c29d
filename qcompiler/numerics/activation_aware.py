"""AWQ's scales (Lin et al. 2023): input channels that carry much get finer steps of the weight's grid.

Nothing is said of how the activation itself is quantized: x' = x / s and W' = s · W, where the rows of W that meet
large activations grow. Within a group the step is set by the largest weight, so a row that is not the largest gains.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.numerics.site_channels import Channels
from qcompiler.numerics.site_judge import Transform

Array = npt.NDArray[Any]
Vector = npt.NDArray[np.float32]

ALPHAS = tuple(i / 10 for i in range(1, 11))
_FAINTEST = 1e-4


def awq_scale(magnitude: Array, alpha: float, floor: float = 0.0) -> Vector:
    """s_j = mean|x_j|^alpha (AWQ, equations 4 and 5), divided by √(max s · min s) as the authors' code does.

    Args:
        magnitude: [channels], mean|x|; 0 for a dead channel, which takes 1.
        alpha: 0 (no scale) to 1.
        floor: fainter channels count as this fraction of the median channel.

    Returns:
        float32 [channels], positive.
    """
    live = magnitude > 0
    scale = np.ones(np.shape(magnitude), np.float64)
    if live.any():
        x = np.asarray(magnitude, np.float64)[live]
        x = np.maximum(x, max(floor * np.median(x), _FAINTEST * x.max()))
        log = alpha * np.log(x)
        scale[live] = np.exp(log - (log.max() + log.min()) / 2)
    return scale.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class ActivationAware:
    """A candidate of the site search: :func:`awq_scale` with this alpha."""

    alpha: float
    floor: float = 0.0

    def __call__(self, channels: Channels) -> Transform:
        return Transform(awq_scale(np.where(channels.weight > 0, channels.magnitude, 0), self.alpha, self.floor))

    def __str__(self) -> str:
        return f"awq alpha={self.alpha:g}"
