"""MiniLM-L6 in int8: accuracy and latency beside fp32 and onnxruntime.quantization, all from one run.

usage: minilm.py [--rounds N] [--schemes S,S] [--passes SPEC] [--json FILE]

Calibrates on sentence1 of the first 128 rows of STS-B dev; evaluates on sentence1 of every 6th row of STS-B test (200),
padded to 128, batch 8. SQNR of the last hidden state against torch fp32. Latency: one thread, alternating in one
process, against the canonical fp32 graph under ORT_ENABLE_ALL.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import onnxruntime as ort
from protocol import (
    MODELS,
    alternate,
    encode,
    median_ratio,
    minilm_calibration,
    minilm_evaluation,
    one_thread_session,
    peak_rss_mb,
    pooled_sqnr,
    print_table,
    quantize_with_ort,
    save_float,
    size_mb,
    spearman_stsb,
)

import qcompiler

FOLDER = MODELS / "minilm"


def torch_reference(batches: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
    """The last hidden state of the float model, by torch."""
    import torch
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModel.from_pretrained(FOLDER).eval()
    with torch.no_grad():
        return [
            model(**{name: torch.from_numpy(array) for name, array in feeds.items()}).last_hidden_state.numpy()
            for feeds in batches
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="rounds of the alternating latency measurement")
    parser.add_argument("--schemes", default="w8a8,w8a8-o3,w8a8-dynamic", help="schemes to compile, by comma")
    parser.add_argument("--passes", help="the pipeline, for all schemes (default: each one's own)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")

    evaluation = encode(FOLDER, minilm_evaluation(), pad_to=128)
    calibration = encode(FOLDER, minilm_calibration())
    reference = torch_reference(evaluation)
    masks = [feeds["attention_mask"] for feeds in evaluation]
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        paths = {"fp32": root / "fp32.onnx"}
        save_float(FOLDER, paths["fp32"])
        for scheme in args.schemes.split(","):
            start, cpu = time.perf_counter(), time.process_time()
            compiled = qcompiler.compile(
                FOLDER,
                scheme=scheme,
                passes=args.passes,
                calibration=calibration,
                output=root / scheme,
                progress=False,
            )
            rows[f"qcompiler {scheme}"] = {
                "compile_s": time.perf_counter() - start,
                "compile_cpu_s": time.process_time() - cpu,
                "coverage": compiled.report.coverage_body or 0.0,
            }
            paths[f"qcompiler {scheme}"] = root / scheme / "model.onnx"
        for kind in ("dynamic", "static"):
            paths[f"onnxruntime {kind}"] = root / f"ort-{kind}.onnx"
            quantize_with_ort(paths["fp32"], paths[f"onnxruntime {kind}"], kind, calibration)
        sessions = {name: one_thread_session(path) for name, path in paths.items()}

        def hidden(session: ort.InferenceSession, feeds: dict[str, np.ndarray]) -> np.ndarray:
            return session.run(["last_hidden_state"], feeds)[0]

        for name, session in sessions.items():
            row = rows.setdefault(name, {})
            row["sqnr_db"] = pooled_sqnr(reference, (hidden(session, feeds) for feeds in evaluation), masks)
            row["spearman"] = spearman_stsb(lambda feeds, s=session: hidden(s, feeds), FOLDER)  # type: ignore[misc]
            row["size_mb"] = size_mb(paths[name])
        for label, feeds in (
            ("8x128", evaluation[0]),
            ("1x16", {name: array[:1, :16] for name, array in evaluation[0].items()}),
        ):
            runs = {name: lambda s=session, f=feeds: hidden(s, f) for name, session in sessions.items()}
            times = alternate(runs, args.rounds)
            for name in sessions:
                rows[name][f"latency_{label}"] = median_ratio(times, name, "fp32")
    columns = {
        "sqnr_db": ("SQNR dB", "{:.2f}"),
        "spearman": ("Spearman", "{:.4f}"),
        "latency_8x128": ("8x128 / fp32", "{:.3f}"),
        "latency_1x16": ("1x16 / fp32", "{:.3f}"),
        "size_mb": ("MB", "{:.1f}"),
        "coverage": ("int. coverage", "{:.3f}"),
        "compile_s": ("compile s", "{:.1f}"),
        "compile_cpu_s": ("CPU s", "{:.1f}"),
    }
    print_table(f"MiniLM-L6, one thread; peak RSS {peak_rss_mb():.0f} MB", columns, rows)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
