"""``qcompiler compile``: a float model into a folder."""

from __future__ import annotations

import argparse
import dataclasses

from qcompiler.cli.arguments import SRC, Commands, add_command, add_data, add_quantization, quantization
from qcompiler.cli.output import tell
from qcompiler.core import OptionError
from qcompiler.report.render import key_values, summary

_HELP = """\
examples:
  qcompiler compile model.onnx -o out --calibration data.npz
  qcompiler compile smollm2/ -o out --scheme w8a8-dynamic --seq-len 512 --limit 32 --calibration wiki.txt
  qcompiler compile minilm/ -o out --calibration text.txt --ignore '*.layer.5.output.*'
  qcompiler compile minilm/ -o out --calibration text.txt --passes 'smooth{alpha=0.5},annotate,insert,fold'
  qcompiler compile minilm/ -o out --calibration text.txt --max-drop sqnr=26
  qcompiler compile llama/ -o out --scheme w4a16 --resume
  qcompiler compile model.onnx -o out --scheme w8a8-dynamic --target 'onnx{form=qoperator}'"""


def add(commands: Commands) -> None:
    """The command and its options."""
    sub = add_command(commands, "compile", run, "quantize a model and save it as a folder", _HELP)
    sub.add_argument("src", metavar="SRC", help=SRC)
    sub.add_argument("-o", "--output", metavar="OUT", required=True, help="the folder to make; it must not exist")
    add_quantization(sub)
    sub.add_argument(
        "--max-drop",
        metavar="METRIC=LIMIT",
        help="as fast as this allows, checked on held-back calibration samples: sqnr=DB at least, or at most "
        "cosine=1-COS, kl=NATS a token, perplexity=RELATIVE increase",
    )
    sub.add_argument(
        "--max-size",
        metavar="SIZE",
        help="bytes that the saved model may take, or 40MB, 1.5GiB: bits are chosen for each Linear",
    )
    add_data(sub)
    sub.add_argument("--force", action="store_true", help="replace a compiled model at OUT")
    sub.add_argument(
        "--resume",
        action="store_true",
        help="go on from OUT.partial, which a killed compile left (without calibration data)",
    )
    sub.add_argument("--dump", metavar="DIR", help="also save the model after each pass, here")


def run(options: argparse.Namespace) -> None:
    """Compile, save, and tell what was done."""
    from qcompiler.driver import compile_as

    asked = dataclasses.replace(
        quantization(options),
        max_drop=_max_drop(options.max_drop) if options.max_drop is not None else None,
        max_size=options.max_size,
        dump=options.dump,
    )
    compiled = compile_as(options.src, asked, options.output, options.force, options.resume)
    pairs = [("saved to", str(options.output)), *summary(compiled.report)]
    tell(options, {"output": str(options.output), "report": compiled.report.to_json()}, key_values(pairs))


def _max_drop(text: str) -> dict[str, float]:
    name, _, number = text.partition("=")
    try:
        return {name: float(number)}
    except ValueError:
        raise OptionError(f"cannot read --max-drop {text!r}: write METRIC=LIMIT, like sqnr=26.") from None
