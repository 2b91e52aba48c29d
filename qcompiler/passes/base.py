"""What a pass is: a frozen dataclass whose fields are its options, with ``wants`` and ``run``."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy.typing as npt
import onnx_ir as ir

from qcompiler.capability import Capability
from qcompiler.core import FoldPlan, Note, StatRequest
from qcompiler.graph.run import Feeds
from qcompiler.scheme import Scheme

Distilled = Callable[[ir.Model, ir.Model, Mapping[str, float], Iterable[Feeds], int], Mapping[str, npt.NDArray[Any]]]
"""Of a float model, a fake-quantized one, the learning rates of some of its initializers, batches and their number:
what these initializers have become when the outputs came nearer to the float model's."""
Stats = Mapping[StatRequest, Any]
"""Results of the observers, by request."""


@dataclasses.dataclass
class Context:
    """What a pass may know beside the model and its statistics.

    Attributes:
        scheme: what is to be quantized, and how.
        capability: what the target can run.
        seed: for every random choice.
        distill: trains weights; see :data:`Distilled`. The driver gives it, since training stands above the passes.
        data: the calibration feeds, for passes that go through the model piece by piece; None: there are none.
        text: general text as feeds of the model, for passes that have few samples; empty where the model takes none.
        float_model: the model as it was just before ``insert``, which leaves it here; None before that.
        collect: statistics of another model than the one being rewritten (quantized upstream, say), in one run over the
            calibration data; None: there is no data.
    """

    scheme: Scheme
    capability: Capability
    seed: int = 0
    float_model: ir.Model | None = None
    collect: Callable[[ir.Model, Sequence[StatRequest]], Stats] | None = None
    distill: Distilled | None = None
    data: Iterable[Feeds] | None = None
    text: Callable[[], Sequence[Feeds]] = tuple


@dataclasses.dataclass(frozen=True)
class PassResult:
    """What a pass did: whether the model changed, its decisions, and the folds it made."""

    changed: bool
    notes: tuple[Note, ...] = ()
    plans: tuple[FoldPlan, ...] = ()


class Pass(abc.ABC):
    """One rewrite of the canonical graph. Subclasses are frozen dataclasses; every stage they leave is a valid model.

    ``float_exact`` says that the pass is the identity in float arithmetic: the driver then compares the model's outputs
    on calibration data before and after.

    ``by_weight`` says that, without calibration data, it treats every weight of a Linear by itself: it may then run on
    one weight at a time (see :mod:`qcompiler.streamed`).
    """

    name: ClassVar[str]
    float_exact: ClassVar[bool] = False
    by_weight: ClassVar[bool] = False

    def wants(self, model: ir.Model, ctx: Context) -> list[StatRequest]:
        """The statistics this pass needs of the model as it stands; all are collected in one run over the data."""
        return []

    @abc.abstractmethod
    def run(self, model: ir.Model, stats: Stats, ctx: Context) -> PassResult:
        """Rewrite ``model`` in place."""
