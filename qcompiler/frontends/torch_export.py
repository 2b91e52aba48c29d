"""From torch to the graph: ``torch.export``, then the dynamo ONNX exporter, silently, weights to a scratch file."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch

from qcompiler.core import ModelError
from qcompiler.frontends.source import Scratch, graphs, hash_files, read_lazily
from qcompiler.graph.run import save_model

OPSET = 21
"""Opset of the export: at 23 RotaryEmbedding fails in ONNX Runtime (DESIGN.md section 5), below 20 there is no Gelu."""


@dataclasses.dataclass(frozen=True)
class Exported:
    """A graph whose weights lie in a scratch folder, and its digest."""

    model: ir.Model
    sha256: str


def capture(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic_shapes: Any
) -> torch.export.ExportedProgram:
    """``torch.export`` without warnings or prints, in evaluation mode; the module is left as it was.

    Raises:
        ModelError: the module cannot be traced with these inputs and dynamic shapes.
    """
    # One tensor object passed twice would be traced as one input.
    args, kwargs = clone_tensors(args), clone_tensors(dict(kwargs))
    try:
        # Without the patch, an example of batch 1 would fix the batch to 1 (torch.onnx sets it for the same reason).
        patch = torch.fx.experimental._config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
        with silent(), torch.no_grad(), evaluation(module), patch:
            return torch.export.export(module, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:
        raise ModelError(f"{type(module).__name__} cannot be traced: {first_line(error)}") from error


def to_onnx(
    program: torch.export.ExportedProgram,
    *,
    what: str,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    prefix: str = "",
    symbols: Mapping[str, str] | None = None,
) -> ir.Model:
    """Translate a traced program; the graph's weights are the program's own.

    Args:
        program: what :func:`capture` or the caller's own ``torch.export.export`` returned.
        what: what to call it in an error.
        input_names, output_names: names of the graph's inputs and outputs, in order; None keeps the exporter's.
        prefix: cut off the front of parameter names (the attribute under which a wrapper holds the model).
        symbols: new names of symbolic dimensions, e.g. ``{"s72": "batch"}``.

    Raises:
        ModelError: an operator has no ONNX counterpart.
    """
    try:
        with silent(), torch.no_grad():
            exported = torch.onnx.export(
                program,
                dynamo=True,
                optimize=False,  # keeps parameter names, and shares only tied parameters
                opset_version=OPSET,
                verbose=False,
                input_names=list(input_names) if input_names is not None else None,
                output_names=list(output_names) if output_names is not None else None,
            )
    except Exception as error:
        raise ModelError(f"{what} cannot be exported to ONNX: {first_line(error)}") from error
    assert exported is not None
    model = exported.model
    _drop_traces(model)
    _cut_prefix(model.graph, prefix)
    _rename_symbols(model, symbols or {})
    return model


def to_scratch(model: ir.Model) -> Exported:
    """Move the weights of a translated program to disk."""
    scratch = Scratch()
    save_model(model, scratch.path / "model.onnx")
    digest = hash_files(sorted(scratch.path.iterdir()))
    return Exported(read_lazily(scratch), digest)


def clone_tensors(value: Any) -> Any:
    """The same nest of tuples, lists and dicts with every tensor cloned."""
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.detach().clone(), value)


def first_line(error: BaseException) -> str:
    """The first line of the innermost cause that says something."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Neither prints nor warnings nor log lines: torch's exporters and transformers' loaders emit all three."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def evaluation(module: torch.nn.Module) -> Iterator[None]:
    """The module in evaluation mode, for as long as this lasts."""
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        yield
    finally:
        for child in training:
            child.training = True


def _drop_traces(model: ir.Model) -> None:
    """The exporter notes a Python stack trace on every node: paths of this machine, megabytes, no use to us."""
    for graph in graphs(model):
        graph.metadata_props.clear()
        for value in graph.inputs:
            value.metadata_props.clear()
        for node in graph:
            node.metadata_props.clear()
            for output in node.outputs:
                output.metadata_props.clear()
    for value in model.graph.initializers.values():
        value.metadata_props.clear()


def _cut_prefix(graph: ir.Graph, prefix: str) -> None:
    if prefix:
        for name in [name for name in graph.initializers if name.startswith(prefix)]:
            value = graph.initializers[name]
            if value.const_value is not None:
                value.const_value.name = name.removeprefix(prefix)
            value.name = name.removeprefix(prefix)


def _rename_symbols(model: ir.Model, symbols: Mapping[str, str]) -> None:
    """Rename in all shapes; a size that tracing fixed, which the exporter may leave as symbol "3", becomes a number."""
    word = re.compile(r"\w+")

    def rename(dim: Any) -> Any:
        text = dim.value if isinstance(dim, ir.SymbolicDim) else None
        if text is None:
            return dim
        return int(text) if text.isdecimal() else ir.SymbolicDim(word.sub(lambda m: symbols.get(m[0], m[0]), text))

    for graph in graphs(model):
        for value in [*graph.inputs, *(output for node in graph for output in node.outputs)]:
            if value.shape is not None:
                value.shape = ir.Shape([rename(dim) for dim in value.shape])
