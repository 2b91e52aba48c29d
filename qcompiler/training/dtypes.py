"""The torch dtype of each ONNX data type that torch computes with."""

from __future__ import annotations

import onnx_ir as ir
import torch

_TYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.INT8: torch.int8,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.BOOL: torch.bool,
}


def torch_type(to: int) -> torch.dtype:
    """The torch dtype of an ONNX data type, by its number."""
    return _TYPES[ir.DataType(to)]
