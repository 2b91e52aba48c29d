"""The measuring protocol behind the figures in README.md, shared by the scripts beside it."""

from __future__ import annotations

import csv
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from qcompiler.frontends import Source, open_source
from qcompiler.graph.rules import canonicalise
from qcompiler.graph.run import save_model
from qcompiler.scheme import Scheme, TensorSpec

SHARED = Path(__file__).resolve().parents[2] / "shared"
MODELS = Path(os.environ.get("QCOMPILER_MODELS", Path.home() / ".cache" / "qcompiler" / "models"))

Feeds = dict[str, np.ndarray]

_MOLECULES = """
CC(=O)Oc1ccccc1C(=O)O CN1C=NC2=C1C(=O)N(C(=O)N2C)C CC(C)Cc1ccc(cc1)C(C)C(=O)O c1ccccc1O CCO
CC(=O)NC1=CC=C(O)C=C1 C1CCCCC1N O=C(O)c1ccccc1 CCN(CC)CC CC(C)O O=C=O CC#N c1ccncc1 CN(C)C=O ClCCl CS(C)=O
OCC(O)CO NC(=O)N CC(=O)C C1CCOC1 CC(C)(C)OC(=O)NCC(=O)O O=C(Cl)c1ccccc1 BrCc1ccccc1 Nc1ccc(Cl)cc1
COc1ccc(C=O)cc1 OB(O)c1ccccc1 CC1(C)OB(B2OC(C)(C)C(C)(C)O2)OC1(C)C C[Si](C)(C)C#C FC(F)(F)c1ccccc1
O=[N+]([O-])c1ccccc1 CCOC(=O)CC(=O)OCC c1ccc2[nH]ccc2c1
"""
SMILES = _MOLECULES.split()
"""Small molecules, for models of chemistry."""

RTN = Scheme(
    "rtn",
    weight=TensorSpec("int8", granularity="per_channel"),
    activation=TensorSpec("uint8", symmetric=True, observer="minmax{margin=1}"),  # a margin that is not searched
)
"""What plain rounding to nearest does: static per-tensor absmax activations, output head included."""
RTN_PASSES = "annotate,insert,fold"


def stsb(split: str, column: int) -> list[str]:
    """A column of STS-B's ``dev`` or ``test`` table: 0 sentence1, 1 sentence2, 2 the human score."""
    with (SHARED / "data" / "stsb" / f"{split}.csv").open(newline="", encoding="utf-8") as file:
        return [row[column] for row in csv.reader(file)]


def encode(folder: Path, sentences: Sequence[str], batch: int = 8, pad_to: int | None = None) -> list[Feeds]:
    """Batches of input_ids, attention_mask and token_type_ids, padded to ``pad_to`` or to each batch's longest."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(pad_to or 128)
    tokenizer.enable_padding(length=pad_to)
    batches = []
    for start in range(0, len(sentences), batch):
        encodings = tokenizer.encode_batch(list(sentences[start : start + batch]))
        ids = np.array([e.ids for e in encodings], np.int64)
        mask = np.array([e.attention_mask for e in encodings], np.int64)
        batches.append({"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)})
    return batches


def minilm_calibration() -> list[str]:
    """sentence1 of the first 128 rows of STS-B dev."""
    return stsb("dev", 0)[:128]


def minilm_evaluation() -> list[str]:
    """sentence1 of every 6th row of STS-B test, the first 200."""
    return stsb("test", 0)[::6][:200]


def pooled_sqnr(reference: Iterable[np.ndarray], got: Iterable[np.ndarray], masks: Iterable[np.ndarray]) -> float:
    """10·log10(Σref² / Σerr²) over unmasked positions of [batch, sequence, hidden] arrays."""
    signal = noise = 0.0
    for ref, out, mask in zip(reference, got, masks, strict=True):
        keep = mask.astype(bool)
        r = ref[keep].astype(np.float64)
        signal += float((r**2).sum())
        noise += float(((out[keep] - r) ** 2).sum())
    return float(10 * np.log10(signal / noise))


def mean_pooled(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Sentence embeddings: the mean over unmasked positions, at unit length."""
    weights = mask[:, :, None].astype(np.float32)
    pooled = (hidden * weights).sum(1) / weights.sum(1)
    return pooled / np.linalg.norm(pooled, axis=1, keepdims=True)


def spearman_stsb(run: Callable[[Feeds], np.ndarray], folder: Path) -> float:
    """Spearman correlation of cosine similarity with the human scores of STS-B test (1,379 pairs)."""
    from scipy.stats import spearmanr

    scores = [float(score) for score in stsb("test", 2)]
    embedded = []
    for column in (0, 1):
        batches = encode(folder, stsb("test", column), batch=32)
        embedded.append(np.concatenate([mean_pooled(run(feeds), feeds["attention_mask"]) for feeds in batches]))
    return float(spearmanr((embedded[0] * embedded[1]).sum(1), scores).statistic)


def save_float(folder: Path, path: Path) -> Source:
    """Save a folder's canonical float graph as ``path``, the model that latency is set against; the source is given."""
    source = open_source(folder)
    canonicalise(source.model)
    save_model(source.model, path)
    return source


def size_mb(path: Path) -> float:
    """MB of an ONNX file and the data beside it."""
    return sum(p.stat().st_size for p in path.parent.glob(f"{path.name}*")) / 1e6


def one_thread_session(path: Path | bytes, threads: int = 1) -> ort.InferenceSession:
    """A plain ONNX Runtime session on one thread, or on more, with every graph optimisation on."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def alternate(
    runs: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.process_time,
    rest: float = 0.0,
) -> dict[str, list[float]]:
    """CPU (or other) seconds of each run, taken in turn: whatever the machine does meanwhile falls on all alike.

    Threads that wait for work go on spinning for a while, and where each has a core they take it from the side whose
    turn it is. With a ``rest`` (seconds) they are asleep by then; three runs that are not timed wake its own.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(warmup + rounds):
        for name, run in runs.items():
            if rest:
                time.sleep(rest)
                for _ in range(3):
                    run()
            start = clock()
            run()
            if i >= warmup:
                times[name].append(clock() - start)
    return times


def clock_of(threads: int) -> Callable[[], float]:
    """CPU time of one thread, wall time of several."""
    return time.process_time if threads == 1 else time.perf_counter


def rest_of(threads: int) -> float:
    """Seconds of rest before each turn: one thread never waits for another."""
    return 0.2 if threads > 1 else 0.0


def median_ratio(times: Mapping[str, Sequence[float]], name: str, reference: str) -> float:
    """Median over rounds of one run's time against the reference's of the same round."""
    return statistics.median(a / b for a, b in zip(times[name], times[reference], strict=True))


def peak_rss_mb() -> float:
    """Peak resident set size of this process so far, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1024 if sys.platform != "darwin" else peak / 1024**2


def quantize_with_ort(fp32: Path, out: Path, kind: str, calibration: Sequence[Feeds]) -> None:
    """The peers that install in no time: onnxruntime.quantization, dynamic per channel and static U8S8."""
    import logging

    from onnxruntime import quantization as q

    logging.disable(logging.WARNING)
    if kind == "dynamic":
        q.quantize_dynamic(fp32, out, per_channel=True)
        return

    class Reader(q.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._batches = iter(calibration)

        def get_next(self) -> Feeds | None:
            return next(self._batches, None)

    q.quantize_static(
        fp32,
        out,
        Reader(),
        quant_format=q.QuantFormat.QDQ,
        activation_type=q.QuantType.QUInt8,
        weight_type=q.QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=["MatMul", "Gemm"],
    )


def print_table(title: str, columns: Mapping[str, tuple[str, str]], rows: Mapping[str, Mapping[str, float]]) -> None:
    """One line a model; ``columns`` gives each figure its heading and format."""
    table = Table(title=f"{title}; onnxruntime {ort.__version__}")
    table.add_column("model")
    for heading, _ in columns.values():
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        table.add_row(name, *(form.format(row[key]) if key in row else "" for key, (_, form) in columns.items()))
    Console(width=140).print(table)
