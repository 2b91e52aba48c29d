"""How much of what plain rounding loses comes back: (RTN - ours) / RTN, on tiny models with injected outliers.

usage: python -m benchmarks.recovered [--families F,F] [--passes P] [--smollm2] [--json FILE]

RTN: per-channel int8 weights, static per-tensor absmax activations, output head included. Ours: the default "w8a8".
Losses of the tiny models: mean squared error of their logits on tokens that calibration did not see. With --smollm2
also SmolLM2-135M, whose loss is perplexity above fp32's, by the protocol of smollm2.py (minutes).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import warnings
from pathlib import Path

import numpy as np

import qcompiler
from benchmarks import outliers
from benchmarks.protocol import MODELS, RTN, RTN_PASSES, SHARED, print_table
from benchmarks.tiny_families import FAMILIES
from qcompiler.frontends import open_data, open_source
from qcompiler.graph.run import Runner
from qcompiler.runtime.evaluate import evaluate

WAYS: dict[str, tuple[str, ...]] = {**{manner: (manner,) for manner in outliers.MANNERS}, "all": outliers.MANNERS}
"""What is injected: each manner alone, and all together."""


@dataclasses.dataclass(frozen=True)
class Recovered:
    """Losses of plain rounding and of the compiler, and how many inputs the latter leaves per-token."""

    rtn: float
    ours: float
    per_token: int

    @property
    def share(self) -> float:
        return (self.rtn - self.ours) / self.rtn


def tiny(family: str, way: str, passes: str | None = None) -> Recovered:
    """Mean squared errors of the logits of one tiny model; ``passes`` None: the scheme's own."""
    model = outliers.tiny_model(family, WAYS[way])
    calibration, evaluation = outliers.batches(4, seed=1), outliers.batches(4, seed=2)
    runner = Runner(model, threads=1)
    reference = [runner(feeds)["logits"] for feeds in evaluation]

    def loss(compiled: qcompiler.CompiledModel) -> float:
        got = [compiled.run(feeds, threads=1)["logits"] for feeds in evaluation]
        return float(np.mean((np.concatenate(got) - np.concatenate(reference)).astype(np.float64) ** 2))

    rtn = qcompiler.compile(model, scheme=RTN, passes=RTN_PASSES, calibration=calibration, progress=False)
    ours = qcompiler.compile(model, scheme="w8a8", passes=passes, calibration=calibration, progress=False)
    return Recovered(loss(rtn), loss(ours), _per_token(ours))


def smollm2(passes: str | None = None) -> Recovered:
    """Perplexity above fp32's on 16 x 512 tokens of WikiText-2 test, calibrated on 32 x 512 of valid."""
    source = open_source(MODELS / "smollm2")
    wikitext = SHARED / "data" / "wikitext2"
    calibration = list(open_data(wikitext / "valid.txt", source, limit=32, seq_len=512, batch_size=1))
    windows = list(open_data(wikitext / "test.txt", source, limit=16, seq_len=512, batch_size=1))
    losses = []
    for scheme, chosen in ((RTN, RTN_PASSES), ("w8a8", passes)):
        compiled = qcompiler.compile(
            source.model, scheme=scheme, passes=chosen, calibration=calibration, progress=False
        )
        metrics = evaluate(compiled, source.model, windows, causal=True)
        assert metrics.perplexity is not None
        assert metrics.reference_perplexity is not None
        losses.append(metrics.perplexity - metrics.reference_perplexity)
    return Recovered(losses[0], losses[1], _per_token(compiled))


def _per_token(compiled: qcompiler.CompiledModel) -> int:
    return sum("per_token" in row.activation for row in compiled.report.rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(FAMILIES), help="tiny models, by comma; may be empty")
    parser.add_argument("--passes", help="another pipeline than the default one")
    parser.add_argument("--smollm2", action="store_true", help="SmolLM2's perplexity as well")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")

    found = {
        f"{family}, {way}": tiny(family, way, args.passes)
        for family in filter(None, args.families.split(","))
        for way in WAYS
    }
    if args.smollm2:
        found["SmolLM2 (perplexity above fp32)"] = smollm2(args.passes)
    rows = {name: {**dataclasses.asdict(result), "share": 100 * result.share} for name, result in found.items()}
    columns = {
        "rtn": ("RTN", "{:.2e}"),
        "ours": ("ours", "{:.2e}"),
        "share": ("recovered %", "{:.2f}"),
        "per_token": ("per-token", "{:.0f}"),
    }
    print_table("Loss of rounding to nearest, and what is left of it", columns, rows)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
