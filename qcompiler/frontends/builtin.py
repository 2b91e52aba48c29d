"""Text that comes with qcompiler: general English for passes that would learn too much from few samples.

News, advice, encyclopedia, captions, instructions, small talk: 275 sentences, written for this purpose.
exllamav2 (``standard_cal_data``) and llama.cpp's users calibrate on such a mixture alone; here it stands beside the
caller's samples.
"""

from __future__ import annotations

import functools
import importlib.resources
from collections import Counter

from tokenizers import Tokenizer

from qcompiler.core import DataError
from qcompiler.frontends import text
from qcompiler.frontends.batches import Batches
from qcompiler.frontends.inputs import Inputs
from qcompiler.frontends.source import Source

_COMMONEST = 0.15  # of all tokens: "the" and "," are 6 % each, an unknown token is most of them


@functools.cache
def sentences() -> tuple[str, ...]:
    """The built-in sentences."""
    path = importlib.resources.files("qcompiler.frontends") / "english.txt"
    return tuple(path.read_text(encoding="utf-8").splitlines())


def builtin_text(source: Source, *, seq_len: int | None = None, batch_size: int = 8) -> Batches | None:
    """The built-in sentences as the model's inputs; None where it takes no text, or its vocabulary is not of words.

    Args:
        source, seq_len, batch_size: as :func:`qcompiler.frontends.data.open_data` has them.
    """
    inputs = Inputs(source.model)
    if source.tokenizer is None or "input_ids" not in inputs or not _spells(Tokenizer.from_file(str(source.tokenizer))):
        return None
    try:
        return text.from_text(sentences(), source, inputs, limit=None, seq_len=seq_len, batch_size=batch_size)
    except DataError:  # it has other inputs besides, which no text can tell
        return None


def _spells(tokenizer: Tokenizer) -> bool:
    tokenizer.no_padding()
    ids = Counter(i for line in sentences() for i in tokenizer.encode(line, add_special_tokens=False).ids)
    return bool(ids) and max(ids.values()) < _COMMONEST * sum(ids.values())
