"""``qcompiler bench``: a compiled model's time against its float source's."""

from __future__ import annotations

import argparse
import re

from qcompiler.cli.arguments import SRC, Commands, add_command, float_source
from qcompiler.cli.output import tell
from qcompiler.core import OptionError
from qcompiler.report.render import key_values
from qcompiler.runtime.load import load
from qcompiler.runtime.synthetic import Shape

_HELP = """\
both models run in turn in this process, under ONNX Runtime's full optimisation; the ratio is the median over pairs.
examples:
  qcompiler bench out --reference minilm/
  qcompiler bench out --reference minilm/ --shape 1x16 --shape 8x128 --threads 4 --repeats 50"""


def add(commands: Commands) -> None:
    """The command and its options."""
    sub = add_command(commands, "bench", run, "time a compiled model against its float source", _HELP)
    sub.add_argument("out", metavar="OUT", help="a folder that compile made")
    sub.add_argument("--reference", metavar="SRC", required=True, help=f"the float source: {SRC}")
    sub.add_argument(
        "--shape",
        metavar="BxS",
        action="append",
        help="batch and sequence to time (may be repeated; default 8x128 and 1x16 for an encoder, 1x512 and 1x1 for a "
        "causal LM, 1 for images)",
    )
    sub.add_argument("--threads", type=int, default=1, help="intra-op threads (default 1)")
    sub.add_argument("--repeats", type=int, default=20, help="pairs of runs for each shape (default 20)")
    sub.add_argument("--seed", type=int, default=0, help="of the made-up inputs (default 0)")


def run(options: argparse.Namespace) -> None:
    """Time both and tell."""
    from qcompiler.measure import bench

    result = bench(
        load(options.out),
        float_source(options.reference),
        shapes=[_shape(text) for text in options.shape] if options.shape else None,
        threads=options.threads,
        repeats=options.repeats,
        seed=options.seed,
        trust_remote_code=options.trust_remote_code,
    )
    tell(options, result.to_json(), key_values(result.lines()))


def _shape(text: str) -> Shape:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", text):
        raise OptionError(f"cannot read shape {text!r}: write BATCHxSEQUENCE, like 8x128, or BATCH.")
    return tuple(int(part) for part in text.split("x"))
