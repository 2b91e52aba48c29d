"""A mixture of experts in a few bits: size and time of QMoE, of one product an expert, and of float32.

usage: experts.py [--schemes S S ...] [--hidden N] [--intermediate N] [--experts N] [--layers N] [--rounds N]
       [--tokens N N ...] [--folder DIR]

(many small experts: --experts 64 --intermediate 256)

A Mixtral of random weights (two experts a token, vocabulary of 512), rounded to nearest: what is measured is time and
size, not accuracy. One thread's CPU time, alternating in one process, against the canonical float32 graph under
ORT_ENABLE_ALL, in which each expert multiplies the rows that chose it; "as traced" is the graph as the exporter leaves
it, which gathers a copy of an expert's weights for each row, and is left out for many rows.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
from protocol import Feeds, alternate, median_ratio, one_thread_session, print_table, save_float, size_mb

import qcompiler
from qcompiler.frontends import open_source
from qcompiler.graph.run import save_model
from qcompiler.runtime.artefact import MODEL
from qcompiler.targets import ort as target

SCHEMES = ("w4a16", "w4a8", "w4a8{group_size=128}")
GATHERED = 64  # rows up to which the graph as traced is run


def mixtral(folder: Path, options: argparse.Namespace) -> None:
    """A Hugging Face folder of random weights."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=512,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 128,
        num_local_experts=options.experts,
    )
    transformers.MixtralForCausalLM(config).save_pretrained(folder)


def tokens(count: int) -> Feeds:
    ids = np.random.default_rng(0).integers(3, 512, (1, count))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=1792)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as scratch:
        root = options.folder or Path(scratch)
        paths = saved(root, options)
        rows: dict[str, dict[str, float]] = {name: {"size": size_mb(path)} for name, path in paths.items()}
        sessions = {name: one_thread_session(path) for name, path in paths.items()}
        for count in options.tokens:
            runs = {
                name: functools.partial(session.run, None, tokens(count))
                for name, session in sessions.items()
                if name != "as traced" or count <= GATHERED
            }
            times = alternate(runs, options.rounds)
            for name in runs:
                rows[name][str(count)] = median_ratio(times, name, "float32")
            print(f"{count} tokens in float32: {1e3 * float(np.median(times['float32'])):.2f} ms")
        columns = {"size": ("MB", "{:.1f}")} | {str(n): (f"time, {n} tokens", "{:.3f}") for n in options.tokens}
        print_table("Mixture of experts against float32", columns, rows)


def saved(root: Path, options: argparse.Namespace) -> dict[str, Path]:
    """The models that are compared, by name."""
    source = root / "mixtral"
    mixtral(source, options)
    paths = {"float32": root / "fp32.onnx", "as traced": root / "traced.onnx"}
    save_float(source, paths["float32"])
    save_model(open_source(source).model, paths["as traced"])
    for number, scheme in enumerate(options.schemes):
        compile_to = {"scheme": scheme, "progress": False}
        qcompiler.compile(source, output=root / str(number), **compile_to)
        paths[scheme] = root / str(number) / MODEL
        with mock.patch.object(target, "lower_experts", return_value=({}, [])):
            qcompiler.compile(source, output=root / f"{number}_apart", **compile_to)
        paths[f"{scheme}, one product an expert"] = root / f"{number}_apart" / MODEL
    return paths


if __name__ == "__main__":
    main()
