"""What verify says about whole, unfinished and large-chunked stores, against plain hashing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from preceptor.benchmarks.faults import flip
from preceptor.benchmarks.small_store import (
    INVALID,
    ROWS,
    TEACHERS,
    calibrate,
    contents,
    extract,
    fill,
    fill_shard,
    plan,
    restore,
    tokens,
)
from preceptor.cache import Cache, StoreWriter, verify
from preceptor.cache.commit import Commit, Completion, completion_name, record_name
from preceptor.cache.durable import file_sizes, write_whole
from preceptor.cache.layout import ArraySpec
from preceptor.cache.manifest import MANIFEST, read_manifest
from preceptor.cache.mend import repair_store
from preceptor.cache.sharding import shard_file
from preceptor.cache.verify import FileRecord, check_file, verify_store
from preceptor.cache.verify_report import fingerprint, fresh_report
from preceptor.errors import StoreError


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("verify") / "store"
    extract(path)
    return contents(path)


def test_a_report_is_read_again_until_a_file_changes(
    good: dict[str, bytes], tmp_path: Path
) -> None:
    path = tmp_path / "store"
    restore(path, good)
    assert fresh_report(path) is None
    flip(path / "spaces/cnn/patch/codes/c.1.0.0", np.random.default_rng(0))
    report = verify_store(path)
    assert json.loads(report.save().read_text())["shards"] == {"cnn": [1]}
    again = fresh_report(path)
    assert again is not None
    assert again.problems == report.problems
    (path / "spaces/cnn/patch/codes/c.1.0.0").write_bytes(good["spaces/cnn/patch/codes/c.1.0.0"])
    assert fresh_report(path) is None
    assert verify_store(path).whole


def test_an_unfinished_store_names_what_is_not_extracted_and_repair_finishes_it(
    good: dict[str, bytes], tmp_path: Path
) -> None:
    path = tmp_path / "store"
    writer = StoreWriter.open_or_create(path, plan())
    calibrate(writer)
    fill_shard(writer, 0, ("rows", "pixels", "vit", "cnn"))
    fill_shard(writer, 1, ("rows", "pixels", "vit"))
    report = verify_store(path)
    assert [str(problem) for problem in report.problems] == [
        "commits/rows/complete.json is missing: the unit was not finished",
        "commits/pixels/complete.json is missing: the unit was not finished",
        "commits/vit/complete.json is missing: the unit was not finished",
        "shard 1 of cnn: commits/cnn/1.json is missing: the shard was not extracted yet",
    ]
    moments = path / "partial/vit/patch.1.f64"
    moments.write_bytes(bytes(moments.stat().st_size))
    report = verify_store(path)
    assert report.shards == [("cnn", 1), ("vit", 1)]
    done = repair_store(path, report.shards, fill)
    assert done.extracted == (("cnn", 1), ("vit", 1))
    assert contents(path) == good


def test_other_bits_are_told_and_the_statistics_are_marked(
    good: dict[str, bytes], tmp_path: Path
) -> None:
    path = tmp_path / "store"
    restore(path, good)
    (path / "spaces/vit/patch/codes/c.0.0.0").unlink()
    done = repair_store(path, verify_store(path).shards, lambda writer: fill(writer, 1))
    assert done.different == (("vit", 0),)
    assert verify_store(path).whole
    assert json.loads((path / "commits/vit/complete.json").read_text())["exact"] is False


@pytest.mark.parametrize("stopped", range(1, 12))
def test_a_repair_that_is_stopped_among_the_new_statistics_is_done_again(
    stopped: int, good: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every shard of a teacher gave other bits, so all of its statistics are new."""
    path, writes = tmp_path / "store", iter(range(1, 100))
    restore(path, good)
    (path / "spaces/vit/patch/codes/c.0.0.0").unlink()
    (path / "spaces/vit/patch/codes/c.1.0.0").unlink()

    def write(file: Path, raw: bytes) -> None:
        if finishing and next(writes) == stopped:
            raise KeyboardInterrupt
        write_whole(file, raw)

    def refill(writer: StoreWriter) -> None:
        nonlocal finishing
        fill(writer, 1)
        finishing = True

    finishing = False
    with monkeypatch.context() as patched:
        patched.setattr("preceptor.cache.spare.write_whole", write)
        with contextlib.suppress(KeyboardInterrupt):
            repair_store(path, verify_store(path).shards, refill)
    assert verify_store(path).whole == (stopped > 10)  # four arrays, a seal, their copies
    repair_store(path, verify_store(path).shards, lambda writer: fill(writer, 1))
    assert verify_store(path).whole
    assert json.loads((path / "commits/vit/complete.json").read_text())["exact"] is True
    moments = Cache.open(path)["vit/patch"].statistics()
    valid = np.array([row for row in range(ROWS) if row != INVALID])
    whole = tokens(TEACHERS[0].spaces[0], valid, 1).reshape(-1, 10).astype(np.float64)
    assert np.allclose(moments.mean, whole.mean(0), rtol=1e-12)


def test_what_lies_behind_a_link_is_part_of_the_store(
    good: dict[str, bytes], tmp_path: Path
) -> None:
    """A report that is older than such a file must not stand for it."""
    path, codes = tmp_path / "store", "spaces/vit/patch/codes/c.1.0.0"
    restore(path, good)
    (path / "spaces/vit").rename(tmp_path / "vit")
    (path / "spaces/vit").symlink_to(tmp_path / "vit")
    (path / "rows/loop").symlink_to(path)
    (path / "nowhere").symlink_to(tmp_path / "gone")
    report = verify_store(path)
    report.save()
    assert report.whole
    assert fresh_report(path) is not None
    flip(path / codes, np.random.default_rng(0))
    assert fresh_report(path) is None
    assert verify_store(path).shards == [("vit", 1)]


def test_the_report_lies_beside_the_store_whatever_it_is_called(
    good: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "store"
    restore(path, good)
    monkeypatch.chdir(path)
    for name in (".", "./", "../store", "../store/"):
        (tmp_path / "store.verify.json").unlink(missing_ok=True)
        assert verify_store(name).save() == tmp_path / "store.verify.json"
        assert fresh_report(name) is not None
    assert contents(path) == good


def test_files_that_go_while_they_are_looked_at_are_passed_over_or_told(
    good: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a writer's temporary files, and those of a shard that is extracted again."""
    path, walk, check = tmp_path / "store", os.walk, verify.check_file
    restore(path, good)

    def walked(*given: Any, **named: Any) -> Iterator[tuple[str, list[str], list[str]]]:
        for found in walk(*given, **named):
            (path / "rows/going").unlink(missing_ok=True)
            yield found

    with monkeypatch.context() as patch:
        patch.setattr(os, "walk", walked)
        for look in (file_sizes, fingerprint):
            expected = look(path)
            (path / "rows/going").touch()
            assert look(path) == expected

    def checked(file: Path, *rest: Any) -> list[str]:
        whys = check(file, *rest)
        if file == path / "rows/valid/c.1":
            file.unlink()
        return whys

    monkeypatch.setattr(verify, "check_file", checked)
    found = [str(problem) for problem in verify_store(path).problems]
    assert found == ["shard 1 of rows: rows/valid/c.1 is missing"]


def other_completion(store: Path, **changes: Any) -> None:
    """A completion of the first teacher, and its copy, that is sealed with other members."""
    name = completion_name(TEACHERS[0].name)
    done = replace(Completion.from_bytes((store / name).read_bytes(), name), **changes)
    for path in (store / name, store / "spare" / name):
        path.write_bytes(done.to_bytes())


@pytest.mark.parametrize("case", ["lengths", "arrays", "spaces", "calibration"])
def test_a_seal_that_opening_refuses_is_not_whole(
    case: str, good: dict[str, bytes], tmp_path: Path
) -> None:
    """Every hash holds: another program may have written it."""
    store, unit = tmp_path / "store", TEACHERS[0].name
    restore(store, good)
    name = completion_name(unit)
    done = Completion.from_bytes(good[name], name)
    array = next(iter(done.sizes))
    if case == "lengths":
        other_completion(store, sizes={**done.sizes, array: [n + 1 for n in done.sizes[array]]})
    elif case == "arrays":
        other_completion(store, sizes={**done.sizes, "another": done.sizes[array]})
    elif case == "spaces":
        other_completion(store, statistics={}, tokens={})
    else:
        manifest = read_manifest(store)
        bare = replace(manifest, calibrations={})
        records = []
        for path in (store / MANIFEST, store / "spare" / MANIFEST):
            path.write_bytes(bare.to_bytes())
        for shard in range(manifest.plan.shards):
            file = store / record_name(unit, shard)
            commit = Commit.from_bytes(file.read_bytes(), str(file))
            file.write_bytes(replace(commit, configuration=bare.configuration(unit)).to_bytes())
            records.append(hashlib.sha256(file.read_bytes()).hexdigest())
        other_completion(store, configuration=bare.configuration(unit), records=tuple(records))
    with pytest.raises(StoreError, match=r"damaged|does not list|no calibration of"):
        Cache.open(store, teachers=[unit])
    assert any(p.file == name or p.unit == unit for p in verify_store(store).problems)


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds no store"):
        verify_store(tmp_path)


def test_files_larger_than_a_block_are_checked_whole(tmp_path: Path) -> None:
    """Chunks of 5 MB, with every bit that is flipped attributed to its chunk."""
    spec = ArraySpec("a", "uint8", (10, 1 << 20), (10, 1 << 20), (5, 1 << 20), 255)
    values = np.random.default_rng(0).integers(0, 255, spec.shape, np.uint8)
    buffers, sums = shard_file(spec, values)
    raw = bytearray(b"".join(bytes(part) for part in buffers))
    record = FileRecord(len(raw), hashlib.sha256(raw).hexdigest(), tuple(sums))
    file = tmp_path / "file"
    file.write_bytes(raw)
    seen: list[int] = []
    assert check_file(file, spec, record, 2, seen.append) == []
    assert sum(seen) >= 10 << 20
    for place, why in (
        (0, "group 0 does not match its checksum"),
        ((5 << 20) - 1, "group 0 does not match its checksum"),
        ((5 << 20) + 3, "group 0 does not match its checksum"),
        ((5 << 20) + 4, "has more than a few zeros before group 1"),
        ((5 << 20) + 63, "has more than a few zeros before group 1"),
        ((5 << 20) + 64, "group 1 does not match its checksum"),
        (len(raw) - 1, "the shard index does not match its checksum"),
    ):
        raw[place] ^= 1
        file.write_bytes(raw)
        assert check_file(file, spec, record, 2) == [why]
        raw[place] ^= 1
    # the same chunks the other way round: every checksum inside the file holds
    other, _ = shard_file(spec, np.concatenate([values[5:], values[:5]]))
    file.write_bytes(b"".join(bytes(part) for part in other))
    assert check_file(file, spec, record, 2) == [
        "group 0 is not what was committed",
        "group 1 is not what was committed",
    ]


def test_metadata_may_be_laid_out_otherwise_but_not_cut(
    good: dict[str, bytes], tmp_path: Path
) -> None:
    path, name = tmp_path / "store", "spaces/vit/zarr.json"
    restore(path, good)
    (path / name).write_text(json.dumps(json.loads(good[name])), encoding="utf-8")
    assert verify_store(path).whole
    (path / name).write_bytes(good[name][:-1])  # JSON of the same meaning all the same
    report = verify_store(path)
    assert [problem.file for problem in report.problems] == [name]
    repair_store(path, report.shards, fill)
    assert contents(path) == good


@pytest.mark.parametrize("damage", ["gone", "torn"])
def test_a_store_that_has_lost_its_manifest_is_not_begun_anew_but_told_what_mends_it(
    damage: str, good: dict[str, bytes], tmp_path: Path
) -> None:
    """Not even by another configuration, to which all of its shards would be strangers."""
    path = tmp_path / "store"
    restore(path, good)
    if damage == "gone":
        (path / "manifest.json").unlink()
    else:
        (path / "manifest.json").write_bytes(good["manifest.json"][:100])
    before = contents(path)
    told = rf"manifest\.json is (missing|not the manifest).* kept.*preceptor repair cache={path}`"
    for use in (
        lambda: Cache.open(path),
        lambda: StoreWriter.open(path),
        lambda: StoreWriter.open_or_create(path, plan()),
        lambda: StoreWriter.open_or_create(path, plan(rows=ROWS + 1)),
    ):
        with pytest.raises(StoreError, match=told):
            use()
        assert contents(path) == before
    repair_store(path, verify_store(path).shards, None)
    assert contents(path) == good


def test_a_store_whose_making_was_interrupted_before_any_shard_is_begun_again(
    good: dict[str, bytes], tmp_path: Path
) -> None:
    """Its copy of the manifest is written first."""
    path = tmp_path / "store"
    StoreWriter.open_or_create(path, plan())
    (path / "manifest.json").unlink()
    extract(path)
    assert contents(path) == good
