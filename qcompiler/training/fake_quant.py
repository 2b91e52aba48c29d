"""Fake-quants with a straight-through gradient (Bengio et al. 2013, arXiv 1308.3432): the calls that ``insert`` places.

Forwards compute what the functions of ``graph/functions.py`` do. Backwards take rounding for the identity: the gradient
of x passes where its integer is inside [low, high] and is zero where it was clipped. A static scale gets the gradient
of LSQ (Esser et al. 2020, arXiv 1902.08153, equation 3), where it wants one; dynamic scales count as constants, and
clip nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from qcompiler.training.dtypes import torch_type

_TINY = 1e-30


class _OnGrid(torch.autograd.Function):
    """(clip(round(x / scale) + zero_point, low, high) - zero_point) · scale, all shapes broadcast to that of x.

    What is kept for the backward pass is a mask of x's own type, for torch multiplies by bools in eight times the time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | None, low: float, high: float) -> Tensor:
        q = torch.div(x, scale).round_()
        if zero_point is not None:
            q += zero_point
        inside = None
        if any(ctx.needs_input_grad):
            clipped = q.clamp(low, high)
            inside, q = torch.eq(clipped, q, out=q), clipped
        else:
            q.clamp_(low, high)
        if zero_point is not None:
            q -= zero_point
        q *= scale
        ctx.save_for_backward(inside, *((x, scale, q) if ctx.needs_input_grad[1] else ()))
        return q

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inside, *kept = ctx.saved_tensors
        of_scale = None
        if kept:
            x, scale, y = kept
            steps = torch.addcmul(y, x, inside, value=-1).div_(scale)
            of_scale = steps.mul_(gradient).sum_to_size(scale.shape)
        return gradient * inside if ctx.needs_input_grad[0] else None, of_scale, None, None, None


class _Through(torch.autograd.Function):
    """The rounded numbers forwards, the gradient as it is backwards."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def on_grid(x: Tensor, scale: Tensor, zero_point: Tensor | None, low: float, high: float) -> Tensor:
    """Static fake-quant to integers.

    Args:
        x: float, any shape.
        scale, zero_point: broadcast to the shape of x; a zero_point of zeros may be None.
        low, high: the smallest and the largest integer.
    """
    return _OnGrid.apply(x, scale, zero_point, low, high)


def fake_quant(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int = 1) -> Tensor:
    """To the whole range of the zero point's dtype; scale and zero_point scalars or vectors along ``axis``."""
    limits = torch.iinfo(zero_point.dtype)
    if scale.ndim:
        shape = [1] * x.ndim
        shape[axis] = -1
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    return on_grid(x, scale, _moved(zero_point), limits.min, limits.max)


def fake_quant_blocks(w: Tensor, scale: Tensor, zero_point: Tensor, block_size: int, low: float, high: float) -> Tensor:
    """w [in, out]; scale and zero_point [ceil(in / block_size), out]; q clipped to [low, high]."""
    rows, columns = w.shape
    short = -rows % block_size
    blocks = (F.pad(w, (0, 0, 0, short)) if short else w).reshape(-1, block_size, columns)
    y = on_grid(blocks, scale.unsqueeze(1), _moved(zero_point.unsqueeze(1)), low, high)
    return y.reshape(-1, columns)[:rows] if short else y.reshape(rows, columns)


def fake_quant_rows(w: Tensor, scale: Tensor, zero_point: Tensor, block_size: int, low: float, high: float) -> Tensor:
    """w [rows, features]; scale and zero_point [rows, ceil(features / block_size)]; q clipped to [low, high]."""
    blocks, features = _in_blocks(w, block_size), w.shape[-1]
    y = on_grid(blocks, scale.unsqueeze(-1), _moved(zero_point.unsqueeze(-1)), low, high)
    return y.flatten(-2)[..., :features]


def _moved(zero_point: Tensor) -> Tensor | None:
    """The zero point, None where it moves nothing: two runs over the numbers less."""
    return zero_point if bool(zero_point.any()) else None


def _in_blocks(x: Tensor, block_size: int) -> Tensor:
    """[..., n] -> [..., ceil(n / block_size), block_size], filled up with zeros."""
    short = -x.shape[-1] % block_size
    return (F.pad(x, (0, short)) if short else x).unflatten(-1, (-1, block_size))


def fake_quant_per_token(x: Tensor, zero_point: float = 128.0) -> Tensor:
    """For each row the least scale whose integers fit [1, 255] about the zero point."""
    values = x.detach()
    high, low = values.amax(-1, keepdim=True), values.amin(-1, keepdim=True)  # aminmax takes 20 times as long
    scale = torch.maximum(high / (255 - zero_point), low / (1 - zero_point)).clamp_min_(_TINY)
    return _Through.apply(x, _rounded(values, scale))


def fake_quant_per_group(x: Tensor, block_size: int) -> Tensor:
    """max|x| / 127 for each ``block_size`` channels of a row; the last group may be short."""
    groups = _in_blocks(x.detach(), block_size)
    scale = groups.abs().amax(-1, keepdim=True).clamp_min_(_TINY) / 127
    return _Through.apply(x, _rounded(groups, scale).flatten(-2)[..., : x.shape[-1]])


def _rounded(x: Tensor, scale: Tensor) -> Tensor:
    return torch.div(x, scale).round_().mul_(scale)


def fake_quant_per_tensor(x: Tensor) -> Tensor:
    """Asymmetric uint8 with one scale, zero included (ONNX DynamicQuantizeLinear)."""
    low, high = x.detach().aminmax()
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return on_grid(x, scale, (-low / scale).round_().clamp_(0, 255), 0, 255)


def fake_quant_float(w: Tensor, to: int) -> Tensor:
    """To the ONNX data type ``to``, a float of fewer bits, and back."""
    return _Through.apply(w, w.detach().to(torch_type(to)).to(w.dtype))


class _OnTable(torch.autograd.Function):
    """The nearest of some values, of two as near ones the lower; the gradient passes between the outermost two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor) -> Tensor:
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward((x >= values[0]) & (x <= values[-1]))
        return values[torch.bucketize(x, (values[1:] + values[:-1]) * 0.5)]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        return gradient * inside, None


def fake_quant_codebook(w: Tensor, values: Tensor, scale: Tensor, block_size: int) -> Tensor:
    """w [in, out], blocks as in ``numerics.codebooks``; scale [ceil(in · out / block_size)]."""
    blocks, columns = _in_blocks(w.T.reshape(-1), block_size), scale.unsqueeze(-1)
    grid = blocks / torch.where(columns == 0, torch.ones_like(columns), columns)
    y = _OnTable.apply(grid, values) * columns
    return y.reshape(-1)[: w.numel()].reshape(w.shape[1], w.shape[0]).T


def dequantize_scales(q: Tensor, step: Tensor, mean: Tensor, count: int) -> Tensor:
    """q · step + mean, the first ``count``; q int8 [rows, n], step [rows]."""
    return (q * step.unsqueeze(-1) + mean).reshape(-1)[:count]


FAKE_QUANTS: Mapping[str, Callable[..., Any]] = {
    "DequantizeScales": dequantize_scales,
    "FakeQuant": fake_quant,
    "FakeQuantBlocks": fake_quant_blocks,
    "FakeQuantCodebook": fake_quant_codebook,
    "FakeQuantFloat": fake_quant_float,
    "FakeQuantPerGroup": fake_quant_per_group,
    "FakeQuantPerTensor": fake_quant_per_tensor,
    "FakeQuantPerToken": fake_quant_per_token,
    "FakeQuantRows": fake_quant_rows,
}
"""By the name of the model-local function."""
