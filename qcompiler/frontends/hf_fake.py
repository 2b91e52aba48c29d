"""A Hugging Face folder traced without its weights: parameters are fake tensors, and are bound to the files by name.

``torch.export`` runs on fake tensors anyway; under ``FakeTensorMode`` they never held numbers. Buffers are real: what a
model computes when it is made (rotary frequencies, position ids) is in no file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from qcompiler.frontends.safetensors_file import Entry, entries
from qcompiler.frontends.torch_export import silent


class Unbound(Exception):
    """The model cannot be traced without its weights, and why."""


def make(cls: Any, folder: Path, trust_remote_code: bool) -> Any:
    """The model of a folder's config, in float32, its parameters without numbers.

    Raises:
        Unbound: transformers turns this checkpoint's tensors into others when it loads them.
    """
    from transformers import AutoConfig
    from transformers.conversion_mapping import WeightConverter, get_model_conversion_mapping
    from transformers.initialization import no_init_weights

    with silent():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
        if getattr(config, "quantization_config", None) is not None:
            raise Unbound("it is quantized already")
        build = cls if hasattr(cls, "config_class") else None
        with _fake_parameters(), no_init_weights():
            options = {} if build is not None else {"trust_remote_code": trust_remote_code}
            make_one = cls._from_config if build is not None else cls.from_config
            model = make_one(config, dtype=torch.float32, **options)
        model.tie_weights()
        if any(isinstance(item, WeightConverter) for item in get_model_conversion_mapping(model)):
            raise Unbound(f"{type(model).__name__} stores its weights in another form than it computes with")
    return model.eval()


@contextlib.contextmanager
def _fake_parameters() -> Iterator[None]:
    """Parameters that are registered while this lasts have shape and dtype only."""
    mode, register = FakeTensorMode(allow_non_fake_inputs=True), torch.nn.Module.register_parameter

    def register_fake(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None and not isinstance(parameter, FakeTensor):
            with mode:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
            parameter = torch.nn.Parameter(empty, requires_grad=False)
        register(module, name, parameter)

    torch.nn.Module.register_parameter = register_fake  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


class Weights:
    """Where the parameters of a model lie.

    Args:
        model: the whole model, as the files know it.
        paths: its safetensors files.

    Raises:
        ModelError: a file cannot be read.
        Unbound: what is tied is stored twice; whether it is equal is for transformers to see.
    """

    def __init__(self, model: Any, paths: Sequence[Path]) -> None:
        found = entries(paths)
        prefix = f"{model.base_model_prefix}."
        self._entries: dict[int, Entry] = {}
        self._tensors = []  # a freed parameter's id could come again
        for named in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
            for name, tensor in named:
                entry = _entry(found, name, prefix)
                if entry is None or entry.shape != tuple(tensor.shape) or entry.dtype is None:
                    continue
                if self._entries.setdefault(id(tensor), entry) != entry:
                    raise Unbound(f"{name!r} is tied to another parameter, and stored as well")
                self._tensors.append(tensor)

    def bind(self, graph: ir.Graph, module: torch.nn.Module) -> None:
        """Give each initializer, named as the module names it, its numbers: from the files, or as they are.

        Raises:
            Unbound: no file has the parameter, or has it in another shape.
        """
        named: Mapping[str, Any] = {
            **dict(module.named_buffers(remove_duplicate=False)),
            **dict(module.named_parameters(remove_duplicate=False)),
        }
        for name, value in graph.initializers.items():
            tensor = value.const_value
            entry = self._entries.get(id(named.get(name)))
            if entry is not None and value.dtype is not None:
                value.const_value = entry.stored(value.dtype, name)
            elif isinstance(getattr(tensor, "raw", None), FakeTensor):
                raise Unbound(f"no file has a tensor {name!r} of its shape")
            elif tensor is not None:
                value.const_value = ir.tensor(tensor.numpy().copy(), name=name)


def _entry(found: Mapping[str, Entry], name: str, prefix: str) -> Entry | None:
    """A model with a head loads files of the bare model, and the other way round."""
    candidates = (name, prefix + name, name.removeprefix(prefix))
    return next((found[candidate] for candidate in candidates if candidate in found), None)
