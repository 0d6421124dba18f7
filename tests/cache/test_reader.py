"""The reader against the teacher's tokens, zarr-python and tensorstore; what it refuses."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from preceptor.cache import Cache, StoreWriter
from preceptor.cache.commit import FileRecord, read_commit
from preceptor.cache.documents import sealed
from preceptor.cache.encodings import encoding
from preceptor.cache.layout import Layout
from preceptor.cache.sharding import shard_file
from preceptor.cache.verify import verify_store
from preceptor.errors import StoreError
from small_stores import CORRUPT, ROWS, SPACES, facts_of, tokens_of

EACH = pytest.mark.parametrize("spec", SPACES, ids=lambda spec: spec.id)
VALID = [row for row in range(ROWS) if row not in CORRUPT]


@EACH
def test_every_row_decodes_within_the_encoding_s_bound(cache: Cache, spec) -> None:
    space = cache[spec.id]
    tokens = space.read(VALID)
    live = tokens_of(spec, np.array(VALID))
    z = (live - space.mean.numpy()) / space.std.numpy()
    bound = encoding(spec.encoding).bound(z)
    assert (np.abs(tokens.standardised().numpy() - z) <= bound).all()
    error = np.abs(space.decode(tokens).numpy() - live)
    assert (error <= bound * space.std.numpy() + 1e-5 * np.abs(live) + 1e-6).all()
    assert space.shape == (ROWS, spec.tokens, spec.dim)
    assert space.grid == spec.grid
    assert space.dtype == tokens.codes.dtype


@EACH
def test_zarr_and_tensorstore_see_the_same_numbers(cache: Cache, finished: Path, spec) -> None:
    tokens = cache[spec.id].read(VALID)
    group = zarr.open_group(finished, mode="r")
    for name, part in tokens.parts.items():
        path = f"spaces/{spec.id}/{name}"
        theirs = group[path][:]
        kvstore = {"driver": "file", "path": str(finished / path)}
        third = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result().read().result()
        assert theirs[VALID].tobytes() == part.numpy().tobytes()
        assert third.tobytes() == theirs.tobytes()
        fill = group[path].fill_value
        holes = theirs[list(CORRUPT)]
        assert (np.isnan(holes) if np.isnan(fill) else holes == fill).all()


def test_row_facts(cache: Cache, finished: Path) -> None:
    facts = facts_of(np.arange(ROWS))
    assert len(cache) == ROWS
    assert list(cache.keys) == facts.keys
    assert cache.keys[-1] == facts.keys[-1]
    assert cache.keys[15:18] == facts.keys[15:18]
    assert (cache.labels == facts.labels).all()
    assert (cache.valid == facts.valid).all()
    assert (cache.flips == facts.flips).all()
    assert (cache.sizes == facts.sizes).all()
    assert (cache.boxes == facts.boxes.astype(np.float32)).all()
    rows = zarr.open_group(finished, mode="r")["rows"]
    assert (rows["label"][:] == facts.labels).all()
    assert bytes(rows["key"][41]).rstrip(b"\0").decode() == facts.keys[41]
    with pytest.raises(IndexError):
        cache.keys[ROWS]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(VALID), max_size=30), st.sampled_from(SPACES), st.integers(1, 3))
def test_any_rows_in_any_order(finished: Path, rows: list[int], spec, threads: int) -> None:
    space = Cache.open(finished)[spec.id]
    got = space.read(torch.tensor(rows, dtype=torch.int64), threads=threads)
    every = space.read(VALID)
    at = [VALID.index(row) for row in rows]
    assert len(got) == len(rows)
    for name, part in got.parts.items():
        assert part.numpy().tobytes() == every.parts[name][at].numpy().tobytes()


def test_rows_that_cannot_be_read_are_named(cache: Cache) -> None:
    space = cache["vit/patch"]
    with pytest.raises(StoreError, match=r"row 7 \(key 'train/00007é'\).*corrupt"):
        space.read([1, 7])
    for row in (-1, ROWS):
        with pytest.raises(StoreError, match=f"row {row} is outside"):
            space.read([row])
    with pytest.raises(StoreError, match="integers, not float64"):
        space.read([0.5])
    with pytest.raises(StoreError, match="has no space 'vit/nothing': it has vit/patch, vit/cls"):
        cache["vit/nothing"]


def test_statistics_are_those_of_the_live_tokens(cache: Cache) -> None:
    for spec in SPACES:
        live = tokens_of(spec, np.array(VALID)).reshape(-1, spec.dim).astype(np.float64)
        moments = cache[spec.id].statistics()
        assert moments.count == len(live)
        assert np.allclose(moments.mean, live.mean(0), rtol=1e-12)
        assert np.allclose(moments.covariance, np.cov(live.T, bias=True), rtol=1e-10, atol=1e-10)


def test_a_cache_can_be_sent_to_another_process(cache: Cache) -> None:
    again = pickle.loads(pickle.dumps(cache))  # noqa: S301
    assert (again["vit/patch"].read([3]).codes == cache["vit/patch"].read([3]).codes).all()


def test_batches_hold_each_row_once_with_its_own_tokens(cache: Cache) -> None:
    ids = list(cache.spaces)
    whole = {name: cache[name].read(VALID) for name in ids}
    seen: list[int] = []
    kept = []
    batches = cache.batches(ids, 8, seed=3, window_rows=16, drop_last=False)
    assert len(batches) == 5
    for batch in batches:
        kept.append(batch)  # holding on must not let the memory be used again
        seen += batch.rows.tolist()
    assert sorted(seen) == VALID
    assert seen != VALID
    for batch in kept:
        at = [VALID.index(row) for row in batch.rows.tolist()]
        for name in ids:
            for part, values in batch.tokens[name].parts.items():
                expected = whole[name].parts[part][at]
                assert values.numpy().tobytes() == expected.numpy().tobytes()


def test_batches_start_at_any_step(cache: Cache) -> None:
    def rows(start: int) -> list[list[int]]:
        batches = cache.batches(
            ["vit/cls"], 3, seed=1, epoch=2, window_rows=6, start_step=start, drop_last=False
        )
        return [batch.rows.tolist() for batch in batches]

    whole = rows(0)
    assert len(whole) == 14
    for start in range(15):
        assert rows(start) == whole[start:]


def test_batches_of_some_rows_in_order(cache: Cache) -> None:
    chosen = [40, 3, 11, 12, 13, 14]
    batches = cache.batches(["vit/cls"], 4, rows=chosen, shuffle=False, drop_last=False)
    assert [batch.rows.tolist() for batch in batches] == [[3, 11, 12, 13], [14, 40]]
    with pytest.raises(StoreError, match="row 33"):
        cache.batches(["vit/cls"], 4, rows=[33])
    for bad in ({"batch_size": 0}, {"rank": 2, "world": 2}, {"start_step": 99}):
        with pytest.raises(StoreError):
            cache.batches(["vit/cls"], **{"batch_size": 4, **bad})


def test_an_epoch_without_a_batch_is_refused_with_both_figures(cache: Cache) -> None:
    count = len(VALID)
    assert len(cache.batches(["vit/cls"], count)) == 1
    told = rf"batch_size={count + 1} is more than the {count} rows .*, 1 rank\).*drop_last=False"
    with pytest.raises(StoreError, match=told):
        cache.batches(["vit/cls"], count + 1)
    with pytest.raises(StoreError, match=rf"more than the {count // 3} rows .*{count} rows .* 3 r"):
        cache.batches(["vit/cls"], count // 3 + 1, world=3)
    with pytest.raises(StoreError, match=r"batch_size=1 is more than the 0 rows of each rank \(2 "):
        cache.batches(["vit/cls"], 1, rows=VALID[:2], world=3, drop_last=False)
    assert list(cache.batches(["vit/cls"], 4, rows=[])) == []


def test_an_iterator_that_is_dropped_half_way_ends_its_threads(cache: Cache) -> None:
    import threading

    batches = cache.batches(["vit/patch"], 2, window_rows=2)
    next(batches)
    batches.close()
    del batches
    for thread in threading.enumerate():
        if thread.name.startswith("cache-read"):
            thread.join(10)
            assert not thread.is_alive()


def forge(store: Path, unit: str, array: str, change: Callable[[np.ndarray], None]) -> None:
    """Other values in shard 0 of an array, with every hash as if they had been written so."""
    writer = StoreWriter.open(store)
    layout = Layout(writer.plan)
    spec = layout.unit_arrays(unit)[array]
    values = zarr.open_array(store / array, mode="r")[: spec.shard[0]].copy()
    change(values)
    buffers, sums = shard_file(spec, values)
    raw = b"".join(bytes(part) for part in buffers)
    (store / spec.file(0)).write_bytes(raw)
    commit = read_commit(store, writer.manifest, layout, unit, 0)
    record = FileRecord(len(raw), hashlib.sha256(raw).hexdigest(), tuple(sums))
    commit = replace(commit, files={**commit.files, array: record})
    (store / f"commits/{unit}/0.json").write_bytes(commit.to_bytes())
    writer.finish()


@pytest.mark.parametrize(
    ("array", "value"),
    [
        ("spaces/vit/patch/codes", -128),
        ("spaces/vit/patch/scales", np.nan),
        ("spaces/vit/cls/codes", np.nan),
    ],
)
def test_rows_that_a_writer_left_out_are_refused(store: Path, array: str, value: float) -> None:
    """Section 3 of the document: where a reader meets a fill value, the row is a hole."""

    def leave_out(values: np.ndarray) -> None:
        values[2] = value

    forge(store, "vit", array, leave_out)
    cache, space = Cache.open(store), array.removeprefix("spaces/").rpartition("/")[0]
    assert len(cache[space].read([0, 1, 3])) == 3
    with pytest.raises(StoreError, match=rf"row 2 of .* is a hole in {array}.*commits/vit/0\.json"):
        cache[space].read([1, 2])
    with pytest.raises(StoreError, match=r"row 2 of .* is a hole"):
        list(cache.batches([space], 4))
    told = [
        (row, "a hole" in why)
        for batch in cache.batches([space, "cnn/map"], 4, keep_going=True)
        for row, why in ((int(batch.rows[at]), why) for at, why in batch.damaged.items())
    ]
    assert told == [(2, True)]


@pytest.mark.parametrize(
    ("fact", "value"), [("label", -(2**63)), ("size", -1), ("box", np.nan), ("flip", 255)]
)
def test_facts_that_a_writer_left_out_are_refused(store: Path, fact: str, value: float) -> None:
    def leave_out(values: np.ndarray) -> None:
        values[2] = value

    forge(store, "rows", f"rows/{fact}", leave_out)
    cache = Cache.open(store)
    with pytest.raises(StoreError, match=rf"row 2 of .* is a hole in rows/{fact}"):
        getattr(cache, {"box": "boxes"}.get(fact, f"{fact}s"))
    (problem,) = verify_store(store).problems
    assert (problem.unit, problem.shard) == ("rows", 0)
    assert f"lacks the {fact} of a row" in str(problem)


def test_only_a_one_makes_a_row_valid(store: Path) -> None:
    def unwritten(values: np.ndarray) -> None:
        values[[2, 3]] = 255, 2

    before = Cache.open(store).valid
    forge(store, "rows", "rows/valid", unwritten)
    after = Cache.open(store).valid
    assert np.flatnonzero(before != after).tolist() == [2, 3]
    assert not after[[2, 3]].any()


def test_the_last_shard_and_swapped_shards_are_told_apart(store: Path) -> None:
    codes = store / "spaces/vit/patch/codes"
    first, second = codes / "c.0.0.0", codes / "c.1.0.0"
    raw = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(raw)
    cache = Cache.open(store)
    with pytest.raises(StoreError, match=r"shard 0 of vit: group 0 .* is not what was committed"):
        cache["vit/patch"].read([0])
    assert zarr.open_group(store)["spaces/vit/patch/codes"][0] is not None  # plain Zarr is silent


@pytest.mark.parametrize("position", [0, 1000, -1, -30])
def test_a_flipped_bit_is_found_when_it_is_read(store: Path, position: int) -> None:
    file = store / "spaces/vit/patch/codes/c.1.0.0"
    raw = bytearray(file.read_bytes())
    raw[position] ^= 16
    file.write_bytes(raw)
    cache = Cache.open(store)
    with pytest.raises(StoreError, match=r"damaged in shard 1 of vit.*preceptor repair"):
        cache["vit/patch"].read(range(16, 32))
    with pytest.raises(StoreError, match=r"damaged in shard 1 of vit"):
        list(cache.batches(["vit/patch"], 4))


def test_what_opening_refuses(store: Path, tmp_path: Path) -> None:
    def refused(words: str) -> None:
        with pytest.raises(StoreError, match=words):
            Cache.open(store)

    with pytest.raises(StoreError, match="holds no store"):
        Cache.open(tmp_path / "nowhere")
    codes = store / "spaces/cnn/map/codes/c.2.0.0"
    raw = codes.read_bytes()
    codes.write_bytes(raw[:-1])
    refused(rf"shard 2 of cnn: spaces/cnn/map/codes/c\.2\.0\.0 has {len(raw) - 1} bytes")
    assert list(Cache.open(store, teachers=["vit"]).spaces) == ["vit/patch", "vit/cls"]
    codes.unlink()
    refused("shard 2 of cnn: .* is missing")
    codes.write_bytes(raw)
    node = store / "spaces/cnn/map/codes/zarr.json"
    text = node.read_text()
    for ours, other in (
        ('"fill_value": -128', '"fill_value": 0'),
        ('"checksum": true', '"checksum": 1'),
        ('"dim": 9', '"dim": 9, "note": "x"'),
    ):
        assert ours in text
        node.write_text(text.replace(ours, other))
        refused(r"spaces/cnn/map/codes/zarr\.json is not what")
    node.write_text("{")
    refused(r"zarr\.json is not JSON")
    Cache.open(store, teachers=["vit"])
    complete = store / "commits/cnn/complete.json"
    text = complete.read_text()
    complete.write_text(text.replace('"exact": true', '"exact": false'))
    refused("SHA-256 differs")
    complete.unlink()
    refused("cnn is committed but not finished")
    (store / "commits/vit/1.json").unlink()
    with pytest.raises(StoreError, match="shard 1 of vit has no commit record"):
        Cache.open(store, teachers=["vit"])


def test_an_older_record_is_refused(store: Path) -> None:
    record = store / "commits/vit/0.json"
    body = json.loads(record.read_text())
    body.pop("sha256")
    record.write_bytes(sealed({**body, "first_key": "another"}))
    with pytest.raises(StoreError, match="not the record that was sealed"):
        Cache.open(store)["vit/patch"].read([0])


def test_another_format_or_version_is_refused(store: Path) -> None:
    manifest = store / "manifest.json"
    body = json.loads(manifest.read_text())
    for member, value, words in (
        ("version", 4, "format version 4 and this program reads versions 1 to 3"),
        ("format", "other", "states the format 'other'"),
    ):
        manifest.write_text(json.dumps({**body, member: value}))
        with pytest.raises(StoreError, match=words):
            Cache.open(store)
    manifest.write_text(json.dumps({**body, "rows": 41}))
    with pytest.raises(StoreError, match="SHA-256 differs"):
        Cache.open(store)


def test_memory_does_not_grow_with_the_epochs(cache: Cache) -> None:
    def epoch(number: int) -> int:
        for _ in cache.batches(["vit/patch", "cnn/map"], 4, epoch=number, window_rows=8):
            pass
        return sum(length * len(free) for length, free in cache.buffers._free.items())

    first = epoch(0)
    assert first > 0
    assert all(epoch(number) <= 2 * first for number in range(1, 10))


def test_a_failing_device_is_named(store: Path) -> None:
    codes = store / "spaces/vit/patch/codes/c.1.0.0"
    cache = Cache.open(store)
    codes.unlink()
    codes.mkdir()
    with pytest.raises(StoreError, match=r"shard 1 of vit: .*c\.1\.0\.0 fails: Is a directory"):
        cache["vit/patch"].read([16])
    record = store / "manifest.json"
    record.unlink()
    record.mkdir()
    with pytest.raises(StoreError, match=r"manifest\.json cannot be read: Is a directory"):
        Cache.open(store)


def test_a_dropped_cache_closes_its_files_at_once(finished: Path) -> None:
    import gc
    import os

    gc.collect()
    gc.disable()  # reference counts alone must do
    try:
        before = len(os.listdir("/proc/self/fd"))
        cache = Cache.open(finished)
        cache["vit/patch"].read(VALID)
        assert len(os.listdir("/proc/self/fd")) > before
        del cache
        assert len(os.listdir("/proc/self/fd")) == before
    finally:
        gc.enable()
