"""Load a saved folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompiler.core import ArtefactError
from qcompiler.report.data import Report
from qcompiler.runtime import artefact
from qcompiler.runtime.compiled import CompiledModel
from qcompiler.runtime.recipe import migrate
from qcompiler.targets import make_target


def load(folder: str | os.PathLike[str]) -> CompiledModel:
    """The compiled model that was saved there; weights stay on disk until they are needed.

    Raises:
        ArtefactError: no such folder, a file is missing, truncated or not readable, or the recipe is of a version that
            cannot be migrated.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ArtefactError(f"there is no folder {folder}.")
    recipe = migrate(_read_json(folder / artefact.RECIPE))
    artefact.check_sizes(folder, recipe.pop("files", {}))
    path = folder / artefact.MODEL
    try:
        model = ir.load(path)
    except Exception as error:
        raise ArtefactError(f"{path} cannot be read as an ONNX model: {str(error).splitlines()[0]}") from error
    if not model.graph.outputs:  # bytes that are no ONNX model may parse as an empty protobuf message
        raise ArtefactError(f"{path} cannot be read as an ONNX model: it has no outputs.")
    tokenizer = folder / artefact.TOKENIZER
    spelled = recipe.get("target")
    target = make_target(spelled) if isinstance(spelled, str) else None
    return CompiledModel(
        model=model,
        recipe=recipe,
        report=Report.from_json(_read_json(folder / artefact.REPORT)),
        plans=artefact.load_plans(folder / artefact.FOLDS),
        tokenizer=tokenizer if tokenizer.is_file() else None,
        path=path,
        executable=target.load(folder) if target is not None else None,
        companion=target.companion(folder) if target is not None else None,
    )


def is_compiled(folder: str | os.PathLike[str]) -> bool:
    """Whether the folder looks like a saved compiled model."""
    return (Path(folder) / artefact.RECIPE).is_file()


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ArtefactError(f"{path.parent} has no {path.name}: it is not a compiled model, or incomplete.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtefactError(f"{path} is not JSON, it may be truncated: {error}.") from error
    if not isinstance(data, dict):
        raise ArtefactError(f"{path} holds no JSON object.")
    return data
