"""What the front door hands on: a graph, what it is a model of, and where it came from."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from qcompiler.core import Note

Kind = Literal["encoder", "causal-lm", "vision", "graph"]

_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True)
class Source:
    """A float model as it came in, before any pass.

    Attributes:
        model: the graph; its weights stay on disk until they are read.
        name: for people: the file's, folder's or class's name.
        kind: "encoder" (token ids in, hidden states or scores out), "causal-lm" (token ids in, next-token logits out),
            "vision" (one image tensor in) or "graph" (anything else). It decides how text and images become inputs.
        sha256: hex digest of the source, weights included.
        folder: where a tokenizer.json, config.json or preprocessor_config.json may lie; None for objects in memory.
        notes: what the front door decided.
    """

    model: ir.Model
    name: str
    kind: Kind
    sha256: str
    folder: Path | None = None
    notes: tuple[Note, ...] = ()

    @property
    def tokenizer(self) -> Path | None:
        """The ``tokenizer.json`` that belongs to the model, or None."""
        path = self.folder / "tokenizer.json" if self.folder is not None else None
        return path if path is not None and path.is_file() else None


class Scratch:
    """A temporary folder that lives as long as this object, or as any weight that :func:`read_lazily` took from it."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="qcompiler-"))
        # Not tempfile.TemporaryDirectory: that warns when it is left to the garbage collector, which is the point here.
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def read_lazily(scratch: Scratch, name: str = "model.onnx") -> ir.Model:
    """Load ``scratch.path / name``, its weights memory-mapped; every weight keeps the folder alive."""
    model = ir.load(scratch.path / name)
    for tensor in tensors(model):
        if isinstance(tensor, ir.ExternalTensor):
            tensor.meta["qcompiler.scratch"] = scratch
    return model


def tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """All constant tensors: initializers and tensor attributes, of the graph, its subgraphs and its functions."""
    for graph in graphs(model):
        if isinstance(graph, ir.Graph):
            yield from (v.const_value for v in graph.initializers.values() if v.const_value is not None)
        for node in graph:
            for attribute in node.attributes.values():
                if isinstance(attribute, ir.Attr) and not attribute.is_ref():
                    if attribute.type == ir.AttributeType.TENSOR:
                        yield attribute.as_tensor()
                    elif attribute.type == ir.AttributeType.TENSORS:
                        yield from attribute.as_tensors()


def graphs(model: ir.Model) -> Iterator[ir.Graph | ir.Function]:
    """The main graph, its subgraphs and the functions."""
    yield model.graph
    yield from model.graph.subgraphs()
    for function in model.functions.values():
        yield function
        yield from function.subgraphs()


def hash_files(paths: Iterable[Path]) -> str:
    """SHA-256 over names and contents, read a megabyte at a time (a memory map would count as resident memory)."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def guess_kind(model: ir.Model) -> Kind:
    """What a bare graph is a model of, by the names and ranks of its inputs and outputs."""
    inputs = {value.name: value for value in data_inputs(model)}
    if "input_ids" in inputs:
        logits = next((v for v in model.graph.outputs if v.name == "logits"), None)
        causal = logits is not None and logits.shape is not None and logits.shape.rank() == 3
        return "causal-lm" if causal and "token_type_ids" not in inputs else "encoder"
    if len(inputs) == 1:
        (only,) = inputs.values()
        if only.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16) and only.shape is not None and only.shape.rank() == 4:
            return "vision"
    return "graph"


def data_inputs(model: ir.Model) -> list[ir.Value]:
    """The inputs that a caller feeds (old files list their initializers among the inputs as well)."""
    return [value for value in model.graph.inputs if value.name not in model.graph.initializers]
