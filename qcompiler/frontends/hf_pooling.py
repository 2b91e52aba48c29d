"""sentence-transformers' modules.json: how hidden states become one vector for a sentence."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from qcompiler.core import Note


@dataclasses.dataclass(frozen=True)
class Pooling:
    """Mean over the unmasked tokens, or the first token; then perhaps L2 normalization (as sentence-transformers)."""

    mode: str
    normalize: bool

    def __call__(self, hidden: Any, mask: Any) -> Any:
        """hidden [batch, sequence, features], mask [batch, sequence] -> [batch, features]."""
        import torch

        if self.mode == "cls":
            vector = hidden[:, 0]
        else:
            weight = mask.unsqueeze(-1).to(hidden.dtype)
            vector = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
        return torch.nn.functional.normalize(vector, dim=-1) if self.normalize else vector


def transformer_folder(folder: Path) -> Path:
    """Where the transformer itself lies: ``modules.json`` may put it in a subfolder."""
    for module in _modules(folder):
        if module["type"].endswith(".Transformer") and module.get("path"):
            return folder / module["path"]
    return folder


def read_pooling(folder: Path) -> tuple[Pooling | None, tuple[Note, ...]]:
    """The pooling of a sentence-transformers folder; None for another folder, or, with a note, for another pooling."""
    later = [m for m in _modules(folder) if not m["type"].endswith(".Transformer")]
    if not later:
        return None, ()
    types = [module["type"].rsplit(".", 1)[-1] for module in later]
    if types not in (["Pooling"], ["Pooling", "Normalize"]):
        return None, (Note("sentence_embedding", "left out", f"modules.json asks for {', '.join(types)}"),)
    path = folder / later[0]["path"] / "config.json"
    options = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"pooling_mode_mean_tokens": True}
    modes = [key.removeprefix("pooling_mode_") for key, on in options.items() if key.startswith("pooling_mode_") and on]
    if isinstance(options.get("pooling_mode"), str):  # newer folders spell it out
        modes = [options["pooling_mode"]]
    known = {"mean_tokens": "mean", "cls_token": "cls", "mean": "mean", "cls": "cls"}
    if len(modes) != 1 or modes[0] not in known:
        return None, (Note("sentence_embedding", "left out", f"pooling {', '.join(modes) or 'none'} is not supported"),)
    return Pooling(known[modes[0]], "Normalize" in types), ()


def _modules(folder: Path) -> list[dict[str, Any]]:
    path = folder / "modules.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
