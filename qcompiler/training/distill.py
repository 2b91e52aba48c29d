"""Training a fake-quantized graph to say what the float graph says (Hinton et al. 2015), on any inputs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from qcompiler.calibration.collect import MASK, shown
from qcompiler.core import ModelError
from qcompiler.graph.run import Feeds, Runner
from qcompiler.graph.stream_ends import is_norm
from qcompiler.training.rebuild import rebuild

_WARM_UP = 20  # updates, while Adam's averages fill up


def distill(
    teacher: ir.Model,
    student: ir.Model,
    rates: Mapping[str, float],
    batches: Iterable[Feeds],
    steps: int,
    progress: bool = True,
) -> dict[str, npt.NDArray[Any]]:
    """Train initializers of the student by Adam until its outputs, and those of its norms, come near the teacher's.

    The loss is the sum of their squared errors, each relative to what the teacher has there; padding does not count.
    Norms lie between all Linears of a Transformer, and what they put out is of one size: errors there are felt, and
    found, before they have gone through the rest of the model.

    Args:
        teacher: the canonical float graph.
        student: the same graph with fake-quants; it is not changed.
        rates: Adam's learning rate of each initializer that is trained, at first; it falls to 0 along a cosine.
        batches: feeds, one for each update.
        steps: how many there are.
        progress: show a bar on stderr.

    Returns:
        The trained initializers by name.

    Raises:
        ModelError: the loss is no longer finite, or a node cannot be trained through.
    """
    norms = [node.outputs[0].name or "" for node in teacher.graph if is_norm(node)]
    there = {output.name for node in student.graph for output in node.outputs}
    taps = [name for name in norms if name in there]
    run, learner = Runner(teacher, taps), rebuild(student, taps)
    for name in rates:
        learner.weights[name].requires_grad_(True)
    optimizer = torch.optim.Adam(
        [{"params": [learner.weights[name]], "lr": rate} for name, rate in rates.items()], betas=(0.9, 0.99), fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    for step, feeds in enumerate(shown(batches, "distilling", progress, steps)):
        wanted, got = run(feeds), learner(**feeds)
        mask = feeds.get(MASK)
        loss = torch.stack([_relative_error(got[name], wanted[name], mask) for name in got]).sum()
        if not torch.isfinite(loss):
            raise ModelError(f"distillation: the loss is {loss.item()} at step {step}: give a lower rate.")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return {name: learner.weights[name].detach().numpy() for name in rates}


def _relative_error(got: Tensor, wanted: npt.NDArray[Any], mask: npt.NDArray[Any] | None) -> Tensor:
    """Σ(got - wanted)² / Σ wanted² over positions that are no padding."""
    target = torch.from_numpy(wanted)
    if mask is not None and wanted.shape[: np.ndim(mask)] == np.shape(mask):
        kept = torch.from_numpy(np.asarray(mask) != 0)
        got, target = got[kept], target[kept]
    return (got - target).square().sum() / target.square().sum().clamp_min(1e-12)
