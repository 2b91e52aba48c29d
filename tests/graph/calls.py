"""Graphs of text whose nodes call our model-local functions, run as a stage of the pipeline runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir

from qcompiler.core import DOMAIN
from qcompiler.graph.functions import ensure_function
from qcompiler.graph.run import Runner
from tests.graph.tiny import HEADER


def runner(body: str) -> Runner:
    """The graph of that text, whose nodes call functions of ours, in ONNX Runtime as a stage of the pipeline runs."""
    model = ir.from_proto(onnx.parser.parse_model(HEADER + body))
    for node in model.graph:
        if node.domain == DOMAIN:
            ensure_function(model, node.op_type)
    return Runner(model, threads=1)


def run(body: str, **feeds: Any) -> np.ndarray:
    return runner(body)(feeds)["y"]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
