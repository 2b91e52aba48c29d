"""Injected outliers: what is said to keep the function keeps it, and rounding to nearest really suffers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from benchmarks import outliers, recovered
from benchmarks.tiny_families import FAMILIES, module

torch = pytest.importorskip("torch")

BAR = 0.99
"""Share of the loss of rounding to nearest that must come back."""
FEEDS = outliers.batches(1, seed=3)[0]

Tapped = dict[str, npt.NDArray[np.float32]]


def run(family: str, manners: tuple[str, ...]) -> tuple[npt.NDArray[np.float32], Tapped]:
    """Logits by torch of the model with these outliers, and the inputs of all its Linears."""
    model = module(family)
    weights = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    outliers.inject(weights, FAMILIES[family], manners)
    inputs: Tapped = {}

    def tap(name: str) -> object:
        return lambda _, args: inputs.__setitem__(name, args[0].detach().numpy())

    for name, child in model.named_modules():
        if isinstance(child, torch.nn.Linear):
            child.register_forward_pre_hook(tap(name))
    with torch.no_grad():
        logits = model(**{name: torch.from_numpy(array) for name, array in FEEDS.items()}).logits
    return logits.numpy(), inputs


def loudest_channels(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Channel maxima against their median, loudest first."""
    absmax = np.abs(x).reshape(-1, x.shape[-1]).max(0)
    return np.sort(absmax / np.median(absmax))[::-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_outlier_channels_keep_the_function(family: str) -> None:
    plain, before = run(family, ())
    for manner in ("norm", "linear"):
        logits, after = run(family, (manner,))
        assert 0 < np.abs(logits - plain).max() <= 1e-5 * np.abs(plain).max()
        louder = {name for name in after if loudest_channels(after[name])[outliers.CHANNELS - 1] > 10}
        readers = {reader for _, group in FAMILIES[family].norm_readers() for reader in group}
        moved = {layer + FAMILIES[family].o for layer in FAMILIES[family].layers()}
        if FAMILIES[family].exact:
            moved |= {layer + FAMILIES[family].down for layer in FAMILIES[family].layers()}
        assert louder == (readers if manner == "norm" else moved)
        assert all(loudest_channels(x)[0] < 10 for x in before.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_outlier_tokens_are_loud_in_half_of_the_channels(family: str) -> None:
    _, inputs = run(family, ("token",))
    chosen = np.isin(FEEDS["input_ids"], outliers.OUTLIER_TOKENS).ravel()
    for layer in FAMILIES[family].layers():
        x = np.abs(inputs[layer + FAMILIES[family].down]).reshape(len(chosen), -1)
        assert (x[chosen] > 50).mean(-1).min() > 0.4
        assert x[~chosen].max() < 50
    again, _ = run(family, ("token",))
    everything, _ = run(family, outliers.MANNERS)
    assert np.abs(everything - again).max() <= 1e-4 * np.abs(again).max()


def test_an_unknown_manner_is_refused() -> None:
    with pytest.raises(ValueError, match="norms"):
        outliers.inject({}, FAMILIES["opt"], ("norms",))


@pytest.mark.parametrize("way", ["norm", "linear"])
def test_the_loss_comes_back(way: str) -> None:
    result = recovered.tiny("opt", way)
    assert result.rtn > 0.1
    assert result.share >= BAR


@pytest.mark.slow
@pytest.mark.parametrize("way", recovered.WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_comes_back_in_every_family(family: str, way: str) -> None:
    result = recovered.tiny(family, way)
    assert result.rtn > 0.05
    assert result.share >= BAR
