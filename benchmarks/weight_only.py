"""Weight-only and mixed schemes on SmolLM2-135M: one token's time, file size, and the memory a session takes.

usage: weight_only.py [--schemes S S ...] [--folder DIR] [--rounds N] [--perplexity N] [--nf4]

Rounded to nearest. Latency: one token (1 x 1, all of the model, without a cache), one thread's CPU time, alternating in
one process, against the canonical fp32 graph under ORT_ENABLE_ALL. Memory: what a process of its own grows by when it
opens a plain session and runs one token; the peak, and what stays. ``--perplexity N`` adds perplexity on the first N x
512 tokens of WikiText-2 test; ``llm-int8`` is calibrated on 8 x 512 tokens of valid. ``--nf4`` prints squared errors of
nf4 weights, double quantization included, against int4 in symmetric groups of 64 on MiniLM and SmolLM2.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
from protocol import MODELS, alternate, median_ratio, one_thread_session, print_table, save_float, size_mb
from smollm2 import WIKITEXT, perplexity

import qcompiler
from qcompiler.frontends import open_data, open_source
from qcompiler.graph.edit import array_of
from qcompiler.graph.linear import linears
from qcompiler.graph.rules import canonicalise
from qcompiler.numerics.codebooks import NF4, CodebookGrid, block_absmax, quantize_scales
from qcompiler.numerics.grids import weight_grid
from qcompiler.presets import resolve

SCHEMES = (
    "w4a8",
    "w4a8{group_size=128}",
    "w4a8{embedding=4}",
    "w4a8{group_size=128,embedding=4}",
    "w4a16",
    "nf4",
    "nf4{double_quant=false}",
    "llm-int8",
    "w16",
    "fp16",
)
TOKEN = {"input_ids": np.array([[5]], np.int64), "attention_mask": np.ones((1, 1), np.int64)}
_MEMORY = """
import json, sys
import numpy as np, onnxruntime as ort
def of_status(key):
    return next(int(line.split()[1]) * 1024 / 1e6 for line in open("/proc/self/status") if line.startswith(key))
before = of_status("VmRSS")
options = ort.SessionOptions()
options.intra_op_num_threads = 1
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
session.run(None, {"input_ids": np.array([[5]], np.int64), "attention_mask": np.ones((1, 1), np.int64)})
print(json.dumps({"rss_mb": of_status("VmRSS") - before, "peak_mb": of_status("VmHWM") - before}))
"""


def memory(path: Path) -> dict[str, float]:
    """MB that a session takes in a process of its own, weights that are mapped from the file included."""
    done = subprocess.run([sys.executable, "-c", _MEMORY, str(path)], check=True, capture_output=True, text=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def smollm2(schemes: list[str], root: Path, rounds: int, windows_read: int) -> None:
    """The table of this script; models are kept under ``root``."""
    folder = MODELS / "smollm2"
    windows = []
    rows: dict[str, dict[str, float]] = {"fp32": {}}
    paths = {"fp32": root / "fp32.onnx"}
    if windows_read or not paths["fp32"].exists():
        source = save_float(folder, paths["fp32"])
        if windows_read:
            windows = list(open_data(WIKITEXT / "test.txt", source, limit=windows_read, seq_len=512, batch_size=1))
    for scheme in schemes:
        data = {"calibration": WIKITEXT / "valid.txt", "limit": 8, "seq_len": 512} if "llm" in scheme else {}
        out = root / scheme
        if not out.exists():
            qcompiler.compile(folder, scheme=scheme, target="ort-cpu{rows=1}", output=out, progress=False, **data)
        paths[scheme] = out / "model.onnx"
    for name, path in paths.items():
        row = rows.setdefault(name, {})
        row |= {"size_mb": size_mb(path), **memory(path)}
        sessions = {key: one_thread_session(paths[key]) for key in dict.fromkeys(("fp32", name))}
        runs = {key: lambda s=session: s.run(None, TOKEN) for key, session in sessions.items()}
        times = alternate(runs, rounds, warmup=3)
        row["ms"], row["ratio"] = 1e3 * float(np.median(times[name])), median_ratio(times, name, "fp32")
        if windows:
            row["perplexity"] = perplexity(sessions[name], windows)
    columns = {
        "ratio": ("1 token / fp32", "{:.3f}"),
        "ms": ("ms", "{:.1f}"),
        "size_mb": ("file, MB", "{:.0f}"),
        "rss_mb": ("session RSS, MB", "{:.0f}"),
        "peak_mb": ("peak, MB", "{:.0f}"),
        "perplexity": ("perplexity", "{:.2f}"),
    }
    print_table("SmolLM2-135M, rounded to nearest, one token on one thread", columns, rows)


def nf4() -> None:
    """Squared error of nf4 (blocks of 64, scales in int8) over that of int4 in symmetric groups of 64."""
    integers = resolve("w4a16{group_size=64}").weight
    rows: dict[str, dict[str, float]] = {}
    for name in ("minilm", "smollm2"):
        source = open_source(MODELS / name)
        canonicalise(source.model)
        ratios = []
        for linear in linears(source.model):
            weight = array_of(linear.weight)
            assert weight is not None
            table = CodebookGrid(NF4, 64, quantize_scales(block_absmax(weight, 64)).expanded())
            errors = (
                float(np.square(grid.rounded(weight) - weight, dtype=np.float64).sum())
                for grid in (table, weight_grid(weight, integers))
            )
            ratios.append(next(errors) / next(errors))
        rows[name] = {"count": len(ratios), "least": min(ratios), "median": float(np.median(ratios))}
        rows[name] |= {"most": max(ratios), "lower": sum(ratio < 1 for ratio in ratios)}
    columns = {key: (key, "{:.3f}") for key in ("least", "median", "most")}
    columns |= {"lower": ("lower at", "{:.0f}"), "count": ("of Linears", "{:.0f}")}
    print_table("squared weight error, nf4 / int4, blocks of 64", columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="*", default=list(SCHEMES), help="schemes to compile")
    parser.add_argument("--folder", type=Path, help="keep the models here, and take those that are here already")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of the alternating latency measurement")
    parser.add_argument("--perplexity", type=int, default=0, help="windows of 512 tokens (default: none)")
    parser.add_argument("--nf4", action="store_true", help="weight errors of nf4 instead")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    if args.nf4:
        nf4()
    else:
        with tempfile.TemporaryDirectory() as scratch:
            smollm2(args.schemes, args.folder or Path(scratch), args.rounds, args.perplexity)


if __name__ == "__main__":
    sys.exit(main())
