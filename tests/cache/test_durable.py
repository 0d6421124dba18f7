"""Files on devices that fail, fill up or lack a call: whole or absent, and told in a sentence."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from preceptor.benchmarks.small_store import contents
from preceptor.cache import StoreWriter
from preceptor.cache.commit import discard
from preceptor.cache.durable import write_whole
from preceptor.errors import StoreError
from small_stores import (
    calibrate,
    make_plan,
    write_pending,
    write_shard,
    write_store,
)


class Once:
    """A system call that fails with an error the nth time, and works otherwise."""

    def __init__(self, call: Callable[..., Any], code: int, nth: int) -> None:
        self.call, self.code, self.left = call, code, nth

    def __call__(self, *args: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise OSError(self.code, os.strerror(self.code))
        return self.call(*args)


@pytest.mark.parametrize(
    ("name", "code"),
    [("fsync", errno.EIO), ("fsync", errno.EDQUOT), ("replace", errno.ESTALE)],
)
def test_a_call_that_fails_once_commits_nothing(
    name: str, code: int, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it happens: of files, of directories, of the record itself."""
    path = tmp_path / "store"
    writer = StoreWriter.open_or_create(path, make_plan())
    calibrate(writer)
    before = contents(path)
    real = os.replace if name == "replace" else lambda fd: None  # quick
    nth = 0
    while True:
        nth += 1
        once = Once(real, code, nth)
        monkeypatch.setattr(os, name, once)
        try:
            write_shard(writer, 1, ("vit",))
        except StoreError as error:
            assert os.strerror(code) in str(error)  # noqa: PT017 (where it is raised varies)
            assert dict(writer.pending())[1] == ("rows", "vit", "cnn"), nth
            assert not list(path.rglob("*.tmp"))
        else:
            break
    monkeypatch.undo()
    assert once.left > 0
    assert nth > 6
    assert contents(path).keys() - before.keys() > {"commits/vit/1.json"}
    write_pending(writer)
    writer.finish()
    assert contents(path) == contents(finished)


def test_a_file_system_that_syncs_no_directories_will_do(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", fsync)
    write_store(tmp_path / "store")
    assert contents(tmp_path / "store") == contents(finished)


def test_torn_files_are_removed_where_only_what_is_writable_can_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS; and whatever the clock of the machine that left them says."""
    path, flock = tmp_path / "store", fcntl.flock
    StoreWriter.open_or_create(path, make_plan())

    def of_nfs(fd: int, how: int) -> None:
        read_only = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        if read_only and not stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", of_nfs)
    torn = path / "rows/key/.c.0.0.0123.tmp"
    torn.write_bytes(b"half")
    os.utime(torn, (4e9, 4e9))
    StoreWriter.open(path)
    assert not torn.exists()


def test_a_file_that_cannot_be_read_back_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from preceptor.cache import durable

    def fails(path: Path) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(durable, "file_sha256", fails)
    with pytest.raises(StoreError, match=r"file cannot be read back: Input/output error"):
        durable.write_whole(tmp_path / "file", b"abc")
    assert list(tmp_path.iterdir()) == []


def test_torn_files_of_the_dead_are_removed_and_those_of_the_living_kept(tmp_path: Path) -> None:
    path = tmp_path / "store"
    StoreWriter.open_or_create(path, make_plan())
    torn = path / "rows/key/.c.0.0.0123.tmp"
    torn.write_bytes(b"half")
    from preceptor.cache.durable import Staged

    living = Staged(path / "rows/key/c.1.0", [b"whole"])
    StoreWriter.open_or_create(path, make_plan())
    assert not torn.exists()
    living.publish()
    assert (path / "rows/key/c.1.0").read_bytes() == b"whole"


def test_a_folder_that_takes_no_files_is_one_sentence(store: Path) -> None:
    discard(store, StoreWriter.open(store).manifest, "vit", 1)
    codes = store / "spaces/vit/patch/codes"
    writer = StoreWriter.open(store)
    codes.rename(store / "elsewhere")
    codes.write_text("no folder")
    with pytest.raises(StoreError, match=r"codes/c\.1\.0\.0 failed: Not a directory"):
        write_shard(writer, 1, ("vit",))


def test_a_file_is_closed_once(tmp_path: Path) -> None:
    """By the second time its number may be that of a file of another thread."""
    from preceptor.cache.durable import Staged

    staged = Staged(tmp_path / "file", [b"abc"])
    number = staged._fd
    staged.publish()
    other = os.open(tmp_path / "file", os.O_RDONLY)
    assert other == number
    staged.discard()
    assert os.read(other, 3) == b"abc"
    os.close(other)


def test_the_disk_giving_back_other_bytes_is_noticed(tmp_path: Path) -> None:
    from preceptor.cache.durable import Staged

    staged = Staged(tmp_path / "file", [b"abc", b"def"])
    (temporary,) = tmp_path.iterdir()
    temporary.write_bytes(b"abcdeg")
    with pytest.raises(StoreError, match="the disk gave back other bytes"):
        staged.verify()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    import resource

    from preceptor.cache.durable import Staged

    size = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, size[1]))
    try:
        with pytest.raises(StoreError, match="nothing was committed"):
            Staged(tmp_path / "file", [bytes(10000)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, size)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = write_store(tmp_path / "begun")

    def flock(fd: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(StoreError, match=r"cannot be locked .*Lustre: flock"):
        begun.drop(begun.plan.teachers[0].name)
    with pytest.raises(StoreError, match=r"cannot be locked"):
        write_whole(tmp_path / "file", b"bytes")
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before
