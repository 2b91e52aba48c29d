"""The table of observers; each is loaded when first used. A new observer is one file and one line here."""

from __future__ import annotations

from qcompiler.calibration.observers.base import Observer
from qcompiler.core import OptionError
from qcompiler.spelling import build_from_table, parse_spelling

__all__ = ["OBSERVERS", "Observer", "make_observer"]

OBSERVERS = {
    "minmax": "qcompiler.calibration.observers.minmax:MinMax",
    "ema": "qcompiler.calibration.observers.ema:Ema",
    "moving": "qcompiler.calibration.observers.moving:Moving",
    "percentile": "qcompiler.calibration.observers.percentile:Percentile",
    "kl": "qcompiler.calibration.observers.kl:KL",
    "mse": "qcompiler.calibration.observers.mse:MSE",
    "absmax": "qcompiler.calibration.observers.absmax:AbsMax",
    "absmean": "qcompiler.calibration.observers.absmean:AbsMean",
    "rows": "qcompiler.calibration.observers.rows:RowSample",
    "folds": "qcompiler.calibration.observers.folds:Folds",
    "means": "qcompiler.calibration.observers.means:Means",
    "meansquare": "qcompiler.calibration.observers.meansquare:MeanSquare",
    "hessian": "qcompiler.calibration.observers.hessian:Hessian",
}


def make_observer(spelling: str, axis: int | None = None, seed: int = 0) -> Observer:
    """The observer of a spelling such as ``"percentile{percent=99.9}"``, with nothing observed yet.

    Args:
        axis: -1 keeps one result for each channel (last axis), None one for the whole tensor.
        seed: of its random choices (RowSample).

    Raises:
        OptionError: an unknown observer or option, with the nearest names, or one that cannot keep channels apart.
    """
    items = parse_spelling(spelling)
    if len(items) != 1:
        raise OptionError(f"{spelling!r} must name one observer, such as minmax or percentile{{percent=99.9}}.")
    name, options = items[0]
    observer: Observer = build_from_table("observer", OBSERVERS, name, options)
    if axis not in observer.axes:
        raise OptionError(f"observer {name!r} knows axis {' or '.join(map(str, observer.axes))}, not {axis}.")
    observer.axis = axis
    observer.seed = seed
    return observer
