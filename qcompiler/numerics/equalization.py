"""Cross-layer equalization: two Linears in a row get channels of equal range (Nagel et al. 2019, section 4.1)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def equalization_scale(source_absmax: Array, sink_absmax: Array) -> npt.NDArray[np.float32]:
    """s_i = sqrt(r1_i · r2_i) / r2_i (equation 11): the source's output is divided by it, the sink's rows multiplied.

    Both weights then reach sqrt(r1_i · r2_i) in channel i. No factor that all channels share is taken out.

    Args:
        source_absmax: r1, max|W1| of each output channel of the source, [channels].
        sink_absmax: r2, max|W2| of each input channel of the sinks, [channels].

    Returns:
        float32 [channels], positive; 1 where either is zero.
    """
    r1, r2 = np.asarray(source_absmax, np.float64), np.asarray(sink_absmax, np.float64)
    live = (r1 > 0) & (r2 > 0)
    scale = np.ones(r1.shape)
    scale[live] = np.sqrt(r1[live] * r2[live]) / r2[live]
    return scale.astype(np.float32)


def channel_absmax(weights: Iterable[tuple[Array, Array]], channels: int) -> npt.NDArray[np.float32]:
    """max|W| of each channel over sinks: pairs of a weight [in, out] and the channel of each row (-1: none), [in]."""
    result = np.zeros(channels, np.float32)
    for weight, columns in weights:
        carried = columns >= 0
        np.maximum.at(result, columns[carried], np.abs(weight).max(1)[carried].astype(np.float32))
    return result
