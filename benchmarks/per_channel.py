"""SmolLM2-135M in 4 bits with one scale an output channel, head in float: what comes back of RTN's loss.

usage: per_channel.py [--methods "GPTQ;GPTQ, clipped"] [--asymmetric]

Calibrates on WikiText-2 valid (32 x 512 tokens); evaluates on the first 16 x 512 tokens of WikiText-2 test (fp32 reads
29.60). The share is (RTN - x) / (RTN - fp32), with this run's symmetric RTN. SmolLM2's weights come from a 4-bit file
with blocks of 32: what asymmetric blocks of 32 lose is no measure of a method; one scale an output channel has no part
in that. A method takes 2 to 7 minutes of one core.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from pathlib import Path

from protocol import one_thread_session, peak_rss_mb, print_table, save_float
from smollm2 import FOLDER, WIKITEXT, perplexity

import qcompiler
from qcompiler.frontends import open_data

METHODS = {
    "RTN": "annotate,insert,fold",
    "clipped": "annotate,insert,clip_weights,fold",
    "GPTQ": "annotate,insert,gptq,fold",
    "GPTQ, clipped": "annotate,insert,clip_weights,gptq,fold",
    "AWQ, GPTQ, clipped": "awq,annotate,insert,clip_weights,gptq,fold",
    "rotated, GPTQ, clipped": "rotate,annotate,insert,clip_weights,gptq,fold",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=";".join(METHODS), help="rows, by semicolon (default: all)")
    parser.add_argument("--asymmetric", action="store_true", help="zero points for all rows but RTN")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")

    rows: dict[str, dict[str, float]] = {"fp32": {}}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "fp32.onnx"
        windows = list(open_data(WIKITEXT / "test.txt", save_float(FOLDER, path), limit=16, seq_len=512, batch_size=1))
        rows["fp32"]["perplexity"] = perplexity(one_thread_session(path), windows)
    for label in dict.fromkeys(("RTN", *args.methods.split(";"))):
        asymmetric = args.asymmetric and label != "RTN"
        scheme = f"w4a16{{group_size=none,head=false,symmetric={str(not asymmetric).lower()}}}"
        with tempfile.TemporaryDirectory() as scratch:
            start, out = time.process_time(), Path(scratch) / "out"
            qcompiler.compile(
                FOLDER,
                scheme=scheme,
                passes=METHODS[label],
                calibration=None if label == "RTN" else WIKITEXT / "valid.txt",
                limit=32,
                seq_len=512,
                batch_size=1,
                output=out,
                progress=False,
            )
            row = {"compile": time.process_time() - start}
            row["perplexity"] = perplexity(one_thread_session(out / "model.onnx"), windows)
        rows[label] = row
        exact, nearest = rows["fp32"]["perplexity"], rows["RTN"]["perplexity"]
        row["recovered"] = (nearest - row["perplexity"]) / (nearest - exact)
        print(f"{label}: {row['perplexity']:.3f}, {row['recovered']:.3f} recovered", file=sys.stderr, flush=True)
    columns = {
        "perplexity": ("perplexity", "{:.3f}"),
        "recovered": ("of RTN's loss recovered", "{:.3f}"),
        "compile": ("compile CPU s", "{:.0f}"),
    }
    kind = "asymmetric" if args.asymmetric else "symmetric"
    print_table(f"SmolLM2-135M w4a16 by output channel, {kind}; peak RSS {peak_rss_mb():.0f} MB", columns, rows)


if __name__ == "__main__":
    main()
