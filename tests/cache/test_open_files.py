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
from preceptor.cache.commit import FileRecord
from preceptor.cache.layout import Layout
from preceptor.cache.source import LocalSource
from preceptor.cache.verify import check_file, verify_store
from preceptor.errors import StoreError
from preceptor.tests.cache.small_stores import write_store


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


def fill(held: list[int]) -> None:
    """Open files until this process may open no more."""
    source._opened.cache_clear()
    with contextlib.suppress(OSError):
        while True:
            held.append(os.open("/dev/null", os.O_RDONLY))


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
    # Whole files are read beside those that stay open, which make room for them.
    assert stores[0].read_into("1", 0, [bytearray(1)]) == 1
    assert kept_open(tmp_path) > 0
    fill(few_files)
    store = stores[0]
    for ask in (lambda: store.read("1"), lambda: store.read_into("1", 0, [bytearray(1)])):
        with pytest.raises(StoreError, match=r"as many files open as it may have; raise its limit"):
            ask()


def test_a_file_that_is_one_too_many_is_no_damage(tmp_path: Path, few_files: list[int]) -> None:
    """Repair would make again what verify calls damaged."""
    plan = write_store(tmp_path / "store").plan
    spec = next(iter(Layout(plan).unit_arrays("rows").values()))
    fill(few_files)
    with pytest.raises(StoreError, match=r"manifest\.json: this process has as many files open"):
        verify_store(tmp_path / "store")
    file = tmp_path / "store" / spec.file(0)
    with pytest.raises(StoreError, match=r"rows/.*: this process has as many files open as it may"):
        check_file(file, spec, FileRecord(0, "", ()), 1)


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
