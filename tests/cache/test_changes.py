"""Changing a store that is there: shards again, teachers added and dropped, copies mended."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from preceptor.benchmarks.small_store import contents
from preceptor.cache import Cache, SpaceSpec, StoreWriter, TeacherRecord
from preceptor.cache.commit import discard, read_commit
from preceptor.cache.layout import Layout
from preceptor.cache.spare import mend, problems
from preceptor.cache.verify import verify_store
from preceptor.errors import StoreError
from small_stores import (
    SPACES,
    calibrate,
    facts_of,
    make_plan,
    tokens_of,
    write_pending,
    write_shard,
    write_store,
)


def test_a_shard_extracted_again_gives_the_same_store(store: Path, finished: Path) -> None:
    manifest = StoreWriter.open(store).manifest
    discard(store, manifest, "cnn", 2)
    discard(store, manifest, "rows", 2)
    with pytest.raises(StoreError, match="shard 2 of rows has no commit record"):
        Cache.open(store)
    writer = StoreWriter.open(store)
    assert writer.pending() == [(2, ("rows", "cnn"))]
    with pytest.raises(StoreError, match="not committed"):
        read_commit(store, manifest, Layout(manifest.plan), "cnn", 2)
    write_pending(writer)
    writer.finish()
    assert contents(store) == contents(finished)


def test_a_repair_with_other_tokens_says_that_statistics_are_not_exact(store: Path) -> None:
    manifest = StoreWriter.open(store).manifest
    discard(store, manifest, "vit", 1)
    writer = StoreWriter.open(store)
    rows = np.arange(16, 32)
    spaces = [space for space in SPACES if space.teacher == "vit"]
    with writer.shard(1, ("vit",)) as shard:
        facts = facts_of(rows)
        seen = rows[facts.valid]
        shard.append(facts, {space.id: tokens_of(space, seen) * 1.001 for space in spaces})
    writer.finish()
    cache = Cache.open(store)
    assert not cache.completions["vit"].exact
    assert cache.completions["cnn"].exact
    assert cache["vit/patch"].statistics().count == 40 * 6


def test_a_teacher_is_added_and_dropped_without_touching_the_others(
    tmp_path: Path, finished: Path
) -> None:
    path = tmp_path / "store"
    whole = make_plan()
    write_store(path, replace(whole, teachers=whole.teachers[:1]))
    before = contents(path)
    writer = StoreWriter.open(path)
    writer.add(whole.teachers[1])
    assert len(Cache.open(path, teachers=["vit"]).spaces) == 2
    calibrate(writer)
    for shard, units in writer.pending():
        assert units == ("cnn",)
        write_shard(writer, shard, units)
    writer.finish()
    assert contents(path) == contents(finished)
    writer.drop("cnn")
    assert contents(path) == before
    with pytest.raises(StoreError, match="no teacher 'cnn'"):
        writer.drop("cnn")


@pytest.mark.parametrize("finished_before", [False, True])
def test_a_committed_shard_whose_file_is_gone_is_written_again(
    finished_before: bool, tmp_path: Path, finished: Path
) -> None:
    """By going on with the extraction, not by repair alone."""
    path = tmp_path / "store"
    writer = StoreWriter.open_or_create(path, make_plan())
    calibrate(writer)
    write_pending(writer)
    if finished_before:
        writer.finish()
    (path / "spaces/vit/patch/codes/c.1.0.0").unlink()
    writer = StoreWriter.open_or_create(path, make_plan())
    assert writer.pending() == [(1, ("vit",))]
    write_shard(writer, 1, ("vit",))
    writer.finish()
    assert contents(path) == contents(finished)


@pytest.mark.parametrize("removed", range(4))
def test_an_interrupted_drop_does_not_stand_in_the_way_of_another_teacher(
    removed: int, store: Path, tmp_path: Path
) -> None:
    folders = ("spaces/cnn", "spare/spaces/cnn", "commits/cnn", "spare/commits/cnn")
    kept = tmp_path / "kept"
    for name in folders[removed:]:
        shutil.copytree(store / name, kept / name)
    StoreWriter.open(store).drop("cnn")
    expected = contents(store)
    shutil.copytree(kept, store, dirs_exist_ok=True)
    assert [problem.unit for problem in verify_store(store).problems] == ["cnn"]
    space = SpaceSpec("cnn", "other", tokens=1, dim=5, grid=None)
    writer = StoreWriter.open(store)
    writer.add(TeacherRecord("cnn", (space,), {"source": "another"}))
    assert {p.file for p in verify_store(store).problems} == {
        f"commits/cnn/{shard}.json" for shard in range(3)
    }
    calibrate(writer)
    write_pending(writer)
    writer.finish()
    assert verify_store(store).whole
    assert not (store / "spaces/cnn/map").exists()
    writer.drop("cnn")
    assert contents(store) == expected


def test_what_cannot_be_removed_is_told(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(StoreError, match=r"cnn cannot be removed: Permission denied"):
        StoreWriter.open(store).drop("cnn")


def test_a_shard_that_cannot_be_removed_is_told(store: Path) -> None:
    """A folder in the record's place stands for a file system that is read-only."""
    (store / "commits/vit/1.json").unlink()
    (store / "commits/vit/1.json").mkdir()
    with pytest.raises(StoreError, match=r"shard 1 of vit in .* cannot be removed: Is a directory"):
        discard(store, StoreWriter.open(store).manifest, "vit", 1)


def test_kept_files_and_their_copies_mend_each_other(store: Path, finished: Path) -> None:
    whole = contents(finished)
    assert problems(store) == []
    kept = [name for name in whole if f"spare/{name}" in whole]
    assert len(kept) == 1 + 3 + 4 * 4 + 1  # the weights of the predicted space
    for number, name in enumerate([*kept, *(f"spare/{name}" for name in kept)]):
        if number % 3:
            (store / name).write_bytes(whole[name][:-7])
        else:
            (store / name).unlink()
        assert any(name.removeprefix("spare/") in problem for problem in problems(store))
        assert mend(store) == [name]
    assert contents(store) == whole
    for name in ("manifest.json", "spare/manifest.json"):
        (store / name).write_bytes(b"{}")
    with pytest.raises(StoreError, match="both damaged"):
        mend(store)


def test_a_finished_store_stays_as_it_is_when_opened_again(store: Path, finished: Path) -> None:
    writer = StoreWriter.open_or_create(store, make_plan())
    assert writer.pending() == []
    writer.finish()
    shutil.rmtree(store / "partial", ignore_errors=True)
    assert contents(store) == contents(finished)
