"""Feeds made up for timing: the right names, shapes and ranges; no more meaning than that."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.core import DataError
from qcompiler.graph.tables import rows_indexed

Shape = tuple[int, ...]


def default_shapes(kind: str | None, inputs: dict[str, ir.Value]) -> list[Shape]:
    """(batch, sequence) or (batch,) to time.

    A batch and a single short request for encoders, a prompt and a step of one token for causal LMs, one image for
    vision models.
    """
    if kind == "causal-lm":
        return [(1, 512), (1, 1)]
    if kind == "vision" or all(len(free_axes(value)) < 2 for value in inputs.values()):
        return [(1,)]
    return [(8, 128), (1, 16)]


def free_axes(value: ir.Value) -> list[int]:
    """Axes whose size the model leaves open."""
    dims = value.shape if value.shape is not None else ()
    return [axis for axis, dim in enumerate(dims) if not isinstance(dim, int)]


def make_feeds(
    inputs: dict[str, ir.Value], shape: Shape, seed: int = 0, model: ir.Model | None = None
) -> dict[str, npt.NDArray[Any]]:
    """One batch of random ids or pixels, masks of ones.

    Args:
        inputs: what the model wants fed.
        shape: sizes of the open axes: the first is axis 0 of every input, the second any other open axis.
        seed: of the random numbers.
        model: where the vocabulary's size is read from: the constant that a Gather indexes with an input.

    Raises:
        DataError: an input has more open axes than ``shape`` has sizes, or no known shape.
    """
    rng = np.random.default_rng(seed)
    feeds = {}
    for name, value in inputs.items():
        if value.shape is None or value.dtype is None:
            raise DataError(f"input {name!r} has no known shape: give feeds.")
        sizes = []
        for axis, dim in enumerate(value.shape):
            if isinstance(dim, int):
                sizes.append(dim)
            elif axis == 0 or len(shape) > 1:
                sizes.append(shape[0] if axis == 0 else shape[1])
            else:
                raise DataError(f"input {name!r} has an open axis {axis}, and shape {shape} says no size for it.")
        feeds[name] = _numbers(rng, name, value, tuple(sizes), model)
    return feeds


def _numbers(
    rng: np.random.Generator, name: str, value: ir.Value, sizes: Shape, model: ir.Model | None
) -> npt.NDArray[Any]:
    assert value.dtype is not None
    dtype = value.dtype.numpy()
    if np.issubdtype(dtype, np.floating):
        return rng.standard_normal(sizes).astype(dtype)
    if "mask" in name or dtype == np.bool_:
        return np.ones(sizes, dtype)
    if "position" in name and len(sizes) == 2:
        return np.broadcast_to(np.arange(sizes[-1], dtype=dtype), sizes).copy()
    bound = rows_indexed(name, model) if model is not None else 1
    return rng.integers(0, bound, sizes).astype(dtype)
