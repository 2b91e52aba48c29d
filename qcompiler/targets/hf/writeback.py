"""From the quantized graph back to the parameters of the model it was traced from.

Each initializer knows its parameter and how it was rearranged (``graph.rules.rewriter``); what a pass folded into it is
written, where the module has a parameter for it. What is as it was is copied from the source's files, byte for byte.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.core import TargetError
from qcompiler.frontends.origin import Origin
from qcompiler.frontends.safetensors_file import Entry
from qcompiler.graph.edit import array_of
from qcompiler.graph.linear import Linear, linears
from qcompiler.graph.rules.rewriter import MAP, PARAMETER, TIED
from qcompiler.graph.transaction import checked_cast
from qcompiler.targets.hf.files import Tensor
from qcompiler.targets.hf.packing import Kind, kind_of, packed

_BEFORE = "qcompiler.before"


@dataclasses.dataclass(frozen=True, eq=False)
class Before:
    """The canonical float graph before any pass.

    Attributes:
        nodes: by name, operator and number of inputs.
        constants: initializers by name.
    """

    nodes: Mapping[str, tuple[str, int]]
    constants: Mapping[str, ir.TensorProtocol | None]

    @staticmethod
    def leave(graph: ir.Graph) -> None:
        """Remember the graph as it is now, for :meth:`of` itself later and its clones."""
        nodes = {node.name or "": _signature(node) for node in graph}
        graph.meta[_BEFORE] = Before(nodes, {name: v.const_value for name, v in graph.initializers.items()})

    @staticmethod
    def of(graph: ir.Graph) -> Before:
        """What :meth:`leave` left."""
        before: Before = graph.meta[_BEFORE]
        return before


def _signature(node: ir.Node) -> tuple[str, int]:
    return node.op_type, sum(value is not None for value in node.inputs)


@dataclasses.dataclass(frozen=True, eq=False)
class Parameters:
    """What a folder's files will hold.

    Attributes:
        tensors: by name.
        kinds: how the weight of each quantized module is.
        modules: the module of each quantized Linear of the graph.
        untied: the head has a weight of its own now.
    """

    tensors: Mapping[str, Tensor]
    kinds: Mapping[str, Kind]
    modules: Mapping[str, str]
    untied: bool


def module_of(linear: Linear, origin: Origin) -> str | None:
    """The torch.nn.Linear that a Linear of the graph is, weights not transposed otherwise than that asks; or None."""
    metadata = linear.weight.metadata_props
    names = origin.names.get(metadata.get(PARAMETER, ""), ())
    modules = [name.removesuffix(".weight") for name in names if name.removesuffix(".weight") in origin.linears]
    return modules[-1] if modules and metadata.get(MAP) == "transpose" else None


def write_back(model: ir.Model, origin: Origin) -> Parameters:
    """The tensors of the folded canonical graph under the names of the model's parameters.

    Raises:
        TargetError: something that a pass changed has no place among them.
    """
    before = Before.of(model.graph)
    _check_structure(model, before)
    weights = {linear.name: linear for linear in linears(model) if linear.weight_quant is not None}
    modules: dict[str, str] = {}
    quantized: dict[str, ir.Node] = {}
    for name, linear in weights.items():
        module, node = module_of(linear, origin), linear.weight_quant
        assert node is not None
        if module is None:
            raise TargetError(f"target 'hf' cannot write the weight of {name!r}: it is that of no torch.nn.Linear.")
        if not _same(quantized.setdefault(module, node), node):
            raise TargetError(f"target 'hf' cannot write {module!r}: its uses in the graph were rounded apart.")
        modules[name] = module
    changed, kept = _floats(model, origin, before)
    tensors = {name: Tensor.of(entry) for name, entry in origin.entries.items()}
    tensors |= {name: _float(name, value, origin) for name, value in changed.items()}
    new = {*changed, *(f"{module}.weight" for module in quantized)}
    untied = any(len(names) > 1 and new & set(names) for names in origin.names.values())
    if untied:
        _untie(tensors, origin, kept)
    kinds = {}
    for module, node in quantized.items():
        kind = kind_of(node)
        if kind is None:
            raise TargetError(f"target 'hf' cannot write the weight of {module!r}: it has no scale by output channel.")
        kinds[module] = kind
        tensors.pop(f"{module}.weight", None)
        tensors |= {f"{module}.{part}": tensor for part, tensor in packed(node, kind).items()}
    return Parameters(dict(sorted(tensors.items())), kinds, modules, untied)


def _check_structure(model: ir.Model, before: Before) -> None:
    """No operator may have come, gone or changed, but for those that dequantize weights."""
    dequantizers = {linear.weight_quant for linear in linears(model)}
    seen = set()
    for node in model.graph:
        name = node.name or ""
        seen.add(name)
        if node in dequantizers or before.nodes.get(name) == _signature(node):
            continue
        what = "has another form" if name in before.nodes else "was added"
        raise TargetError(
            f"target 'hf' has no place for {node.op_type} {name!r}, which {what} in a pass: the source's module has no "
            "such operator or parameter; leave that pass out, or let it only fold."
        )
    gone = [name for name in before.nodes if name not in seen]
    if gone:
        raise TargetError(
            f"target 'hf' cannot do without {before.nodes[gone[0]][0]} {gone[0]!r}, which a pass removed: leave out "
            "that pass."
        )


def _floats(model: ir.Model, origin: Origin, before: Before) -> tuple[dict[str, ir.Value], set[str]]:
    """The float parameters that passes changed, under the name each is to be written, and the names of the others."""
    changed: dict[str, ir.Value] = {}
    kept: set[str] = set()
    for value in _read(model):
        names = origin.names.get(value.metadata_props.get(PARAMETER, ""), ())
        name = names[-1 if TIED in value.metadata_props else 0] if names else ""  # a Linear's name is the last
        if _unchanged(value, before):
            kept.add(name)
        elif not names or names[0] not in origin.entries:
            raise TargetError(
                f"target 'hf' has no parameter to write {value.name!r} to, which a pass changed: leave that pass out."
            )
        elif not _same_numbers(changed.setdefault(name, value), value):
            raise TargetError(f"target 'hf' cannot write {name!r}: passes changed its uses apart.")
    both = sorted(kept & set(changed))
    if both:
        raise TargetError(f"target 'hf' cannot write {both[0]!r}: a pass changed some of its uses and left others.")
    return changed, kept


def _read(model: ir.Model) -> Iterator[ir.Value]:
    """The constants that are read otherwise than as a quantized weight."""
    dequantizers = {linear.weight_quant for linear in linears(model)}
    for value in model.graph.initializers.values():
        if any(user not in dequantizers for user, _ in value.uses()):
            yield value


def _unchanged(value: ir.Value, before: Before) -> bool:
    old = before.constants.get(value.name or "")
    if old is None or value.const_value is None:
        return False
    if old is value.const_value:
        return True
    return old.dtype == value.const_value.dtype and np.array_equal(old.numpy(), value.const_value.numpy())


def _same_numbers(a: ir.Value | None, b: ir.Value | None) -> bool:
    first, second = array_of(a), array_of(b)
    return a is b or (first is not None and second is not None and np.array_equal(first, second))


def _same(a: ir.Node, b: ir.Node) -> bool:
    return a is b or all(_same_numbers(x, y) for x, y in zip(a.inputs, b.inputs, strict=True))


def _untie(tensors: dict[str, Tensor], origin: Origin, kept: set[str]) -> None:
    """Every name of a tied parameter gets numbers of its own: nothing is tied when the model is loaded."""
    for first, *others in origin.names.values():
        for name in others:
            if name in kept and first in origin.entries:
                tensors[name] = Tensor.of(origin.entries[first])
            elif first in tensors:
                tensors.setdefault(name, tensors[first])


def _float(name: str, value: ir.Value, origin: Origin) -> Tensor:
    """A changed parameter in the type and shape that the source's file has it in."""
    entry = origin.entries[origin.names[value.metadata_props[PARAMETER]][0]]
    maps = [part for part in value.metadata_props.get(MAP, "").split(",") if part]
    if entry.dtype is None or any(not _inverts(part) for part in maps):
        raise TargetError(f"target 'hf' cannot write {name!r}: the graph has it as {', '.join(maps) or entry.code}.")

    numbers = value.const_value
    assert numbers is not None

    def read() -> npt.NDArray[Any]:
        return _cast(inverse(numbers.numpy(), maps).reshape(entry.shape), entry, name)

    return Tensor(entry.code, entry.shape, read)


def _cast(array: npt.NDArray[Any], entry: Entry, name: str) -> npt.NDArray[Any]:
    assert entry.dtype is not None
    return checked_cast(array, ir.DataType.from_numpy(entry.dtype), repr(name))


def _inverts(part: str) -> bool:
    return part in ("transpose", "one_plus") or part.startswith("scale:")


def inverse(array: npt.NDArray[Any], maps: Sequence[str]) -> npt.NDArray[Any]:
    """The parameter that these steps (``graph.rules.rewriter.MAP``) made ``array`` of, in its precision."""
    if array.dtype == ml_dtypes.bfloat16:
        array = array.astype(np.float32)
    for part in reversed(maps):
        if part == "transpose":
            array = array.T
        elif part == "one_plus":
            array = array - array.dtype.type(1)
        else:
            array = array / array.dtype.type(float(part.removeprefix("scale:")))
    return array
