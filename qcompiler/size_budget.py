"""max_size: bits for each Linear such that the saved model keeps to a size and loses as little as may be."""

from __future__ import annotations

import dataclasses
import glob
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompiler.budget import F
from qcompiler.capability import Capability
from qcompiler.core import Note, OptionError
from qcompiler.graph.edit import array_of
from qcompiler.graph.linear import Linear
from qcompiler.graph.run import Feeds, save_model
from qcompiler.numerics.knapsack import cheapest
from qcompiler.passes.base import Pass
from qcompiler.passes.judging import quantized
from qcompiler.passes.pipeline import Pipeline
from qcompiler.scheme import BITS, DTYPES, Scheme
from qcompiler.size_plan import FLOAT, Losses, Plan
from qcompiler.targets.base import Target

NOTE = "max_size"
TRIES = 4
"""Models to finish at most: transforms may add a few numbers that the choice did not count."""
_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "ki": 1024, "mi": 1024**2, "gi": 1024**3}


def parse_size(given: Any) -> int:
    """Bytes of ``40_000_000``, "40MB" or "1.5 GiB".

    Raises:
        OptionError: not of that form.
    """
    if isinstance(given, int) and not isinstance(given, bool) and given > 0:
        return given
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?)?b?\s*", str(given).lower())
    size = int(float(match[1]) * _UNITS[match[2] or ""]) if match and isinstance(given, str) else 0
    if size <= 0:
        raise OptionError(f"max_size is {given!r}: write bytes, or a text like '40MB' or '1.5GiB'.")
    return size


def check_size(scheme: Scheme, target: Target, passes: Sequence[Pass], calibrated: bool) -> None:
    """Refuse what no size can be spent on.

    Raises:
        OptionError: no data, weights that are no integers, a target that saves more than a graph, or no pass that would
            carry the choice out.
    """
    names = [item.name for item in passes]
    if not calibrated:
        raise OptionError("max_size measures what each Linear's bits cost: give calibration samples.")
    if scheme.weight.dtype not in DTYPES:
        raise OptionError(f"max_size chooses bits of integers, and scheme {scheme.name!r} has {scheme.weight.dtype}.")
    if not target.runs_graph:
        raise OptionError(f"max_size counts the bytes of model.onnx, and target {target.name!r} saves more than that.")
    missing = [name for name in ("annotate", "insert", "fold") if name not in names]
    if missing:
        raise OptionError(f"max_size needs {' and '.join(missing)} among the passes, which are {', '.join(names)}.")


@dataclasses.dataclass(frozen=True)
class SizeBudget:
    """How large the saved model may be, and what is known to choose by.

    Attributes:
        limit: bytes of model.onnx and its data.
        search: samples that the errors are measured and choices compared on.
        scheme, target, capability: what may be chosen, and what it takes.
        stages: shows and times the search.
    """

    limit: int
    search: Iterable[Feeds]
    scheme: Scheme
    target: Target
    capability: Capability
    stages: Callable[[str], AbstractContextManager[None]]

    def spend(self, work: Pipeline, passes: Sequence[Pass], finish: Callable[[Pipeline], F]) -> F:
        """Measure, choose, and finish the model with the bits that were chosen; they stand in its scheme.

        Args:
            work: the canonical float model.
            passes: all of them; those from ``annotate`` on are tried with each width.
            finish: what comes after the passes.

        Raises:
            OptionError: even the cheapest choice is larger; the least that can be reached is told.
        """
        with self.stages(NOTE):
            plan = self._plan(work, passes)
        capacity = self.limit - plan.fixed
        for _ in range(TRIES):
            if cheapest(plan.sizes) > capacity:
                break
            choice, compared = plan.choose(capacity)
            trial = work.fork(self._decided(plan, choice), trial=False)
            for item in passes:
                trial.apply(item)
            finished = finish(trial)
            saved = saved_bytes(finished.work.model)
            if saved <= self.limit:
                finished.work.notes += self._notes(plan, choice, saved, compared)
                return finished
            capacity -= max(saved - plan.bytes(choice), 1)
        least = self.limit - capacity + cheapest(plan.sizes)
        raise OptionError(
            f"max_size={self.limit} bytes cannot be reached: with all Linears as small as scheme {self.scheme.name!r} "
            f"and target {self.target.name!r} allow, the model takes {least}; allow that much."
        )

    def _widths(self) -> list[int]:
        spec = self.scheme.weight
        return [bits for bits in BITS if self.capability.runs(spec.with_bits(bits), self.scheme.activation)]

    def _plan(self, work: Pipeline, passes: Sequence[Pass]) -> Plan:
        tail = passes[[item.name for item in passes].index("annotate") :]
        free = [line for line in quantized(work.model, self.scheme) if self.scheme.bits_of(line.name) is None]
        groups = _tied(free)
        widths = self._widths()
        trials = []
        for bits in widths:
            trial = work.fork(dataclasses.replace(self.scheme, bits=(("*", bits), *self.scheme.bits)))
            for item in tail:
                trial.apply(item)
            trials.append(trial.model)
        names = tuple(tuple(line.name for line in group) for group in groups)
        losses = Losses(work.model, trials, names, self.search)
        sizes = [[_float_bytes(group)] for group in groups]
        fixed = []
        for model in trials:
            nodes = self.target.lower(model).nodes
            stored = {node.name: node for node in model.graph}
            numbers = _numbers(free, nodes)
            for group, options in zip(groups, sizes, strict=True):
                taken = {nodes[line.name] for line in group if line.name in nodes}
                own = sum(_numbers(group, nodes).values())
                whole, among = _constant_bytes(stored[name] for name in taken), sum(numbers[name] for name in taken)
                options.append(whole * own // among if taken else options[FLOAT])
            fixed.append(saved_bytes(model) - sum(options[-1] for options in sizes))
        return Plan(names, widths, sizes, losses.alone(), min(fixed), losses)

    def _decided(self, plan: Plan, choice: Sequence[int]) -> Scheme:
        bits = tuple(
            (glob.escape(name), 16 if option == FLOAT else plan.widths[option - 1])
            for names, option in zip(plan.groups, choice, strict=True)
            for name in names
        )
        return dataclasses.replace(self.scheme, bits=(*self.scheme.bits, *bits))

    def _notes(self, plan: Plan, choice: Sequence[int], saved: int, compared: str) -> list[Note]:
        counts = [sum(len(g) for g, o in zip(plan.groups, choice, strict=True) if o == i) for i in range(len(BITS) + 1)]
        words = ["in float", *(f"in {bits} bits" for bits in plan.widths)]
        spent = ", ".join(f"{count} {word}" for count, word in zip(counts, words, strict=False) if count)
        lost = sum(errors[option] for errors, option in zip(plan.errors, choice, strict=True))
        told = [Note(NOTE, f"{self.limit} bytes at most", f"{saved} bytes saved; Linears: {spent}; error {lost:.1e}")]
        told.append(Note(NOTE, "chosen", compared))
        for names, errors, sizes, option in zip(plan.groups, plan.errors, plan.sizes, choice, strict=True):
            texts = [f"{w} {e:.1e}, {s} bytes" for w, e, s in zip(words, errors, sizes, strict=True)]
            told += [Note(name, words[option], f"max_size, error alone: {'; '.join(texts)}") for name in names]
        return told


def saved_bytes(model: ir.Model) -> int:
    """Bytes of model.onnx and its data, as they are saved."""
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder) / "model.onnx")
        return sum(path.stat().st_size for path in Path(folder).iterdir())


def _tied(free: Iterable[Linear]) -> list[list[Linear]]:
    groups: dict[ir.Value, list[Linear]] = {}
    for linear in free:
        groups.setdefault(linear.weight, []).append(linear)
    return list(groups.values())


def _numbers(found: Iterable[Linear], nodes: Mapping[str, str]) -> Mapping[str, int]:
    """How many weights each lowered node multiplies by: experts share one."""
    numbers: dict[str, int] = {}
    for linear in found:
        if (name := nodes.get(linear.name)) is not None:
            numbers[name] = numbers.get(name, 0) + linear.in_features * linear.out_features
    return numbers


def _float_bytes(group: Sequence[Linear]) -> int:
    """Weight and biases; a weight that something else reads too costs nothing more in float."""
    weight = group[0].weight
    alone = {node for node, _ in weight.uses()} <= {linear.matmul for linear in group}
    values = {linear.bias for linear in group if linear.bias is not None} | ({weight} if alone else set())
    return sum(array.nbytes for value in values if (array := array_of(value)) is not None)


def _constant_bytes(nodes: Iterable[ir.Node]) -> int:
    """Bytes of the initializers that these nodes read, through nodes that read nothing but constants too."""
    found: set[ir.Value] = set()
    todo = [value for node in nodes for value in node.inputs if value is not None]
    while todo:
        value = todo.pop()
        producer = value.producer()
        if value.is_initializer():
            found.add(value)
        elif producer is not None and producer.op_type == "DequantizeLinear":
            todo += [each for each in producer.inputs if each is not None]
    return sum(value.const_value.nbytes for value in found if value.const_value is not None)
