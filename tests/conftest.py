"""Fixtures shared by all tests: real models, which may be absent."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

from tests import models

# The same examples in every run: what fails, fails again. --hypothesis-profile=hunt looks for new ones.
settings.register_profile("fixed", derandomize=True, database=None, deadline=None)
settings.register_profile("hunt", max_examples=1000, database=None, deadline=None)
settings.load_profile("fixed")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2: BERT, post-LN, 6 layers of 384, mean pooling."""
    return models.model("minilm")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct: LLaMA, GQA, 30 layers, tied head."""
    return models.model("smollm2")


@pytest.fixture(scope="session")
def stories260k() -> Path:
    """A LLaMA of 260 thousand parameters that tells stories: GQA 8/4, 5 layers of 64."""
    return models.model("stories260k")


@pytest.fixture(scope="session")
def rxnmapper() -> Path:
    """ALBERT over SMILES: one layer used twelve times, masked-token head."""
    return models.model("rxnmapper-albert")
