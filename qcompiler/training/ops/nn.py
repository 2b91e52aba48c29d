"""Operators of neural networks, and the model-local functions that ``normalise`` raises."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    group: int = 1,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    kernel_shape: Sequence[int] | None = None,
) -> Tensor:
    """Over one, two or three axes; ``pads`` are [starts, ends]. (``kernel_shape`` is the weight's own.)"""
    axes = x.ndim - 2
    before, after = (list(pads)[:axes], list(pads)[axes:]) if pads is not None else ([0] * axes, [0] * axes)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
    if before != after:
        x = F.pad(x, [width for pair in zip(reversed(before), reversed(after), strict=True) for width in pair])
        before = [0] * axes
    stride, dilation = list(strides or [1] * axes), list(dilations or [1] * axes)
    return convolve(x, weight, bias, stride, before, dilation, group)


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    return F.gelu(x, approximate=approximate)


def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    product = (a.T if transA else a) @ (b.T if transB else b)
    return product * alpha if c is None else torch.add(product * alpha, c, alpha=beta)


def layer_norm(x: Tensor, scale: Tensor, bias: Tensor | None = None, axis: int = -1, epsilon: float = 1e-5) -> Tensor:
    shape = x.shape[axis:]
    return F.layer_norm(x, shape, scale.expand(shape), None if bias is None else bias.expand(shape), epsilon)


def leaky_relu(x: Tensor, alpha: float = 0.01) -> Tensor:
    return F.leaky_relu(x, alpha)


def log_softmax(x: Tensor, axis: int = -1) -> Tensor:
    return F.log_softmax(x, axis)


def softmax(x: Tensor, axis: int = -1) -> Tensor:
    return F.softmax(x, axis)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """A row that is masked throughout gives 0, in torch as in the function's own body."""
    return F.scaled_dot_product_attention(q, k, v, torch.atleast_2d(mask), scale=scale)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=epsilon) * weight


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def sort_by_expert(ids: Tensor, experts: int) -> Sequence[Tensor]:
    order = torch.argsort(ids, stable=True)
    return order, torch.argsort(order), torch.bincount(ids, minlength=experts)


NN: Mapping[str, Callable[..., Any]] = {
    "Conv": convolution,
    "Gelu": gelu,
    "Gemm": gemm,
    "LayerNormalization": layer_norm,
    "LeakyRelu": leaky_relu,
    "LogSoftmax": log_softmax,
    "MatMul": torch.matmul,
    "Relu": torch.relu,
    "Sigmoid": torch.sigmoid,
    "Softmax": softmax,
    "Tanh": torch.tanh,
}
LOCAL: Mapping[str, Callable[..., Any]] = {
    "Attention": attention,
    "MaskedAttention": masked_attention,
    "RMSNorm": rms_norm,
    "RotaryEmbedding": rotary_embedding,
    "SortByExpert": sort_by_expert,
}
"""Of our own domain; ``graph/functions.py`` says what each computes."""
