"""Tiny models of random weights that quantize as badly as large language models do: with outliers put in by hand.

Three manners, as they were found in trained models:

- "norm": some channels behind each norm are 20 to 100 times as large (Dettmers et al. 2022). The norm's weight and
  bias go up, the columns of the Linears that read it down: the function stays.
- "linear": the same for channels from v to o and from up to down, where that is exact: not through BLOOM's GELU.
- "token": for a few tokens half of the inputs of each down are hundreds of times as large as all others (Sun et al.
  2024, "massive activations"). This is another function: a float model of its own is the reference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from benchmarks.tiny_families import FAMILIES, HEAD, HEADS, HIDDEN, VOCABULARY, Family, exported
from qcompiler.graph.edit import array_of

MANNERS = ("norm", "linear", "token")
OUTLIER_TOKENS = (3, 4, 5)
CHANNELS = 4
"""Outlier channels at each site."""
FACTORS = 20.0, 100.0
MASSIVE = 300.0
"""What the inputs of down are for outlier tokens; for the others they are near 1."""
_LOUD = 30 * math.sqrt(HIDDEN)  # the length of an outlier token's residual; other tokens' is about sqrt(HIDDEN)

Arrays = dict[str, npt.NDArray[np.float32]]
Feeds = dict[str, npt.NDArray[np.int64]]


def tiny_model(family: str, manners: Sequence[str] = (), seed: int = 0) -> ir.Model:
    """A two-layer causal language model as exported, with the outliers of these manners."""
    model = exported(family).clone()
    named = {name: value for name, value in model.graph.initializers.items() if name.endswith((".weight", ".bias"))}
    weights = {name: np.array(array_of(value), np.float32) for name, value in named.items()}
    inject(weights, FAMILIES[family], manners, seed)
    for name, value in named.items():
        value.const_value = ir.tensor(weights[name], name=name)
    return model


def batches(count: int, seed: int, size: int = 8, length: int = 32) -> list[Feeds]:
    """Random tokens; each sample starts with an outlier token, and one token in 32 further on is one."""
    rng = np.random.default_rng(seed)
    feeds = []
    for _ in range(count):
        ids = rng.integers(max(OUTLIER_TOKENS) + 1, VOCABULARY, (size, length), dtype=np.int64)
        outliers = rng.choice(OUTLIER_TOKENS, ids.shape)
        chosen = rng.random(ids.shape) < 1 / 32
        chosen[:, 0] = True
        feeds.append({"input_ids": np.where(chosen, outliers, ids), "attention_mask": np.ones_like(ids)})
    return feeds


def inject(weights: Arrays, family: Family, manners: Sequence[str], seed: int = 0) -> None:
    """Put outliers into a family's weights, by name, in place.

    Raises:
        ValueError: no such manner.
    """
    if unknown := set(manners) - set(MANNERS):
        raise ValueError(f"manners {sorted(unknown)}: they are {', '.join(MANNERS)}.")
    rng = np.random.default_rng(seed)
    if "token" in manners:  # first: the others keep the function
        _massive_tokens(weights, family, rng)
    if "norm" in manners:
        for norm, readers in family.norm_readers():
            channels, factors = _outliers(HIDDEN, rng)
            for part in _parts(weights, norm):
                part[channels] *= factors
            for reader in readers:
                weights[f"{reader}.weight"][:, channels] /= factors
    if "linear" in manners:
        for layer in family.layers():
            rows, columns = _value_channels(weights[f"{layer}{family.v}.weight"], family)
            _move(weights, layer + family.v, rows, layer + family.o, columns, rng)
            if family.exact:
                rows = _up_rows(weights, layer, family)
                _move(weights, layer + family.up, rows, layer + family.down, np.arange(len(rows))[:, None], rng)


def _move(
    weights: Arrays,
    source: str,
    rows: npt.NDArray[np.int64],
    sink: str,
    columns: npt.NDArray[np.int64],
    rng: np.random.Generator,
) -> None:
    """Some of the source's outputs ``rows`` [n] up, the columns [n, copies] of the sink that read them down."""
    chosen, factors = _outliers(len(rows), rng)
    for part in _parts(weights, source):
        part[rows[chosen]] *= factors.reshape(-1, *[1] * (part.ndim - 1))
    copies = columns.shape[1]
    weights[f"{sink}.weight"][:, columns[chosen].ravel()] /= np.repeat(factors, copies)


def _value_channels(v: npt.NDArray[np.float32], family: Family) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The rows [n] of v's weight, and the columns [n, copies] of o that read each: several under grouped queries."""
    if "query_key_value" in family.v:  # [heads, (q, k, v), head]
        return np.arange(len(v)).reshape(HEADS, 3, HEAD)[:, 2].ravel(), np.arange(HIDDEN)[:, None]
    groups = HIDDEN // len(v)
    columns = np.arange(HIDDEN).reshape(-1, groups, HEAD).transpose(0, 2, 1).reshape(-1, groups)
    return np.arange(len(v)), columns


def _up_rows(weights: Arrays, layer: str, family: Family) -> npt.NDArray[np.int64]:
    """The rows of up's weight; where one Linear makes gate and up, the second half of them."""
    rows = np.arange(len(weights[f"{layer}{family.up}.weight"]))
    return rows[len(rows) // 2 :] if family.gate == family.up else rows


def _massive_tokens(weights: Arrays, family: Family, rng: np.random.Generator) -> None:
    """Keep one direction of the residual stream for the outlier tokens, and let gate and up fire on it.

    Nothing but the outlier tokens' embeddings writes to the direction u, so that other tokens stay as they are; u has
    two channels of opposite sign, so that a LayerNorm's mean does not touch it. Down answers the tokens' pattern p with
    u itself, as a trained model does: without that, they would drown in noise after the first layer.
    """
    u = np.zeros(HIDDEN, np.float32)
    pair = rng.choice(HIDDEN, 2, replace=False)
    u[pair] = math.sqrt(0.5), -math.sqrt(0.5)
    norms = [norm for norm, _ in family.norm_readers()]
    for norm in [*norms, *([family.embedding_norm] if family.embedding_norm else [])]:
        for part in _parts(weights, norm):
            part[pair[1]] = part[pair[0]]
    for name in family.embeddings:
        table = weights[f"{name}.weight"]
        table -= np.outer(table @ u, u)
    weights[f"{family.embeddings[0]}.weight"][list(OUTLIER_TOKENS)] = _LOUD * u
    for layer in family.layers():
        for writer in (family.o, family.down):
            for part in _parts(weights, layer + writer):
                part -= np.multiply.outer(u, u @ part)
        norm = next(layer + norm for norm, readers in family.norms.items() if family.up in readers)
        read = u / (weights[f"{norm}.weight"][pair[0]] * math.sqrt(HIDDEN))  # 1 on u behind the norm
        rows = _up_rows(weights, layer, family)
        chosen = np.sort(rng.choice(len(rows), len(rows) // 2, replace=False))
        up = weights[f"{layer}{family.up}.weight"]
        pattern = rng.uniform(0.5, 1.5, len(chosen)).astype(np.float32)
        if family.gate is not None:
            half = math.sqrt(MASSIVE)
            pattern *= rng.choice([-1, 1], len(chosen))
            weights[f"{layer}{family.gate}.weight"][chosen] += half * read  # SiLU leaves what is large alone
            up[rows[chosen]] += np.outer(half * pattern, read)
        else:
            up[rows[chosen]] += np.outer(MASSIVE * pattern, read)
        down = weights[f"{layer}{family.down}.weight"]
        unit = pattern / np.linalg.norm(pattern)
        down[:, chosen] -= np.outer(down[:, chosen] @ unit, unit)
        down[:, chosen] += np.outer(u, unit) * (_LOUD / (MASSIVE * np.linalg.norm(pattern)))


def _outliers(count: int, rng: np.random.Generator) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Some of ``count`` channels, and how much louder each becomes."""
    channels = rng.choice(count, CHANNELS, replace=False)
    return channels, np.exp(rng.uniform(*np.log(FACTORS), CHANNELS)).astype(np.float32)


def _parts(weights: Arrays, name: str) -> list[npt.NDArray[np.float32]]:
    """Weight, and bias if there is one, of a norm or a Linear."""
    return [weights[full] for part in ("weight", "bias") if (full := f"{name}.{part}") in weights]
