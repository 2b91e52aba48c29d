"""The graph as a torch module: an onnx_ir model in canonical form, rebuilt as a ``torch.fx.GraphModule``.

One torch function stands for one ONNX node, so what is trained is the very graph that the passes see, and what was
learned goes back by the initializer's name. Any model that the front door opens can so be trained, torch's or not.
"""

from __future__ import annotations

import dataclasses
import inspect
import keyword
import operator
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx

from qcompiler.core import DataError, ModelError, OptionError
from qcompiler.training.dtypes import to_array, to_torch
from qcompiler.training.ops import ONLY, OPS


@dataclasses.dataclass(frozen=True, eq=False)
class Rebuilt:
    """A model that torch runs and trains, on the CPU.

    Attributes:
        module: the graph; its outputs are a dict by ONNX name.
        weights: float initializers by their ONNX names, the module's own parameters. None of them is trained
            (``requires_grad``) before it is asked to be.
        inputs: ONNX names of the inputs, in the order of the module's arguments.
    """

    module: fx.GraphModule
    weights: Mapping[str, torch.nn.Parameter]
    inputs: Sequence[str]

    def __call__(self, /, **feeds: Any) -> dict[str, Tensor]:
        """Outputs and taps by name, of inputs (tensors or arrays) by name.

        Raises:
            DataError: an input is missing.
        """
        missing = [name for name in self.inputs if name not in feeds]
        if missing:
            raise DataError(f"input {missing[0]!r} of the rebuilt graph is missing: it takes {', '.join(self.inputs)}.")
        return self.module(*(torch.as_tensor(feeds[name]) for name in self.inputs))


def rebuild(model: ir.Model, taps: Sequence[str] = ()) -> Rebuilt:
    """Rebuild a model at any stage between ``normalise`` and ``fold``, fake-quants included.

    Args:
        model: it is not changed; its weights are copied.
        taps: names of inner values to return beside the model's own outputs.

    Raises:
        ModelError: a node has no torch function here, or torch does not compute with the type of an initializer.
        OptionError: a tap is no value of the graph.
    """
    return _Builder(model).built(taps)


def write_back(rebuilt: Rebuilt, model: ir.Model) -> list[str]:
    """Give the model, in place, the values of every weight that is trained (``requires_grad``); their names.

    An initializer that several nodes read is one parameter, so all of them get what it learned.
    """
    trained = [name for name, parameter in rebuilt.weights.items() if parameter.requires_grad]
    for name in trained:
        value = model.graph.initializers[name]
        assert value.const_value is not None
        array = to_array(rebuilt.weights[name]).astype(value.const_value.dtype.numpy())
        value.const_value = ir.tensor(array, name=name)
    return trained


class _Builder:
    """Nodes of ONNX become nodes of FX, one after the other."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._root = torch.nn.Module()
        self._arguments: set[str] = set()
        self._graph = fx.Graph()
        self._values: dict[ir.Value, fx.Node] = {}
        self._weights: dict[str, torch.nn.Parameter] = {}

    def built(self, taps: Sequence[str]) -> Rebuilt:
        inputs = [value for value in self._model.graph.inputs if not value.is_initializer()]
        for value in inputs:
            name = _free(_identifier(value.name), self._arguments)
            self._arguments.add(name)
            self._values[value] = self._graph.placeholder(name)
        for node in self._model.graph:
            self._add(node)
        outputs = {value.name or "": self._read(value) for value in self._model.graph.outputs}
        self._graph.output({**outputs, **self._tapped(taps)})
        self._graph.eliminate_dead_code()
        module = fx.GraphModule(self._root, self._graph, "Rebuilt")
        return Rebuilt(module, self._weights, [value.name or "" for value in inputs])

    def _tapped(self, taps: Iterable[str]) -> dict[str, fx.Node]:
        known = {value.name or "": value for value in self._values}
        for name in taps:
            if name not in known:
                raise OptionError(f"tap {name!r} is no value that the rebuilt graph computes or reads.")
        return {name: self._values[known[name]] for name in taps}

    def _add(self, node: ir.Node) -> None:
        if node.op_type == "Constant" and node.domain == "":
            tensor = ir.convenience.get_const_tensor(node.outputs[0])
            assert tensor is not None
            self._values[node.outputs[0]] = self._constant(node.outputs[0].name, tensor)
            return
        function = _function(node)
        inputs = [None if value is None else self._read(value) for value in node.inputs]
        attributes = {name: self._attribute(node, value) for name, value in _attributes(node, function).items()}
        name = _identifier(node.outputs[0].name)
        call = self._graph.create_node("call_function", function, tuple(inputs), attributes, name)
        if len(node.outputs) == 1:
            self._values[node.outputs[0]] = call
        else:
            for index, output in enumerate(node.outputs):
                self._values[output] = self._graph.call_function(operator.getitem, (call, index))

    def _read(self, value: ir.Value) -> fx.Node:
        if value not in self._values:
            assert value.const_value is not None
            self._values[value] = self._constant(value.name, value.const_value, weight=True)
        return self._values[value]

    def _attribute(self, node: ir.Node, attribute: ir.Attr) -> Any:
        if attribute.type == ir.AttributeType.TENSOR:
            return self._constant(f"{node.name}_{attribute.name}", attribute.as_tensor())
        return list(attribute.value) if isinstance(attribute.value, tuple | list) else attribute.value

    def _constant(self, name: str | None, tensor: ir.TensorProtocol, weight: bool = False) -> fx.Node:
        """A parameter where it is a float initializer, else a buffer."""
        values = to_torch(tensor)
        place = _free(_identifier(name), dir(self._root))
        if weight and values.is_floating_point():
            parameter = torch.nn.Parameter(values, requires_grad=False)
            self._root.register_parameter(place, parameter)
            self._weights[name or ""] = parameter
        else:
            self._root.register_buffer(place, values)
        return self._graph.get_attr(place)


def _function(node: ir.Node) -> Callable[..., Any]:
    found = OPS.get((node.domain, node.op_type))
    if found is None:
        kind = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        raise ModelError(
            f"node {node.name!r} cannot be trained through: operator {kind} has no torch function in "
            "qcompiler/training/ops."
        )
    return found


def _attributes(node: ir.Node, function: Callable[..., Any]) -> dict[str, ir.Attr]:
    """Those that the function takes; the others must have the one value that it holds for."""
    taken: dict[str, ir.Attr] = {}
    for name, attribute in node.attributes.items():
        fixed = ONLY.get((node.op_type, name)) if node.domain == "" else None
        if fixed is None and name in _arguments(function):
            taken[name] = attribute
        elif fixed is None or attribute.value != fixed:
            raise ModelError(
                f"node {node.name!r} cannot be trained through: {node.op_type} with {name}={attribute.value!r} has no "
                "torch function in qcompiler/training/ops."
            )
    return taken


def _arguments(function: Callable[..., Any]) -> Iterable[str]:
    try:
        return inspect.signature(function).parameters
    except ValueError:  # torch's own built-in functions have no signature, and stand for operators without attributes
        return ()


def _identifier(name: str | None) -> str:
    """A name that Python takes."""
    return re.sub(r"\W|^(?=\d)", "_", name or "value")


def _free(name: str, taken: Container[str]) -> str:
    while keyword.iskeyword(name) or name == "self" or name in taken:
        name += "_"
    return name
