"""ONNX models: a file with or without external data, a ModelProto, an onnx_ir.Model."""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from qcompiler.core import ModelError
from qcompiler.frontends.source import Scratch, Source, guess_kind, hash_files, read_lazily, tensors
from qcompiler.graph.run import save_model

OPSETS = range(11, 24)
"""Opsets of the standard domain that normalisation knows how to bring to 21."""

_INLINE_LIMIT = 16 << 20
"""Bytes of weights inside the protobuf above which they are moved to a scratch file, so that they stay on disk."""


def open_path(path: Path) -> Source:
    """Open an ``.onnx`` file; a ``tokenizer.json`` in the same folder belongs to it.

    Raises:
        ModelError: the file is not there, is not ONNX, is cut off, has an unsupported opset, or lacks external data.
    """
    if not path.is_file():
        raise ModelError(f"there is no file {path}.")
    model = _deserialize(_parse(path), str(path))
    ir.external_data.set_base_dir(model.graph, path.parent)
    _check(model, str(path))
    data = sorted({Path(t.path) for t in tensors(model) if isinstance(t, ir.ExternalTensor)})
    return Source(
        model=_to_disk(model),
        name=path.stem,
        kind=guess_kind(model),
        sha256=hash_files([path, *data]),
        folder=path.parent,
    )


def open_proto(proto: onnx.ModelProto) -> Source:
    """Open a ModelProto; it is not changed. External data is looked for from the current folder on."""
    model = _deserialize(proto, "the ModelProto")
    _check(model, "the ModelProto")
    return Source(_to_disk(model), model.graph.name or "model", guess_kind(model), hash_model(model))


def open_ir(model: ir.Model) -> Source:
    """Open an onnx_ir.Model; passes work on a clone of it, weights are shared."""
    model = model.clone()
    _check(model, "the onnx_ir.Model")
    return Source(model, model.graph.name or "model", guess_kind(model), hash_model(model))


def hash_model(model: ir.Model) -> str:
    """SHA-256 of a model in memory: its structure, then its weights one at a time."""
    digest = hashlib.sha256()
    stripped = model.clone()
    for value in stripped.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes > 1024:
            digest.update(f"{value.name} {tensor.dtype} {tensor.shape}".encode())
            mapped = isinstance(tensor, ir.ExternalTensor) and tensor.raw is not None
            digest.update(tensor.tobytes())
            if isinstance(tensor, ir.ExternalTensor) and not mapped:
                tensor.release()  # pages that were touched count as resident until the map is closed
            value.const_value = ir.tensor([0], name=value.name)  # with none at all onnx_ir would log a warning
    digest.update(ir.to_proto(stripped).SerializeToString(deterministic=True))
    return digest.hexdigest()


def _parse(path: Path) -> onnx.ModelProto:
    content = path.read_bytes()
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(content)
    except DecodeError:
        # An ONNX file starts with field 1, ir_version, a varint; what starts like one and does not parse was cut off.
        if content[:1] == b"\x08" and len(content) > 1 and 0 < content[1] < 32:
            raise ModelError(
                f"{path} is cut off or damaged: its {len(content):,} bytes start like an ONNX file but do not parse."
            ) from None
        raise ModelError(f"{path} is not an ONNX file.") from None
    if not proto.ir_version and not proto.HasField("graph"):
        raise ModelError(f"{path} is {'empty' if not content else 'not an ONNX file'}.")
    if not proto.HasField("graph") or not proto.opset_import:
        raise ModelError(f"{path} is cut off or damaged: it has no {'opset' if proto.HasField('graph') else 'graph'}.")
    return proto


def _deserialize(proto: onnx.ModelProto, what: str) -> ir.Model:
    try:
        return ir.from_proto(proto)
    except (ir.serde.SerdeError, ValueError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ModelError(f"{what} is not a valid graph: {str(cause).splitlines()[0]}") from error


def _check(model: ir.Model, what: str) -> None:
    opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx"))
    if opset is None or opset not in OPSETS:
        raise ModelError(
            f"{what} uses {'no standard opset' if opset is None else f'opset {opset}'}: "
            f"opsets {OPSETS[0]} to {OPSETS[-1]} are supported; export or convert it to one of them (21 is best)."
        )
    if not model.graph.outputs:
        raise ModelError(f"{what} has no outputs.")
    opened: set[str] = set()
    for tensor in tensors(model):
        if isinstance(tensor, ir.ExternalTensor):
            _check_external(tensor, what, opened)


def _check_external(tensor: ir.ExternalTensor, what: str, opened: set[str]) -> None:
    path = Path(tensor.path)
    if not path.is_file():
        raise ModelError(f"{what} keeps weight {tensor.name!r} in {path.name!r}, which is not at {path}.")
    need = (tensor.offset or 0) + (tensor.length or tensor.nbytes)
    if path.stat().st_size < need:
        raise ModelError(
            f"external data {path} is cut off: weight {tensor.name!r} ends at byte {need:,} of {path.stat().st_size:,}."
        )
    if str(path) not in opened and tensor.raw is None:
        opened.add(str(path))
        try:
            tensor.numpy()  # onnx_ir refuses paths that leave the folder, by link or by ..; nothing is read yet
        except ValueError as error:
            raise ModelError(f"external data {path} of {what} is refused: {error}") from error
        finally:
            tensor.release()


def _to_disk(model: ir.Model) -> ir.Model:
    """Move weights that came inside the protobuf to a scratch file and read them from there when they are needed."""
    inline = sum(t.nbytes for t in tensors(model) if not isinstance(t, ir.ExternalTensor))
    if inline <= _INLINE_LIMIT:
        return model
    scratch = Scratch()
    save_model(model, scratch.path / "model.onnx")
    return read_lazily(scratch)
