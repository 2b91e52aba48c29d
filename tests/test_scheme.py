"""scheme: validation, JSON."""

from __future__ import annotations

import dataclasses
import json

import pytest

from qcompiler.core import OptionError
from qcompiler.presets import PRESETS
from qcompiler.scheme import Scheme, TensorSpec


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_round_trip_through_json(name: str) -> None:
    scheme = PRESETS[name]
    assert Scheme.from_json(json.loads(json.dumps(scheme.to_json()))) == scheme


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


def test_schemes_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["w8a8"].head = False  # type: ignore[misc]


def test_activations_in_larger_groups_than_weights_are_refused() -> None:
    weight = TensorSpec("int4", granularity="per_group", group_size=32)
    activation = TensorSpec("int8", granularity="per_group", group_size=64, dynamic=True)
    with pytest.raises(OptionError, match="must divide"):
        Scheme("mine", weight, activation)
