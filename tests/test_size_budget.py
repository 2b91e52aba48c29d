"""max_size: the saved model keeps to it, the error falls with it, and what cannot be reached is told."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qcompiler
from qcompiler.core import OptionError
from qcompiler.size_budget import parse_size
from tests.passes.blocks import HELD_OUT, batches, block, error
from tests.passes.blocks import outputs as outputs_of

SCHEME = "w4a16{group_size=16}"
PASSES = "annotate,insert,hqq{p=2,beta=1},fold"


def compiled(output: Path | None = None, **options: Any) -> qcompiler.CompiledModel:
    options = {"scheme": SCHEME, "passes": PASSES, "calibration": batches(), "progress": False, **options}
    return qcompiler.compile(block(), output=output, **options)


def lost(model: qcompiler.CompiledModel) -> float:
    results = [model.run(feeds, threads=1) for feeds in HELD_OUT]
    exact = outputs_of(block())
    return sum(error(exact[name], np.concatenate([result[name] for result in results])) for name in exact)


def saved(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))


def test_sizes_are_kept_and_error_falls_with_them(tmp_path: Path) -> None:
    two, four, eight = (compiled(tmp_path / f"{bits}", bits={"*": bits}) for bits in (2, 4, 8))
    sizes = [saved(tmp_path / name) for name in "248"]
    errors = []
    budgets = [sizes[0], (sizes[0] + sizes[1]) // 2, sizes[1], (sizes[1] + sizes[2]) // 2, 2 * sizes[2]]
    for number, budget in enumerate(budgets):
        model = compiled(tmp_path / f"m{number}", max_size=budget)
        assert saved(tmp_path / f"m{number}") <= budget
        errors.append(lost(model))
    assert all(a >= b for a, b in itertools.pairwise(errors))
    assert errors[0] <= lost(two) * 1.001
    assert errors[2] <= lost(four) * 1.001
    assert errors[3] < lost(four) * 0.7
    assert errors[4] < lost(eight)


def test_it_says_what_it_spent_and_the_recipe_makes_it_again() -> None:
    first = compiled(max_size="12 KB")
    note = next(note for note in first.report.notes if note.node == "max_size")
    assert note.what == "12000 bytes at most"
    assert "bytes saved; Linears: " in note.why
    assert first.recipe["max_size"] == 12000
    bits = dict(first.recipe["scheme"]["bits"])
    assert len(bits) == 6
    again = compiled(max_size=None, bits=bits)
    for feeds in HELD_OUT:
        for name, array in first.run(feeds, threads=1).items():
            np.testing.assert_array_equal(array, again.run(feeds, threads=1)[name])
    assert compiled(max_size=12000).recipe == first.recipe


def test_bits_that_the_user_fixed_stay() -> None:
    model = compiled(max_size="16KB", bits={"wu": 8}, ignore=("wq",))
    rows = {row.name: row.weight for row in model.report.rows}
    assert rows["wu"].startswith("int8")
    assert rows["wq"] == "float"
    assert any(row.startswith(("int2", "int4")) for row in rows.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_size": 2000}, r"cannot be reached: .* the model takes \d+; allow that much"),
        ({"max_size": "12KB", "calibration": None}, "give calibration samples"),
        ({"max_size": "12KB", "passes": "annotate,insert"}, "max_size needs fold"),
        ({"max_size": "12KB", "scheme": "nf4"}, "bits of integers"),
        ({"max_size": "12KB", "max_drop": {"sqnr": 20}, "scheme": "w8a8", "passes": None}, "give one of them"),
        ({"max_size": "much"}, "like '40MB'"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        compiled(**options)


def test_targets_that_save_a_library_are_refused() -> None:
    pytest.importorskip("tvm")
    with pytest.raises(OptionError, match="saves more than that"):
        compiled(max_size="12KB", scheme="w8a8", target="tvm-llvm")


def test_the_least_size_that_is_told_can_be_reached(tmp_path: Path) -> None:
    with pytest.raises(OptionError) as refusal:
        compiled(max_size=2000)
    least = int(str(refusal.value).partition("takes ")[2].partition(";")[0])
    compiled(tmp_path / "out", max_size=least)
    assert saved(tmp_path / "out") <= least


def test_sizes_in_words() -> None:
    words = {"40MB": 40_000_000, "1.5 GiB": 3 << 29, "300k": 300_000, "7 b": 7, " 12 ": 12}
    assert {text: parse_size(text) for text in words} == words
    assert parse_size(5) == 5
    for bad in (0, -1, True, 1.5, "MB", "1 TB", "0KB"):
        with pytest.raises(OptionError, match="max_size is"):
            parse_size(bad)
