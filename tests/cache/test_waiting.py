"""Waiting for other processes: when it is told, without waiting."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from preceptor.benchmarks.small_store import extract
from preceptor.cache import durable, waiting, writer
from preceptor.cache.durable import directory_lock


@pytest.mark.parametrize("seconds", [0, 4, 6, 604, 606, 3000])
def test_it_is_told_soon_and_then_every_ten_minutes(seconds: float) -> None:
    passed, told = 0.0, list[tuple[float, str]]()

    def over(pause: float) -> bool:
        nonlocal passed
        passed = min(passed + pause, seconds)
        return passed == seconds

    waiting.speak("one waits", over, lambda line: told.append((passed, line)))
    assert [at for at, _ in told] == [at for at in (5, *range(605, 3000, 600)) if at < seconds]
    lines = [line for _, line in told]
    assert lines[:2] == ["one waits", "one waits, for 10 minutes now"][: len(lines)]


def test_what_is_told_ends_with_the_waiting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every pause but the second ends at once, as if it had passed."""
    told, real = threading.Event(), threading.Event.wait

    def wait(event: threading.Event, pause: float | None = None) -> bool:
        if pause == waiting.FIRST:
            return False
        if pause == waiting.AGAIN:
            told.set()
        return real(event)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Event, "wait", wait)
        with waiting.waiting("process 0 waits"):
            assert real(told, 60)
    assert capsys.readouterr().err == "process 0 waits\n"
    assert not [one for one in threading.enumerate() if one.name.endswith("(speak)")]


def test_a_lock_that_another_process_holds_is_told_with_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, told = os.open(tmp_path, os.O_RDONLY), list[str]()

    @contextlib.contextmanager
    def released(what: str) -> Iterator[None]:
        told.append(what)
        fcntl.flock(held, fcntl.LOCK_UN)
        yield

    monkeypatch.setattr(durable, "waiting", released)
    with directory_lock(tmp_path):
        assert not told
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        with directory_lock(tmp_path), pytest.raises(BlockingIOError):
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(held)
    assert told == [f"waiting for another process that holds {tmp_path}"]


def test_the_sealing_of_a_store_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    @contextlib.contextmanager
    def recorded(what: str) -> Iterator[None]:
        assert not list(tmp_path.rglob("complete.json"))
        told.append(what)
        yield
        assert list(tmp_path.rglob("complete.json"))

    monkeypatch.setattr(writer, "waiting", recorded)
    extract(tmp_path / "store")
    assert told == [
        f"{tmp_path / 'store'}: the statistics of 2 shards are merged, and the store sealed"
    ]
