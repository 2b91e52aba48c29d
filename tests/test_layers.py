"""Imports go strictly down (DESIGN.md, section 2), and torch comes in late or not at all: read off the sources."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import qcompiler

ROOT = Path(qcompiler.__file__).parent
LAYERS = (
    {"cli"},
    {"analysis", "driver", "measure", "quantize", "streamed", "options", "budget", "size_budget", "size_plan"},
    {"frontends", "targets", "training", "runtime", "report"},
    {"passes"},
    {"calibration"},
    {"graph"},
    {"core", "capability", "spelling", "scheme", "presets", "numerics"},
)
"""From the top down. ``__init__``, the public face, stands above them all."""
TORCH = {"torch", "torchvision", "transformers"}
SOURCES = sorted(ROOT.rglob("*.py"))

Import = tuple[str, bool]
"""A module's full name, and whether it is imported when the file is (not inside a function)."""


def imports_of(tree: ast.Module, package: list[str]) -> Iterator[Import]:
    """Every import of a file; what only type checkers read is left out."""
    pending: list[tuple[ast.AST, bool]] = [(tree, True)]
    while pending:
        node, eager = pending.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name, eager) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module != "qcompiler":
                yield module, eager
            yield from ((f"{module}.{alias.name}", eager) for alias in node.names)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += [(child, eager) for child in node.orelse]
            continue
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        pending += [(child, eager and not lazy) for child in ast.iter_child_nodes(node)]


def parsed(path: Path) -> set[Import]:
    package = ["qcompiler", *path.relative_to(ROOT).parent.parts]
    return set(imports_of(ast.parse(path.read_text(encoding="utf-8")), package))


def layer_of(unit: str) -> int:
    """Its number from the top; -1 for what only the public face has."""
    return next((number for number, units in enumerate(LAYERS) if unit in units), -1)


def unit_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_every_file_has_its_layer() -> None:
    assert SOURCES
    known = {"__init__", "__main__"}.union(*LAYERS)
    assert {unit_of(path) for path in SOURCES} <= known


def test_imports_are_read_as_python_means_them() -> None:
    """The reader itself: relative imports, functions, type checking."""
    code = """
import torch.nn
from ..core import Note
from . import edit
from qcompiler import passes
if TYPE_CHECKING:
    import transformers
else:
    import onnx
class A:
    import numpy
    def f(self):
        from qcompiler.driver import compile
"""
    found = dict(imports_of(ast.parse(code), ["qcompiler", "graph"]))
    assert found == {
        "torch.nn": True,
        "qcompiler.core": True,
        "qcompiler.core.Note": True,
        "qcompiler.graph": True,
        "qcompiler.graph.edit": True,
        "qcompiler.passes": True,
        "onnx": True,
        "numpy": True,
        "qcompiler.driver": False,
        "qcompiler.driver.compile": False,
    }


@pytest.mark.parametrize("path", [p for p in SOURCES if unit_of(p) not in ("__init__", "__main__")], ids=name_of)
def test_imports_go_down(path: Path) -> None:
    """Also inside functions: a lazy import upwards is a cycle that shows up late."""
    units = {name.split(".")[1] for name, _ in parsed(path) if name.startswith("qcompiler.")}
    own = layer_of(unit_of(path))
    up = sorted(unit for unit in units if layer_of(unit) < own)
    assert not up, f"{name_of(path)} imports {', '.join(up)}, which stand above it"


def test_passes_know_no_target() -> None:
    """They are handed a Capability: what a target can run, as data."""
    for path in SOURCES:
        if unit_of(path) == "passes":
            assert not any(name.startswith("qcompiler.targets") for name, _ in parsed(path)), name_of(path)


def test_torch_is_imported_where_a_torch_model_is_opened_only() -> None:
    allowed = ("frontends/torch", "frontends/hf", "training/")
    users = {name_of(path) for path in SOURCES if any(name.split(".")[0] in TORCH for name, _ in parsed(path))}
    assert users
    assert not [path for path in users if not path.startswith(allowed)]


def test_what_imports_torch_is_itself_imported_late() -> None:
    """No module that is loaded by ``import qcompiler`` reaches torch when it is imported."""
    eager = {path: {name for name, now in parsed(path) if now} for path in SOURCES}
    modules = {
        ".".join(["qcompiler", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__"): path
        for path in SOURCES
    }
    seen: set[Path] = set()
    pending = [modules["qcompiler"]]
    while pending:
        path = pending.pop()
        if path not in seen:
            seen.add(path)
            assert not [name for name in eager[path] if name.split(".")[0] in TORCH], name_of(path)
            pending += [modules[name] for name in eager[path] if name in modules]
    assert len(seen) > 10


_WITHOUT_TORCH = """
import sys
for blocked in ("torch", "transformers", "PIL"):
    sys.modules[blocked] = None  # import of it raises ImportError
import numpy as np
import onnx_ir as ir
import qcompiler
from tests.graphs_int8 import feeds, float_mlp

data = [feeds(seed=1), feeds(seed=2)]
compiled = qcompiler.compile(float_mlp(), calibration=data, progress=False, output=sys.argv[1])
assert compiled.report.coverage_body is not None
y = qcompiler.load(sys.argv[1]).run(feeds(seed=3))["y"]
assert np.isfinite(y).all()
for model, options in ((sys.argv[2], {}), (float_mlp(), {"passes": "annotate,insert,distill,fold"})):
    try:
        qcompiler.compile(model, calibration=data, progress=False, **options)
    except qcompiler.QCompilerError as error:
        print(error)
"""


def test_without_torch_onnx_models_compile_and_folders_are_refused_in_a_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["BertModel"], "model_type": "bert"}')
    (folder / "model.safetensors").write_bytes(b"")
    run = subprocess.run(
        [sys.executable, "-c", _WITHOUT_TORCH, str(tmp_path / "out"), str(folder)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[1],
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("\n") == 2
    assert run.stdout.count("pip install 'qcompiler[torch]'") == 2
