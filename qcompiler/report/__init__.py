"""What was done to every layer, why, and what it cost: data, measurement, tables."""

from qcompiler.report.build import build, peak_rss
from qcompiler.report.data import LinearRow, Report

__all__ = ["LinearRow", "Report", "build", "peak_rss"]
