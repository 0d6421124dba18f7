"""Shards committed beside the filling: the same store, in order, and no error is lost."""

from __future__ import annotations

import errno
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from preceptor.benchmarks.small_store import (
    calibrate,
    contents,
    extract,
    fill_shard,
    filled,
    plan,
)
from preceptor.cache import StoreWriter, shard_writer
from preceptor.cache.commit import committed
from preceptor.cache.commit_thread import CommitThread
from preceptor.cache.durable import Staged
from preceptor.cache.shard_writer import ShardWriter
from preceptor.cache.verify import verify_store
from preceptor.errors import StoreError

ROWS, SHARDS = 38, 5
PATIENCE = 60  # seconds, for what comes at once unless the machine is very busy


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The store of commits that the filling waits for."""
    writer = begun(tmp_path_factory.mktemp("good") / "store")
    for shard, units in writer.pending():
        fill_shard(writer, shard, units)
    writer.finish()
    return contents(writer.path)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [one.name for one in threading.enumerate() if one.name.startswith("commit")]


def begun(path: Path) -> StoreWriter:
    writer = StoreWriter.open_or_create(path, plan(rows=ROWS))
    assert writer.plan.shards == SHARDS
    calibrate(writer)
    return writer


def fill(writer: StoreWriter, seen: Callable[[int], object] = lambda shard: None) -> None:
    """Every pending shard; each is shown when it is filled, before it is handed over."""
    with CommitThread() as commits:
        for shard, units in writer.pending():
            out = filled(writer, shard, units)
            seen(shard)
            commits.commit(out)


def whole_shards(writer: StoreWriter) -> dict[str, list[int]]:
    return {unit: sorted(committed(writer.path, unit)) for unit in writer.plan.units}


def the_same(writer: StoreWriter, shards: list[int]) -> dict[str, list[int]]:
    """Those shards of every unit."""
    return {unit: shards for unit in writer.plan.units}


def resumed(writer: StoreWriter) -> dict[str, bytes]:
    extract(writer.path, rows=ROWS)
    return contents(writer.path)


def test_the_store_is_that_of_commits_the_filling_waits_for(
    tmp_path: Path, good: dict[str, bytes]
) -> None:
    writer = begun(tmp_path / "store")
    fill(writer)
    writer.finish()
    assert contents(writer.path) == good
    assert verify_store(writer.path).whole


def test_a_shard_is_filled_while_the_one_before_is_in_commit_and_no_other_is(
    tmp_path: Path, good: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = begun(tmp_path / "store")
    events: list[tuple[str, int]] = []
    full = [threading.Event() for _ in range(SHARDS)]
    plain = ShardWriter.commit

    def commit(self: ShardWriter) -> None:
        shard = self._shard
        events.append(("begun", shard))
        # were the filling to wait for this commit, the next shard would never be full
        assert shard + 1 == SHARDS or full[shard + 1].wait(PATIENCE)
        plain(self)
        assert whole_shards(writer) == the_same(writer, list(range(shard + 1)))
        events.append(("done", shard))

    monkeypatch.setattr(ShardWriter, "commit", commit)
    fill(writer, lambda shard: full[shard].set())
    assert events == [(what, shard) for shard in range(SHARDS) for what in ("begun", "done")]
    writer.finish()
    assert contents(writer.path) == good


def test_no_more_than_two_shards_are_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = begun(tmp_path / "store")
    sizes: dict[int, int] = {}
    alive: list[int] = []
    lock = threading.Lock()
    made, make = ShardWriter.__init__, shard_writer.pad_to_chunks

    def gone(bytes_: int) -> None:
        with lock:
            alive.append(alive[-1] - bytes_)

    def counted(*given: Any) -> np.ndarray:
        array = make(*given)
        with lock:
            alive.append((alive[-1] if alive else 0) + array.nbytes)
        weakref.finalize(array, gone, array.nbytes)
        return array

    def init(self: ShardWriter, *given: Any) -> None:
        before = alive[-1] if alive else 0
        made(self, *given)
        sizes[self._shard] = alive[-1] - before

    monkeypatch.setattr(shard_writer, "pad_to_chunks", counted)
    monkeypatch.setattr(ShardWriter, "__init__", init)
    slow = ShardWriter.commit
    full = threading.Event()

    def commit(self: ShardWriter) -> None:
        assert self._shard + 1 == SHARDS or full.wait(PATIENCE)
        full.clear()
        slow(self)

    monkeypatch.setattr(ShardWriter, "commit", commit)
    fill(writer, lambda shard: full.set() if shard else None)
    assert list(sizes) == list(range(SHARDS))
    assert max(alive) == 2 * sizes[0]
    assert alive[-1] == 0


def failing(monkeypatch: pytest.MonkeyPatch, call: str, error: int, shard: int, unit: str) -> None:
    """Let a call of ``os`` fail in the commit of one shard of one unit."""
    plain_call, plain_commit = getattr(os, call), ShardWriter._commit
    doomed = threading.local()

    def commit(self: ShardWriter, of: str) -> None:
        doomed.now = (self._shard, of) == (shard, unit)
        plain_commit(self, of)

    def called(*given: Any) -> Any:
        if getattr(doomed, "now", False):
            raise OSError(error, os.strerror(error))
        return plain_call(*given)

    monkeypatch.setattr(ShardWriter, "_commit", commit)
    monkeypatch.setattr(os, call, called)


@pytest.mark.parametrize(
    ("call", "error"), [("write", errno.ENOSPC), ("fsync", errno.EIO), ("replace", errno.EROFS)]
)
def test_a_commit_that_fails_is_told_by_the_next_shard_and_the_rest_can_be_done_later(
    call: str,
    error: int,
    tmp_path: Path,
    good: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    writer = begun(tmp_path / "store")
    seen: list[int] = []
    with monkeypatch.context() as patch:
        failing(patch, call, error, shard=1, unit="vit")
        with pytest.raises(StoreError, match=f"^shard 1 of vit: .*{os.strerror(error)}"):
            fill(writer, seen.append)
    assert seen == [0, 1, 2]
    assert whole_shards(writer) == {"rows": [0, 1], "pixels": [0, 1], "vit": [0], "cnn": [0]}
    assert not list(writer.path.rglob("*.tmp"))
    assert resumed(writer) == good


def test_the_last_commit_is_waited_for_and_its_error_told(
    tmp_path: Path, good: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = begun(tmp_path / "store")
    with monkeypatch.context() as patch:
        failing(patch, "fsync", errno.EIO, shard=SHARDS - 1, unit="cnn")
        with pytest.raises(StoreError, match=f"^shard {SHARDS - 1} of cnn: .*Input/output error"):
            fill(writer)
    assert whole_shards(writer)["cnn"] == list(range(SHARDS - 1))
    assert resumed(writer) == good


@pytest.mark.parametrize("fails", [False, True])
def test_an_interrupt_lets_the_commit_under_way_end_and_leaves_nothing_else(
    fails: bool, tmp_path: Path, good: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = begun(tmp_path / "store")
    verifying, interrupted = threading.Event(), threading.Event()
    plain = Staged.verify

    def verify(self: Staged) -> None:
        if self.final.name.startswith("c.1") and not interrupted.is_set():
            verifying.set()
            assert interrupted.wait(PATIENCE)
            if fails:
                raise StoreError("the disk gave up")
        plain(self)

    def interrupt(shard: int) -> None:
        if shard == 2:
            assert verifying.wait(PATIENCE)
            interrupted.set()
            raise KeyboardInterrupt

    monkeypatch.setattr(Staged, "verify", verify)
    with pytest.raises(KeyboardInterrupt):
        fill(writer, interrupt)
    assert whole_shards(writer) == the_same(writer, [0] if fails else [0, 1])
    assert not list(writer.path.rglob("*.tmp"))
    assert resumed(writer) == good


def test_a_shard_that_lacks_rows_is_refused_where_it_is_handed_over(tmp_path: Path) -> None:
    writer = begun(tmp_path / "store")
    with CommitThread() as commits, pytest.raises(StoreError, match="shard 0 got 0 of its 8 rows"):
        commits.commit(writer.shard(0, ("vit",)))
    assert whole_shards(writer) == the_same(writer, [])
