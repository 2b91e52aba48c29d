"""ONNX data types and tensors in torch, and back: those that torch computes with."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from qcompiler.core import ModelError

_TYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.INT8: torch.int8,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.UINT16: torch.uint16,
    ir.DataType.UINT32: torch.uint32,
    ir.DataType.UINT64: torch.uint64,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.BOOL: torch.bool,
}


def torch_type(to: int) -> torch.dtype:
    """The torch dtype of an ONNX data type, by its number.

    Raises:
        ModelError: torch does not compute with it.
    """
    kind = ir.DataType(to)
    if kind not in _TYPES:
        raise ModelError(f"numbers of type {kind.name} cannot be trained through: torch does not compute with them.")
    return _TYPES[kind]


def to_torch(tensor: ir.TensorProtocol) -> torch.Tensor:
    """A copy of the numbers; bfloat16, of which torch takes no array, goes by its bits.

    Raises:
        ModelError: torch does not compute with their data type.
    """
    kind = torch_type(tensor.dtype)
    array = np.array(tensor.numpy())
    return torch.from_numpy(array.view(np.int16)).view(kind) if kind == torch.bfloat16 else torch.from_numpy(array)


def to_array(tensor: torch.Tensor) -> npt.NDArray[np.generic]:
    """The numbers of a tensor of torch, gradients or none, as an array that looks at them."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
