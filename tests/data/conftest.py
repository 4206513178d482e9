"""The embedded sets, loaded once; hypothesis without clock or disk."""

from pathlib import Path

import pytest
from hypothesis import settings

from data import catalog
from data.core import Dataset

settings.register_profile("data", deadline=None, database=None, max_examples=60)
settings.load_profile("data")


@pytest.fixture(scope="session")
def icons(cache: Path) -> Dataset:
    return catalog.load("icons")


@pytest.fixture(scope="session")
def digits(cache: Path) -> Dataset:
    return catalog.load("digits")
