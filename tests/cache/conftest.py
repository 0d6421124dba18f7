"""Fixtures: a finished small store, and copies of it that a test may harm."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from preceptor.benchmarks.small_store import contents, restore
from preceptor.cache import Cache

sys.path.insert(0, str(Path(__file__).parent))  # for small_stores, in this and in new processes

from small_stores import write_store


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store that tests only read."""
    path = tmp_path_factory.mktemp("finished") / "store"
    write_store(path)
    return path


@pytest.fixture
def store(tmp_path: Path, finished: Path) -> Path:
    """A copy of it that a test may harm."""
    path = tmp_path / "store"
    restore(path, contents(finished))
    return path


@pytest.fixture
def cache(finished: Path) -> Cache:
    return Cache.open(finished)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """In memory where there is such a place: thousands of files are synced here."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path_factory.mktemp("faults")
        return
    path = memory / f"preceptor-faults-{os.getpid()}"
    path.mkdir()
    yield path
    shutil.rmtree(path)
