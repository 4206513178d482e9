"""The embedded sets, loaded once; hypothesis without clock or disk."""

from pathlib import Path

import pytest
from hypothesis import settings

from data import catalog
from data.dataset import Dataset
from tests.data import published

settings.register_profile("data", deadline=None, database=None, max_examples=60)
settings.load_profile("data")


@pytest.fixture(scope="session")
def icons(cache: Path) -> Dataset:
    return catalog.load("icons")


@pytest.fixture(scope="session")
def digits(cache: Path) -> Dataset:
    return catalog.load("digits")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for each benchmark with a small stand-in for its original files; and a cache of the test's own."""
    monkeypatch.setenv("KSHOT_CACHE", str(tmp_path / "cache"))
    for name in published.SETS:
        (tmp_path / "originals" / name).mkdir(parents=True)
        getattr(published, name)(tmp_path / "originals" / name)
    return tmp_path / "originals"
