"""A graph-level compiler that turns float Transformers into int8 models that are faster and still right."""

from qcompiler.analysis import analyze
from qcompiler.core import QCompilerError
from qcompiler.driver import compile
from qcompiler.measure import bench, evaluate
from qcompiler.presets import PRESETS
from qcompiler.runtime.compiled import CompiledModel
from qcompiler.runtime.load import load
from qcompiler.scheme import Scheme, TensorSpec

__all__ = [
    "PRESETS",
    "CompiledModel",
    "QCompilerError",
    "Scheme",
    "TensorSpec",
    "analyze",
    "bench",
    "compile",
    "evaluate",
    "load",
]
