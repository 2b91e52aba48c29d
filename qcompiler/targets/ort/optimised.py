"""What ONNX Runtime really runs: the graph as its optimizer leaves it, and our nodes found again in it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime as ort

from qcompiler.core import ModelError
from qcompiler.graph.run import save_model, session_options

INTEGER_KERNELS = frozenset(
    {"MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulInteger", "QLinearMatMul", "QGemm", "QAttention"}
)


def is_integer(node: onnx.NodeProto) -> bool:
    """Whether this node multiplies in integers; MatMulNBits and QMoE do so at accuracy level 4 only."""
    if node.op_type in ("MatMulNBits", "QMoE"):
        return any(a.name == "accuracy_level" and a.i == 4 for a in node.attribute)
    return node.op_type in INTEGER_KERNELS


def optimised_graph(model: ir.Model) -> onnx.GraphProto:
    """The graph after ONNX Runtime's optimizer at ORT_ENABLE_ALL, without its weights.

    Raises:
        ModelError: ONNX Runtime refuses the model.
    """
    with tempfile.TemporaryDirectory(prefix="qcompiler-") as folder:
        before, after = Path(folder) / "model.onnx", Path(folder) / "optimised.onnx"
        save_model(model, before)
        options = session_options(threads=1)
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.optimized_model_filepath = str(after)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimised.data")
        try:
            ort.InferenceSession(before, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ModelError(f"ONNX Runtime refuses the lowered graph: {str(error).splitlines()[0]}") from error
        return onnx.load(after, load_external_data=False).graph


class Finder:
    """Finds a node of the lowered model again after optimisation: by name, by its output, or by the weight it reads."""

    def __init__(self, model: ir.Model, optimised: onnx.GraphProto) -> None:
        self._before = {node.name: node for node in model.graph if node.name}
        self._by_name = {node.name: node for node in optimised.node if node.name}
        self._by_output = {output: node for node in optimised.node for output in node.output if output}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in optimised.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)

    def find(self, name: str) -> onnx.NodeProto | None:
        before = self._before.get(name)
        candidates = [self._by_name.get(name)]
        if before is not None:
            candidates += [self._by_output.get(output.name or "") for output in before.outputs]
            weights = [v.name for v in _weights(before) if v.name]
            candidates += [node for weight in weights for node in self._readers.get(weight, [])]
        found = [node for node in candidates if node is not None]
        return next((node for node in found if is_integer(node)), found[0] if found else None)


def _weights(node: ir.Node) -> list[ir.Value]:
    """Integer initializers that the node reads, directly or through a DequantizeLinear."""
    direct = [value for value in node.inputs if value is not None]
    producers = [value.producer() for value in direct]
    behind = [p.inputs[0] for p in producers if p is not None and p.op_type == "DequantizeLinear"]
    return [
        v
        for v in (*direct, *behind)
        if v is not None and v.is_initializer() and v.shape is not None and len(v.shape) > 1
    ]
