"""Which process of a launch tells that it waits, and for whom."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from preceptor.extract import turns
from torch.distributed import HashStore


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is told, in order with what is waited for."""
    found: list[str] = []

    @contextlib.contextmanager
    def recorded(what: str) -> Iterator[None]:
        found.append(what)
        yield
        found.append("over")

    monkeypatch.setattr(turns, "waiting", recorded)
    return found


@pytest.mark.parametrize("machines", [1, 2])
@pytest.mark.parametrize("fails", [False, True])
def test_who_waits_for_the_first_of_a_machine_is_told(
    machines: int, fails: bool, told: list[str]
) -> None:
    """The barrier is within what is told, the block is not."""
    for rank in range(4):
        local = rank % (4 // machines)
        fabric: Any = SimpleNamespace(
            world_size=4, global_rank=rank, local_rank=local, barrier=lambda: told.append("barrier")
        )
        with contextlib.suppress(ZeroDivisionError), turns.one_first(fabric, "lists"):
            told.append("block")
            assert not fails or 1 / 0
        barrier = ["barrier"]
        if rank < 2:
            whose = "every machine" if local == 0 else "its machine"
            line = f"process {rank} waits for the first process of {whose}, which lists"
            barrier = [line, "barrier", "over"]
        assert told == (["block", *barrier] if local == 0 else [*barrier, "block"])
        told.clear()


@pytest.mark.parametrize(
    ("world", "calibration", "shares"),
    [
        (1, {}, {}),
        (2, {1: "process 1 waits for process 0"}, {0: "waits for that of process 1"}),
        (8, {1: "processes 1 to 7 wait for"}, {0: "waits for those of processes 1 to 7"}),
    ],
)
def test_one_process_tells_for_all(
    world: int, calibration: dict[int, str], shares: dict[int, str], told: list[str]
) -> None:
    for rank in range(world):
        fabric: Any = SimpleNamespace(
            world_size=world, global_rank=rank, barrier=lambda: told.append("barrier")
        )
        turns.await_calibration(fabric)
        expected = ["barrier"]
        if rank in calibration:
            assert calibration[rank] in told[0]
            expected = [told[0], "barrier", "over"]
        assert told == expected
        told.clear()
        turns.await_others(fabric)
        expected = ["barrier"]
        if rank in shares:
            assert shares[rank] in told[0]
            expected = [told[0], "barrier", "over"]
        assert told == expected
        told.clear()


def test_every_number_is_for_one_process_and_all_see_what_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = HashStore()
    monkeypatch.setattr(turns.distributed_c10d, "_get_default_store", lambda: store)
    fabric: Any = SimpleNamespace(world_size=2, broadcast=lambda name: "list")
    first, second = (turns.WorkList(fabric, 5) for _ in range(2))
    ours, theirs = iter(first), iter(second)
    assert [next(ours), next(theirs), next(theirs), next(ours), next(theirs)] == [*range(5)]
    assert list(ours) == list(theirs) == list(second) == []
    assert [first.advance(3), second.advance(4), first.advance(1)] == [3, 7, 8]


def test_a_process_alone_takes_all() -> None:
    names = iter("ab")
    fabric: Any = SimpleNamespace(world_size=1, broadcast=lambda name: next(names))
    for _ in range(2):
        work = turns.WorkList(fabric, 3)
        assert list(work) == [0, 1, 2]
        assert [work.advance(2), work.advance(5)] == [2, 7]
