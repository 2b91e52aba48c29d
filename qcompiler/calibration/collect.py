"""One run over the data for all statistics of a pipeline step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sized
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import rich.console
import rich.progress

from qcompiler.calibration.observers import Observer, make_observer
from qcompiler.calibration.observers.base import Rows, Samples, as_rows, not_finite
from qcompiler.calibration.origin import first_nan
from qcompiler.core import DataError, ModelError, StatRequest
from qcompiler.graph.experts import Chosen, chosen, of_all_rows
from qcompiler.graph.run import Feeds, Runner

MASK = "attention_mask"


def collect(
    model: ir.Model,
    batches: Iterable[Feeds],
    requests: Iterable[StatRequest],
    *,
    seed: int = 0,
    progress: bool = True,
    threads: int = 0,
) -> dict[StatRequest, Any]:
    """Run the model once over the data and return what each request asks for.

    Values of rank above 2 are read as rows of their last axis; rows of padding (``attention_mask`` is 0) are dropped.
    What an expert reads that no row chose is judged by all rows that there are.
    Equal requests share one observer, and an array is freed as soon as its observers have seen it, so memory does not
    grow with the data.

    Args:
        batches: feeds of the model, one dict for each run.
        requests: an empty list does not run the model.
        seed: of the row samples.
        progress: show a bar on stderr while it runs.
        threads: intra-op threads; 0 leaves the number to ONNX Runtime.

    Raises:
        DataError: there is no data, only padding, or a value is NaN or infinite.
        ModelError: a request names a value that the graph does not have.
        OptionError: a request names an unknown observer.
    """
    observers = {request: make_observer(request.observer, request.axis, seed) for request in dict.fromkeys(requests)}
    if not observers:
        return {}
    by_value: dict[str, list[Observer]] = {}
    for request, observer in observers.items():
        by_value.setdefault(request.value, []).append(observer)
    _check_names(model, by_value)
    gathered = parts_of_experts(model, by_value)
    taps = [value.name or "" for part in gathered.values() for value in (part.rows, part.inverse)]
    runner = Runner(model, [*by_value, *taps], threads)
    ran = False
    first = 0
    for index, feeds in enumerate(shown(batches, "calibrating", progress)):
        ran = True
        _observe(model, runner, feeds, by_value, gathered, index, first)
        first += samples_in(feeds)
    if not ran:
        raise DataError("the calibration data is empty: give at least one batch.")
    unseen = [request for request, observer in observers.items() if request.value in gathered and not observer.seen]
    again = model.clone() if unseen else model
    everywhere = of_all_rows(again, dict.fromkeys(request.value for request in unseen))
    asked = {request: dataclasses.replace(request, value=everywhere[request.value]) for request in unseen}
    instead = collect(again, batches, asked.values(), seed=seed, progress=progress, threads=threads)
    return {
        request: instead[asked[request]] if request in asked else _result(request, observer)
        for request, observer in observers.items()
    }


def parts_of_experts(model: ir.Model, names: Iterable[str]) -> dict[str, Chosen]:
    """Which of these values hold only rows that chose an expert, and which rows those are."""
    wanted = set(names)
    found = {
        output.name: part
        for node in model.graph
        for output in node.outputs
        if output.name in wanted and (part := chosen(output)) is not None
    }
    return {name: part for name, part in found.items() if name is not None}


def _observe(
    model: ir.Model,
    runner: Runner,
    feeds: Feeds,
    by_value: dict[str, list[Observer]],
    gathered: dict[str, Chosen],
    index: int,
    first: int,
) -> None:
    """Run one batch, whose first sample has the number ``first``."""
    mask = feeds.get(MASK)
    arrays = runner(feeds)
    places = {
        name: (arrays[part.rows.name or ""], len(arrays[part.inverse.name or ""])) for name, part in gathered.items()
    }
    for name in arrays.keys() - by_value.keys():
        del arrays[name]
    for name, observers in by_value.items():
        rows, samples = unpadded(arrays.pop(name), mask, samples_in(feeds), places.get(name))
        if (fault := not_finite(rows)) is not None:
            origin = first_nan(model, feeds, name) if fault == "NaN" else None
            raise DataError(
                f"value {name!r} holds {fault} in calibration batch {index}"
                + (f"; NaN first appears in {origin}." if origin else ".")
            )
        for observer in observers:
            observer.observe(rows, samples + first)


def unpadded(
    x: npt.NDArray[Any],
    mask: npt.NDArray[Any] | None,
    batch: int,
    place: tuple[npt.NDArray[Any], int] | None = None,
) -> tuple[Rows, Samples]:
    """A value without rows whose token is masked out, float32 [rows, channels], and the sample of each, int64 [rows].

    A value is masked where its leading axes are the mask's [batch, sequence], where it is [batch · sequence, channels],
    or where it is [batch, heads, sequence, channels]; any other is kept whole. Rows are shared out evenly among the
    ``batch`` samples; where that cannot be, they all are of the first.

    Args:
        place: where the rows of ``x`` come from, if they are some of another value's: int64 [rows], their places among
            its rows, and how many those are (a multiple of the mask's: as many for each token).
    """
    rows = as_rows(x)
    number = len(rows) if place is None else place[1]
    samples = np.arange(number) // (number // batch) if number and number % batch == 0 else np.zeros(number, np.int64)
    if place is not None:
        kept = _of_tokens(number, mask)[place[0]]
        return rows[kept], samples[place[0]][kept]
    whole = _kept(x, mask)
    return (rows, samples) if whole is None else (rows[whole], samples[whole])


def _of_tokens(number: int, mask: npt.NDArray[Any] | None) -> npt.NDArray[np.bool_]:
    """Which of ``number`` rows, as many for each token, are no padding."""
    real = np.ones(1, bool) if mask is None else np.asarray(mask).reshape(-1) != 0
    return np.repeat(real, number // len(real)) if number % len(real) == 0 else np.ones(number, bool)


def _kept(x: npt.NDArray[Any], mask: npt.NDArray[Any] | None) -> npt.NDArray[np.bool_] | None:
    """Which of the value's rows are no padding, bool [rows]; None: all."""
    if mask is None or np.all(real := np.asarray(mask) != 0):
        return None
    if x.ndim > real.ndim and x.shape[: real.ndim] == real.shape:
        inner = x.shape[real.ndim : -1]
        return np.repeat(real.reshape(-1), int(np.prod(inner)))
    if real.ndim == 2 and x.ndim == 4 and (x.shape[0], x.shape[2]) == real.shape:
        return np.repeat(real[:, None], x.shape[1], axis=1).reshape(-1)
    return real.reshape(-1) if x.ndim == 2 and x.shape[0] == real.size else None


def samples_in(feeds: Feeds) -> int:
    """Samples of a batch: the leading axis of the mask, or of the first input that has one."""
    arrays = [np.asarray(feeds[MASK])] if MASK in feeds else [np.asarray(array) for array in feeds.values()]
    return next((len(array) for array in arrays if array.ndim), 1) or 1


def _result(request: StatRequest, observer: Observer) -> Any:
    try:
        return observer.result()
    except DataError as error:
        raise DataError(f"value {request.value!r}: {error}") from None


def _check_names(model: ir.Model, wanted: Iterable[str]) -> None:
    known = {value.name for value in model.graph.inputs}
    known.update(output.name for node in model.graph for output in node.outputs)
    if missing := [name for name in wanted if name not in known]:
        raise ModelError(f"the graph has no value {missing[0]!r} to observe.")


def shown(batches: Iterable[Feeds], what: str, progress: bool, total: int | None = None) -> Iterable[Feeds]:
    """The batches, with a bar on stderr while one goes through them; ``total``: how many, if they have no length."""
    console = rich.console.Console(stderr=True)
    if not progress or not console.is_terminal:
        return batches
    total = len(batches) if isinstance(batches, Sized) else total
    return rich.progress.track(batches, what, total=total, console=console, transient=True)
