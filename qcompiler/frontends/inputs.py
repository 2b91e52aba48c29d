"""The model's inputs, and how one batch of the caller's becomes feeds that fit them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.core import DataError
from qcompiler.frontends.source import data_inputs

IGNORED = {
    "labels",
    "label",
    "label_ids",
    "token_type_ids",
    "attention_mask",
    "position_ids",
    "special_tokens_mask",
    "offset_mapping",
    "overflow_to_sample_mapping",
    "length",
}
"""What tokenizers and data sets yield beside the inputs; dropped where the model has no such input."""


@dataclasses.dataclass(frozen=True)
class Input:
    """One input: its dtype, its shape with None for a free size (None: the rank is not known), and both as text."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...] | None
    text: str

    @property
    def batch(self) -> int | None:
        """The size of axis 0 where the model fixes it."""
        return self.shape[0] if self.shape else None


class Inputs:
    """The inputs of a model, in order."""

    def __init__(self, model: ir.Model) -> None:
        self.all = [_input(value) for value in data_inputs(model)]
        self.by_name = {item.name: item for item in self.all}

    def __contains__(self, name: str) -> bool:
        return name in self.by_name

    def fixed(self, name: str, axis: int) -> int | None:
        """The size of an axis where the model fixes it."""
        shape = self.by_name[name].shape if name in self.by_name else None
        return shape[axis] if shape is not None and len(shape) > axis else None

    def fit(self, item: Any, where: str) -> dict[str, npt.NDArray[Any]]:
        """One batch (dict, tuple, array or tensor) as feeds: named, completed, cast and checked.

        A missing attention_mask becomes ones, token_type_ids zeros, position_ids 0, 1, 2 …, where input_ids are given.
        Integers become int64 and floats float32 where the model asks for that.

        Raises:
            DataError: an input is missing, unknown, empty or not finite, or its dtype, rank or size does not fit.
        """
        given = self._named(item, where)
        for name in [name for name in given if name not in self.by_name]:
            if name not in IGNORED:
                known = ", ".join(self.by_name)
                raise DataError(f"{where} has {name!r}, but the model's inputs are {known}.")
            del given[name]
        feeds = {}
        ids = as_array(given["input_ids"]) if "input_ids" in given else None
        for spec in self.all:
            if spec.name in given:
                array = as_array(given[spec.name])
            elif ids is not None and spec.name in _FILLERS:
                array = _FILLERS[spec.name](ids)
            else:
                raise DataError(f"{where} lacks the input {spec.name!r} ({spec.text}).")
            feeds[spec.name] = _check(spec, array, where)
        return feeds

    def _named(self, item: Any, where: str) -> dict[str, Any]:
        if isinstance(item, Mapping) or hasattr(item, "keys"):
            return {str(key): item[key] for key in item.keys()}  # noqa: SIM118  (BatchEncoding is no Mapping)
        values = list(item) if isinstance(item, tuple | list) else [item]
        if len(values) > len(self.all):
            raise DataError(
                f"{where} has {len(values)} arrays, but the model has {len(self.all)} inputs: pass dicts by name."
            )
        return {spec.name: value for spec, value in zip(self.all, values, strict=False)}


def as_array(value: Any) -> npt.NDArray[Any]:
    """Numbers as an array; torch tensors are recognised by their methods, so that torch need not be imported."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":
            value = value.float()
        return np.asarray(value.numpy())
    try:
        return np.asarray(value)
    except ValueError as error:
        raise DataError(f"cannot make an array of a {type(value).__name__}: {error}.") from error


_FILLERS = {
    "attention_mask": lambda ids: np.ones(ids.shape, np.int64),
    "token_type_ids": lambda ids: np.zeros(ids.shape, np.int64),
    "position_ids": lambda ids: np.broadcast_to(np.arange(ids.shape[-1], dtype=np.int64), ids.shape),
}


def _input(value: ir.Value) -> Input:
    assert value.name is not None
    dtype = value.dtype.numpy() if value.dtype is not None else np.dtype(np.float32)
    if value.shape is None:
        return Input(value.name, dtype, None, str(dtype))
    sizes = tuple(dim if isinstance(dim, int) else None for dim in value.shape)
    dims = ", ".join(str(dim) if isinstance(dim, int) else (dim.value or "?") for dim in value.shape)
    return Input(value.name, dtype, sizes, f"{dtype} [{dims}]")


def _check(spec: Input, array: npt.NDArray[Any], where: str) -> npt.NDArray[Any]:
    expected = f"expected {spec.text}"
    cast = array
    if array.dtype != spec.dtype:
        both_float = array.dtype.kind == "f" and spec.dtype.kind == "f"
        to_integer = array.dtype.kind in "iub" and spec.dtype.kind in "iu"
        if not (both_float or to_integer or (array.dtype.kind in "iub" and spec.dtype.kind == "b")):
            raise DataError(f"{where}: input {spec.name!r} has dtype {array.dtype}, {expected}.")
        cast = array.astype(spec.dtype)
    if spec.shape is not None:
        if array.ndim != len(spec.shape):
            raise DataError(f"{where}: input {spec.name!r} has rank {array.ndim}, {expected}.")
        if any(want is not None and want != got for want, got in zip(spec.shape, array.shape, strict=True)):
            raise DataError(f"{where}: input {spec.name!r} has shape {list(array.shape)}, {expected}.")
    if not array.size:
        raise DataError(f"{where}: input {spec.name!r} is empty: shape {list(array.shape)}, {expected}.")
    if cast.dtype.kind == "f" and not np.isfinite(cast).all():
        what = "NaN" if np.isnan(cast).any() else "infinity"
        raise DataError(f"{where}: input {spec.name!r} holds {what}, expected finite {spec.text}.")
    return np.ascontiguousarray(cast)
