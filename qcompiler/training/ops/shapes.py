"""Operators that move numbers or compute shapes. Shapes are int64 tensors, as in ONNX, so every axis may be dynamic."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qcompiler.training.dtypes import torch_type


def cast(x: Tensor, to: int) -> Tensor:
    return x.to(torch_type(to))


def cast_like(x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype)


def concat(*values: Tensor, axis: int) -> Tensor:
    return torch.cat(values, axis)


def constant_of_shape(shape: Tensor, value: Tensor | None = None) -> Tensor:
    filled = torch.zeros(1) if value is None else value
    return filled.reshape(()).expand(shape.tolist())


def expand(x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, shape.tolist()))


def flatten(x: Tensor, axis: int = 1) -> Tensor:
    lead = x.shape[:axis].numel()
    return x.reshape(lead, x.numel() // lead if lead else -1)


def gather(x: Tensor, indices: Tensor, axis: int = 0) -> Tensor:
    axis %= x.ndim
    if x.is_floating_point() and axis == 0 and x.ndim == 2:
        return F.embedding(_counted(indices, len(x)), x)
    flat = x.index_select(axis, _counted(indices, x.shape[axis]).reshape(-1))
    return flat.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def gather_elements(x: Tensor, indices: Tensor, axis: int = 0) -> Tensor:
    return torch.gather(x, axis, _counted(indices, x.shape[axis]))


def gather_nd(x: Tensor, indices: Tensor) -> Tensor:
    return x[tuple(indices.unbind(-1))]


def _counted(indices: Tensor, size: int) -> Tensor:
    """Indices from the front: ONNX counts negative ones from the back."""
    return torch.where(indices < 0, indices + size, indices)


def pad(x: Tensor, pads: Tensor, value: Tensor | None = None, axes: Tensor | None = None) -> Tensor:
    """With a constant; ``pads`` are [starts, ends] of the axes."""
    widths = [[0, 0] for _ in range(x.ndim)]
    places = range(x.ndim) if axes is None else axes.tolist()
    for place, (before, after) in zip(places, pads.reshape(2, -1).T.tolist(), strict=True):
        widths[place] = [before, after]
    return F.pad(x, [width for pair in reversed(widths) for width in pair], value=0 if value is None else value.item())


def span(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def reshape(x: Tensor, shape: Tensor, allowzero: int = 0) -> Tensor:
    sizes = shape.tolist()
    return x.reshape(sizes if allowzero else [size or x.shape[axis] for axis, size in enumerate(sizes)])


def shape_of(x: Tensor, start: int = 0, end: int | None = None) -> Tensor:
    return torch.tensor(x.shape[start:end], dtype=torch.int64)


def size_of(x: Tensor) -> Tensor:
    return torch.tensor(x.numel())


def cut(x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None) -> Tensor:
    """Slice: limits are clamped as Python's are; a negative step reads backwards."""
    places = range(len(starts)) if axes is None else axes.tolist()
    strides = [1] * len(starts) if steps is None else steps.tolist()
    for axis, start, end, step in zip(places, starts.tolist(), ends.tolist(), strides, strict=True):
        first, last, _ = slice(start, end, step).indices(x.shape[axis])
        if step > 0:
            x = x.narrow(axis, first, max(last - first, 0))
            x = x if step == 1 else x[(slice(None),) * (axis % x.ndim) + (slice(None, None, step),)]
        else:
            x = x.index_select(axis, torch.arange(first, last, step))
    return x


def split(x: Tensor, sizes: Tensor | None = None, axis: int = 0, num_outputs: int | None = None) -> Sequence[Tensor]:
    """Without sizes, equal parts, of which the last may be short."""
    if sizes is not None:
        return torch.split(x, sizes.tolist(), axis)
    assert num_outputs is not None
    return torch.split(x, -(-x.shape[axis] // num_outputs), axis)


def squeeze(x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(axes.tolist()))


def unsqueeze(x: Tensor, axes: Tensor) -> Tensor:
    rank = x.ndim + axes.numel()
    for axis in sorted(axis % rank for axis in axes.reshape(-1).tolist()):
        x = x.unsqueeze(axis)
    return x


def tile(x: Tensor, repeats: Tensor) -> Tensor:
    return x.tile(repeats.tolist())


def top_k(x: Tensor, k: Tensor, axis: int = -1, largest: int = 1) -> Sequence[Tensor]:
    return torch.topk(x, int(k), axis, bool(largest), sorted=True)


def transpose(x: Tensor, perm: Sequence[int] | None = None) -> Tensor:
    return x.permute(tuple(reversed(range(x.ndim))) if perm is None else tuple(perm))


def triangle(x: Tensor, k: Tensor | None = None, upper: int = 1) -> Tensor:
    return (torch.triu if upper else torch.tril)(x, 0 if k is None else int(k))


def identity(x: Tensor) -> Tensor:
    return x


SHAPES: Mapping[str, Callable[..., Any]] = {
    "Cast": cast,
    "CastLike": cast_like,
    "Concat": concat,
    "ConstantOfShape": constant_of_shape,
    "Expand": expand,
    "Flatten": flatten,
    "Gather": gather,
    "GatherElements": gather_elements,
    "GatherND": gather_nd,
    "Identity": identity,
    "Pad": pad,
    "Range": span,
    "Reshape": reshape,
    "Shape": shape_of,
    "Size": size_of,
    "Slice": cut,
    "Split": split,
    "Squeeze": squeeze,
    "Tile": tile,
    "TopK": top_k,
    "Transpose": transpose,
    "Trilu": triangle,
    "Unsqueeze": unsqueeze,
}
