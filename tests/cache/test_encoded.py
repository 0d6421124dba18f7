"""Codes that a device copies later: none is read before it has arrived, none is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from preceptor.benchmarks.small_store import (
    TEACHERS,
    batch,
    calibrate,
    contents,
    extract,
    fill,
    plan,
    tokens,
)
from preceptor.cache import StoreWriter, encoded, statistics
from preceptor.cache.shard_writer import ShardWriter
from preceptor.errors import DataError, StoreError

SPACES = [space for teacher in TEACHERS for space in teacher.spaces]


class Device:
    """Stands in for a device: what it copies to the host holds 77 until it is waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = 0
        self.events: list[tuple[str, int]] = []
        monkeypatch.setattr(encoded, "to_host", self.to_host)
        monkeypatch.setattr(statistics, "to_host", self.to_host)

    def to_host(self, tensors: list[torch.Tensor]) -> tuple[list[torch.Tensor], Any]:
        copies = [torch.full_like(x, 77) for x in tensors]
        number = self.begun
        self.begun += 1
        self.events.append(("begun", number))

        def wait() -> None:
            for copy, x in zip(copies, tensors, strict=True):
                copy.copy_(x)
            self.events.append(("awaited", number))

        return copies, wait


def begun(path: Path) -> StoreWriter:
    writer = StoreWriter.open_or_create(path, plan())
    calibrate(writer)
    return writer


def append(
    out: ShardWriter, first: int, last: int, bad: float | None = None, device: str = "cpu"
) -> None:
    rows = batch(first, last)
    numbers = np.arange(first, last)[rows.valid]
    given = {space.id: torch.from_numpy(tokens(space, numbers)) for space in SPACES}
    if bad is not None:
        given["cnn/patch"][1, 2, 3] = bad
    out.append(rows, {name: x.to(device) for name, x in given.items()})


def test_the_store_is_the_same_whenever_the_copies_arrive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(tmp_path / "store")
    writer = begun(tmp_path / "late")
    device = Device(monkeypatch)
    fill(writer)
    writer.finish()
    assert contents(tmp_path / "late") == contents(tmp_path / "store")
    # batches of three rows, shards of 8 and 6, and the moments of each
    assert device.begun == len(SPACES) * (3 + 2 + 2)


def test_a_batch_is_awaited_when_the_next_is_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = begun(tmp_path / "store")
    device = Device(monkeypatch)
    out = writer.shard(0, ("rows", "vit", "cnn"))
    for first, last in ((0, 3), (3, 6), (6, 8)):
        append(out, first, last)
    out.close()
    order = [("begun", 0), ("begun", 1), ("awaited", 0), ("begun", 2), ("awaited", 1)]
    order.append(("begun", 3))  # the moments
    assert len(SPACES) == 4
    expected = [(what, 4 * one + space) for what, one in order for space in range(4)]
    assert device.events == expected
    device.events.clear()
    out.commit()
    assert sorted(device.events) == [("awaited", number) for number in range(8, 16)]


@pytest.mark.parametrize(
    ("value", "words"), [(np.nan, "not finite"), (np.inf, "not finite"), (1e30, "too far")]
)
def test_tokens_that_cannot_be_stored_are_named_later_and_never_passed_over(
    value: float, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = begun(tmp_path / "store")
    Device(monkeypatch)
    named = rf"token 2 of cnn/patch is {words}.* row key 'key0001'"
    out = writer.shard(0, ("rows", "vit", "cnn"))
    append(out, 0, 3, bad=value)
    for _ in range(2):
        with pytest.raises(DataError, match=named):
            append(out, 3, 6)
    with pytest.raises(StoreError, match="3 of its 8 rows"):
        out.close()
    last = writer.shard(0, ("rows", "vit", "cnn"))
    append(last, 0, 8, bad=value)
    last.close()
    with pytest.raises(DataError, match=named):
        last.commit()
    assert not list((writer.path / "commits").rglob("*.json"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_codes_from_a_gpu_are_those_from_the_cpu(tmp_path: Path) -> None:
    stores = []
    for device in ("cpu", "cuda"):
        writer = begun(tmp_path / device)
        with writer.shard(0, ("rows", "vit", "cnn")) as out:
            for first, last in ((0, 3), (3, 6), (6, 8)):
                append(out, first, last, device=device)
        found = contents(writer.path)
        # their moments are sums in another order
        stores.append({name: raw for name, raw in found.items() if Path(name).name[:2] == "c."})
    assert len(stores[0]) > 8
    assert stores[0] == stores[1]
