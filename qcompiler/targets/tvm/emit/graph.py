"""From the folded canonical graph to a Relax module of our kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import relax

from qcompiler.core import Note, TargetError
from qcompiler.graph.edit import array_of, users
from qcompiler.graph.embedding import as_embedding, folded_rows
from qcompiler.graph.experts import has_experts, on_all_rows
from qcompiler.graph.functions import FAKE_QUANT, is_call
from qcompiler.graph.linear import linears
from qcompiler.graph.shapes import concrete_shapes
from qcompiler.targets.tvm.emit import blocks, elementwise, gathers, movement, reductions
from qcompiler.targets.tvm.emit import linears as products
from qcompiler.targets.tvm.emit.attention import attention
from qcompiler.targets.tvm.emit.builder import Builder, Tensor
from qcompiler.targets.tvm.emit.choice import emit_linear, kernel_note, kernel_of
from qcompiler.targets.tvm.emit.emitted import Emitted, axis_name, input_sizes
from qcompiler.targets.tvm.emit.fusion import Fused, is_static, plan, smoothing_of
from qcompiler.targets.tvm.emit.numbers import Numbers, compute, tidy
from qcompiler.targets.tvm.emit.values import Values, constant_of
from qcompiler.targets.tvm.isa import Isa, fits_maddubs, with_narrow_weights
from qcompiler.targets.tvm.kernels import FLOAT, INTEGERS

TYPES = ("float32", "int64", "int32", "bool", "int8", "uint8")


def emit(model: ir.Model, isa: Isa, tune: bool = False) -> Emitted:
    """Emit a folded canonical graph; the model is not changed. Experts compute all rows: sizes are known before a run.

    Args:
        model: the graph.
        isa: what kernels are made for.
        tune: measure how products are best cut.

    Raises:
        TargetError: a node that is not understood, or whose sizes are not known.
    """
    if has_experts(model):
        model = model.clone()
        on_all_rows(model)
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
        self.values = Values(self.builder)
        self.tensor = self.values.tensor
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
            self.values.tensors[value] = tensor
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
            compute_result: list[Numbers] | None = [tidy(array)]
        else:
            numbers = [self.values.known(value) for value in node.inputs]
            known = all(n is not None for n, value in zip(numbers, node.inputs, strict=True) if value is not None)
            compute_result = compute(node, numbers) if known and node.inputs else None
        if compute_result is not None:
            self.values.numbers.update(zip(node.outputs, compute_result, strict=False))
            return
        for value, tensor in zip(node.outputs, self._tensors(node), strict=False):
            self.values.tensors[value] = tensor

    def _tensors(self, node: ir.Node) -> list[Tensor]:
        builder, inputs = self.builder, node.inputs
        if is_call(node, *FAKE_QUANT):
            return self._fake_quant(node)
        if is_call(node, "RMSNorm") or (node.op_type == "LayerNormalization" and node.domain == ""):
            return [self._norm(node)]
        if is_call(node, "Attention", "MaskedAttention"):
            y, unnecessary = attention(self.values, node, self.facts)
            self.skipped |= unnecessary
            return [y]
        if is_call(node, "RotaryEmbedding"):
            return [blocks.rotary(builder, *(self.tensor(value) for value in inputs))]
        if node.domain != "":
            raise ValueError(f"operators of domain {node.domain!r} are not among those it has")
        if node.op_type == "MatMul":
            return [blocks.matmul(builder, *(self.tensor(value) for value in inputs))]
        if node.op_type == "Conv":
            weight, bias = (constant_of(v) for v in (inputs[1], inputs[2] if len(inputs) > 2 else None))
            if weight is None:
                raise ValueError("its weight is not constant")
            return [blocks.convolution(builder, node, self.tensor(inputs[0]), weight, bias)]
        if (found := as_embedding(node)) is not None and (rows := folded_rows(found)) is not None:
            return [gathers.gather_rows(builder, found.name, rows, self.tensor(inputs[1]))]
        if node.op_type in elementwise.RULES:
            return [elementwise.RULES[node.op_type](builder, node, [self.tensor(v) for v in inputs if v is not None])]
        rule = _RULES.get(node.op_type)
        if rule is None:
            raise ValueError("the operator is not among those it has")
        numbers = [self.values.known(value) for value in inputs]
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

    def _linear(self, fused: Fused) -> None:
        linear, builder = fused.linear, self.builder
        bias = constant_of(linear.bias) if linear.bias is not None else None
        residuals = [self.tensor(value) for value in fused.residuals]
        kernel, weight = kernel_of(linear), None
        x: products.Integers | Tensor
        if kernel in INTEGERS:
            assert linear.activation_quant is not None
            x = self.integers[linear.activation_quant]
        else:
            x = self.tensor(linear.matmul.inputs[0])
        if kernel == FLOAT:
            weight = constant_of(linear.matmul.inputs[1])
            assert weight is not None
        y = emit_linear(builder, fused, x, weight, bias, residuals)
        self.nodes[linear.name] = kernel
        self.notes.append(kernel_note(fused, kernel))
        if fused.requantize is None:
            self.values.tensors[fused.output] = y
        else:
            steps = products.static_steps(fused.requantize)
            self.integers[fused.requantize] = products.Integers(
                y, (*x.sizes[:-1], linear.out_features), "static", *steps
            )
            if any(reader not in self.products for reader in users(fused.requantize.outputs[0])):
                self.values.tensors[fused.requantize.outputs[0]] = products.restored(
                    self.builder, self.integers[fused.requantize]
                )
            self.skipped.add(fused.requantize)


_OPERANDS = {"Concat": 0, "Gather": 2, "GatherElements": 2, "GatherND": 2, "Range": 0}
"""How many of the inputs are tensors, 0 for all; the others are axes, shapes and the like."""
_RULES = {**movement.RULES, **gathers.RULES, **reductions.RULES}
