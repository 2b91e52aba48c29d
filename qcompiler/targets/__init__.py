"""The table of targets; each is loaded when first used. A new target is one file or folder and one line here."""

from __future__ import annotations

from qcompiler.core import OptionError
from qcompiler.spelling import build_from_table, parse_spelling
from qcompiler.targets.base import Target

TARGETS = {
    "ort-cpu": "qcompiler.targets.ort:OrtCpu",
    "onnx": "qcompiler.targets.portable:Portable",
    "hf": "qcompiler.targets.hf:HuggingFace",
    "tvm-llvm": "qcompiler.targets.tvm:TvmLlvm",
    "tvm-cuda": "qcompiler.targets.tvm.cuda:TvmCuda",
}


def make_target(text: str) -> Target:
    """The target of ``"ort-cpu"`` or ``"onnx{form=qoperator}"``.

    Raises:
        OptionError: an unknown target or option, with the nearest names.
    """
    items = parse_spelling(text)
    if len(items) != 1:
        raise OptionError(f"one target is wanted, not {text!r}.")
    name, options = items[0]
    target: Target = build_from_table("target", TARGETS, name, options)
    return target
