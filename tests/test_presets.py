"""presets: names, variations, what is added to them."""

from __future__ import annotations

import json

import pytest

from qcompiler.core import OptionError
from qcompiler.presets import PRESETS, resolve
from qcompiler.scheme import Scheme, TensorSpec


def test_resolve_adds_ignores_and_names_the_nearest() -> None:
    scheme = resolve("w8a8", ("*lm_head*",))
    assert scheme.ignored_by("model.lm_head") == "*lm_head*"
    assert scheme.ignored_by("model.layers.0.q_proj") is None
    assert resolve(scheme) == scheme
    with pytest.raises(OptionError, match="did you mean 'w8a8"):
        resolve("w8a9")


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
