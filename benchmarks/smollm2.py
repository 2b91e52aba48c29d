"""SmolLM2-135M-Instruct in int8: perplexity and latency beside fp32 and onnxruntime.quantization, all from one run.

usage: smollm2.py [--rounds N] [--schemes S,S] [--peers] [--json FILE]

Calibrates on WikiText-2 valid (32 x 512 tokens); evaluates on the first 16 x 512 tokens of WikiText-2 test (fp32 reads
29.60). Latency: 1 x 512 tokens with all logits, one thread, alternating in one process, against the canonical fp32
graph under ORT_ENABLE_ALL. Schemes ending in "-o3" are static everywhere.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import onnxruntime as ort
from protocol import (
    MODELS,
    SHARED,
    Feeds,
    alternate,
    median_ratio,
    one_thread_session,
    peak_rss_mb,
    print_table,
    quantize_with_ort,
    save_float,
    size_mb,
)

import qcompiler
from qcompiler.frontends import open_data

FOLDER = MODELS / "smollm2"
WIKITEXT = SHARED / "data" / "wikitext2"


def perplexity(session: ort.InferenceSession, windows: list[Feeds]) -> float:
    """exp of the mean negative log likelihood of each token given those before it in its window."""
    total, count = 0.0, 0
    for feeds in windows:
        [logits] = session.run(["logits"], feeds)
        for row, ids in zip(logits[:, :-1], feeds["input_ids"][:, 1:], strict=True):
            shifted = row - row.max(-1, keepdims=True)
            log_sum = np.log(np.exp(shifted, dtype=np.float32).sum(-1, dtype=np.float64))
            total += float((log_sum - shifted[np.arange(len(ids)), ids]).sum())
            count += len(ids)
    return float(np.exp(total / count))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="rounds of the alternating latency measurement")
    parser.add_argument("--schemes", default="w8a8,w8a8-dynamic,w8a8-o3", help="schemes to compile, by comma")
    parser.add_argument("--peers", action="store_true", help="onnxruntime.quantization dynamic as well")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")

    rows: dict[str, dict[str, float]] = {"fp32": {}}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        paths = {"fp32": root / "fp32.onnx"}
        source = save_float(FOLDER, paths["fp32"])
        windows = list(open_data(WIKITEXT / "test.txt", source, limit=16, seq_len=512, batch_size=1))
        for scheme in args.schemes.split(","):
            start, cpu = time.perf_counter(), time.process_time()
            compiled = qcompiler.compile(
                FOLDER,
                scheme=scheme,
                calibration=WIKITEXT / "valid.txt",
                limit=32,
                seq_len=512,
                batch_size=1,
                output=root / scheme,
                progress=False,
            )
            report = compiled.report
            rows[f"qcompiler {scheme}"] = {
                "coverage": report.coverage_body or 0.0,
                "head_coverage": report.coverage_head or 0.0,
                "per_token": sum("per_token" in row.activation for row in report.rows),
                "compile_s": time.perf_counter() - start,
                "compile_cpu_s": time.process_time() - cpu,
            }
            paths[f"qcompiler {scheme}"] = root / scheme / "model.onnx"
        if args.peers:
            paths["onnxruntime dynamic"] = root / "ort-dynamic.onnx"
            quantize_with_ort(paths["fp32"], paths["onnxruntime dynamic"], "dynamic", [])
        for name, path in paths.items():
            sessions = {key: one_thread_session(paths[key]) for key in dict.fromkeys(("fp32", name))}
            row = rows.setdefault(name, {})
            row["perplexity"] = perplexity(sessions[name], windows)
            row["perplexity_ratio"] = row["perplexity"] / rows["fp32"]["perplexity"]
            runs = {key: lambda s=session: s.run(None, windows[0]) for key, session in sessions.items()}
            row["latency_1x512"] = median_ratio(alternate(runs, args.rounds, warmup=1), name, "fp32")
            row["size_mb"] = size_mb(path)
    columns = {
        "perplexity": ("perplexity", "{:.3f}"),
        "perplexity_ratio": ("/ fp32", "{:.4f}"),
        "latency_1x512": ("1x512 / fp32", "{:.3f}"),
        "coverage": ("int. coverage", "{:.4f}"),
        "head_coverage": ("of the head", "{:.0f}"),
        "per_token": ("per-token", "{:.0f}"),
        "size_mb": ("MB", "{:.0f}"),
        "compile_s": ("compile s", "{:.0f}"),
        "compile_cpu_s": ("CPU s", "{:.0f}"),
    }
    print_table(f"SmolLM2-135M, one thread; peak RSS {peak_rss_mb():.0f} MB", columns, rows)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    sys.exit(main())
