"""torch modules and exported programs, with dynamic shapes derived where the caller gives none."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from qcompiler.core import ModelError, Note
from qcompiler.frontends.source import Source, guess_kind
from qcompiler.frontends.torch_export import capture, to_onnx, to_scratch


def open_module(module: torch.nn.Module, example_inputs: Any, dynamic_shapes: Any) -> Source:
    """Trace a module.

    Args:
        module: it is traced in evaluation mode and left as it was.
        example_inputs: a tuple of positional inputs, a dict of keyword inputs, or one tensor. A Hugging Face
            PreTrainedModel needs none: they follow from its config.
        dynamic_shapes: as ``torch.export.export`` takes it. None: axis 0 of every tensor, and axis 1 of every integer
            tensor, are dynamic where the module allows it; a note says where it does not.

    Raises:
        ModelError: no example inputs, or the module cannot be traced or exported.
    """
    if _is_pretrained(module):
        from qcompiler.frontends.hf_model import open_pretrained

        return open_pretrained(module, example_inputs, dynamic_shapes)
    name = type(module).__name__
    if example_inputs is None:
        raise ModelError(f"{name} is a torch module: pass example_inputs=(tensor, ...) or a dict, to trace it with.")
    args, kwargs = as_call(example_inputs)
    derived = dynamic_shapes is None
    program = capture(module, args, kwargs, auto_shapes(args, kwargs) if derived else dynamic_shapes)
    notes = static_notes(program) if derived else ()
    return open_program(program, name=name, notes=notes)


def open_program(
    program: torch.export.ExportedProgram, name: str = "exported-program", notes: tuple[Note, ...] = ()
) -> Source:
    """Translate a program that was traced already; its dynamic shapes are kept.

    Raises:
        ModelError: an operator has no ONNX counterpart.
    """
    exported = to_scratch(to_onnx(program, what=name, output_names=output_names(program)))
    gc.collect()
    return Source(exported.model, name, guess_kind(exported.model), exported.sha256, notes=notes)


def as_call(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as (args, kwargs)."""
    if isinstance(example_inputs, Mapping) or hasattr(example_inputs, "keys"):
        return (), {key: example_inputs[key] for key in example_inputs.keys()}  # noqa: SIM118  (BatchEncoding)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def auto_shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Dynamic shapes that torch may narrow: axis 0 of every tensor, axis 1 of integer ones too.

    The result has the shape of ``torch.export``'s ``dynamic_shapes`` when all inputs are positional or all by keyword.
    """

    def axes(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return None
        count = min(value.ndim, 1 if value.is_floating_point() else 2)
        return dict.fromkeys(range(count), torch.export.Dim.AUTO)

    tree_map = torch.utils._pytree.tree_map
    return tree_map(axes, kwargs) if kwargs else tree_map(axes, args)


def static_notes(program: torch.export.ExportedProgram, names: Sequence[str] | None = None) -> tuple[Note, ...]:
    """One note for each wished dynamic axis that tracing fixed to the example's size."""
    notes = []
    inputs = user_inputs(program)
    for name, tensor in zip(names or inputs, inputs.values(), strict=True):
        wished = min(tensor.ndim, 1 if tensor.is_floating_point() else 2)
        for axis in range(wished):
            if is_concrete_int(tensor.shape[axis]):
                why = f"the module is only traceable with axis {axis} of this input fixed to {tensor.shape[axis]}"
                notes.append(Note(name, f"axis {axis} is static", why))
    return tuple(notes)


def user_inputs(program: torch.export.ExportedProgram) -> dict[str, Any]:
    """The program's inputs by name, as fake tensors whose dynamic sizes are symbols."""
    wanted = set(program.graph_signature.user_inputs)
    found = {n.name: n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder" and n.name in wanted}
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def output_names(program: torch.export.ExportedProgram) -> list[str] | None:
    """Names for the outputs: the keys of a returned dict or ModelOutput, else ``output`` or ``output_0`` …"""
    spec = program.call_spec.out_spec
    if spec is None:
        return None
    count = spec.num_leaves
    keys = spec.context if isinstance(spec.context, list) else None
    if keys is not None and len(keys) == count and all(isinstance(key, str) for key in keys):
        return list(keys)
    return ["output"] if count == 1 else [f"output_{i}" for i in range(count)]


def _is_pretrained(module: torch.nn.Module) -> bool:
    """Asked without importing transformers: a PreTrainedModel exists only where it was imported."""
    return any(
        c.__name__ == "PreTrainedModel" and c.__module__.startswith("transformers.") for c in type(module).__mro__
    )
