"""The writer: whole or absent, the same bytes whatever happened on the way."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from preceptor.benchmarks.small_store import contents
from preceptor.cache import Cache, RowBatch, StoreWriter
from preceptor.cache.commit import discard
from preceptor.cache.durable import write_whole
from preceptor.errors import DataError, StoreError
from small_stores import (
    SPACES,
    calibrate,
    facts_of,
    make_plan,
    some_weights,
    tokens_of,
    write_shard,
    write_store,
)

HERE = Path(__file__).parent
DRIVER = f"""
import os, sys
sys.path.insert(0, {str(HERE)!r})
from small_stores import calibrate, make_plan, write_shard
from preceptor.cache import StoreWriter
path, mode = sys.argv[1], sys.argv[2]
writer = StoreWriter.open_or_create(path, make_plan())
calibrate(writer)
print("ready", flush=True)
sys.stdin.readline()
if mode == "race":
    write_shard(writer, 1, ("rows", "vit", "cnn"))
elif mode.startswith("rank"):
    rank = int(mode.removeprefix("rank"))
    while todo := writer.pending():
        shard, units = todo[rank % len(todo)]
        write_shard(writer, shard, units)
        print(shard, flush=True)
    writer.finish()
else:
    for shard, units in writer.pending():
        write_shard(writer, shard, units)
        print(shard, flush=True)
"""


def fill(
    writer: StoreWriter, shard: int, unit: str, facts: RowBatch, tokens: dict[str, Any]
) -> None:
    with writer.shard(shard, (unit,)) as out:
        out.append(facts, tokens)


def driver(path: Path | str, mode: str, cwd: Path | None = None) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(path), mode],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=cwd,
    )


def test_killed_and_resumed_gives_the_same_bytes(tmp_path: Path, finished: Path) -> None:
    path = tmp_path / "store"
    process = driver(path, "all")
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.strip() == "0":  # the first shard is committed, the second is under way
            process.send_signal(signal.SIGKILL)
            break
    process.communicate()
    writer = StoreWriter.open_or_create(path, make_plan())
    todo = writer.pending()
    assert 0 not in dict(todo)
    assert 2 in dict(todo)
    calibrate(writer)
    for shard, units in todo:
        write_shard(writer, shard, units)
    writer.finish()
    assert contents(path) == contents(finished)


def test_two_processes_at_one_shard_leave_one_whole_shard(tmp_path: Path, finished: Path) -> None:
    path = tmp_path / "store"
    writer = StoreWriter.open_or_create(path, make_plan())
    calibrate(writer)
    racer = driver(path, "race")
    assert racer.stdout is not None
    assert racer.stdin is not None
    assert racer.stdout.readline() == "ready\n"
    racer.stdin.write("go\n")
    racer.stdin.flush()
    write_shard(writer, 1, ("rows", "vit", "cnn"))
    racer.communicate()
    assert racer.returncode == 0
    assert [shard for shard, _ in writer.pending()] == [0, 2]
    for shard, units in writer.pending():
        write_shard(writer, shard, units)
    writer.finish()
    assert contents(path) == contents(finished)


def test_ranks_that_spell_the_path_each_their_own_way_finish_one_store(
    tmp_path: Path, finished: Path
) -> None:
    """Each in a directory of its own, all at once; one is lost on the way, the others take over
    what it had begun, and race to finish."""
    path = tmp_path / "real/store"
    (tmp_path / "elsewhere").mkdir()
    path.parent.mkdir()
    (tmp_path / "link").symlink_to("real")
    spellings = [
        (str(path), None),
        ("store/", path.parent),
        ("../real/../link/store", tmp_path / "elsewhere"),
        (f"file://{tmp_path}/link/store", tmp_path),
    ]
    ranks = [
        driver(spelled, f"rank{number}", cwd) for number, (spelled, cwd) in enumerate(spellings)
    ]
    for rank in ranks:
        assert rank.stdout is not None
        assert rank.stdout.readline() == "ready\n"
    for rank in ranks:
        assert rank.stdin is not None
        rank.stdin.write("go\n")
        rank.stdin.flush()
    lost = ranks.pop(2)
    assert lost.stdout is not None
    lost.stdout.readline()
    lost.send_signal(signal.SIGKILL)
    lost.communicate()
    for rank in ranks:
        rank.communicate()
    assert [rank.returncode for rank in ranks] == [0, 0, 0]
    StoreWriter.open(tmp_path / "link/store")  # torn files of the lost one may lie about
    assert contents(path) == contents(finished)


def test_two_processes_may_finish_at_once(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second begins when the first is about to read the moments."""
    from preceptor.cache import finish

    path = tmp_path / "store"
    writer = StoreWriter.open_or_create(path, make_plan())
    calibrate(writer)
    for shard, units in writer.pending():
        write_shard(writer, shard, units)
    racers: list[Future[None]] = []
    with ThreadPoolExecutor(1) as pool:

        def late(*args: Any) -> Any:
            if not racers:
                racers.append(pool.submit(StoreWriter.open(path).finish))
                wait(racers, timeout=0.5)
            return shard_moments(*args)

        shard_moments = finish.shard_moments
        monkeypatch.setattr(finish, "shard_moments", late)
        writer.finish()
        racers[0].result()
    assert contents(path) == contents(finished)


def test_a_rank_whose_shard_was_taken_over_leaves_the_finished_store_alone(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was thought lost, and wakes up before it has committed."""
    from preceptor.cache.durable import Staged

    path = tmp_path / "store"
    slow = StoreWriter.open_or_create(path, make_plan())
    calibrate(slow)
    verify = Staged.verify

    def asleep(staged: Staged) -> None:
        monkeypatch.setattr(Staged, "verify", verify)
        other = StoreWriter.open(path)
        for shard, units in other.pending():
            write_shard(other, shard, units)
        other.finish()
        verify(staged)

    monkeypatch.setattr(Staged, "verify", asleep)
    write_shard(slow, 1, ("vit", "cnn"))
    slow.finish()
    assert contents(path) == contents(finished)
    assert not (path / "partial").exists()


def test_finishing_leaves_the_moments_of_a_teacher_that_is_being_added(
    tmp_path: Path, finished: Path
) -> None:
    path, whole = tmp_path / "store", make_plan()
    first = StoreWriter.open_or_create(path, replace(whole, teachers=whole.teachers[:1]))
    calibrate(first)
    for shard, units in first.pending():
        write_shard(first, shard, units)
    second = StoreWriter.open(path)
    second.add(whole.teachers[1])
    calibrate(second)
    write_shard(second, 0, ("cnn",))
    first.finish()
    for shard, units in second.pending():
        write_shard(second, shard, units)
    second.finish()
    assert contents(path) == contents(finished)


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
    for shard, units in writer.pending():
        write_shard(writer, shard, units)
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


def test_another_configuration_is_refused_with_both_sides(store: Path) -> None:
    plan = make_plan()
    other = replace(plan, samples={**plan.samples, "sha256": "cd" * 32})
    with pytest.raises(StoreError, match=r"samples.sha256 is \"abab.* in the store and \"cdcd"):
        StoreWriter.open_or_create(store, other)
    teacher = replace(plan.teachers[0], identity={"source": "call:other"})
    with pytest.raises(StoreError, match=r"teachers\[vit\].identity"):
        StoreWriter.open_or_create(store, replace(plan, teachers=(teacher, *plan.teachers[1:])))
    with pytest.raises(StoreError, match=r"group_rows is 4 in the store and 8"):
        StoreWriter.open_or_create(store, replace(plan, group_rows=8))


def test_a_directory_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(StoreError, match=r"thesis\.tex"):
        StoreWriter.open_or_create(tmp_path, make_plan())


def test_a_shard_that_is_not_full_commits_nothing(tmp_path: Path) -> None:
    writer = StoreWriter.open_or_create(tmp_path / "store", make_plan())
    before = contents(tmp_path)
    whole = facts_of(np.arange(16))
    with pytest.raises(StoreError, match="got 4 of its 16 rows"):
        fill(writer, 0, "rows", facts_of(np.arange(4)), {})
    with pytest.raises(StoreError, match="cannot be stored"):
        fill(writer, 0, "rows", replace(whole, keys=["", *whole.keys[1:]]), {})
    with pytest.raises(StoreError, match="takes 16 rows, not 17"):
        fill(writer, 0, "rows", facts_of(np.arange(17)), {})
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("value", "words"), [(np.nan, "not finite"), (np.inf, "not finite"), (1e30, "too far")]
)
def test_tokens_that_cannot_be_stored_are_named(tmp_path: Path, value: float, words: str) -> None:
    writer = StoreWriter.open_or_create(tmp_path / "store", make_plan(SPACES[:1]))
    calibrate(writer)
    rows = np.arange(3)
    x = tokens_of(SPACES[0], rows)
    x[2, 4, 1] = value
    with pytest.raises(DataError, match=rf"token 4 of vit/patch is {words}.*train/00002é"):
        fill(writer, 0, "vit", facts_of(rows), {"vit/patch": torch.from_numpy(x)})


def test_wrong_shapes_and_spaces_are_named(tmp_path: Path) -> None:
    writer = StoreWriter.open_or_create(tmp_path / "store", make_plan(SPACES[:1]))
    with pytest.raises(StoreError, match=r"vit/patch .* is not calibrated"):
        writer.shard(0, ("vit",))
    calibrate(writer)
    rows = facts_of(np.arange(3))
    shard = writer.shard(0, ("vit",))
    with pytest.raises(StoreError, match=r"\(3, 6, 70\), not \(2, 6, 70\)"):
        shard.append(rows, {"vit/patch": np.zeros((2, 6, 70), np.float32)})
    with pytest.raises(StoreError, match="wants tokens of"):
        shard.append(rows, {})
    with pytest.raises(StoreError, match="label of 3 rows"):
        shard.append(replace(rows, labels=np.zeros(2)), {})
    with pytest.raises(StoreError, match="1 to 128 bytes"):
        shard.append(replace(rows, keys=["a", "b" * 129, "c"]), {})
    with pytest.raises(StoreError, match=r"1 to 128 bytes .* of UTF-8"):
        shard.append(replace(rows, keys=["a", "b\udcff", "c"]), {})
    with pytest.raises(StoreError, match="shards 0 to 2, not 3"):
        writer.shard(3, ("vit",))
    with pytest.raises(StoreError, match="no teacher 'vgg'"):
        writer.shard(0, ("vgg",))


def test_a_calibration_is_frozen(tmp_path: Path) -> None:
    writer = StoreWriter.open_or_create(tmp_path / "store", make_plan(SPACES[:1]))
    assert [space.id for space in writer.uncalibrated] == ["vit/patch"]
    mean, std = np.arange(70.0), np.arange(70.0) + 1
    for bad in (std[:3], std * np.nan, std - 1):
        with pytest.raises(StoreError, match="vit/patch"):
            writer.calibrate("vit/patch", mean, bad, rows_used=3)
    writer.calibrate("vit/patch", mean, std, rows_used=3)
    writer.calibrate("vit/patch", mean, std, rows_used=3)
    with pytest.raises(StoreError, match="frozen"):
        writer.calibrate("vit/patch", mean, std + 1, rows_used=3)
    again = StoreWriter.open_or_create(tmp_path / "store", make_plan(SPACES[:1]))
    assert again.uncalibrated == []
    assert (again.calibration("vit/patch")["std"] == std.astype(np.float32)).all()


def test_weights_of_a_prediction_are_frozen_with_the_calibration(tmp_path: Path) -> None:
    writer = StoreWriter.open_or_create(tmp_path / "store", make_plan())
    ones = np.ones(9, np.float32)
    weights = some_weights(9, 100, np.random.default_rng(0))
    for bad, why in (
        (weights.astype(np.int16), "int8 of shape"),
        (weights[:8], "int8 of shape"),
        (weights.T.copy(), "earlier block"),
    ):
        with pytest.raises(StoreError, match=f"cnn/map.*{why}"):
            writer.calibrate("cnn/map", ones, ones, rows_used=3, weights=bad)
    with pytest.raises(StoreError, match="cnn/small is not predicted"):
        writer.calibrate("cnn/small", np.ones(129), np.ones(129), rows_used=3, weights=weights)
    writer.calibrate("cnn/map", ones, ones, rows_used=3, weights=weights)
    writer.calibrate("cnn/map", ones, ones, rows_used=3, weights=weights)
    with pytest.raises(StoreError, match="frozen"):
        writer.calibrate("cnn/map", ones, ones, rows_used=3)
    again = StoreWriter.open(tmp_path / "store")
    assert (again.calibration("cnn/map")["weights"] == weights).all()
    other = StoreWriter.open_or_create(tmp_path / "other", make_plan())
    other.calibrate("cnn/map", ones, ones, rows_used=3)
    assert not other.calibration("cnn/map")["weights"].any()


def test_tokens_of_other_rows_than_the_store_has_are_refused(store: Path) -> None:
    discard(store, StoreWriter.open(store).manifest, "vit", 1)
    writer = StoreWriter.open(store)
    assert writer.pending() == [(1, ("vit",))]
    rows = np.arange(16, 32)
    facts = facts_of(rows)
    facts.keys[3] = "another"
    spaces = [space for space in SPACES if space.teacher == "vit"]
    tokens = {space.id: tokens_of(space, rows) for space in spaces}
    with pytest.raises(StoreError, match="shard 1: key of the rows"):
        fill(writer, 1, "vit", facts, tokens)


def test_finishing_names_what_is_pending(tmp_path: Path) -> None:
    writer = StoreWriter.open_or_create(tmp_path / "store", make_plan())
    calibrate(writer)
    write_shard(writer, 1, ("rows", "vit", "cnn"))
    write_shard(writer, 0, ("rows",))
    assert writer.pending() == [(0, ("vit", "cnn")), (2, ("rows", "vit", "cnn"))]
    with pytest.raises(StoreError, match=r"2 of 3 shards are not committed \(0, 2\)"):
        writer.finish()
    with pytest.raises(StoreError, match=r"vit lacks 2 of 3 shards \(0, 2\).*extract"):
        Cache.open(tmp_path / "store")


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
