"""What each transform gains, alone and together: one table a model, every pipeline measured on the same data.

usage: python -m benchmarks.ablation [--models M,M] [--transforms T,T] [--smollm2] [--json FILE]

Static columns quantize every input with one scale, known beforehand (scheme "w8a8-o3"): no fallback hides what a
transform leaves. Dynamic ones take a scale a token ("w8a8-dynamic"). SQNR in dB, more is better; perplexity against
fp32's, less is better. Evaluation data are never calibration data. The same versions give the same figures.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir

import qcompiler
from benchmarks.protocol import (
    MODELS,
    SHARED,
    SMILES,
    encode,
    minilm_calibration,
    minilm_evaluation,
    print_table,
)
from qcompiler.frontends import open_data, open_source
from qcompiler.runtime.evaluate import Metrics, OutputMetrics, evaluate

BEFORE = ("rotate", "equalize", "split", "smooth", "shift", "piecewise", "adaptive")
"""Transforms of the float model."""
AFTER = ("clip", "gptq", "bias_correction")
"""What works on the quantized one."""
TOGETHER = "rotate,split,adaptive,annotate,insert,clip,gptq,bias_correction,fold"
PIPELINES: dict[str, str | None] = {
    "nothing": "annotate,insert,fold",
    **{name: f"{name},annotate,insert,fold" for name in BEFORE},
    **{name: f"annotate,insert,{name},fold" for name in AFTER},
    "all": TOGETHER,
    "default": None,
}
"""Where each transform stands alone; None: the scheme's own pipeline."""
STATIC, DYNAMIC = "w8a8-o3", "w8a8-dynamic"

Compile = Callable[[str, str | None], tuple[qcompiler.CompiledModel, Metrics]]


def minilm() -> Compile:
    """Calibrated and evaluated on STS-B sentences, as in minilm.py."""
    folder = MODELS / "minilm"
    source = open_source(folder)
    return partial(
        _measured,
        source.model,
        encode(folder, minilm_calibration()),
        encode(folder, minilm_evaluation(), pad_to=128),
    )


def stories260k() -> Compile:
    """Calibrated on the first half of the stories, 16 x 256 tokens, evaluated on as many of the second."""
    source = open_source(SHARED / "models" / "stories260k")
    text = (SHARED / "data" / "tinystories" / "sample.txt").read_text(encoding="utf-8")
    halves = ([text[: len(text) // 2]], [text[len(text) // 2 :]])
    first, second = (list(open_data(half, source, limit=16, seq_len=256, batch_size=4)) for half in halves)
    return partial(_measured, source.model, first, second)


def rxnmapper() -> Compile:
    """Calibrated on every other molecule, evaluated on the rest."""
    source = open_source(SHARED / "models" / "rxnmapper-albert")
    first, second = (list(open_data(SMILES[start::2], source)) for start in (0, 1))
    return partial(_measured, source.model, first, second)


def smollm2() -> Compile:
    """Calibrated on WikiText-2 valid, 32 x 512 tokens, evaluated on 16 x 512 of test, as in smollm2.py."""
    source = open_source(MODELS / "smollm2")
    first, second = (
        list(open_data(SHARED / "data/wikitext2" / name, source, limit=limit, seq_len=512, batch_size=1))
        for name, limit in (("valid.txt", 32), ("test.txt", 16))
    )
    return partial(_measured, source.model, first, second)


def _measured(
    model: ir.Model, calibration: Any, evaluation: Any, scheme: str, passes: str | None
) -> tuple[qcompiler.CompiledModel, Metrics]:
    compiled = qcompiler.compile(model, scheme=scheme, passes=passes, calibration=calibration, progress=False)
    causal = "logits" in compiled.outputs and "token_type_ids" not in compiled.inputs
    return compiled, evaluate(compiled, model, evaluation, causal=causal, threads=1)


def _sqnr(metrics: Metrics) -> float:
    return _first(metrics).sqnr_db


def _top1(metrics: Metrics) -> float:
    top1 = _first(metrics).top1
    assert top1 is not None
    return 100 * top1


def _first(metrics: Metrics) -> OutputMetrics:
    """Of the model's first output: the last hidden state, or the logits."""
    return next(iter(metrics.outputs.values()))


def _perplexity(metrics: Metrics) -> float:
    assert metrics.perplexity is not None
    assert metrics.reference_perplexity is not None
    return metrics.perplexity / metrics.reference_perplexity


FIGURES: Mapping[str, tuple[Callable[[], Compile], tuple[tuple[str, str, Callable[[Metrics], float], str], ...]]] = {
    "MiniLM": (minilm, (("static dB", STATIC, _sqnr, "{:.2f}"), ("dynamic dB", DYNAMIC, _sqnr, "{:.2f}"))),
    "stories260k": (
        stories260k,
        (("static, x perplexity", STATIC, _perplexity, "{:.4f}"), ("static dB", STATIC, _sqnr, "{:.2f}")),
    ),
    "rxnmapper-albert": (
        rxnmapper,
        (("static top-1 %", STATIC, _top1, "{:.2f}"), ("static dB", STATIC, _sqnr, "{:.2f}")),
    ),
    "SmolLM2": (smollm2, (("static, x perplexity", STATIC, _perplexity, "{:.4f}"),)),
}
"""For each model: how to compile it, and each column's heading, scheme, figure and format."""


def ablate(model: str, transforms: Mapping[str, str | None]) -> dict[str, dict[str, float]]:
    """The figures of one model, by transform and by column."""
    make, columns = FIGURES[model]
    measure = make()
    rows: dict[str, dict[str, float]] = {}
    for name, passes in transforms.items():
        metrics = {scheme: measure(scheme, passes)[1] for scheme in dict.fromkeys(column[1] for column in columns)}
        rows[name] = {heading: figure(metrics[scheme]) for heading, scheme, figure, _ in columns}
        print(model, name, rows[name], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="MiniLM,stories260k,rxnmapper-albert", help="by comma")
    parser.add_argument("--transforms", default=",".join(PIPELINES), help="rows of the table, by comma")
    parser.add_argument("--smollm2", action="store_true", help="SmolLM2 as well (many minutes a row)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")

    chosen = {name: PIPELINES[name] for name in args.transforms.split(",")}
    found = {}
    for model in [*filter(None, args.models.split(",")), *(["SmolLM2"] if args.smollm2 else [])]:
        found[model] = ablate(model, chosen)
        columns = {heading: (heading, form) for heading, _, _, form in FIGURES[model][1]}
        print_table(f"{model}: each transform alone, and together", columns, found[model])
        if args.json:
            args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
