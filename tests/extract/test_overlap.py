"""A device is never left without work while what it has done is encoded, written and read back."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from preceptor.benchmarks.small_store import contents
from preceptor.cache import encoded, statistics
from preceptor.cli import main
from preceptor.extract import storable
from preceptor.extract.runner import TeacherRunner
from preceptor.tests.conftest import COUNT
from preceptor.tests.extract.tiny_store import CALL
from torch import Tensor

PATIENCE = 60  # seconds, for what comes at once unless the machine is very busy
SHARD_ROWS = 4


class Queue:
    """Stands in for a device that works through a queue of batches.

    What is copied from it after so many batches holds 77 until another batch is behind them, or
    none is left. The filling's own thread may not wait for it sooner: the queue would run empty.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
        self.batches, self.begun, self.drained = batches, 0, list[int]()
        self.more = threading.Condition()
        self.awaited: dict[str, int] = {}
        plain = TeacherRunner.tokens

        def tokens(runner: TeacherRunner, *given: Any) -> dict[str, Tensor]:
            with self.more:
                self.begun += 1
                self.more.notify_all()
            return plain(runner, *given)

        monkeypatch.setattr(TeacherRunner, "tokens", tokens)
        for module in (encoded, statistics, storable):
            monkeypatch.setattr(module, "to_host", self.to_host)

    def to_host(self, tensors: list[Tensor]) -> tuple[list[Tensor], Any]:
        copies, behind = [torch.full_like(x, 77) for x in tensors], self.begun

        def over() -> bool:
            return self.begun > behind or self.begun == self.batches

        def wait() -> None:
            thread = threading.current_thread().name.split("_")[0]
            with self.more:
                if thread != "commit" and not over():
                    self.drained.append(behind)
                elif not self.more.wait_for(over, PATIENCE):
                    raise TimeoutError
                self.awaited[thread] = self.awaited.get(thread, 0) + 1
            for copy, x in zip(copies, tensors, strict=True):
                copy.copy_(x)

        return copies, wait


def extracted(store: Path, shards: str, batch_size: int, *options: str) -> dict[str, bytes]:
    groups = store.parent / "teachers"
    groups.mkdir(exist_ok=True)
    (groups / "both.yaml").write_text(
        "".join(f"{name}: {{source: '{CALL}:{name}'}}\n" for name in ("vit", "cnn"))
    )
    given = [f"cache={store}", f"data.shards='{shards}'", f"calibration.images={COUNT}"]
    given += [f"shard_rows={SHARD_ROWS}", "group_rows=2", f"batch_size={batch_size}"]
    given += ["workers=0", "engine=cpu", "pixels.size=8", *options]
    assert main(["extract", "--config-dir", str(store.parent), "teachers=both", *given]) == 0
    return contents(store)


@pytest.mark.parametrize("batch_size", [1, 2, SHARD_ROWS])
def test_the_next_batch_is_queued_before_the_one_before_is_waited_for(
    batch_size: int, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a shard and from one to the next, and the store is the same."""
    expected = extracted(tmp_path / "plain", shards, batch_size)
    whole, rest = divmod(COUNT, SHARD_ROWS)
    queue = Queue(monkeypatch, whole * -(-SHARD_ROWS // batch_size) + -(-rest // batch_size))
    # with the other's calibration, so that no batch is run before the filling
    calibrated = f"calibration.store={tmp_path / 'plain'}"
    assert extracted(tmp_path / "queued", shards, batch_size, calibrated) == expected
    assert queue.begun == queue.batches
    assert not queue.drained
    assert set(queue.awaited) == {"MainThread", "commit"}
