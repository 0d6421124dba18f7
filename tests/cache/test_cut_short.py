"""Cut short at any file, adding and dropping leave a store that verify's advice makes whole."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from preceptor.benchmarks.small_store import TEACHERS, calibrate, contents, extract, fill, plan
from preceptor.cache import Cache, StoreWriter
from preceptor.cache.durable import Staged
from preceptor.cache.mend import mend_files, repair_store
from preceptor.cache.verify import verify_store

Files = dict[str, bytes]
FIRST, SECOND = (  # with one space each: few files
    replace(teacher, spaces=teacher.spaces[part])
    for teacher, part in zip(TEACHERS, (slice(1, 2), slice(0, 1)), strict=True)
)
WHOLE = plan(FIRST, SECOND)


class Disk:
    """Counts the files that get their name and the folders that are removed, and lets no more than
    some be."""

    def __init__(self, patch: pytest.MonkeyPatch, last: int = 1 << 30) -> None:
        self.count, self._last = 0, last
        patch.setattr(Staged, "publish", self._counted(Staged.publish))
        patch.setattr(shutil, "rmtree", self._counted(shutil.rmtree))

    def _counted(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*given: Any) -> Any:
            if self.count == self._last:
                raise KeyboardInterrupt
            self.count += 1
            return plain(*given)

        return counted


def add(path: Path, unit: str) -> None:
    """As `preceptor add`."""
    writer = StoreWriter.open(path)
    if unit not in writer.plan.units:
        if WHOLE.pixels is not None and unit == "pixels":
            writer.add_pixels(WHOLE.pixels)
        else:
            writer.add(WHOLE.teacher(unit))
    calibrate(writer)
    fill(writer)
    writer.finish()


def follow_advice(path: Path, unit: str) -> None:
    """What verify says is to be done, and what repair says where it cannot."""
    report = verify_store(path)
    if report.damaged:
        _, writer = mend_files(path)
        if writer.uncalibrated:
            add(path, unit)
        else:
            repair_store(path, report.shards, fill)
    elif report.unfinished:
        add(path, unit)
    for stray in report.strays:
        StoreWriter.open(path).drop(stray)


@pytest.fixture(scope="module")
def both(folder: Path) -> tuple[Path, Files, Path, Files]:
    """A store of one teacher, and the same with a second one and pixels."""
    one = replace(plan(FIRST), pixels=None)
    writer = StoreWriter.open_or_create(folder / "one", one)
    calibrate(writer)
    fill(writer)
    writer.finish()
    extract(folder / "two", FIRST, SECOND)
    return folder / "one", kept(folder / "one"), folder / "two", kept(folder / "two")


def kept(path: Path) -> Files:
    """Its files; not those that a writer may leave behind, which do no harm."""
    files = contents(path)
    return {name: raw for name, raw in files.items() if not name.startswith("partial/")}


def copied(store: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    return Path(shutil.copytree(store, to))


@pytest.mark.parametrize("given_up", [False, True])
@pytest.mark.parametrize("unit", ["cnn", "pixels"])
def test_adding(
    unit: str, given_up: bool, folder: Path, both: tuple[Path, Files, Path, Files],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    one, before, *_ = both
    path = copied(one, folder / "adding")
    with monkeypatch.context() as patch:
        disk = Disk(patch)
        add(path, unit)
    after = kept(path)
    for last in range(disk.count):
        copied(one, path)
        with monkeypatch.context() as patch:
            Disk(patch, last)
            with pytest.raises(KeyboardInterrupt):
                add(path, unit)
        if not given_up:
            follow_advice(path, unit)
        elif not verify_store(path).whole:  # as it is where nothing was written yet
            StoreWriter.open(path).drop(unit)
        assert verify_store(path).whole, last
        assert kept(path) in (before, after), last
        assert Cache.open(path, teachers=["vit"]).completions.keys() >= {"rows", "vit"}


@pytest.mark.parametrize("unit", ["cnn", "pixels"])
def test_dropping(
    unit: str, folder: Path, both: tuple[Path, Files, Path, Files],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    *_, two, before = both
    path = copied(two, folder / "dropping")
    with monkeypatch.context() as patch:
        disk = Disk(patch)
        StoreWriter.open(path).drop(unit)
    after = kept(path)
    assert disk.count > 4
    for last in range(disk.count):
        for again in (False, True):
            copied(two, path)
            with monkeypatch.context() as patch:
                Disk(patch, last)
                with pytest.raises(KeyboardInterrupt):
                    StoreWriter.open(path).drop(unit)
            if not again:
                follow_advice(path, unit)
            elif unit in {*StoreWriter.open(path).plan.units, *verify_store(path).strays}:
                StoreWriter.open(path).drop(unit)
            assert verify_store(path).whole, last
            assert kept(path) in ((after,) if again else (before, after)), last
