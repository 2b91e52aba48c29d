"""The command line: compile, analyze, inspect, evaluate, bench."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console

from qcompiler.core import DataError, OptionError, QCompilerError
from qcompiler.frontends import open_source
from qcompiler.graph.rules import canonicalise
from qcompiler.options import Options
from qcompiler.passes import PASSES
from qcompiler.presets import PRESETS
from qcompiler.report.analysis import METRICS
from qcompiler.report.analysis_tables import TOP
from qcompiler.report.render import key_values, summary
from qcompiler.report.render import to_rich as report_tables
from qcompiler.runtime.artefact import refuse_file, write_text
from qcompiler.runtime.load import is_compiled, load
from qcompiler.runtime.synthetic import Shape
from qcompiler.targets import TARGETS

_SRC = "an .onnx file (external data beside it) or a Hugging Face folder (config.json and *.safetensors)"
_DATA = (
    "a text file (an encoder takes a sample from each line; a causal LM takes the text joined and cut into windows), "
    "an .npz of arrays by input name, or a folder of images"
)

_EXAMPLES = """\
examples:
  qcompiler inspect minilm/                      which Linears and norms there are, and what could be folded
  qcompiler compile minilm/ -o minilm-int8 --scheme w8a8 --calibration sentences.txt --limit 128
  qcompiler analyze minilm/ --scheme w8a8 --calibration sentences.txt --html report.html
                                                 which Linears the error comes from
  qcompiler inspect minilm-int8                  what was done to each Linear, why, and what it cost
  qcompiler evaluate minilm-int8 --reference minilm/ --data held-out.txt
  qcompiler bench minilm-int8 --reference minilm/

Results go to stdout (as JSON with --json), progress to stderr. Exit code 2: the input cannot be used, and one sentence
on stderr says why."""

_COMPILE = """\
examples:
  qcompiler compile model.onnx -o out --calibration data.npz
  qcompiler compile smollm2/ -o out --scheme w8a8-dynamic --seq-len 512 --limit 32 --calibration wiki.txt
  qcompiler compile minilm/ -o out --calibration text.txt --ignore '*.layer.5.output.*'
  qcompiler compile minilm/ -o out --calibration text.txt --passes 'smooth{alpha=0.5},annotate,insert,fold'
  qcompiler compile minilm/ -o out --calibration text.txt --max-drop sqnr=26
  qcompiler compile llama/ -o out --scheme w4a16 --resume
  qcompiler compile model.onnx -o out --scheme w8a8-dynamic --target 'onnx{form=qoperator}'"""

_ANALYZE = """\
quantizes as compile does, lowers and saves nothing, and measures the output of each Linear against the float model's:
alone (only this Linear is quantized) and accumulated (all are). Also the ranges and outlier channels of what the
Linears read, before and after the transforms.
examples:
  qcompiler analyze minilm/ --calibration text.txt --limit 64 --html report.html
  qcompiler analyze smollm2/ --scheme w8a8-dynamic --data wiki.txt --limit 8 --metric cosine --json out.json
  qcompiler analyze model.onnx --calibration data.npz --passes annotate,insert,fold --top 20"""

_EVALUATE = """\
prints, for each output, SQNR in dB, cosine, for logits top-1 agreement and KL divergence; perplexity for causal LMs.
examples:
  qcompiler evaluate out --reference minilm/ --data held-out.txt --limit 200
  qcompiler evaluate out --reference model.onnx --data data.npz --json"""

_BENCH = """\
both models run in turn in this process, under ONNX Runtime's full optimisation; the ratio is the median over pairs.
examples:
  qcompiler bench out --reference minilm/
  qcompiler bench out --reference minilm/ --shape 1x16 --shape 8x128 --threads 4 --repeats 50"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0, or 2 where the input cannot be used)."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except QCompilerError as error:
        print(f"qcompiler: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("qcompiler: interrupted.", file=sys.stderr)
        return 130
    return 0


def _compile(options: argparse.Namespace) -> None:
    from qcompiler.driver import compile_as

    asked = dataclasses.replace(
        _options(options),
        max_drop=_max_drop(options.max_drop) if options.max_drop is not None else None,
        max_size=options.max_size,
        dump=options.dump,
    )
    compiled = compile_as(options.src, asked, options.output, options.force, options.resume)
    pairs = [("saved to", str(options.output)), *summary(compiled.report)]
    _tell(options, {"output": str(options.output), "report": compiled.report.to_json()}, key_values(pairs))


def _analyze(options: argparse.Namespace) -> None:
    from qcompiler.analysis import analyze_as
    from qcompiler.report.analysis_tables import to_rich
    from qcompiler.report.plots import require_matplotlib

    if options.top < 1:
        raise OptionError(f"top is {options.top}, but at least one Linear is to be shown.")
    texts = {"html": options.html, "json": options.json if isinstance(options.json, str) else None}
    files = {kind: Path(name) for kind, name in texts.items() if name is not None}
    for path in files.values():
        refuse_file(path, options.force)
    if options.html is not None:
        require_matplotlib()
    found = analyze_as(options.src, _options(options), options.data, options.metric)
    for kind, path in files.items():
        write_text(path, found.to_html(options.top) if kind == "html" else found.to_text(), options.force)
    if options.json is True:
        print(found.to_text(), end="")
    else:
        Console(width=None if sys.stdout.isatty() else 200).print(to_rich(found, options.top))


def _options(options: argparse.Namespace) -> Options:
    """What compile and analyze both ask."""
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


def _inspect(options: argparse.Namespace) -> None:
    if is_compiled(options.path):
        compiled = load(options.path)
        _tell(options, {"recipe": compiled.recipe, "report": compiled.report.to_json()}, report_tables(compiled.report))
        return
    from qcompiler.report.overview import overview, to_rich

    source = open_source(options.path, trust_remote_code=options.trust_remote_code)
    canonicalise(source.model)
    found = overview(source.model)
    _tell(options, found.to_json(), to_rich(found))


def _evaluate(options: argparse.Namespace) -> None:
    from qcompiler.measure import evaluate

    metrics = evaluate(
        load(options.out),
        _float_source(options.reference),
        options.data,
        logits=options.logits,
        limit=options.limit,
        seq_len=options.seq_len,
        batch_size=options.batch_size,
        threads=options.threads,
        trust_remote_code=options.trust_remote_code,
    )
    _tell(options, metrics.to_json(), key_values(metrics.lines()))


def _bench(options: argparse.Namespace) -> None:
    from qcompiler.measure import bench

    result = bench(
        load(options.out),
        _float_source(options.reference),
        shapes=[_shape(text) for text in options.shape] if options.shape else None,
        threads=options.threads,
        repeats=options.repeats,
        seed=options.seed,
        trust_remote_code=options.trust_remote_code,
    )
    _tell(options, result.to_json(), key_values(result.lines()))


def _tell(options: argparse.Namespace, data: dict[str, Any], tables: Any) -> None:
    if options.json:
        print(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False))
    else:
        Console(width=None if sys.stdout.isatty() else 200).print(tables)


def _float_source(path: str) -> str:
    if is_compiled(path):
        raise DataError(f"{path} is a compiled model: the float source is wanted here.")
    return path


def _shape(text: str) -> Shape:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", text):
        raise OptionError(f"cannot read shape {text!r}: write BATCHxSEQUENCE, like 8x128, or BATCH.")
    return tuple(int(part) for part in text.split("x"))


def _bits(text: str) -> tuple[str, int | str]:
    glob, equals, number = text.rpartition("=")
    if not equals or not (number.isdecimal() or number == "float"):
        raise OptionError(f"cannot read --bits {text!r}: write GLOB=BITS, like '*down_proj*=8'.")
    return glob, int(number) if number.isdecimal() else number


def _max_drop(text: str) -> dict[str, float]:
    name, _, number = text.partition("=")
    try:
        return {name: float(number)}
    except ValueError:
        raise OptionError(f"cannot read --max-drop {text!r}: write METRIC=LIMIT, like sqnr=26.") from None


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="qcompiler",
        description="Compile a float Transformer into an int8 one that is faster and still right.",
        epilog=_EXAMPLES,
        formatter_class=raw,
    )
    parser.add_argument("--version", action="version", version=f"qcompiler {metadata.version('qcompiler')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, run: Any, text: str, epilog: str | None = None, json_file: bool = False
    ) -> argparse.ArgumentParser:
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

    sub = command("compile", _compile, "quantize a model and save it as a folder", _COMPILE)
    sub.add_argument("src", metavar="SRC", help=_SRC)
    sub.add_argument("-o", "--output", metavar="OUT", required=True, help="the folder to make; it must not exist")
    _quantize_options(sub)
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
    _data_options(sub)
    sub.add_argument("--force", action="store_true", help="replace a compiled model at OUT")
    sub.add_argument(
        "--resume",
        action="store_true",
        help="go on from OUT.partial, which a killed compile left (without calibration data)",
    )
    sub.add_argument("--dump", metavar="DIR", help="also save the model after each pass, here")

    sub = command(
        "analyze", _analyze, "measure which Linears the error of a scheme comes from", _ANALYZE, json_file=True
    )
    sub.add_argument("src", metavar="SRC", help=_SRC)
    _quantize_options(sub)
    sub.add_argument("--data", metavar="DATA", help="what to measure on (default: the calibration data)")
    _data_options(sub)
    sub.add_argument("--metric", default="sqnr", help=f"what to rank by: {', '.join(METRICS)} (default sqnr)")
    sub.add_argument("--top", metavar="N", type=int, default=TOP, help=f"Linears to show (default {TOP})")
    sub.add_argument("--html", metavar="FILE", help="also write tables and plots as one page, here")
    sub.add_argument("--force", action="store_true", help="replace the files that are written")

    sub = command("inspect", _inspect, "show what a source holds, or the report of a compiled folder")
    sub.add_argument("path", metavar="SRC|OUT", help=f"{_SRC}, or a folder that compile made")

    sub = command("evaluate", _evaluate, "compare a compiled model with its float source on data", _EVALUATE)
    sub.add_argument("out", metavar="OUT", help="a folder that compile made")
    sub.add_argument("--reference", metavar="SRC", required=True, help=f"the float source: {_SRC}")
    sub.add_argument("--data", metavar="DATA", required=True, help=_DATA)
    sub.add_argument(
        "--logits",
        metavar="NAME",
        action="append",
        help="outputs that are logits (default: those with it in their name)",
    )
    _data_options(sub)
    sub.add_argument("--threads", type=int, default=0, help="intra-op threads (default: ONNX Runtime's choice)")

    sub = command("bench", _bench, "time a compiled model against its float source", _BENCH)
    sub.add_argument("out", metavar="OUT", help="a folder that compile made")
    sub.add_argument("--reference", metavar="SRC", required=True, help=f"the float source: {_SRC}")
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
    return parser


def _quantize_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--scheme", default="w8a8", help=f"what is quantized, and how: {', '.join(PRESETS)} (default w8a8)"
    )
    sub.add_argument("--target", default="ort-cpu", help=f"where it will run: {', '.join(TARGETS)} (default ort-cpu)")
    sub.add_argument("--calibration", metavar="DATA", help=f"{_DATA}; static schemes need it")
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


def _data_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--limit", metavar="N", type=int, help="samples to take of DATA (default: all)")
    sub.add_argument(
        "--seq-len", metavar="L", type=int, help="tokens in a sample (default 128 for an encoder, 512 for a causal LM)"
    )
    sub.add_argument("--batch-size", metavar="B", type=int, help="samples in a batch (default 8, or 1 for a causal LM)")


if __name__ == "__main__":
    sys.exit(main())
