"""A store that several files look at."""

from __future__ import annotations

from pathlib import Path

import pytest
from preceptor.cli import main
from preceptor.tests.extract.timm_store import options


@pytest.fixture(scope="session")
def store(shards: str, teachers: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "store"
    assert main(["extract", *options(shards, teachers, path)]) == 0
    return path
