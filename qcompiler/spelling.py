"""The one text spelling of passes, observers, schemes, targets and their options: ``name{key=value,key=value}``."""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from qcompiler.core import OptionError, unknown

_ITEM = re.compile(r"\s*([\w-]+)\s*(?:\{([^{}]*)\})?\s*(,|$)")


def parse_spelling(text: str) -> list[tuple[str, dict[str, str]]]:
    """Split ``"smooth{alpha=0.5},insert,fold"`` into ``[("smooth", {"alpha": "0.5"}), ("insert", {}), ("fold", {})]``.

    Raises:
        OptionError: where the text is not of that form.
    """
    items: list[tuple[str, dict[str, str]]] = []
    position = 0
    while position < len(text):
        match = _ITEM.match(text, position)
        if match is None:
            raise OptionError(f"cannot read {text!r} from {text[position:]!r} on: write name{{key=value,...}},name,...")
        options = {}
        for pair in filter(None, (part.strip() for part in (match[2] or "").split(","))):
            key, equals, value = pair.partition("=")
            if not equals:
                raise OptionError(f"cannot read option {pair!r} of {match[1]!r}: write {match[1]}{{key=value}}")
            options[key.strip()] = value.strip()
        items.append((match[1], options))
        position = match.end()
    return items


_READERS: Mapping[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "str": str,
    "bool": lambda text: {"true": True, "false": False}[text.lower()],
}


def build_from_spelling(kind: str, cls: Any, name: str, options: Mapping[str, str]) -> Any:
    """Make the frozen dataclass ``cls`` from text options; its fields are the options it knows.

    Raises:
        OptionError: an option that is no field, or a value that does not read as the field's type.
    """
    fields = {f.name: str(f.type) for f in dataclasses.fields(cls) if f.init}
    values: dict[str, Any] = {}
    for key, text in options.items():
        if key not in fields:
            raise unknown(f"option of {kind} {name!r}", key, fields)
        annotation = fields[key].replace(" ", "")
        if text == "none" and annotation.endswith("|None"):
            values[key] = None
            continue
        try:
            values[key] = _READERS[annotation.removesuffix("|None")](text)
        except (KeyError, ValueError):
            raise OptionError(f"option {key}={text} of {kind} {name!r} is not of type {annotation}") from None
    return cls(**values)


def build_from_table(kind: str, table: Mapping[str, str], name: str, options: Mapping[str, str]) -> Any:
    """Make what ``table`` lists under ``name`` as "module:class"; the module is loaded now, and not before.

    Raises:
        OptionError: the table has no such name, or the class no such option; the nearest names are told.
    """
    if name not in table:
        raise unknown(kind, name, table)
    module, cls = table[name].split(":")
    return build_from_spelling(kind, getattr(importlib.import_module(module), cls), name, options)


def spell(name: str, item: Any) -> str:
    """The text of a dataclass built by :func:`build_from_spelling`; options at their default are left out."""
    options = [
        f"{f.name}={str(value).lower() if isinstance(value, bool) or value is None else value}"
        for f in dataclasses.fields(item)
        if f.init and (value := getattr(item, f.name)) != f.default
    ]
    return f"{name}{{{','.join(options)}}}" if options else name
