"""The files of a saved folder: written beside and renamed, sized, fold plans as safetensors."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import safetensors
from safetensors.numpy import save

from qcompiler.core import ArtefactError, FoldPlan

MODEL = "model.onnx"
DATA = "model.onnx.data"
RECIPE = "recipe.json"
REPORT = "report.json"
REPORT_TEXT = "report.md"
FOLDS = "folds.safetensors"
TOKENIZER = "tokenizer.json"
LIBRARY, WEIGHTS, ENGINE = "model.so", "weights.safetensors", "engine.json"
SIZED = (MODEL, DATA, FOLDS, TOKENIZER, LIBRARY, WEIGHTS, ENGINE)
"""Files whose size the recipe records, so that a truncated one is noticed."""


def refuse_existing(folder: Path, force: bool) -> None:
    """Say no before any work is done.

    Raises:
        ArtefactError: the folder exists and ``force`` is not given, or it holds something else than a compiled model
            (which ``force`` does not replace either), or it is a file.
    """
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise ArtefactError(f"{folder} exists and is not a folder: choose another output.")
    if not force:
        raise ArtefactError(f"{folder} exists: choose another output, or replace it with force=True (--force).")
    if any(folder.iterdir()) and not (folder / RECIPE).is_file():
        raise ArtefactError(f"{folder} exists and holds no compiled model (no {RECIPE}): it is not replaced.")


@contextlib.contextmanager
def replacing(folder: Path, force: bool, through: Path | None = None) -> Iterator[Path]:
    """A temporary folder that takes the place of ``folder`` when the block ends well, and vanishes when not.

    It is ``through``, which is emptied, or else one beside ``folder``.

    Raises:
        ArtefactError: as :func:`refuse_existing`, or the disk refuses.
    """
    refuse_existing(folder, force)
    partial = through if through is not None else folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        refuse_existing(folder, force)
        old = folder.with_name(f"{folder.name}.old-{os.getpid()}")
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise ArtefactError(f"cannot write {folder}: {error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_file(path: Path, force: bool) -> None:
    """Say no to a file that could not be written, before any work is done.

    Raises:
        ArtefactError: it exists and ``force`` is not given, it is no plain file, or its folder is missing or read-only.
    """
    if path.is_dir():
        raise ArtefactError(f"{path} is a folder: a file's name is wanted.")
    if os.path.lexists(path) and not force:
        raise ArtefactError(f"{path} exists: choose another file, or replace it with --force.")
    if not path.parent.is_dir():
        raise ArtefactError(f"cannot write {path}: there is no folder {path.parent}.")
    if not os.access(path.parent, os.W_OK):
        raise ArtefactError(f"cannot write {path}: the folder {path.parent} is read-only.")


def write_text(path: Path, text: str, force: bool) -> None:
    """Write a file whole or not at all.

    Raises:
        ArtefactError: as :func:`refuse_file`, or the disk refuses.
    """
    refuse_file(path, force)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise ArtefactError(f"cannot write {path}: {error}.") from error
    finally:
        partial.unlink(missing_ok=True)


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of the files that the recipe records, weights in a companion's folder included."""
    companions = [path.relative_to(folder).as_posix() for path in sorted(folder.glob("*/*.safetensors"))]
    return {name: (folder / name).stat().st_size for name in (*SIZED, *companions) if (folder / name).is_file()}


def check_sizes(folder: Path, recorded: dict[str, int]) -> None:
    """Compare with what was saved.

    Raises:
        ArtefactError: a file is missing, truncated or grown.
    """
    for name, size in recorded.items():
        path = folder / name
        if not path.is_file():
            raise ArtefactError(f"{folder} has no {name}: the folder is incomplete.")
        if path.stat().st_size != size:
            raise ArtefactError(
                f"{path} has {path.stat().st_size} bytes instead of {size}: it is truncated or changed."
            )


_TENSORS = ("scale", "shift", "rotation", "order")


def save_plans(plans: Sequence[FoldPlan], path: Path) -> None:
    """Scales, shifts, rotations and orders as tensors ``<number>.scale`` and so on; the rest as JSON in the header."""
    arrays: dict[str, np.ndarray] = {}
    described = []
    for number, plan in enumerate(plans):
        texts = {"kind": plan.kind, "source": plan.source, "sinks": plan.sinks, "why": plan.why}
        described.append({**texts, "proof": repr(plan.proof)})
        for name in _TENSORS:
            if (array := getattr(plan, name)) is not None:
                arrays[f"{number}.{name}"] = np.ascontiguousarray(array)
    # Not save_file: it would make the file readable by its owner only.
    path.write_bytes(save(arrays, metadata={"plans": json.dumps(described)}))


def load_plans(path: Path) -> tuple[FoldPlan, ...]:
    """The plans of :func:`save_plans`.

    Raises:
        ArtefactError: the file cannot be read.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            described = json.loads((file.metadata() or {})["plans"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        return tuple(
            FoldPlan(
                kind=plan["kind"],
                source=plan["source"],
                sinks=tuple(plan["sinks"]),
                proof=float(plan["proof"]),
                why=plan["why"],
                **{name: arrays.get(f"{number}.{name}") for name in _TENSORS},
            )
            for number, plan in enumerate(described)
        )
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise ArtefactError(f"{path} cannot be read: {error}.") from error
