"""The model on its way through the passes."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import onnx_ir as ir

from qcompiler.calibration.collect import collect
from qcompiler.core import DataError, FoldPlan, ModelError, Note, StatRequest
from qcompiler.graph.canonical import check
from qcompiler.graph.run import Feeds, save_model
from qcompiler.graph.verify import compare_outputs
from qcompiler.passes.base import Context, Pass, Stats
from qcompiler.scheme import Scheme

COMPARED_BATCHES = 2
FLOAT_TOLERANCE = 1e-4
"""Relative difference of the model's outputs that a float-exact pass may leave; measured ones are below 1e-5."""


class Pipeline:
    """Applies passes one by one: statistics first, then the pass, then the checks.

    Attributes:
        model: the graph, rewritten in place.
        transformed: it after the last float-exact pass: what the layer errors are measured against.
        notes, plans: what the passes decided so far.
    """

    def __init__(
        self,
        model: ir.Model,
        batches: Iterable[Feeds] | None,
        context: Context,
        *,
        stages: Callable[[str], AbstractContextManager[None]],
        progress: bool,
        dump: Path | None = None,
    ) -> None:
        """
        Args:
            batches: calibration feeds, readable as often as needed; None: there are none.
            stages: wraps each pass, by name, to show and time it.
            progress: show the runs over the data.
            dump: a folder where the model is saved after every pass.
        """
        self.model = model
        self.transformed = model
        self.notes: list[Note] = []
        self.plans: list[FoldPlan] = []
        self._batches, self._context = batches, context
        context.data = batches
        self._stages, self._progress = stages, progress
        self._dump, self._count = dump, 0
        if batches is not None:
            context.collect = functools.partial(self._collect, batches)

    @property
    def scheme(self) -> Scheme:
        """What is quantized, and how."""
        return self._context.scheme

    def fork(self, scheme: Scheme | None = None, trial: bool = True) -> Pipeline:
        """A copy at this point of the way; with another ``scheme`` than the run's it is a ``trial``, neither shown nor
        timed nor dumped."""
        fork = copy.copy(self)
        fork.model, fork.notes, fork.plans = self.model.clone(), list(self.notes), list(self.plans)
        fork._context = dataclasses.replace(self._context, scheme=scheme or self._context.scheme)
        if scheme is not None and trial:
            fork._stages, fork._progress, fork._dump = lambda name: nullcontext(), False, None
        return fork

    def apply(self, item: Pass) -> None:
        """Collect what the pass wants, run it, and check what it left.

        Raises:
            DataError: it wants statistics and there is no data.
            ModelError: it left the canonical form, or was to be exact in float and is not.
        """
        with self._stages(item.name):
            requests = item.wants(self.model, self._context)
            if requests and self._batches is None:
                raise DataError(
                    f"pass {item.name!r} needs activation statistics: give calibration data or choose a dynamic scheme."
                )
            batches = self._batches or ()
            stats = self._collect(batches, self.model, requests)
            before = self.model.clone() if item.float_exact and self._batches is not None else None
            result = item.run(self.model, stats, self._context)
            check(self.model)
            if before is not None and result.changed:
                self._check_exact(item, before, batches)
        if item.float_exact:
            self.transformed = self.model.clone()
        self.notes += result.notes
        self.plans += result.plans
        if self._dump is not None:
            folder = self._dump / f"{self._count:02d}-{item.name}"
            folder.mkdir(parents=True, exist_ok=True)
            save_model(self.model, folder / "model.onnx")
        self._count += 1

    def _collect(self, batches: Iterable[Feeds], model: ir.Model, requests: Sequence[StatRequest]) -> Stats:
        return collect(model, batches, requests, seed=self._context.seed, progress=self._progress)

    def _check_exact(self, item: Pass, before: ir.Model, batches: Iterable[Feeds]) -> None:
        difference = compare_outputs(before, self.model, itertools.islice(batches, COMPARED_BATCHES))
        if not difference <= FLOAT_TOLERANCE:
            raise ModelError(
                f"pass {item.name!r} changed the model's float outputs by {difference:.1e}, more than "
                f"{FLOAT_TOLERANCE:.0e}: leave it out with passes=..., and please report the model."
            )
        why = f"relative difference {difference:.1e} on calibration data"
        self.notes.append(Note(item.name, "outputs compared", why))
