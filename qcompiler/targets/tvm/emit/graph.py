"""From the folded canonical graph to a Relax module of our kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from tvm import relax, tirx

from qcompiler.core import Note, TargetError
from qcompiler.graph.edit import array_of, users
from qcompiler.graph.functions import FAKE_QUANT, is_call
from qcompiler.graph.linear import Linear, linears
from qcompiler.graph.shapes import concrete_shapes
from qcompiler.numerics.affine import dequantize
from qcompiler.targets.ort.heads import merged_output, trace
from qcompiler.targets.tvm.emit import blocks, elementwise, movement, reductions
from qcompiler.targets.tvm.emit import linears as products
from qcompiler.targets.tvm.emit.builder import Builder, Tensor
from qcompiler.targets.tvm.emit.choice import emit_linear, kernel_note, kernel_of
from qcompiler.targets.tvm.emit.dims import Size, symbol
from qcompiler.targets.tvm.emit.fusion import Fused, is_static, plan, smoothing_of
from qcompiler.targets.tvm.emit.numbers import Numbers, compute, is_open
from qcompiler.targets.tvm.isa import Isa, fits_maddubs, with_narrow_weights
from qcompiler.targets.tvm.kernels import FLOAT, INTEGERS

AXES = ("batch", "sequence")
TYPES = ("float32", "int64", "int32", "bool", "int8", "uint8")


@dataclasses.dataclass(frozen=True)
class Emitted:
    """A module and what it needs to run.

    Attributes:
        module: with one function, ``main(inputs, constants)``, whose result is a tuple of the outputs.
        constants: by name, in the order of the parameters.
        limits: open sizes, as polynomials over axes, that must not grow beyond a number.
        nodes: name of each Linear -> the kernel that computes it, one of :data:`qcompiler.targets.tvm.kernels.LINEAR`.
        notes: what became of each Linear.
        isa: what the kernels were made for.
    """

    module: Any
    constants: Mapping[str, npt.NDArray[Any]]
    limits: tuple[tuple[Size, int], ...]
    nodes: Mapping[str, str]
    notes: tuple[Note, ...]
    isa: Isa


def input_sizes(value: ir.Value) -> tuple[Size, ...]:
    """A graph input's shape; open axes are named by their place: all batches are one, all sequences are one."""
    assert value.shape is not None
    return tuple(d if isinstance(d, int) else symbol(axis_name(i)) for i, d in enumerate(value.shape))


def axis_name(axis: int) -> str:
    """The name of an open axis."""
    return AXES[axis] if axis < len(AXES) else f"axis{axis}"


def emit(model: ir.Model, isa: Isa, tune: bool = False) -> Emitted:
    """Emit a folded canonical graph; the model is not changed.

    Args:
        model: the graph.
        isa: what kernels are made for.
        tune: measure how products are best cut.

    Raises:
        TargetError: a node that is not understood, or whose sizes are not known.
    """
    weights = [array_of(linear.weight) for linear in linears(model) if products.refusal(linear) is None]
    if weights and all(weight is not None and fits_maddubs(weight) for weight in weights):
        isa = with_narrow_weights(isa)
    if not tune:
        return _Emitter(model, isa).emit()
    from qcompiler.targets.tvm.tuning import Tuner

    return _Emitter(model, isa, Tuner(isa).tiling).emit()


class _Emitter:
    def __init__(self, model: ir.Model, isa: Isa, tiling: Callable[[int, int], Any] | None = None) -> None:
        self.model = model
        self.inputs = [v for v in model.graph.inputs if v.name not in model.graph.initializers]
        names = {
            axis_name(i) for value in self.inputs for i, d in enumerate(value.shape or ()) if not isinstance(d, int)
        }
        self.builder = Builder(isa, sorted(names), tiling)
        self.facts = concrete_shapes(model)
        self.values: dict[ir.Value, Tensor] = {}
        self.numbers: dict[ir.Value, Numbers] = {}
        self.integers: dict[ir.Node, products.Integers] = {}
        self.notes: list[Note] = []
        self.nodes: dict[str, str] = {}
        self.products = {linear.matmul for linear in linears(model) if kernel_of(linear) in INTEGERS}
        weight_quants = {linear.weight_quant for linear in linears(model)}
        fused = plan(model, self.facts, isa.group)
        self.smoothed = {
            quant: found
            for quant in model.graph
            if is_call(quant, *FAKE_QUANT) and quant not in weight_quants and (found := smoothing_of(quant)) is not None
        }
        self.anchors = {item.nodes[-1]: item for item in fused}
        self.skipped = {node for item in fused for node in item.nodes[:-1]}
        self.skipped |= {product for product, _, _ in self.smoothed.values()}

    def emit(self) -> Emitted:
        builder = self.builder
        arguments = []
        for i, value in enumerate(self.inputs):
            if value.dtype is None or value.shape is None or value.dtype.numpy().name not in TYPES:
                raise TargetError(f"input {value.name!r} of type {value.dtype} cannot be compiled for tvm-llvm.")
            tensor = builder.variable(f"i{i}", input_sizes(value), value.dtype.numpy().name)
            self.values[value] = tensor
            arguments.append(tensor.var)
        block = builder.block
        with block.function("main", attrs={"num_input": len(arguments)}, pure=True):
            with block.dataflow():
                for node in self.model.graph:
                    self._node(node)
                outputs = [self.tensor(value) for value in self.model.graph.outputs]
                result = block.emit_output(relax.Tuple([tensor.var for tensor in outputs]))
            block.emit_func_output(result, params=[*arguments, *builder.parameters])
        return Emitted(
            block.get(), builder.constants, tuple(builder.limits), self.nodes, tuple(self.notes), builder.isa
        )

    # --- values

    def tensor(self, value: ir.Value | None) -> Tensor:
        """The value as a tensor; a constant becomes a parameter."""
        assert value is not None
        if value not in self.values:
            if value in self.numbers:
                self.values[value] = self._open_tensor(self.numbers[value], value.name or "")
            else:
                array = self.constant(value)
                if array is None:
                    raise ValueError(f"its input {value.name!r} is not known")
                self.values[value] = self.builder.constant(value.name or f"constant{len(self.values)}", array)
        return self.values[value]

    def constant(self, value: ir.Value | None) -> npt.NDArray[Any] | None:
        """The numbers of an initializer, or of one that is dequantized; None for what is computed."""
        array = array_of(value)
        producer = value.producer() if value is not None else None
        if array is None and producer is not None and producer.op_type == "DequantizeLinear":
            stored, scale = (array_of(v) for v in producer.inputs[:2])
            if stored is not None and scale is not None:
                zero = array_of(producer.inputs[2]) if len(producer.inputs) > 2 else None
                if zero is None:
                    zero = np.zeros(1, np.int8)
                return dequantize(stored, _along(scale, producer, stored.ndim), _along(zero, producer, stored.ndim))
        return array

    def _open_tensor(self, array: Numbers, name: str) -> Tensor:
        if not is_open(array):
            return self.builder.constant(f"{name}.numbers", array)
        sizes = list(array.reshape(-1))

        def body(_: Any, index: Sequence[Any]) -> Any:
            expressions = [self.builder.expression(size) for size in sizes]
            value = expressions[-1]
            for number in reversed(range(len(expressions) - 1)):
                value = tirx.Select(index[0] == number, expressions[number], value)
            return value

        flat = self.builder.compute("sizes", (len(sizes),), "int64", [], body, sizes)
        return self.builder.view(flat, array.shape)

    def _known(self, value: ir.Value | None) -> Numbers | None:
        if value is None:
            return None
        if value not in self.numbers and value not in self.values:
            tensor = ir.convenience.get_const_tensor(value) if not value.is_graph_input() else None
            if tensor is not None and tensor.size <= 4096:
                self.numbers[value] = tensor.numpy()
        return self.numbers.get(value)

    # --- nodes

    def _node(self, node: ir.Node) -> None:
        if node in self.skipped:
            return
        try:
            if node in self.anchors:
                self._linear(self.anchors[node])
            else:
                self._plain(node)
        except (ValueError, AssertionError, NotImplementedError, IndexError) as error:
            name = node.name or (node.outputs[0].name if node.outputs else "")
            raise TargetError(f"{node.op_type} {name!r} cannot be compiled for tvm-llvm: {error}.") from error

    def _plain(self, node: ir.Node) -> None:
        if node.op_type == "Constant" and node.domain == "":
            return
        if node.op_type == "DequantizeLinear" and array_of(node.inputs[0]) is not None:
            return  # a weight or a bias: its readers ask for the numbers
        if node.op_type == "Shape" and node.domain == "":
            sizes = self.tensor(node.inputs[0]).sizes
            chosen = sizes[node.attributes.get_int("start", 0) : node.attributes.get_int("end", len(sizes))]
            array = np.empty(len(chosen), object)
            array[:] = chosen
            compute_result: list[Numbers] | None = [_tidy(array)]
        else:
            numbers = [self._known(value) for value in node.inputs]
            known = all(n is not None for n, value in zip(numbers, node.inputs, strict=True) if value is not None)
            compute_result = compute(node, numbers) if known and node.inputs else None
        if compute_result is not None:
            self.numbers.update(zip(node.outputs, compute_result, strict=False))
            return
        for value, tensor in zip(node.outputs, self._tensors(node), strict=False):
            self.values[value] = tensor

    def _tensors(self, node: ir.Node) -> list[Tensor]:
        builder, inputs = self.builder, node.inputs
        if is_call(node, *FAKE_QUANT):
            return self._fake_quant(node)
        if is_call(node, "RMSNorm") or (node.op_type == "LayerNormalization" and node.domain == ""):
            return [self._norm(node)]
        if is_call(node, "Attention", "MaskedAttention"):
            return [self._attention(node)]
        if is_call(node, "RotaryEmbedding"):
            return [blocks.rotary(builder, *(self.tensor(value) for value in inputs))]
        if node.domain != "":
            raise ValueError(f"operators of domain {node.domain!r} are not among those it has")
        if node.op_type == "MatMul":
            return [blocks.matmul(builder, *(self.tensor(value) for value in inputs))]
        if node.op_type == "Conv":
            weight, bias = (self.constant(v) for v in (inputs[1], inputs[2] if len(inputs) > 2 else None))
            if weight is None:
                raise ValueError("its weight is not constant")
            return [blocks.convolution(builder, node, self.tensor(inputs[0]), weight, bias)]
        if node.op_type in elementwise.RULES:
            return [elementwise.RULES[node.op_type](builder, node, [self.tensor(v) for v in inputs if v is not None])]
        rule = movement.RULES.get(node.op_type) or reductions.RULES.get(node.op_type)
        if rule is None:
            raise ValueError("the operator is not among those it has")
        numbers = [self._known(value) for value in inputs]
        tensors = [self.tensor(v) for v in inputs[: _OPERANDS.get(node.op_type, 1) or len(inputs)] if v is not None]
        return list(rule(builder, node, tensors, numbers))

    def _fake_quant(self, node: ir.Node) -> list[Tensor]:
        """The integers are for the Linears; what else reads the value gets it in float."""
        if node.op_type not in products.GRANULARITY:
            raise ValueError("the operator is not among those it has")
        if is_call(node, "FakeQuant") and not is_static(node):
            raise ValueError("it has more than one scale")
        if node not in self.integers:
            smoothed = self.smoothed.get(node)
            x = self.tensor(node.inputs[0] if smoothed is None else smoothed[1])
            self.integers[node] = products.quantize(self.builder, node, x, self._multiplier(node))
        if all(reader in self.products for reader in users(node.outputs[0])) and not node.outputs[0].is_graph_output():
            return []
        return [products.restored(self.builder, self.integers[node])]

    def _multiplier(self, quant: ir.Node) -> Tensor | None:
        if quant not in self.smoothed:
            return None
        name = quant.inputs[0].name if quant.inputs[0] is not None else ""
        return self.builder.constant(f"{name}.multiplier", self.smoothed[quant][2].astype(np.float32))

    def _quants_of(self, value: ir.Value) -> Iterator[ir.Node]:
        """Fake-quants that a norm can compute along: of the value, or of its product with a vector."""
        behind = {product: quant for quant, (product, _, _) in self.smoothed.items()}
        for reader in users(value):
            quant = behind.get(reader, reader)
            if is_static(quant) or is_call(quant, "FakeQuantPerToken", "FakeQuantPerGroup"):
                yield quant

    def _norm(self, node: ir.Node) -> Tensor:
        if len([value for value in node.outputs if value.uses()]) > 1:
            raise ValueError("its mean or deviation is read")
        quant = next(self._quants_of(node.outputs[0]), None)
        x, weight = (self.tensor(value) for value in node.inputs[:2])
        bias = self.tensor(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
        multiplier = self._multiplier(quant) if quant is not None else None
        y, integers = blocks.norm(self.builder, node, (x, weight, bias), quant, multiplier)
        if quant is not None and integers is not None:
            self.integers[quant] = integers
        return y

    def _attention(self, node: ir.Node) -> Tensor:
        builder, operands = self.builder, []
        for value in node.inputs[:3]:
            assert value is not None
            traced = trace(value, self.facts)
            if traced.rotation is not None:
                operands.append((self.tensor(traced.rotation.outputs[0]), False))
            elif traced.rows is not None:
                rows = self.tensor(traced.rows)
                b, s = rows.sizes[:2]
                operands.append((builder.view(rows, (b, s, traced.count, self.facts[value.name or ""].shape[3])), True))
            else:
                operands.append((self.tensor(traced.value), False))
        key_heads, value_heads = ((t.sizes[2] if rows else t.sizes[1]) for t, rows in operands[1:])
        if key_heads != value_heads:  # a repeat that was found on one side only
            operands[1:] = [(self.tensor(v), False) for v in node.inputs[1:3]]
        mask = self.tensor(node.inputs[3]) if len(node.inputs) > 3 else None
        if mask is not None:
            mask = builder.view(mask, (*([1] * (4 - len(mask.sizes))), *mask.sizes))
        merged = merged_output(node, self.facts)
        y = blocks.attention(builder, operands, mask, node.attributes.get_float("scale"), merged is not None)
        if merged is None:
            return y
        b, s, h, d = y.sizes
        reshape = merged.producer()
        assert reshape is not None
        transpose = reshape.inputs[0].producer() if reshape.inputs[0] is not None else None
        assert transpose is not None
        self.skipped |= {reshape, transpose}
        self.values[merged] = builder.view(y, (b, s, h * d))
        return y

    def _linear(self, fused: Fused) -> None:
        linear, builder = fused.linear, self.builder
        bias = self.constant(linear.bias) if linear.bias is not None else None
        residuals = [self.tensor(value) for value in fused.residuals]
        kernel, weight = kernel_of(linear), None
        x: products.Integers | Tensor
        if kernel in INTEGERS:
            assert linear.activation_quant is not None
            x = self.integers[linear.activation_quant]
        else:
            x = self.tensor(linear.matmul.inputs[0])
        if kernel == FLOAT:
            weight = self.constant(linear.matmul.inputs[1])
            assert weight is not None
        y = emit_linear(builder, fused, x, weight, bias, residuals)
        self.nodes[linear.name] = kernel
        self.notes.append(kernel_note(fused, kernel))
        if fused.requantize is None:
            self.values[fused.output] = y
        else:
            steps = products.static_steps(fused.requantize)
            self.integers[fused.requantize] = products.Integers(
                y, (*x.sizes[:-1], linear.out_features), "static", *steps
            )
            if any(reader not in self.products for reader in users(fused.requantize.outputs[0])):
                self.values[fused.requantize.outputs[0]] = products.restored(
                    self.builder, self.integers[fused.requantize]
                )
            self.skipped.add(fused.requantize)


_OPERANDS = {"Concat": 0, "Gather": 2, "GatherElements": 2, "GatherND": 2, "Range": 0}
"""How many of the inputs are tensors, 0 for all; the others are axes, shapes and the like."""


def _along(array: npt.NDArray[Any], node: ir.Node, rank: int) -> npt.NDArray[Any]:
    """A scale or zero point so that it broadcasts along the node's axis."""
    if array.size == 1:
        return array.reshape(())
    if array.ndim == rank:
        raise ValueError("its weight has scales by group")
    shape = [1] * rank
    shape[node.attributes.get_int("axis", 1) % rank] = array.size
    return array.reshape(shape)


def _tidy(array: Numbers) -> Numbers:
    return array.astype(np.int64) if not any(not isinstance(item, int) for item in array) else array


__all__ = ["Emitted", "Linear", "emit", "input_sizes"]
