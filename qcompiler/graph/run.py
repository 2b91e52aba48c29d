"""Run a graph in ONNX Runtime, with any of its values tapped as outputs."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from qcompiler.core import ModelError

Feeds = Mapping[str, npt.NDArray[Any]]


def session_options(threads: int = 0) -> ort.SessionOptions:
    """Options with warnings silenced; ``threads`` 0 leaves the number to ONNX Runtime."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1 if threads else 0
    return options


def open_session(model: ir.Model, options: ort.SessionOptions | None = None) -> ort.InferenceSession:
    """An ONNX Runtime session of the model; weights travel through a temporary file, so size has no limit.

    Raises:
        ModelError: ONNX Runtime refuses the model.
    """
    with tempfile.TemporaryDirectory(prefix="qcompiler-") as folder:
        path = Path(folder) / "model.onnx"
        save_model(model, path)
        try:
            return ort.InferenceSession(path, options or session_options(), providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ModelError(f"ONNX Runtime refuses the graph: {str(error).splitlines()[0]}") from error


def save_model(model: ir.Model, path: Path) -> None:
    """Write ``path`` and its weights beside it as ``<name>.data``; the model in memory is left as it was."""
    ir.save(model, path, external_data=f"{path.name}.data")


class Runner:
    """A model opened with extra outputs.

    Args:
        model: any stage of the pipeline; it is not changed.
        taps: names of inner values to return beside the model's own outputs.
        threads: intra-op threads; 0 leaves the number to ONNX Runtime.
        as_deployed: run as a plain session would. Otherwise ONNX Runtime may not fuse quantize and dequantize nodes:
            it turns ``DequantizeLinear -> MatMul`` into a MatMulNBits that quantizes the activation once more, and a
            stage of the pipeline would no longer compute what it says.
        in_order: run the nodes in the order in which they stand; ONNX Runtime's default goes depth first from the
            outputs, and holds for long what could be let go.
    """

    def __init__(
        self,
        model: ir.Model,
        taps: Sequence[str] = (),
        threads: int = 0,
        *,
        as_deployed: bool = False,
        in_order: bool = False,
    ) -> None:
        self.outputs = [output.name or "" for output in model.graph.outputs]
        extra = [name for name in dict.fromkeys(taps) if name not in self.outputs]
        values = {output.name: output for node in model.graph for output in node.outputs}
        values.update({value.name: value for value in model.graph.inputs})
        tapped = [values[name] for name in extra]
        options = session_options(threads)
        # Idle threads must not burn the processor between runs: other work goes on there meanwhile.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if in_order:
            options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
        if not as_deployed:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        model.graph.outputs.extend(tapped)
        try:
            self._session = open_session(model, options)
        finally:
            for _ in tapped:  # pop, for onnx_ir does not notice a del and would still take them for outputs
                model.graph.outputs.pop()
        self.inputs = [value.name for value in self._session.get_inputs()]

    def __call__(self, feeds: Feeds) -> dict[str, npt.NDArray[Any]]:
        """Outputs and taps by name.

        Raises:
            ModelError: the run fails in ONNX Runtime.
        """
        try:
            results = self._session.run(None, {name: np.asarray(feeds[name]) for name in self.inputs})
        except Exception as error:
            raise ModelError(f"the graph failed to run: {str(error).splitlines()[0]}") from error
        return {value.name: array for value, array in zip(self._session.get_outputs(), results, strict=True)}
