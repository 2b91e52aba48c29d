"""What several commands take, and how it reads."""

from __future__ import annotations

import argparse
from typing import Any

from qcompiler.core import DataError, OptionError
from qcompiler.options import Options
from qcompiler.passes import PASSES
from qcompiler.presets import PRESETS
from qcompiler.runtime.load import is_compiled
from qcompiler.targets import TARGETS

SRC = "an .onnx file (external data beside it) or a Hugging Face folder (config.json and *.safetensors)"
DATA = (
    "a text file (an encoder takes a sample from each line; a causal LM takes the text joined and cut into windows), "
    "an .npz of arrays by input name, or a folder of images"
)

Commands = Any
"""What :meth:`argparse.ArgumentParser.add_subparsers` returns."""


def add_command(
    commands: Commands, name: str, run: Any, text: str, epilog: str | None = None, json_file: bool = False
) -> argparse.ArgumentParser:
    """A command with what all of them take; with ``json_file``, --json may be given a file to write."""
    raw = argparse.RawDescriptionHelpFormatter
    sub: argparse.ArgumentParser
    sub = commands.add_parser(name, help=text, description=text, epilog=epilog, formatter_class=raw)
    sub.set_defaults(run=run)
    if json_file:
        told = "write the result as JSON, here; without FILE, print it"
        sub.add_argument("--json", metavar="FILE", nargs="?", const=True, default=False, help=told)
    else:
        sub.add_argument("--json", action="store_true", help="print the result as JSON")
    sub.add_argument(
        "--trust-remote-code", action="store_true", help="let a Hugging Face folder run its own Python code"
    )
    return sub


def add_quantization(sub: argparse.ArgumentParser) -> None:
    """What compile and analyze both take."""
    sub.add_argument(
        "--scheme", default="w8a8", help=f"what is quantized, and how: {', '.join(PRESETS)} (default w8a8)"
    )
    sub.add_argument("--target", default="ort-cpu", help=f"where it will run: {', '.join(TARGETS)} (default ort-cpu)")
    sub.add_argument("--calibration", metavar="DATA", help=f"{DATA}; static schemes need it")
    sub.add_argument(
        "--ignore", metavar="GLOB", action="append", default=[], help="Linears to leave in float (may be repeated)"
    )
    sub.add_argument(
        "--bits",
        metavar="GLOB=BITS",
        action="append",
        default=[],
        help="Linears whose weights get 2, 4 or 8 bits, or stay in float: '*down_proj*=8', '*head*=float' (may be "
        "repeated: the last that matches holds)",
    )
    passes = ", ".join(name for name in PASSES if name != "normalise")
    sub.add_argument("--passes", metavar="SPEC", help=f"the pipeline as name{{option=value}},...; there are {passes}")
    sub.add_argument("--seed", type=int, default=0, help="of every random choice (default 0)")
    sub.add_argument("--quiet", action="store_true", help="no progress on stderr")


def add_data(sub: argparse.ArgumentParser) -> None:
    """How much of DATA is read, and how it is cut."""
    sub.add_argument("--limit", metavar="N", type=int, help="samples to take of DATA (default: all)")
    sub.add_argument(
        "--seq-len", metavar="L", type=int, help="tokens in a sample (default 128 for an encoder, 512 for a causal LM)"
    )
    sub.add_argument("--batch-size", metavar="B", type=int, help="samples in a batch (default 8, or 1 for a causal LM)")


def quantization(options: argparse.Namespace) -> Options:
    """What :func:`add_quantization` and :func:`add_data` read.

    Raises:
        OptionError: a text that cannot be read.
    """
    return Options(
        scheme=options.scheme,
        target=options.target,
        calibration=options.calibration,
        passes=options.passes,
        ignore=tuple(options.ignore),
        bits=dict(map(_bits, options.bits)),
        seed=options.seed,
        limit=options.limit,
        seq_len=options.seq_len,
        batch_size=options.batch_size,
        trust_remote_code=options.trust_remote_code,
        progress=not options.quiet,
    )


def float_source(path: str) -> str:
    """The path of a float source.

    Raises:
        DataError: it is a compiled model.
    """
    if is_compiled(path):
        raise DataError(f"{path} is a compiled model: the float source is wanted here.")
    return path


def _bits(text: str) -> tuple[str, int | str]:
    glob, equals, number = text.rpartition("=")
    if not equals or not (number.isdecimal() or number == "float"):
        raise OptionError(f"cannot read --bits {text!r}: write GLOB=BITS, like '*down_proj*=8'.")
    return glob, int(number) if number.isdecimal() else number
