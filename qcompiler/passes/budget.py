"""What ``max_drop`` chooses from: the sites of a model, the ways to compute each, and what each takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from qcompiler.capability import Capability
from qcompiler.graph.linear import Linear, linears
from qcompiler.passes.annotate import annotated, leave_weight
from qcompiler.passes.judging import by_input, decision, forget_decision, keep_float, leave_decision, quantized
from qcompiler.scheme import Scheme, TensorSpec

FLOAT = 0
"""The option "float"; option i > 0 is the i-th of :func:`options`."""


FINER = (
    (
        TensorSpec("int8", granularity="per_group", group_size=128),
        TensorSpec("int8", granularity="per_group", group_size=128, dynamic=True),
    ),
)
"""(weight, activation) with more scales than 8-bit schemes have themselves: slower, and nearer to float."""


@dataclasses.dataclass(frozen=True)
class Site:
    """Linears that read one value, and so share how it is quantized.

    Attributes:
        names: of the Linears.
        microseconds: what each option takes, float first: one product for all of them.
    """

    names: tuple[str, ...]
    microseconds: tuple[float, ...]


def options(scheme: Scheme, capability: Capability) -> tuple[Scheme, ...]:
    """The ways in which a site may be quantized, each as a scheme that quantizes every site so.

    Those of the scheme itself; and, where the target has a measured kernel for it, finer scales: a new way is one more
    scheme in :data:`FINER`.
    """
    found = [dataclasses.replace(scheme, fallback=None)]
    if scheme.fallback is not None:
        found.append(dataclasses.replace(scheme, activation=scheme.fallback, fallback=None))
    for weight, activation in FINER:
        if capability.measured(weight, activation) and scheme.weight.bits == weight.bits:
            found.append(dataclasses.replace(scheme, weight=weight, activation=activation, fallback=None))
    return tuple(found)


def describe(option: Scheme) -> str:
    """An option in words: how it quantizes the activation."""
    return str(option.activation)


def sites(model: ir.Model, scheme: Scheme, capability: Capability) -> list[Site]:
    """The sites that the scheme quantizes, in graph order.

    Raises:
        TargetError: the target has no times of a kernel that an option needs.
    """
    return [_site(group, scheme, capability) for group in by_input(quantized(model, scheme))]


def _site(group: Sequence[Linear], scheme: Scheme, capability: Capability) -> Site:
    # One quantization of the input serves them all: one wide product is nearer to what they take than several.
    shape = group[0].in_features, sum(linear.out_features for linear in group)
    times = [capability.microseconds(*shape, None)]
    for option in options(scheme, capability):
        assert option.activation is not None
        times.append(capability.microseconds(*shape, (option.weight, option.activation)))
    return Site(tuple(linear.name for linear in group), tuple(times))


def prepare(model: ir.Model, option: Scheme) -> None:
    """Take back the decisions of earlier passes that are not this option's, so that ``annotate`` makes its own."""
    for linear in quantized(model, option):
        made = decision(linear)
        if made is not None and option.activation is not None and not _alike(made[0], option.activation):
            forget_decision(linear)


Decisions = Mapping[str, tuple[TensorSpec, TensorSpec]]
"""How weight and input of each Linear are quantized, by its name."""


def decisions(model: ir.Model) -> Decisions:
    """What ``annotate`` decided, margins included."""
    found = {linear.name: annotated(linear) for linear in linears(model)}
    return {name: (weight, spec) for name, (weight, spec) in found.items() if weight is not None and spec is not None}


def decide(
    model: ir.Model, sites: Sequence[Site], choices: Sequence[int], made: Sequence[Decisions], reasons: Sequence[str]
) -> None:
    """Write the choices on the Linears, for ``annotate`` and ``insert`` to carry out.

    Args:
        choices: the option of each site; 0: float.
        made: for each other option, what it decides.
        reasons: of each site.
    """
    by_name = {linear.name: linear for linear in linears(model)}
    for site, option, why in zip(sites, choices, reasons, strict=True):
        for linear in (by_name[name] for name in site.names):
            if option == FLOAT:
                keep_float(linear.matmul, why)
            else:
                weight, activation = made[option - 1][linear.name]
                leave_weight(linear, weight)
                leave_decision([linear], activation, why)


def _alike(a: TensorSpec, b: TensorSpec) -> bool:
    return (a.dynamic, a.granularity) == (b.dynamic, b.granularity)
