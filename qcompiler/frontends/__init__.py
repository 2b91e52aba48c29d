"""The front door: every kind of model becomes a :class:`Source`, every kind of data becomes :class:`Batches`.

torch and transformers are imported only where a torch model or a Hugging Face folder is opened.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from qcompiler.core import ModelError
from qcompiler.frontends import onnx_file
from qcompiler.frontends.data import Batches, open_data
from qcompiler.frontends.source import Source

__all__ = ["Batches", "Source", "open_data", "open_source"]


def open_source(
    model: Any, *, example_inputs: Any = None, dynamic_shapes: Any = None, trust_remote_code: bool = False
) -> Source:
    """Turn a model of any supported kind into a graph. The caller's object is never changed.

    Args:
        model: torch.nn.Module, torch.export.ExportedProgram, path of an ``.onnx`` file or of a Hugging Face folder,
            onnx.ModelProto, or onnx_ir.Model.
        example_inputs: for a torch.nn.Module: a tuple, a dict or one tensor.
        dynamic_shapes: for a torch.nn.Module, as ``torch.export.export`` takes it; None: batch and sequence.
        trust_remote_code: let a Hugging Face folder run its own code.

    Raises:
        ModelError: one sentence that says what is wrong with the model.
    """
    if isinstance(model, ir.Model):
        return onnx_file.open_ir(model)
    if isinstance(model, onnx.ModelProto):
        return onnx_file.open_proto(model)
    if isinstance(model, str | os.PathLike):
        path = Path(model)
        if path.is_dir():
            from qcompiler.frontends.hf_folder import open_folder

            return open_folder(path, trust_remote_code=trust_remote_code)
        if not path.exists():
            raise ModelError(f"there is no file or folder {path}.")
        return onnx_file.open_path(path)
    origin = {f"{c.__module__}.{c.__name__}" for c in type(model).__mro__}
    if "torch.nn.modules.module.Module" in origin:
        from qcompiler.frontends.torch_module import open_module

        return open_module(model, example_inputs, dynamic_shapes)
    if "torch.export.exported_program.ExportedProgram" in origin:
        from qcompiler.frontends.torch_module import open_program

        return open_program(model)
    raise ModelError(
        f"cannot open a {type(model).__module__}.{type(model).__name__}: pass a torch.nn.Module, an ExportedProgram, "
        "the path of an .onnx file or of a Hugging Face folder, an onnx.ModelProto or an onnx_ir.Model."
    )
