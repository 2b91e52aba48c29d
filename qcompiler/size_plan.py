"""What max_size chooses from: what each Linear costs in each width, and which whole choices are worth comparing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import onnx_ir as ir

from qcompiler.budget import SAMPLES, TOKENS
from qcompiler.graph.run import Feeds
from qcompiler.graph.switch import Switch
from qcompiler.numerics.knapsack import choose_within
from qcompiler.report.errors import fixed_batch, sliced
from qcompiler.runtime.drop import Drop, MaxDrop, float_outputs
from qcompiler.runtime.evaluate import LOGITS

FLOAT = 0
"""The first option of each Linear; the others are the bits that the target runs."""
COARSE = 2
"""Bits whose errors are so large that they may not add up: a choice without them is compared too."""
SHARE = 4
"""Samples that choices are made and compared on, per sample that single errors are measured on."""

Choice = tuple[int, ...]
"""The option of each group."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What there is to choose from.

    Attributes:
        groups: names of the Linears that share one weight.
        widths: bits of the options after the first, which is float.
        sizes: bytes that each option of each group takes in the saved model.
        errors: what the model loses with that group alone so.
        fixed: bytes of everything else, at least.
        losses: measures whole choices.
    """

    groups: tuple[tuple[str, ...], ...]
    widths: Sequence[int]
    sizes: list[list[int]]
    errors: list[list[float]]
    fixed: int
    losses: Losses

    def bytes(self, choice: Sequence[int]) -> int:
        """Predicted size of the saved model."""
        return self.fixed + self._cost(choice)

    def candidates(self, capacity: int) -> dict[Choice, str]:
        """Choices within a capacity, and what they are: by the sum of errors, that without 2 bits, and uniform ones."""
        found = {tuple(choose_within(self.sizes, self.errors, capacity)): "mixed"}
        if COARSE in self.widths:
            coarse = self.widths.index(COARSE) + 1
            errors = [[math.inf if i == coarse else e for i, e in enumerate(options)] for options in self.errors]
            careful = tuple(choose_within(self.sizes, errors, capacity))
            if coarse not in careful:
                found.setdefault(careful, f"mixed without {COARSE} bits")
        for option, bits in enumerate(self.widths, 1):
            uniform = (option,) * len(self.groups)
            if self._cost(uniform) <= capacity:
                found[uniform] = f"{bits} bits everywhere"
        return found

    def choose(self, capacity: int) -> tuple[Choice, str]:
        """The candidate that loses least where single errors were not measured, and what was compared."""
        found = self.candidates(capacity)
        if len(found) == 1:
            return next(iter(found.items()))
        losses = dict(zip(found, self.losses.of(list(found)), strict=True))
        best = min(losses, key=lambda choice: (math.isnan(losses[choice]), losses[choice]))
        told = ", ".join(f"{name} {losses[choice]:.2e}" for choice, name in found.items())
        return best, f"{found[best]}; measured {self.losses.where}: {told}"

    def _cost(self, choice: Sequence[int]) -> int:
        return sum(sizes[option] for sizes, option in zip(self.sizes, choice, strict=True))


class Losses:
    """What a model's outputs lose: noise over signal of every output, summed; KL divergence where all are logits.

    Args:
        model: the float graph.
        trials: it with all Linears in one width, for each width.
        groups: names of the Linears that share one weight.
        data: samples; single errors are measured on some, whole choices compared on others, where there are others.
    """

    def __init__(
        self, model: ir.Model, trials: Sequence[ir.Model], groups: Sequence[Sequence[str]], data: Iterable[Feeds]
    ) -> None:
        self._switch = Switch(model, trials, [[name] for group in groups for name in group])
        self._counts = [len(group) for group in groups]
        self._options = len(trials) + 1
        self._metric = MaxDrop("kl" if all(LOGITS in name for name in float_outputs(model)) else "sqnr", 0.0)
        first, feeds = (
            list(sliced(data, share * SAMPLES, rows=TOKENS // SHARE, total=share * TOKENS, whole=fixed_batch(model)))
            for share in (1, SHARE)
        )
        seen = min(len(first), -(-len(feeds) // 2))
        self._seen, others = feeds[:seen], feeds[seen:]
        self._compared = others or self._seen
        self.where = "on samples that no single error was measured on" if others else "on the same samples"

    def alone(self) -> list[list[float]]:
        """With one group alone in each option, float first."""
        exact = (FLOAT,) * len(self._counts)
        choices = [
            (*exact[:place], option, *exact[place + 1 :])
            for place in range(len(exact))
            for option in range(1, self._options)
        ]
        found = iter(self._measured(choices, self._seen))
        return [[0.0, *(next(found) for _ in range(1, self._options))] for _ in exact]

    def of(self, choices: Sequence[Choice]) -> list[float]:
        """With whole choices."""
        return self._measured(choices, self._compared)

    def _measured(self, choices: Sequence[Choice], data: Iterable[Feeds]) -> list[float]:
        drops = [Drop(self._metric) for _ in choices]
        for feeds in data:
            reference = self._switch(feeds, [FLOAT] * self._switch.sites)
            for drop, choice in zip(drops, choices, strict=True):
                drop.update(reference, self._switch(feeds, self._spread(choice)), feeds)
        return [drop.total for drop in drops]

    def _spread(self, choice: Choice) -> list[int]:
        """The option of each Linear."""
        return [option for option, count in zip(choice, self._counts, strict=True) for _ in range(count)]
