"""The recipe of a compile: version, migrations, and its text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from qcompiler.core import ArtefactError

RECIPE_VERSION = 1

Recipe = dict[str, Any]

MIGRATIONS: Mapping[int, Callable[[Recipe], Recipe]] = {}
"""From a version to a function that makes the next one of it; it may change the recipe it is given. Version 1 is the
first, so that nothing is to be migrated yet."""


def migrate(
    recipe: Mapping[str, Any],
    version: int = RECIPE_VERSION,
    migrations: Mapping[int, Callable[[Recipe], Recipe]] = MIGRATIONS,
) -> Recipe:
    """Bring a recipe up to ``version``, one step at a time. The recipe given is not changed.

    Raises:
        ArtefactError: it has no version, is of a later one, or a step is missing.
    """
    found = recipe.get("version")
    if not isinstance(found, int) or isinstance(found, bool):
        raise ArtefactError(f"the recipe has no version (found {found!r}): it was not written by qcompiler.")
    if found > version:
        raise ArtefactError(f"the recipe is of version {found}, and this qcompiler reads up to {version}: update it.")
    current: Recipe = json.loads(json.dumps(recipe))
    for step in range(found, version):
        if step not in migrations:
            raise ArtefactError(
                f"the recipe is of version {found}, which this qcompiler (version {version}) cannot bring up to date: "
                "compile the model again."
            )
        current = {**migrations[step](current), "version": step + 1}
    return current


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """The text of recipe.json: the same recipe gives the same bytes."""
    return json.dumps(recipe, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
