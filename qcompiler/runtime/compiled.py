"""CompiledModel: what a compile returns and what a saved folder loads as."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from qcompiler.core import ArtefactError, Companion, DataError, Executable, FoldPlan, ModelError, OptionError
from qcompiler.graph.run import open_session, save_model, session_options
from qcompiler.report.data import Report
from qcompiler.report.render import to_markdown
from qcompiler.runtime import artefact
from qcompiler.runtime.artefact import refuse_existing
from qcompiler.runtime.recipe import RECIPE_VERSION, recipe_text

__all__ = ["RECIPE_VERSION", "CompiledModel", "refuse_existing"]


class CompiledModel:
    """A lowered model with its recipe, report and fold plans.

    Attributes:
        model: the lowered graph.
        recipe: what makes this artefact again, JSON-ready.
        report: what was done to every Linear, why, and what it cost.
        plans: what the transforms folded or inserted.
        tokenizer: the source's tokenizer.json, copied along by :meth:`save`; None: there is none.
        path: the saved ``model.onnx`` where this was loaded from; None: in memory only.
        executable: what runs, where the target makes something else than a graph for ONNX Runtime; then ``model`` is
            the canonical quantized graph that it was made from.
        companion: the weights in another format, written along by :meth:`save`; None: there is none.
    """

    def __init__(
        self,
        model: ir.Model,
        recipe: Mapping[str, Any],
        report: Report,
        plans: tuple[FoldPlan, ...] = (),
        tokenizer: Path | None = None,
        path: Path | None = None,
        executable: Executable | None = None,
        companion: Companion | None = None,
    ) -> None:
        self.model = model
        self.recipe = dict(recipe)
        self.report = report
        self.plans = tuple(plans)
        self.tokenizer = tokenizer
        self.path = path
        self.executable = executable
        self.companion = companion
        self._sessions: dict[int | ort.SessionOptions, ort.InferenceSession] = {}

    @property
    def inputs(self) -> dict[str, ir.Value]:
        """What :meth:`run` wants fed, by name."""
        return {v.name or "": v for v in self.model.graph.inputs if v.name not in self.model.graph.initializers}

    @property
    def outputs(self) -> list[str]:
        """Names of what :meth:`run` returns."""
        return [value.name or "" for value in self.model.graph.outputs]

    def run(
        self,
        feeds: Mapping[str, npt.NDArray[Any]],
        *,
        threads: int = 0,
        session_options: ort.SessionOptions | None = None,
    ) -> dict[str, npt.NDArray[Any]]:
        """Run once, in ONNX Runtime or, where the target made one, in the executable.

        Args:
            feeds: an array for each input, by name.
            threads: intra-op threads; 0 leaves the number to ONNX Runtime or the executable.
            session_options: ONNX Runtime's own options, in place of ``threads``; an executable has none.

        Returns:
            The outputs by name.

        Raises:
            DataError: names, ranks, dtypes or fixed dimensions do not fit the inputs.
            ModelError: ONNX Runtime or the executable fails.
            OptionError: ``session_options`` for an executable.
        """
        arrays = self.check(feeds)
        if self.executable is not None:
            if session_options is not None:
                raise OptionError(f"session_options are ONNX Runtime's: {self.recipe.get('target')} has none.")
            return self.executable.run(arrays, threads)
        session = self.session(threads, session_options)
        try:
            results = session.run(None, arrays)
        except Exception as error:
            raise ModelError(f"the compiled model failed to run: {str(error).splitlines()[0]}") from error
        return dict(zip((value.name for value in session.get_outputs()), results, strict=True))

    def session(self, threads: int = 0, options: ort.SessionOptions | None = None) -> ort.InferenceSession:
        """The ONNX Runtime session, opened on first use and kept for each number of threads or options object."""
        key: int | ort.SessionOptions = threads if options is None else options
        if key not in self._sessions:
            self._sessions[key] = self._open(options or session_options(threads))
        return self._sessions[key]

    def save(self, folder: str | os.PathLike[str], force: bool = False, *, through: Path | None = None) -> Path:
        """Write model.onnx, its data, recipe.json, report.json, report.md, fold plans, tokenizer: all or nothing.

        The same compile gives the same bytes, but for the seconds and the memory that the report tells.

        Args:
            folder: must not exist, unless ``force``; then a compiled model there is replaced.
            force: replace.
            through: where to write before the rename, on the same disk; None: beside ``folder``.

        Returns:
            The folder.

        Raises:
            ArtefactError: the folder exists, or cannot be written.
        """
        folder = Path(folder)
        with artefact.replacing(folder, force, through) as partial:
            save_model(self.model, partial / artefact.MODEL)
            if self.executable is not None:
                self.executable.save(partial)
            if self.companion is not None:
                self.companion.save(partial)
            artefact.save_plans(self.plans, partial / artefact.FOLDS)
            if self.tokenizer is not None:
                shutil.copyfile(self.tokenizer, partial / artefact.TOKENIZER)
            recipe = {**self.recipe, "files": artefact.sizes(partial)}
            _write(partial / artefact.RECIPE, recipe_text(recipe))
            _write(partial / artefact.REPORT, self.report.to_text())
            _write(partial / artefact.REPORT_TEXT, to_markdown(self.report))
        return folder

    def __repr__(self) -> str:
        quantized = sum(row.quantized for row in self.report.rows)
        return (
            f"CompiledModel({self.recipe.get('source', {}).get('name')!r}, target {self.recipe.get('target')!r}, "
            f"{quantized} of {len(self.report.rows)} Linears quantized)"
        )

    def _open(self, options: ort.SessionOptions) -> ort.InferenceSession:
        if self.path is None:
            return open_session(self.model, options)
        try:
            return ort.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ArtefactError(f"ONNX Runtime cannot open {self.path}: {str(error).splitlines()[0]}") from error

    def check(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """The feeds as arrays.

        Raises:
            DataError: names, ranks, dtypes or fixed dimensions do not fit the inputs.
        """
        wanted = self.inputs
        missing, unknown = sorted(wanted.keys() - feeds.keys()), sorted(feeds.keys() - wanted.keys())
        if missing or unknown:
            faults = [f"{what} {', '.join(names)}" for what, names in (("no", missing), ("unknown", unknown)) if names]
            raise DataError(f"the feeds have {' and '.join(faults)}: the inputs are {', '.join(sorted(wanted))}.")
        arrays = {name: np.asarray(array) for name, array in feeds.items()}
        for name, value in wanted.items():
            check_feed(name, arrays[name], value)
        return arrays


def check_feed(name: str, array: npt.NDArray[Any], value: ir.Value) -> None:
    """Compare one array with the graph input it is for.

    Raises:
        DataError: another dtype, rank or fixed dimension.
    """
    if value.dtype is not None and array.dtype != value.dtype.numpy():
        raise DataError(f"input {name!r} is {array.dtype}, and the model wants {value.dtype.numpy()}.")
    if value.shape is None:
        return
    dims = [dim if isinstance(dim, int) else None for dim in value.shape]
    fits = len(dims) == array.ndim and all(d in (None, n) for d, n in zip(dims, array.shape, strict=True))
    if not fits:
        shape = ", ".join(str(dim) for dim in value.shape)
        raise DataError(f"input {name!r} has shape {list(array.shape)}, and the model wants [{shape}].")


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
