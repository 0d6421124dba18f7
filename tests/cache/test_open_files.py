"""Stores keep files open, and a process may have so many."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from preceptor.cache import source
from preceptor.cache.source import LocalSource
from preceptor.errors import StoreError


@pytest.fixture
def few_files() -> Iterator[list[int]]:
    """Twenty files more than are open now; some, to be filled with others."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    highest = max(int(number) for number in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 20, hard))
    try:
        yield held
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for number in held:
            os.close(number)


def test_a_store_gives_up_what_it_keeps_open(
    tmp_path: Path, few_files: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "_OPEN_FILES", 1000)
    names = [str(number) for number in range(100)]
    for name in names:
        (tmp_path / name).write_text(name)
    store = LocalSource(tmp_path)
    for name in names:
        buffer = bytearray(len(name))
        assert store.read_into(name, 0, [buffer]) == len(name)
        assert buffer.decode() == name == store.read(name).decode()
    store._files.clear()
    with contextlib.suppress(OSError):
        while True:
            few_files.append(os.open(tmp_path, os.O_RDONLY))
    for ask in (lambda: store.read("1"), lambda: store.read_into("1", 0, [bytearray(1)])):
        with pytest.raises(StoreError, match=r"as many files open as it may have; raise its limit"):
            ask()
