"""scheme: presets, validation, JSON."""

from __future__ import annotations

import dataclasses
import json

import pytest

from qcompiler.core import OptionError
from qcompiler.scheme import PRESETS, Scheme, TensorSpec, resolve


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_round_trip_through_json(name: str) -> None:
    scheme = PRESETS[name]
    assert Scheme.from_json(json.loads(json.dumps(scheme.to_json()))) == scheme


def test_resolve_adds_ignores_and_names_the_nearest() -> None:
    scheme = resolve("w8a8", ("*lm_head*",))
    assert scheme.ignored_by("model.lm_head") == "*lm_head*"
    assert scheme.ignored_by("model.layers.0.q_proj") is None
    assert resolve(scheme) == scheme
    with pytest.raises(OptionError, match="did you mean 'w8a8"):
        resolve("w8a9")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int9"}, "unknown dtype 'int9'"),
        ({"granularity": "per_row"}, "unknown granularity 'per_row'"),
        ({"granularity": "per_group"}, "one needs the other"),
        ({"group_size": 32}, "one needs the other"),
        ({"granularity": "per_token"}, "set dynamic=True"),
    ],
)
def test_impossible_specs_are_refused(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        TensorSpec(**options)


def test_json_of_another_version_or_with_unknown_fields_is_refused() -> None:
    data = PRESETS["w8a8"].to_json()
    with pytest.raises(OptionError, match="reads version"):
        Scheme.from_json({**data, "version": 99})
    with pytest.raises(OptionError, match="cannot be read"):
        Scheme.from_json({**data, "colour": "blue"})


def test_bits_by_glob_the_last_that_matches_holds() -> None:
    scheme = resolve("w4a16{symmetric=false}", bits={"*": 2, "*down*": 8, "*.3.down*": "float"})
    assert scheme.weight_of("layers.0.up") == TensorSpec("uint2", False, "per_group", 32)
    assert scheme.weight_of("layers.0.down") == TensorSpec("uint8", False, "per_group", 32)
    assert scheme.bits_of("layers.3.down") == ("*.3.down*", 16)
    assert resolve("w4a16").weight_of("layers.0.up") == PRESETS["w4a16"].weight
    assert resolve("nf4", bits={"a": 8}).weight_of("a") == TensorSpec("int8", True, "per_group", 64)
    assert Scheme.from_json(json.loads(json.dumps(scheme.to_json()))) == scheme
    with pytest.raises(OptionError, match="bits of 'x' are 3"):
        resolve("w4a16", bits={"x": 3})


def test_schemes_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["w8a8"].head = False  # type: ignore[misc]


def test_groups_and_zero_points_are_spelled() -> None:
    assert resolve("w4a16").weight == TensorSpec("int4", granularity="per_group", group_size=32)
    varied = resolve("w4a8{group_size=128, symmetric=false, head=false}")
    assert varied.weight == TensorSpec("uint4", False, "per_group", 128)
    assert varied.activation == TensorSpec("int8", granularity="per_group", group_size=128, dynamic=True)
    assert not varied.head
    assert varied.name == "w4a8{group_size=128,symmetric=false,head=false}"
    assert Scheme.from_json(json.loads(json.dumps(varied.to_json()))) == varied
    channels = resolve("w4a8{group_size=none}")
    assert channels.weight.granularity == "per_channel"
    assert channels.activation is not None
    assert channels.activation.group_size == 128
    assert not resolve("w8a8{head=false}").head


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("w4a16{groups=32}", "did you mean 'group_size'"),
        ("w4a16{group_size=many}", "not of type int"),
        ("w4a16{group_size=0}", "no number of input channels"),
        ("w8a8{group_size=32}", "has no groups"),
        ("w4a16,w4a8", "one scheme is wanted"),
    ],
)
def test_spellings_that_say_nothing_possible_are_refused(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        resolve(text)


def test_activations_in_larger_groups_than_weights_are_refused() -> None:
    weight = TensorSpec("int4", granularity="per_group", group_size=32)
    activation = TensorSpec("int8", granularity="per_group", group_size=64, dynamic=True)
    with pytest.raises(OptionError, match="must divide"):
        Scheme("mine", weight, activation)
