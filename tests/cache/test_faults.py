"""Every fault to every file of a store is noticed, named, and mended to the same bytes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from preceptor.benchmarks import faults
from preceptor.benchmarks.small_store import (
    TEACHERS,
    add,
    batch,
    contents,
    extract,
    fill,
    plan,
    restore,
)
from preceptor.cache import Cache, StoreWriter
from preceptor.cache.commit import discard
from preceptor.cache.mend import repair_store
from preceptor.cache.verify import verify_store
from preceptor.errors import PreceptorError, StoreError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def whole(folder: Path) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """The files of an undamaged store, and what a reader gets out of it."""
    extract(folder / "whole")
    assert verify_store(folder / "whole").whole
    return contents(folder / "whole"), faults.everything(folder / "whole")


def mended(path: Path, good: dict[str, bytes], version: int = 0) -> bool:
    """Verify and repair; whether every file is as before, and verify is content."""
    report = verify_store(path)
    repair_store(path, report.shards, lambda writer: fill(writer, version))
    return contents(path) == good and verify_store(path).whole


def unit_and_shard(name: str) -> tuple[str, int] | None:
    """Of a file that can only be extracted again."""
    alone = name.startswith(("rows/", "pixels/"))
    unit = Path(name).parts[0 if alone else min(1, name.count("/"))]
    if re.fullmatch(r"commits/\w+/\d+\.json", name):
        return unit, int(Path(name).stem)
    if re.fullmatch(r"(pixels|rows/\w+|spaces/\w+/\w+/(codes|scales))/c[.\d]+", name):
        return unit, int(Path(name).name.split(".")[1])
    return None


def test_a_flipped_bit_in_every_file(
    folder: Path, whole: tuple[dict[str, bytes], dict[str, bytes]]
) -> None:
    good, values = whole
    path, random = folder / "flip", np.random.default_rng(4)
    restore(path, good)
    for name in good:
        faults.flip(path / name, random)
        assert faults.noticed_by_reader(path, values) is not None, f"{name}: silently wrong"
        report = verify_store(path)
        assert name in [problem.file for problem in report.problems], f"{name}: not named"
        expected = unit_and_shard(name)
        assert report.shards == ([expected] if expected else []), name
        assert repair_store(path, report.shards, fill).different == ()
        assert contents(path) == good, f"{name}: repaired to other bytes"


@pytest.mark.parametrize("fault", ["truncate", "zero", "delete"])
def test_every_file(
    fault: str, folder: Path, whole: tuple[dict[str, bytes], dict[str, bytes]]
) -> None:
    """Nine files at a time, but never a file and its copy."""
    good, values = whole
    path, random = folder / fault, np.random.default_rng(5)
    restore(path, good)
    copies = [name for name in good if name.startswith("spare/")]
    for kind in (copies, [name for name in good if name not in copies]):
        order = random.permutation(kind).tolist()
        for names in (order[at : at + 9] for at in range(0, len(order), 9)):
            for name in names:
                faults.FAULTS[fault](path / name, random)
            assert faults.noticed_by_reader(path, values) is not None, f"{names}: silently wrong"
            report = verify_store(path)
            seen = {problem.file for problem in report.problems}
            for name in names:
                assert name in seen or unit_and_shard(name) in report.shards, f"{name}: not named"
            repair_store(path, report.shards, fill)
            assert contents(path) == good, f"{names}: repaired to other bytes"


def test_a_file_that_the_device_does_not_give(
    folder: Path,
    whole: tuple[dict[str, bytes], dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An error of the device is a sentence to whoever meets it, verify names the file, and repair
    writes another in its place."""
    good, _ = whole
    path, read = folder / "device", Path.read_bytes
    restore(path, good)
    bad = [0]

    def failing(file: Path) -> bytes:
        if file.stat().st_ino == bad[0]:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(file)

    monkeypatch.setattr(Path, "read_bytes", failing)
    for name in good:
        if unit_and_shard(name) and not name.startswith("commits/"):
            continue  # read otherwise: by what is tried in test_reader.py
        bad[0] = (path / name).stat().st_ino
        for use in (
            lambda: StoreWriter.open(path).finish(),
            lambda: [StoreWriter.open(path).calibration(space) for space in plan().spaces],
        ):
            with contextlib.suppress(StoreError):  # or nothing that was needed; no other exception
                use()
        if (path / name).stat().st_ino == bad[0]:  # finishing writes zarr.json again
            report = verify_store(path)
            named = [str(problem) for problem in report.problems if problem.file == name]
            assert named, name
            assert re.search("cannot be read: Input/output error|missing or damaged", named[0])
            repair_store(path, report.shards, fill)
        bad[0] = 0
        assert contents(path) == good, name


@pytest.mark.parametrize("folder_name", ["commits/vit", "spaces/vit/patch/codes"])
def test_a_folder_that_cannot_be_listed_is_one_sentence(
    folder_name: str,
    folder: Path,
    whole: tuple[dict[str, bytes], dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, scan = folder / "unlisted", os.scandir
    restore(path, whole[0])

    def failing(where: str | Path) -> Iterator[os.DirEntry[str]]:
        if str(where) == str(path / folder_name):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return scan(where)

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(StoreError, match=f"{folder_name} cannot be listed: Stale file handle"):
        Cache.open(path)
    if folder_name.startswith("commits"):
        with pytest.raises(StoreError, match="commits/vit cannot be listed: Stale file handle"):
            StoreWriter.open(path).pending()


def shard_files(good: dict[str, bytes]) -> list[str]:
    return [
        n for n in good if Path(n).name.startswith("c.0") and n.replace("c.0", "c.1", 1) in good
    ]


def test_swapped_shards(folder: Path, whole: tuple[dict[str, bytes], dict[str, bytes]]) -> None:
    good, values = whole
    path = folder / "swap"
    restore(path, good)
    pairs = [(name, name.replace("c.0", "c.1", 1)) for name in shard_files(good)]
    pairs += [
        (f"commits/{u}/0.json", f"commits/{u}/1.json") for u in ("rows", "pixels", "vit", "cnn")
    ]
    assert len(pairs) == 6 + 1 + 7 + 4
    for one, other in pairs:
        faults.swap(path / one, path / other)
        assert faults.noticed_by_reader(path, values), one
        unit = one.split("/")[0 if one.startswith(("rows", "pixels")) else 1]
        assert verify_store(path).shards == [(unit, 0), (unit, 1)]
        assert mended(path, good)
    # whole shards with their records, which agree among themselves
    for one, other in pairs:
        faults.swap(path / one, path / other)
    assert faults.noticed_by_reader(path, values)
    assert len(verify_store(path).shards) == 8
    assert mended(path, good)


def test_swapped_files_of_equal_length(
    folder: Path, whole: tuple[dict[str, bytes], dict[str, bytes]]
) -> None:
    good, values = whole
    path, random = folder / "equal", np.random.default_rng(0)
    restore(path, good)
    by_length: dict[int, list[str]] = {}
    for name, raw in good.items():
        by_length.setdefault(len(raw), []).append(name)
    for names in by_length.values():
        one, other = random.choice(names, 2)
        if good[one] != good[other]:
            faults.swap(path / one, path / other)
            assert faults.noticed_by_reader(path, values) is not None
            assert not verify_store(path).whole
            assert mended(path, good), (one, other)


def test_older_commit(folder: Path, whole: tuple[dict[str, bytes], dict[str, bytes]]) -> None:
    """Shard 1 of vit was extracted again with other features; its first files come back."""
    old, _ = whole
    path = folder / "older"
    restore(path, old)
    discard(path, StoreWriter.open(path).manifest, "vit", 1)
    writer = StoreWriter.open(path)
    fill(writer, version=1)
    writer.finish()
    good, values = contents(path), faults.everything(path)
    changed = [name for name in good if good[name] != old[name]]
    record, seal = "commits/vit/1.json", "commits/vit/complete.json"
    assert {record, seal, f"spare/{seal}"} < set(changed)
    data = [name for name in changed if "/c." in name]
    for names in (
        [record],
        data,
        [record, *data],
        [seal],
        [f"spare/{seal}"],
        [seal, f"spare/{seal}"],
        [record, *data, seal],
        [record, *data, f"spare/{seal}"],
    ):
        for name in names:
            (path / name).write_bytes(old[name])
        whole_again = {record, *data, seal} == set(names)
        assert whole_again or faults.noticed_by_reader(path, values) is not None, names
        report = verify_store(path)
        assert not report.whole, names
        if names in ([record], data, [record, *data]):
            assert report.shards == [("vit", 1)]
        repair_store(path, report.shards, lambda writer: fill(writer, 1))
        # records, files and a seal of one time are a sound store, only not the latest one
        assert contents(path) == (old if {record, *data} < set(names) else good), names
        restore(path, good)


def test_older_manifest(folder: Path, whole: tuple[dict[str, bytes], dict[str, bytes]]) -> None:
    path = folder / "manifest"
    extract(path, TEACHERS[0])
    old = contents(path)
    add(path, TEACHERS[1])
    good = contents(path)
    for name in ("manifest.json", "spare/manifest.json"):
        (path / name).write_bytes(old[name])
        report = verify_store(path)
        assert [problem.file for problem in report.problems] == [name]
        assert mended(path, good)


def test_both_copies_lost_is_said(
    folder: Path, whole: tuple[dict[str, bytes], dict[str, bytes]]
) -> None:
    path = folder / "both"
    restore(path, whole[0])
    faults.flip(path / "manifest.json", np.random.default_rng(0))
    faults.flip(path / "spare/manifest.json", np.random.default_rng(1))
    report = verify_store(path)
    assert not report.whole
    with pytest.raises(StoreError, match=r"manifest\.json and its copy .* both damaged"):
        repair_store(path, report.shards, fill)


def test_without_images_the_shards_to_extract_are_named_and_nothing_is_lost(
    folder: Path, whole: tuple[dict[str, bytes], dict[str, bytes]]
) -> None:
    path = folder / "without"
    restore(path, whole[0])
    (path / "commits/vit/1.json").unlink()
    (path / "manifest.json").unlink()
    report = verify_store(path)
    with pytest.raises(StoreError, match=r"1 of vit.*teachers=.*data\.shards="):
        repair_store(path, report.shards, None)
    left = contents(path)
    assert {name for name in whole[0] if name not in left} == {"commits/vit/1.json"}


def test_full_disk(folder: Path, whole: tuple[dict[str, bytes], dict[str, bytes]]) -> None:
    """Extraction stops with a sentence at any size of disk, and goes on when there is room."""
    good, _ = whole
    disk = folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    try:
        stopped = 0
        for size in range(16, 1200, 90):
            subprocess.run(["mount", "-o", f"remount,size={size}k", str(disk)], check=True)
            try:
                extract(disk / "store")
            except PreceptorError as error:
                why = str(error)
                stopped += 1
                assert not list((disk / "store").rglob("*.tmp"))
                with pytest.raises(StoreError):
                    Cache.open(disk / "store")
            else:
                break
        assert stopped > 3
        assert "No space left" in why
        assert contents(disk / "store") == good
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_killed_writers_and_racing_writers(folder: Path) -> None:
    """The short form of the torture: kill -9 at random operations, and races for one shard."""
    done = subprocess.run(
        [
            sys.executable, str(ROOT / "benchmarks/torture_cache.py"), "--seed", "3",
            "--kills", "15", "--races", "6", "--faults", "0", "--folder", str(folder),
            "--json", str(folder / "t.json"),
        ],
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((folder / "t.json").read_text())["summary"]
    assert summary["kills"] == 15
    assert summary["races"] == 6
    assert summary["silent_differences"] == summary["not_identical"] == 0


def test_tokens_of_other_rows_are_refused(
    folder: Path, whole: tuple[dict[str, bytes], dict[str, bytes]]
) -> None:
    """A repair whose images are not those of the store stops before it commits anything."""
    path = folder / "others"
    restore(path, whole[0])
    discard(path, StoreWriter.open(path).manifest, "vit", 0)
    others, spaces = batch(6, 14), plan().teacher("vit").spaces
    shard = StoreWriter.open(path).shard(0, ("vit",))
    shard.append(others, {s.id: np.zeros((8, s.tokens, s.dim), np.float32) for s in spaces})
    with pytest.raises(StoreError, match="is not what the store has"):
        shard.__exit__(None, None, None)
    assert not (path / "commits/vit/0.json").exists()
