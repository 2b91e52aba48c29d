"""max_drop: quantize as fast as a budget of accuracy allows, proved on samples that the search did not see."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

import onnx_ir as ir

from qcompiler.capability import Capability
from qcompiler.core import Note, OptionError
from qcompiler.graph.run import Feeds, Runner
from qcompiler.graph.switch import Switch
from qcompiler.numerics.budget import first_safe, spread, taken, upgrades
from qcompiler.passes.base import Pass
from qcompiler.passes.budget import FLOAT, Decisions, Site, decide, decisions, describe, options, prepare, sites
from qcompiler.passes.pipeline import Pipeline
from qcompiler.report.errors import fixed_batch, sliced
from qcompiler.runtime.drop import Drop, MaxDrop, Verdict
from qcompiler.scheme import Scheme
from qcompiler.targets.lowered import Lowered

NOTE = "max_drop"
SAMPLES, TOKENS = 64, 512
"""Samples, and rows (tokens) in all, that single sites are tried on: their order is all that these decide."""
POINTS, COARSE = 64, 8
"""How many states between the cheapest and the best are looked at: each COARSE-th first, then those before the first
that holds."""
TRIES = 4
"""Lowered models to check at most; the first holds unless lowering changes what the fake-quantized graph computes."""


class Finished(Protocol):
    """What the rest of a compile makes."""

    @property
    def work(self) -> Pipeline: ...
    @property
    def lowered(self) -> Lowered: ...


F = TypeVar("F", bound=Finished)


@dataclasses.dataclass(frozen=True)
class Budget:
    """What may be lost, and on which data that is searched and checked.

    Attributes:
        allowed: metric and limit.
        float_model: the canonical float graph that the outcome is compared with.
        search: samples that the search sees, as all passes do.
        validation: samples that nothing else sees.
        scheme, capability: what may be chosen, and what it costs.
        stages: shows and times the search.
    """

    allowed: MaxDrop
    float_model: ir.Model
    search: Iterable[Feeds]
    validation: Iterable[Feeds]
    scheme: Scheme
    capability: Capability
    stages: Callable[[str], AbstractContextManager[None]]

    def spend(self, work: Pipeline, passes: Sequence[Pass], finish: Callable[[Pipeline], F]) -> F:
        """Search, choose, and finish the model in the cheapest state that keeps to the limit once it is lowered.

        Args:
            work: the canonical float model.
            passes: all of them; ``annotate`` and what follows carry the choice out.
            finish: what comes after the passes.

        Raises:
            OptionError: no state in which anything is quantized keeps to the limit.
        """
        place = [item.name for item in passes].index("annotate")
        tail = passes[place:]
        for item in passes[:place]:
            work.apply(item)
        with self.stages("max_drop"):
            plan = self._plan(work, tail)
        for number in range(plan.first, min(plan.first + TRIES, len(plan.states))):
            trial = work.fork()
            decide(trial.model, plan.sites, plan.states[number], plan.made, plan.reasons(self._names))
            for item in tail:
                trial.apply(item)
            finished = finish(trial)
            verdict = self._verdict(finished)
            if verdict.holds(self.allowed):
                finished.work.notes += self._notes(plan, number, verdict)
                return finished
        raise self._refusal(verdict, "lowered, the model")

    @property
    def _names(self) -> list[str]:
        """Of the options, float first."""
        return ["float", *map(describe, options(self.scheme, self.capability))]

    def _plan(self, work: Pipeline, tail: Sequence[Pass]) -> Plan:
        """Try the sites of a model one by one and together, as ``tail`` would quantize them."""
        found = sites(work.model, self.scheme, self.capability)
        made, versions = [], []
        for option in options(self.scheme, self.capability):
            trial = work.fork(option)
            prepare(trial.model, option)
            for item in tail:
                trial.apply(item)
            versions.append(trial.model)
            made.append(decisions(trial.model))
        switch = Switch(work.model, versions, [site.names for site in found])
        versions.clear()
        errors = self._errors(switch, found)
        start, order = upgrades([list(zip(s.microseconds, e, strict=True)) for s, e in zip(found, errors, strict=True)])
        last = max((n for n in range(len(order) + 1) if any(taken(start, order, n))), default=None)
        if last is None:
            raise OptionError(f"max_drop: by the cost table of target {self.capability.target!r} nothing gains by it.")
        states = [taken(start, order, count) for count in spread(0, last, POINTS)]
        first = self._first(switch, states)
        return Plan(tuple(found), tuple(map(tuple, errors)), tuple(made), tuple(states), first)

    def _errors(self, switch: Switch, found: Sequence[Site]) -> list[list[float]]:
        """What the model loses with one site alone quantized, by site and option."""
        drops = [[Drop(self.allowed.ordering()) for _ in site.microseconds] for site in found]
        whole = fixed_batch(self.float_model)
        for feeds in sliced(self.search, SAMPLES, rows=TOKENS, total=TOKENS, whole=whole):
            reference = switch(feeds, [FLOAT] * len(found))
            for number, site in enumerate(drops):
                for option, drop in enumerate(site):
                    if option != FLOAT:
                        choices = [option if i == number else FLOAT for i in range(len(found))]
                        drop.update(reference, switch(feeds, choices), feeds)
        return [[0.0 if option == FLOAT else drop.total for option, drop in enumerate(site)] for site in drops]

    def _first(self, switch: Switch, states: Sequence[tuple[int, ...]]) -> int:
        """The first of the states, from the cheapest on, that holds with those after it."""
        last = len(states) - 1
        coarse = spread(0, last, COARSE)
        verdicts = self._verdicts(switch, [states[i] for i in coarse])
        found = first_safe([verdict.holds(self.allowed) for verdict in verdicts])
        if found is None:
            raise self._refusal(verdicts[-1], "the most careful model of the search")
        if found == 0:
            return coarse[0]
        between = range(coarse[found - 1] + 1, coarse[found])
        fine = self._verdicts(switch, [states[i] for i in between])
        holds = [*(verdict.holds(self.allowed) for verdict in fine), True]
        safe = first_safe(holds)
        assert safe is not None
        return between.start + safe

    def _verdicts(self, switch: Switch, states: Sequence[tuple[int, ...]]) -> list[Verdict]:
        drops = [Drop(self.allowed) for _ in states]
        for feeds in self.validation if states else ():
            reference = switch(feeds, [FLOAT] * switch.sites)
            for drop, state in zip(drops, states, strict=True):
                drop.update(reference, switch(feeds, state), feeds)
        return [drop.verdict() for drop in drops]

    def _verdict(self, finished: Finished) -> Verdict:
        """Of what will run."""
        drop, executable = Drop(self.allowed), finished.lowered.runnable
        reference = Runner(self.float_model)
        candidate = Runner(finished.work.model, as_deployed=True) if executable is None else executable.run
        for feeds in self.validation:
            drop.update(reference(feeds), candidate(feeds), feeds)
        return drop.verdict()

    def _refusal(self, verdict: Verdict, what: str) -> OptionError:
        return OptionError(
            f"max_drop {self.allowed.name}={self.allowed.limit:g} cannot be held: {what} reaches "
            f"{self._told(verdict)}; allow more, or give more calibration samples for a smaller margin."
        )

    def _told(self, verdict: Verdict) -> str:
        text = self.allowed.text
        return (
            f"{text(verdict.ratio)} at {verdict.output!r}, {text(verdict.bound)} with its margin, on "
            f"{verdict.samples} samples that the search did not see"
        )

    def _notes(self, plan: Plan, number: int, verdict: Verdict) -> list[Note]:
        names = self._names
        state = plan.states[number]
        counts = ", ".join(f"{state.count(i)} {name}" for i, name in enumerate(names) if state.count(i))
        whole = ", ".join(f"{plan.cost([i] * len(state)):.0f} all {name}" for i, name in enumerate(names))
        return [
            Note(NOTE, f"{self.allowed.name}={self.allowed.limit:g} holds", self._told(verdict)),
            Note(NOTE, "predicted", f"{plan.cost(state):.0f} µs for the Linears ({whole})"),
            Note(NOTE, "sites", counts),
        ]


def check_budget(scheme: Scheme, passes: Sequence[Pass], calibrated: bool) -> None:
    """Refuse what no budget can be spent on.

    Raises:
        OptionError: no data, nothing to choose, or no pass that would carry the choice out.
    """
    names = [item.name for item in passes]
    if not calibrated:
        raise OptionError("max_drop is searched and checked on data: give calibration samples.")
    if scheme.activation is None:
        raise OptionError(
            f"max_drop chooses how inputs are quantized, and scheme {scheme.name!r} leaves them in float."
        )
    if "annotate" not in names or "insert" not in names:
        raise OptionError(f"max_drop needs annotate and insert among the passes, which are {', '.join(names)}.")


@dataclasses.dataclass(frozen=True)
class Plan:
    """States of a model from the cheapest to the most careful, and the first that holds.

    Attributes:
        sites: what is chosen for.
        errors: what the model loses with one site alone quantized, by site and option.
        made: what each option but float decides for the Linears.
        states: the option of each site.
        first: number of the cheapest state that the fake-quantized graph may be in.
    """

    sites: tuple[Site, ...]
    errors: tuple[tuple[float, ...], ...]
    made: tuple[Decisions, ...]
    states: tuple[tuple[int, ...], ...]
    first: int

    def cost(self, state: Sequence[int]) -> float:
        """Predicted microseconds of the Linears."""
        return sum(site.microseconds[option] for site, option in zip(self.sites, state, strict=True))

    def reasons(self, names: Sequence[str]) -> list[str]:
        """For each site, what was chosen from."""
        told = []
        for site, errors in zip(self.sites, self.errors, strict=True):
            choices = zip(names, errors, site.microseconds, strict=True)
            texts = (f"{name} {error:.1e}, {time:.0f} µs" for name, error, time in choices)
            told.append(f"max_drop, error alone and time: {'; '.join(texts)}")
        return told
