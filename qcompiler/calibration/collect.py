"""One run over the data for all statistics of a pipeline step."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import rich.console
import rich.progress

from qcompiler.calibration.observers import Observer, make_observer
from qcompiler.calibration.observers.base import Rows, as_rows, not_finite
from qcompiler.calibration.origin import first_nan
from qcompiler.core import DataError, ModelError, StatRequest
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
    runner = Runner(model, list(by_value), threads)
    ran = False
    for index, feeds in enumerate(_shown(batches, progress)):
        ran = True
        _observe(model, runner, feeds, by_value, index)
    if not ran:
        raise DataError("the calibration data is empty: give at least one batch.")
    return {request: _result(request, observer) for request, observer in observers.items()}


def _observe(model: ir.Model, runner: Runner, feeds: Feeds, by_value: dict[str, list[Observer]], index: int) -> None:
    mask = feeds.get(MASK)
    arrays = runner(feeds)
    for name in arrays.keys() - by_value.keys():
        del arrays[name]
    for name, observers in by_value.items():
        rows = unpadded(arrays.pop(name), mask)
        if (fault := not_finite(rows)) is not None:
            origin = first_nan(model, feeds, name) if fault == "NaN" else None
            raise DataError(
                f"value {name!r} holds {fault} in calibration batch {index}"
                + (f"; NaN first appears in {origin}." if origin else ".")
            )
        for observer in observers:
            observer.observe(rows)


def unpadded(x: npt.NDArray[Any], mask: npt.NDArray[Any] | None) -> Rows:
    """float32 [rows, channels] of a value, without the rows whose token is masked out.

    A value is masked where its leading axes are the mask's [batch, sequence], where it is [batch · sequence, channels],
    or where it is [batch, heads, sequence, channels]; any other is kept whole.
    """
    if mask is None or np.all(kept := np.asarray(mask) != 0):
        return as_rows(x)
    if x.ndim > kept.ndim and x.shape[: kept.ndim] == kept.shape:
        return as_rows(x[kept])
    if kept.ndim == 2 and x.ndim == 4 and (x.shape[0], x.shape[2]) == kept.shape:
        return as_rows(x.transpose(0, 2, 1, 3)[kept])
    if x.ndim == 2 and x.shape[0] == kept.size:
        return as_rows(x[kept.reshape(-1)])
    return as_rows(x)


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


def _shown(batches: Iterable[Feeds], progress: bool) -> Iterable[Feeds]:
    console = rich.console.Console(stderr=True)
    if not progress or not console.is_terminal:
        return batches
    total = len(batches) if isinstance(batches, Sized) else None
    return rich.progress.track(batches, "calibrating", total=total, console=console, transient=True)
