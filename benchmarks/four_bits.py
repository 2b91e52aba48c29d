"""Four bits: rounding to nearest, clipped groups, AWQ, HQQ and GPTQ on MiniLM (w4a8 g32) and stories260k (w4a16 g32).

usage: four_bits.py [--models minilm,stories260k] [--methods "RTN;GPTQ, clipped groups"]

MiniLM: protocol of minilm.py. stories260k: every story of shared/data/tinystories, at most 512 tokens with BOS;
calibrated on 128 sequences of 96 tokens that the float model samples itself (seed 0).
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from minilm import torch_reference
from protocol import (
    MODELS,
    SHARED,
    Feeds,
    encode,
    minilm_calibration,
    minilm_evaluation,
    one_thread_session,
    pooled_sqnr,
    print_table,
    save_float,
)
from smollm2 import perplexity
from tokenizers import Tokenizer

import qcompiler
from qcompiler.graph.linear import linears

PAPER = "gptq{beam=1,refits=0,correction=0,text=false,copies=0}"
METHODS = {
    "RTN": "annotate,insert,fold",
    "RTN, clipped groups": "annotate,insert,clip_weights,fold",
    "AWQ": "awq,annotate,insert,fold",
    "AWQ, clipped groups": "awq,annotate,insert,clip_weights,fold",
    "HQQ": "annotate,insert,hqq,fold",
    "HQQ, least squares": "annotate,insert,hqq{p=2,beta=1},fold",
    "GPTQ": "annotate,insert,gptq,fold",
    "GPTQ, clipped groups": "annotate,insert,clip_weights,gptq,fold",
    "AWQ, GPTQ, clipped groups": "awq,annotate,insert,clip_weights,gptq,fold",
    "GPTQ, clipped groups, distilled": "annotate,insert,clip_weights,gptq,distill{steps=300},fold",
    "the paper's GPTQ, on the samples alone": f"annotate,insert,clip_weights,{PAPER},fold",
    "GPTQ, on the samples alone": "split,adaptive,reorder,annotate,insert,clip_weights,gptq{text=false},fold",
    "the default": "split,adaptive,reorder,annotate,insert,clip_weights,gptq,fold",
    "the default, distilled": "split,adaptive,reorder,annotate,insert,clip_weights,gptq,distill{steps=500},fold",
}


def minilm(methods: Mapping[str, str]) -> None:
    """SQNR of the last hidden state in dB, symmetric and asymmetric groups of 32."""
    folder = MODELS / "minilm"
    evaluation = encode(folder, minilm_evaluation(), pad_to=128)
    reference, masks = torch_reference(evaluation), [feeds["attention_mask"] for feeds in evaluation]
    rows: dict[str, dict[str, float]] = {}
    for label, passes in methods.items():
        for key, scheme in (("symmetric", "w4a8"), ("asymmetric", "w4a8{symmetric=false}")):
            with tempfile.TemporaryDirectory() as scratch:
                calibration = encode(folder, minilm_calibration(), batch=16)
                out = Path(scratch) / "out"
                qcompiler.compile(
                    folder, scheme=scheme, passes=passes, calibration=calibration, output=out, progress=False
                )
                session = one_thread_session(out / "model.onnx")
                got = (session.run(["last_hidden_state"], feeds)[0] for feeds in evaluation)
                rows.setdefault(label, {})[key] = pooled_sqnr(reference, got, masks)
            print(f"{label}, {key}: {rows[label][key]:.2f} dB", file=sys.stderr, flush=True)
    for label, integer in (("onnxruntime's HQQ, inputs in float", False), ("the same, integer zero points", True)):
        session = ort_hqq(folder, integer)
        got = (session.run(["last_hidden_state"], feeds)[0] for feeds in evaluation)
        rows[label] = {"asymmetric": pooled_sqnr(reference, got, masks)}
    columns = {key: (f"{key}, dB", "{:.2f}") for key in ("symmetric", "asymmetric")}
    print_table("MiniLM-L6 w4a8, groups of 32, all Linears", columns, rows)


def ort_hqq(folder: Path, integer: bool) -> ort.InferenceSession:
    """The canonical float graph through ONNX Runtime's own HQQ, at accuracy level 4.

    Its zero points are floats, and with those MatMulNBits multiplies in float at every level, bit for bit the same.
    ``integer`` rounds them, and the weights to the grids that come of it, so that inputs are int8 as in ``w4a8``.
    """
    from onnxruntime.quantization.matmul_nbits_quantizer import HQQWeightOnlyQuantConfig, MatMulNBitsQuantizer

    logging.getLogger().setLevel(logging.WARNING)  # importing it makes every library talk
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.onnx"
        source = save_float(folder, path)
        quantizer = MatMulNBitsQuantizer(str(path), algo_config=HQQWeightOnlyQuantConfig(block_size=32, bits=4))
        quantizer.process()
        graph = quantizer.model.model.graph
        nodes = [node for node in graph.node if node.op_type == "MatMulNBits"]
        assert len(nodes) == len(list(linears(source.model)))
        for node in nodes:
            node.attribute.append(onnx.helper.make_attribute("accuracy_level", 4))
        if integer:
            _round_zero_points(graph, nodes, {x.weight.name: x.weight.const_value for x in linears(source.model)})
        onnx.save(quantizer.model.model, path)
        return one_thread_session(path)


def _round_zero_points(graph: Any, nodes: Sequence[Any], weights: Mapping[str, Any]) -> None:
    """Integers instead of float zero points, and each weight [in, out] on the grid with its scales and those."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in nodes:
        packed, scales, zeros = (tensors[name] for name in node.input[1:4])
        blocks = weights[packed.name.removesuffix("_Q4")].numpy().T.reshape(*packed.dims[:2], 32)
        scale = onnx.numpy_helper.to_array(scales).reshape(*packed.dims[:2], 1)
        zero = np.clip(onnx.numpy_helper.to_array(zeros).reshape(scale.shape).round(), 0, 15)
        q = np.clip((blocks / scale + zero).round(), 0, 15)
        packed.CopyFrom(onnx.numpy_helper.from_array(_nibbles(q), packed.name))
        zeros.CopyFrom(onnx.numpy_helper.from_array(_nibbles(zero[..., 0]).reshape(-1), zeros.name))


def _nibbles(q: Any) -> Any:
    """Pairs along the last axis in a byte, the first one low."""
    q = q.astype(np.uint8)
    return q[..., 0::2] | (q[..., 1::2] << 4)


def stories(tokenizer: Tokenizer) -> list[Feeds]:
    """Each story by itself: BOS and at most 511 tokens."""
    text = (SHARED / "data" / "tinystories" / "sample.txt").read_text(encoding="utf-8")
    parts = [part.strip() for part in text.split("<|endoftext|>")]
    ids = [[1, *tokenizer.encode(part, add_special_tokens=False).ids][:512] for part in parts if part]
    return [as_feeds(np.array([row], np.int64)) for row in ids]


def as_feeds(ids: np.ndarray) -> Feeds:
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def sampled(path: Path, count: int = 128, length: int = 96, seed: int = 0) -> list[Feeds]:
    """Sequences that the model samples from BOS on, at temperature 1."""
    session, rng = one_thread_session(path), np.random.default_rng(seed)
    ids = np.ones((count, 1), np.int64)
    wanted = {value.name for value in session.get_inputs()}
    while ids.shape[1] < length:
        feeds = {name: array for name, array in as_feeds(ids).items() if name in wanted}
        logits = session.run(["logits"], feeds)[0][:, -1]
        gumbel = logits + rng.gumbel(size=logits.shape)  # argmax of this is a draw from the softmax
        ids = np.concatenate([ids, gumbel.argmax(-1)[:, None]], axis=1)
    return [as_feeds(ids[start : start + 8]) for start in range(0, count, 8)]


def stories260k(methods: Mapping[str, str]) -> None:
    """Perplexity with symmetric groups of 32, head included, and the share of RTN's loss that comes back."""
    folder = SHARED / "models" / "stories260k"
    windows = stories(Tokenizer.from_file(str(folder / "tokenizer.json")))
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        save_float(folder, root / "fp32.onnx")
        rows["fp32"] = {"perplexity": perplexity(one_thread_session(root / "fp32.onnx"), windows)}
        calibration = sampled(root / "fp32.onnx")
        for number, (label, passes) in enumerate(methods.items()):
            out = root / str(number)
            qcompiler.compile(
                folder, scheme="w4a16", passes=passes, calibration=calibration, output=out, progress=False
            )
            rows[label] = {"perplexity": perplexity(one_thread_session(out / "model.onnx"), windows)}
    exact, nearest = (rows[label]["perplexity"] for label in ("fp32", "RTN"))
    for row in rows.values():
        row["recovered"] = (nearest - row["perplexity"]) / (nearest - exact)
    columns = {"perplexity": ("perplexity", "{:.3f}"), "recovered": ("of RTN's loss recovered", "{:.2f}")}
    print_table("stories260k w4a16, symmetric groups of 32, head included", columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="minilm,stories260k", help="which, by comma (default: %(default)s)")
    parser.add_argument("--methods", default=";".join(METHODS), help="rows, by semicolon, RTN always (default: all)")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    methods = {label: METHODS[label] for label in dict.fromkeys(("RTN", *args.methods.split(";")))}
    measures = {"minilm": minilm, "stories260k": stories260k}
    for name in args.models.split(","):
        measures[name](methods)


if __name__ == "__main__":
    main()
