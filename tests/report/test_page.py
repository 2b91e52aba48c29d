"""The page is one file that needs nothing else, says names as they are, and is the same every time."""

from __future__ import annotations

import dataclasses
import io
import math
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from qcompiler.core import OptionError
from qcompiler.report.analysis import Analysis, Errors, Layer, Ranges, Site, bits_of
from qcompiler.report.analysis_tables import channels
from qcompiler.report.data import LinearRow
from qcompiler.report.heat_map import places

pytest.importorskip("matplotlib")
NASTY = "<script>alert('$x_1$')</script>&\"layer\""


def _ranges(outlier: float) -> Ranges:
    absmax = np.linspace(0.5, 1.5, 32).astype(np.float32)
    absmax[[4, 9]] = outlier, 0.0
    return Ranges(-float(absmax.max()), 1.0, absmax)


def _row(name: str, activation: str, weight: str = "int8 per_channel static") -> LinearRow:
    reason = "ignored by '*'" if weight == "float" else ""
    return LinearRow(name, 32, 8, weight, activation, "", reason=reason)


def analysis(count: int = 4, metric: str = "sqnr") -> Analysis:
    names = [NASTY, *(f"layer.{i}.dense" for i in range(1, count))]
    specs = ["uint8 per_tensor static", "uint8 per_token dynamic"]
    layers = [
        Layer(
            _row(name, specs[i % 2]),
            f"site{i}",
            None if i == 2 else Errors(1e-3 / (i + 1), 30.0 + i, 0.99, 0.1 * i),
            Errors(1e-2 / (i + 1), 20.0 + i, 0.9, 0.2 * i),
        )
        for i, name in enumerate(names)
    ]
    layers.append(Layer(_row("head", "float", "float"), "last", None, None))
    sites = [
        Site(f"site{i}", (name,), None if i == 1 else _ranges(20.0), _ranges(1.2), ("fold scale at n: <b>why</b>",))
        for i, name in enumerate(names)
    ]
    return Analysis(
        model=NASTY,
        kind="graph",
        scheme="w8a8",
        passes="annotate,insert,fold",
        metric=metric,
        metric_name="own" if metric == "custom" else metric,
        samples=8,
        layers=tuple(layers),
        sites=(*sites, Site("last", ("head",), _ranges(1.0), _ranges(1.0), ())),
        outputs={"y": Errors(1e-3, 25.0, 0.99), "z": Errors(0.0, math.inf, 1.0)},
    )


class _Page(HTMLParser):
    """Tags that were opened and not closed, and what the page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href")]
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("metric", ["sqnr", "mse", "cosine", "custom"])
def test_the_page_is_whole_and_needs_nothing_else(metric: str) -> None:
    text = analysis(metric=metric).to_html()
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert page.tags.count("svg") == 3
    assert page.tags.count("script") == 1  # our own: the model's name is no tag
    assert all(link.startswith("#") for link in page.links)  # markers of the plots
    assert "url(http" not in text
    assert "&lt;script&gt;alert(" in text
    assert "&lt;b&gt;why&lt;/b&gt;" in text


def test_ids_of_the_plots_do_not_clash() -> None:
    ids = re.findall(r'\bid="([^"]*)"', analysis().to_html())
    assert ids
    assert len(ids) == len(set(ids))


def test_no_date_and_the_same_bytes() -> None:
    first, second = analysis().to_html(), analysis().to_html()
    assert first == second
    assert "dc:date" not in first
    assert "currentColor" in first


def test_formulas_in_names_are_text() -> None:
    """matplotlib would read $x_1$ as mathematics."""
    assert "$x_1$" in re.sub(r"<!--.*?-->", "", analysis().to_html(), flags=re.DOTALL)


def test_many_layers_are_named_every_few() -> None:
    text = analysis(300).to_html()
    error = text[text.index("<svg") : text.index("</svg>")]
    assert 40 < len(re.findall(r"<text[^>]*>layer\.\d+\.dense|<text[^>]*>\d+\.dense", error)) <= 64


def _deep(names: list[str], metric: str = "sqnr") -> Analysis:
    one = analysis(len(names), metric)
    layers = [
        dataclasses.replace(layer, row=dataclasses.replace(layer.row, name=name))
        for layer, name in zip(one.layers, names, strict=False)
    ]
    return dataclasses.replace(one, layers=tuple(layers))


def test_a_deep_model_has_a_heat_map() -> None:
    """Layer 2's k, whose error alone is not known, has a number below only."""
    names = [f"model.{i}.{kind}" for i in range(5) for kind in ("q", "k")]
    for metric in ("sqnr", "mse", "cosine", "custom"):
        deep = _deep(names, metric)
        found = places(deep)
        assert found is not None
        assert {kind: sorted(layers) for kind, layers in found.items()} == {
            "model.*.q": [0, 1, 2, 3, 4],
            "model.*.k": [0, 1, 2, 3, 4],
        }
        assert found["model.*.k"][3].row.name == "model.3.k"
        text = deep.to_html()
        assert text.count("<svg") == 4
        assert "<image" not in text
        page = _Page()
        page.feed(text)
        assert page.open == []
    texts = re.findall(r"<text[^>]*>(\d\d\.\d)</text>", _deep(names).to_html())
    assert "22.0" in texts  # accumulated
    assert "32.0" not in texts
    assert "33.0" in texts  # alone


@pytest.mark.parametrize(
    "names",
    [
        ["up", "down", "left", "right", "head"],
        ["MatMul_17", "MatMul_230", "MatMul_901", "MatMul_1301", "MatMul_2000"],
        ["a.0.q", "a.1.q", "a.2.q"],
        ["layer1.q", "layer2.q", "layer3.q", "layer4.q", "layer5.q"],
    ],
)
def test_names_without_layers_have_none(names: list[str]) -> None:
    deep = _deep(names)
    assert places(deep) is None
    assert deep.to_html().count("<svg") == 3


def test_without_matplotlib_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(OptionError, match=r'pip install "qcompiler\[plot\]"'):
        analysis().to_html()


def test_worst_is_by_the_error_alone_and_unknown_ones_come_last() -> None:
    assert [layer.site for layer in analysis().worst()] == ["site0", "site1", "site3", "site2"]
    assert [layer.site for layer in analysis(metric="custom").worst(2)] == ["site3", "site1"]
    assert [site.name for site in analysis().worst_sites(2)] == ["site0", "site1"]


def test_the_terminal_shows_the_worst_only() -> None:
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(dataclasses.replace(analysis(30), model="m"))
    text = console.export_text()
    assert "layer.1.dense" in text
    assert "layer.20.dense" not in text
    assert "SQNR inf dB" in text


def test_outliers_are_above_six_medians() -> None:
    absmax = np.ones(9, np.float32)
    absmax[[2, 5]] = 6.0, 6.001
    ranges = Ranges(-6.001, 1.0, absmax)
    assert ranges.outliers == (5,)
    assert ranges.ratio == pytest.approx(6.001)
    silent = np.zeros(9, np.float32)
    assert Ranges(0.0, 0.0, silent).ratio == 1.0
    silent[0] = 1
    assert Ranges(0.0, 1.0, silent).ratio == math.inf
    assert Ranges(0.0, 1.0, silent).to_json()["outlier_ratio"] == "inf"


def test_words() -> None:
    assert [bits_of(spec) for spec in ("uint4 per_group(64) static", "nf4 x", "float", "int16 y")] == [4, 4, 32, 16]
    assert channels(range(3)) == "0, 1, 2"
    assert channels(range(10)).endswith("7 and 2 more")
    assert channels(()) == "none"
