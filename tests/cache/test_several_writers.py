"""Several writers of one store, some of them killed or late: the same bytes in the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from preceptor.benchmarks.small_store import contents
from preceptor.cache import StoreWriter
from small_stores import (
    calibrate,
    make_plan,
    write_pending,
    write_shard,
)

HERE = Path(__file__).parent
DRIVER = f"""
import os, sys
sys.path.insert(0, {str(HERE)!r})
from small_stores import (
    calibrate,
    make_plan,
    write_shard,
)
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
    write_pending(writer)
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
    write_pending(writer)
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
        write_pending(other)
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
    write_pending(first)
    second = StoreWriter.open(path)
    second.add(whole.teachers[1])
    calibrate(second)
    write_shard(second, 0, ("cnn",))
    first.finish()
    write_pending(second)
    second.finish()
    assert contents(path) == contents(finished)
