"""``qcompiler evaluate``: a compiled model against its float source, on data."""

from __future__ import annotations

import argparse

from qcompiler.cli.arguments import DATA, SRC, Commands, add_command, add_data, float_source
from qcompiler.cli.output import tell
from qcompiler.report.render import key_values
from qcompiler.runtime.load import load

_HELP = """\
prints, for each output, SQNR in dB, cosine, for logits top-1 agreement and KL divergence; perplexity for causal LMs.
examples:
  qcompiler evaluate out --reference minilm/ --data held-out.txt --limit 200
  qcompiler evaluate out --reference model.onnx --data data.npz --json"""


def add(commands: Commands) -> None:
    """The command and its options."""
    sub = add_command(commands, "evaluate", run, "compare a compiled model with its float source on data", _HELP)
    sub.add_argument("out", metavar="OUT", help="a folder that compile made")
    sub.add_argument("--reference", metavar="SRC", required=True, help=f"the float source: {SRC}")
    sub.add_argument("--data", metavar="DATA", required=True, help=DATA)
    sub.add_argument(
        "--logits",
        metavar="NAME",
        action="append",
        help="outputs that are logits (default: those with it in their name)",
    )
    add_data(sub)
    sub.add_argument("--threads", type=int, default=0, help="intra-op threads (default: ONNX Runtime's choice)")


def run(options: argparse.Namespace) -> None:
    """Measure and tell."""
    from qcompiler.measure import evaluate

    metrics = evaluate(
        load(options.out),
        float_source(options.reference),
        options.data,
        logits=options.logits,
        limit=options.limit,
        seq_len=options.seq_len,
        batch_size=options.batch_size,
        threads=options.threads,
        trust_remote_code=options.trust_remote_code,
    )
    tell(options, metrics.to_json(), key_values(metrics.lines()))
