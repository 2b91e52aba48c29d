"""The table of passes; each is loaded when first used. A new pass is one file and one line here."""

from __future__ import annotations

from qcompiler.passes.base import Pass
from qcompiler.spelling import build_from_table, parse_spelling

PASSES = {
    "normalise": "qcompiler.passes.normalise:Normalise",
    "rotate": "qcompiler.passes.rotate:Rotate",
    "reorder": "qcompiler.passes.reorder:Reorder",
    "equalize": "qcompiler.passes.equalize:Equalize",
    "split": "qcompiler.passes.split:Split",
    "smooth": "qcompiler.passes.smooth:Smooth",
    "piecewise": "qcompiler.passes.piecewise:Piecewise",
    "shift": "qcompiler.passes.shift:Shift",
    "adaptive": "qcompiler.passes.adaptive:Adaptive",
    "awq": "qcompiler.passes.awq:Awq",
    "annotate": "qcompiler.passes.annotate:Annotate",
    "insert": "qcompiler.passes.insert:Insert",
    "clip": "qcompiler.passes.clip:Clip",
    "clip_weights": "qcompiler.passes.clip_weights:ClipWeights",
    "hqq": "qcompiler.passes.hqq:Hqq",
    "gptq": "qcompiler.passes.gptq:Gptq",
    "distill": "qcompiler.passes.distill:Distill",
    "bias_correction": "qcompiler.passes.bias_correction:BiasCorrection",
    "fold": "qcompiler.passes.fold:Fold",
}


def parse_pipeline(text: str) -> list[Pass]:
    """The passes of ``"smooth{alpha=0.5},insert,fold"``.

    Raises:
        OptionError: an unknown pass or option, with the nearest names.
    """
    return [make_pass(name, options) for name, options in parse_spelling(text)]


def make_pass(name: str, options: dict[str, str]) -> Pass:
    """One pass by its name in the table.

    Raises:
        OptionError: an unknown pass or option, with the nearest names.
    """
    built: Pass = build_from_table("pass", PASSES, name, options)
    return built
