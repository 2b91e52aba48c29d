"""Statistics of inner values over calibration data, in constant memory."""

from qcompiler.calibration.collect import collect
from qcompiler.calibration.observers import make_observer

__all__ = ["collect", "make_observer"]
