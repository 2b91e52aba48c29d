"""The kernels of a model's Linears, each once, and their packed weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.core import Note
from qcompiler.graph.edit import array_of
from qcompiler.graph.linear import Linear, linears
from qcompiler.targets.ort.nbits import blocks_of
from qcompiler.targets.tvm.cuda.gemm_int8 import Int8
from qcompiler.targets.tvm.cuda.gemm_w4 import NIBBLES, Weight4
from qcompiler.targets.tvm.emit.linears import GRANULARITY, refusal, static_steps

Arrays = dict[str, npt.NDArray[Any]]


@dataclasses.dataclass(frozen=True)
class Emitted:
    """What a model's Linears need.

    Attributes:
        functions: PrimFuncs by name.
        kernels: name of a Linear -> name of its kernel.
        arrays: "linear.argument" -> the constant arguments of its kernel.
        notes: what became of each Linear.
    """

    functions: Mapping[str, Any]
    kernels: Mapping[str, str]
    arrays: Arrays
    notes: tuple[Note, ...]


def emit(model: ir.Model) -> Emitted:
    """Emit the Linears of a folded canonical graph; the model is not changed."""
    names: dict[Int8 | Weight4, str] = {}
    kernels: dict[str, str] = {}
    arrays: Arrays = {}
    notes = []
    for linear in linears(model):
        made = _int8(linear) if refusal(linear) is None else _weight4(linear)
        if made is None:
            notes.append(Note(linear.name, "no CUDA kernel", refusal(linear) or "it is float"))
            continue
        kernel, constants = made
        name = names.setdefault(kernel, f"{type(kernel).__name__.lower()}_{len(names)}")
        kernels[linear.name] = name
        arrays |= {f"{linear.name}.{label}": array for label, array in constants.items()}
        notes.append(Note(linear.name, f"CUDA kernel {name}", "dp4a" if isinstance(kernel, Int8) else "fp16 x int4"))
    return Emitted({name: kernel.build(name) for kernel, name in names.items()}, kernels, arrays, tuple(notes))


def _int8(linear: Linear) -> tuple[Int8, Arrays] | None:
    weight, quant, dequantize = array_of(linear.weight), linear.activation_quant, linear.weight_quant
    bias = array_of(linear.bias)
    if weight is None or quant is None or dequantize is None or (linear.bias is not None and bias is None):
        return None
    scale = array_of(dequantize.inputs[1])
    assert scale is not None
    kernel = Int8(linear.in_features, linear.out_features, GRANULARITY[quant.op_type], bias is not None)
    offset = weight.sum(axis=0, dtype=np.int32)
    factor = np.broadcast_to(scale.astype(np.float32).reshape(-1), linear.out_features)
    if kernel.scales == "static":
        x_scale, x_zero = static_steps(quant)
        offset, factor = offset * np.int32(x_zero - 128), factor * np.float32(x_scale)
    columns = {"offset": offset, "scale": factor} | ({"bias": bias.astype(np.float32)} if bias is not None else {})
    return kernel, {"weight": kernel.pack(weight), **{label: _padded(v, kernel) for label, v in columns.items()}}


def _weight4(linear: Linear) -> tuple[Weight4, Arrays] | None:
    """Weights by group only: an input that is quantized needs another kernel."""
    if linear.activation_quant is not None or linear.weight_quant is None:
        return None
    blocks, bias = blocks_of(linear.weight_quant), array_of(linear.bias)
    if blocks is None or blocks.bits != 4 or blocks.group_size % NIBBLES or (linear.bias is not None and bias is None):
        return None
    kernel = Weight4(linear.in_features, linear.out_features, blocks.group_size, bias is not None)
    arrays: Arrays = {"weight": kernel.pack(blocks.q)}
    arrays |= {"scale": kernel.pack_groups(blocks.scale), "zero": kernel.pack_groups(blocks.zero_point)}
    return kernel, arrays | ({"bias": _padded(bias.astype(np.float32), kernel)} if bias is not None else {})


def _padded(vector: npt.NDArray[Any], kernel: Int8 | Weight4) -> npt.NDArray[Any]:
    return np.pad(vector, (0, kernel.padded[1] - len(vector)))
