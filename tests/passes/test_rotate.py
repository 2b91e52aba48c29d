"""rotate keeps what pays, tells why it left the rest, and changes nothing in float."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.calibration import collect
from qcompiler.graph.edit import array_of
from qcompiler.graph.linear import linears
from qcompiler.graph.residual import find_streams
from qcompiler.graph.rules import canonicalise
from qcompiler.graph.run import Runner
from qcompiler.graph.verify import relative_error
from qcompiler.passes import parse_pipeline
from qcompiler.passes.base import PassResult
from qcompiler.passes.rotate import Rotate
from qcompiler.runtime.artefact import load_plans, save_plans
from tests import families
from tests.passes.blocks import apply, context, error, quantize

FAMILY = "llama"
DATA = [families.feeds(FAMILY, 4, 12, seed) for seed in range(6)]


def decoder(outlier: float = 1.0) -> ir.Model:
    """Two LLaMA layers; one channel of the embedding table is ``outlier`` times as large."""
    model = ir.load(families.exported(FAMILY))
    canonicalise(model)
    table = next(value for name, value in model.graph.initializers.items() if name.endswith("embed_tokens.weight"))
    array = np.array(array_of(table))
    array[:, 7] *= outlier
    table.const_value = ir.tensor(array, name=table.name)
    return model


def rotated(model: ir.Model, item: Rotate, scheme: str = "w8a8-o3") -> PassResult:
    return apply(item, model, context(scheme), DATA)


def whats(result: PassResult) -> list[str]:
    return [note.what for note in result.notes]


def logits(model: ir.Model) -> np.ndarray:
    return Runner(model, threads=1)(families.feeds(FAMILY, 4, 12, 99))["logits"]


def test_an_outlier_channel_is_rotated_away_and_static_quantization_gains() -> None:
    exact = logits(decoder(30.0))
    plain, turned = decoder(30.0), decoder(30.0)
    quantize(plain, context("w8a8-o3"), data=DATA)
    result = rotated(turned, Rotate(smoothed=False))
    assert "residual stream of 64 channels rotated" in whats(result)
    assert error(exact, logits(turned)) < 1e-10
    quantize(turned, context("w8a8-o3"), data=DATA)
    assert error(exact, logits(turned)) < 0.5 * error(exact, logits(plain))


def test_calibrated_weights_with_one_scale_an_output_channel_are_rotated_unjudged() -> None:
    """And gain by it once gptq has rounded them: here a few weights of each Linear are far larger than all others."""

    def heavy_tailed() -> ir.Model:
        model, rng = decoder(), np.random.default_rng(5)
        for linear in linears(model):
            old = array_of(linear.weight)
            new = rng.standard_t(3, old.shape).astype(np.float32)
            linear.weight.const_value = ir.tensor(new * np.float32(old.std() / new.std()), name=linear.weight.name)
        return model

    ctx = dataclasses.replace(context("w4a16{group_size=none}"), data=DATA)
    exact, errors = logits(heavy_tailed()), []
    for item in (None, Rotate()):
        model = heavy_tailed()
        if item is not None:
            assert item.wants(model, ctx) == []
            assert {plan.why for plan in apply(item, model, ctx, DATA).plans} == {"not judged"}
        for each in parse_pipeline("annotate,insert,clip_weights,gptq"):
            apply(each, model, ctx, DATA)
        errors.append(error(exact, logits(model)))
    assert errors[1] < 0.5 * errors[0]


def test_what_else_is_judged_unless_it_is_told_otherwise() -> None:
    model = decoder()
    calibrated = dataclasses.replace(context("w4a16{group_size=none}"), data=DATA)
    for scheme in ("w4a16", "w8a16{group_size=none}", "w4a8{group_size=none}", "nf4", "w8a8"):
        assert Rotate().wants(model, dataclasses.replace(context(scheme), data=DATA))
    assert Rotate().wants(model, context("w4a16{group_size=none}"))
    assert Rotate(gate=True).wants(model, calibrated)
    assert not Rotate(gate=False).wants(model, context())


def test_the_gate_leaves_a_stream_alone_that_gains_nothing() -> None:
    model = decoder()
    before = {name: value.const_value for name, value in model.graph.initializers.items()}
    result = rotated(model, Rotate(gain=1e6))
    assert not result.changed
    assert whats(result) == ["residual stream not rotated", *["heads not rotated"] * 2]
    assert all("no gain: summed error" in note.why for note in result.notes)
    assert {name: value.const_value for name, value in model.graph.initializers.items()} == before


@pytest.mark.parametrize(
    ("item", "kinds"),
    [
        (Rotate(gate=False), {"embedding": 64, "v_proj": 16}),
        (Rotate(gate=False, heads=False), {"embedding": 64}),
        (Rotate(gate=False, residual=False), {"v_proj": 16}),
    ],
)
def test_options_choose_what_is_rotated(item: Rotate, kinds: dict[str, int]) -> None:
    model = decoder()
    exact = logits(model)
    assert item.wants(model, context("w8a8-o3")) == []
    result = item.run(model, {}, context("w8a8-o3"))
    assert {
        plan.source.split(".")[-1]: plan.rotation.size for plan in result.plans if plan.rotation is not None
    } == kinds
    assert relative_error({"y": exact}, {"y": logits(model)}) < 5e-6


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dynamic", "w8a8-o3"])
def test_every_scheme_is_judged_by_its_own_specs(scheme: str) -> None:
    model = decoder(30.0)
    exact = logits(model)
    result = rotated(model, Rotate(), scheme)
    assert len(result.notes) == 3
    assert relative_error({"y": exact}, {"y": logits(model)}) < 5e-6


def test_rows_are_asked_for_where_the_gate_needs_them_only() -> None:
    """The norms' inputs, o and down: what q, k, v, gate, up and the head read follows from the norms' inputs."""
    model = decoder()
    [stream] = find_streams(model)
    norms = {norm.node.inputs[0].name for norm in stream.norms if norm.node.inputs[0] is not None}
    written = {writer.linear.x.name for writer in stream.writers if writer.linear is not None}
    wanted = {request.value for request in Rotate().wants(model, context("w8a8-o3"))}
    assert wanted == norms | written
    assert len(collect(model, DATA[:1], Rotate().wants(model, context("w8a8")), progress=False, threads=1)) == 9


def test_an_ignored_linear_is_rotated_but_not_judged() -> None:
    model = decoder(30.0)
    exact = logits(model)
    result = apply(Rotate(), model, context("w8a8-o3", ignore=["*lm_head*", "*o_proj*", "*down_proj*"]), DATA)
    assert "residual stream of 64 channels rotated" in whats(result)
    assert relative_error({"y": exact}, {"y": logits(model)}) < 5e-6


def test_a_stream_that_would_need_many_bridges_is_told_with_its_price() -> None:
    model = ir.load(families.exported("gemma2"))
    canonicalise(model)
    result = Rotate(gate=False, heads=False).run(model, {}, context())
    [note] = result.notes
    assert note.what == "residual stream not rotated"
    assert "4 of its ends are no Linears: Linears of 64 x 64 there would add" in note.why
    assert Rotate(gate=False, heads=False, bridges=1.0).run(model, {}, context()).changed


def test_plans_are_saved_with_their_rotation(tmp_path: Path) -> None:
    result = Rotate(gate=False).run(decoder(), {}, context())
    save_plans(result.plans, tmp_path / "plans")
    for plan, again in zip(result.plans, load_plans(tmp_path / "plans"), strict=True):
        assert (plan.kind, plan.sinks, plan.scale) == (again.kind, again.sinks, again.scale)
        assert again.rotation is not None
        assert np.array_equal(plan.rotation, again.rotation)


def test_its_spelling() -> None:
    [item] = parse_pipeline("rotate{heads=false,gain=1.5,random_signs=false}")
    assert item == Rotate(heads=False, gain=1.5, random_signs=False)
