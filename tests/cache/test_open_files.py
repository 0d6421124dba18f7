"""Stores keep files open, and a process may have so many."""

from __future__ import annotations

import contextlib
import gc
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


def kept_open(folder: Path) -> int:
    """How many files below a folder this process has open."""
    found = 0
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found += os.readlink(f"/proc/self/fd/{number}").startswith(f"{folder}/")
    return found


def test_stores_give_up_what_they_keep_open(tmp_path: Path, few_files: list[int]) -> None:
    """Those that are not read just now as well."""
    stores = [LocalSource(tmp_path / str(number)) for number in range(5)]
    names = [str(number) for number in range(12)]
    for store in stores:
        Path(store.location).mkdir()
        for name in names:
            (Path(store.location) / name).write_text(name)
    for _ in range(2):
        for store in stores:
            for name in names:
                buffer = bytearray(len(name))
                assert store.read_into(name, 0, [buffer]) == len(name)
                assert buffer.decode() == name == store.read(name).decode()
    assert kept_open(tmp_path) > 0
    source._opened.cache_clear()
    with contextlib.suppress(OSError):
        while True:
            few_files.append(os.open(tmp_path, os.O_RDONLY))
    store = stores[0]
    for ask in (lambda: store.read("1"), lambda: store.read_into("1", 0, [bytearray(1)])):
        with pytest.raises(StoreError, match=r"as many files open as it may have; raise its limit"):
            ask()


def test_a_store_that_is_let_go_of_holds_no_file(tmp_path: Path) -> None:
    """Deleted files would keep their room on the disk, and on NFS their folder."""
    (tmp_path / "a").write_text("a")
    store = LocalSource(tmp_path)
    assert store.read_into("a", 0, [bytearray(1)]) == 1
    assert kept_open(tmp_path) == 1
    del store
    gc.collect()
    assert kept_open(tmp_path) == 0


def test_all_stores_share_one_limit(tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert source._opened.cache_info().maxsize == source.OPEN_FILES <= max(16, limit // 4)
