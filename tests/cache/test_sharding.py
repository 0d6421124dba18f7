"""Gaps that let chunks begin where they are read fastest: their cost, other writers', damage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from preceptor.benchmarks.faults import flip
from preceptor.benchmarks.small_store import contents, extract, fill, restore
from preceptor.cache import Cache, SpaceSpec, TeacherRecord, sharding, source
from preceptor.cache.encodings import encoding
from preceptor.cache.layout import ArraySpec
from preceptor.cache.mend import repair_store
from preceptor.cache.sharding import alignment, shard_file
from preceptor.cache.verify import verify_store

LARGE = TeacherRecord(
    "vit",
    (
        SpaceSpec("vit", "patch", 50, 331, (5, 10)),
        SpaceSpec("vit", "dense", 50, 331, (5, 10), "compact"),
        SpaceSpec("vit", "cls", 1, 64, None),
    ),
    {"weights": "a"},
)
SPACES = [space.id for space in LARGE.spaces]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["fp16", "int8", "compact", "int4"]),
    st.integers(1, 400),
    st.integers(1, 1500),
    st.sampled_from([1, 4, 32, 64]),
)
def test_gaps_cost_less_than_a_thousandth(name: str, tokens: int, dim: int, group: int) -> None:
    """Of every array of every space, counted on files of eight groups."""
    for part in encoding(name).components(tokens, dim):
        rows, shape = 8 * group, part.row_shape
        wide = (rows, *shape)
        spec = ArraySpec("a", part.dtype, wide, wide, (group, *shape), part.fill)
        stored, step = spec.chunk_bytes + 4, alignment(spec)
        plain = 8 * stored + spec.index_bytes
        gaps = 7 * (-stored % step)
        assert gaps <= plain / 1000
        if plain < 1 << 21:
            buffers, _ = shard_file(spec, np.zeros(wide, part.dtype))
            assert sum(memoryview(buffer).nbytes for buffer in buffers) == plain + gaps


@pytest.mark.parametrize("tokens", [1, 256])
def test_int8_is_half_of_fp16_for_grids_and_for_descriptors(tokens: int) -> None:
    def size(name: str) -> int:
        total = 0
        for part in encoding(name).components(tokens, 768):
            wide = (64, *part.row_shape)
            spec = ArraySpec("a", part.dtype, wide, wide, (32, *part.row_shape), part.fill)
            buffers, _ = shard_file(spec, np.zeros(wide, part.dtype))
            total += sum(memoryview(buffer).nbytes for buffer in buffers)
        return total

    assert 0.5 < size("int8") / size("fp16") <= 0.505


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("gaps") / "store"
    extract(path, LARGE)
    return contents(path)


def gaps(path: Path, space: str) -> list[tuple[int, int]]:
    """Begin and end of every gap of the first shard of a space's codes."""
    cache = Cache.open(path)
    spec = cache.layout.space_arrays(cache.plan.spaces[space])["codes"]
    entries = cache.chunks.index("vit", spec, 0).entries
    ends = [0, *entries.sum(1)[:-1].tolist()]
    return [(a, b) for a, b in zip(ends, entries[:, 0].tolist(), strict=True) if a < b]


def tokens(path: Path) -> dict[str, bytes]:
    cache = Cache.open(path)
    rows = np.flatnonzero(cache.valid)
    return {
        f"{name} {part}": values.numpy().tobytes()
        for name in SPACES
        for part, values in cache[name].read(rows).parts.items()
    }


@pytest.mark.parametrize("space", ["vit/patch", "vit/dense"])
def test_a_bit_flipped_in_a_gap_is_found_and_mended(
    space: str, good: dict[str, bytes], tmp_path: Path
) -> None:
    path = tmp_path / "store"
    restore(path, good)
    codes = f"spaces/{space}/codes/c.0.0.0"
    ((begin, end),) = gaps(path, space)
    for place in {begin, (begin + end) // 2, end - 1}:
        raw = bytearray(good[codes])
        raw[place] ^= 4
        (path / codes).write_bytes(raw)
        assert tokens(path)  # readers go by the index and never see it
        report = verify_store(path)
        assert [str(problem) for problem in report.problems] == [
            f"shard 0 of vit: {codes} has more than a few zeros before group 1"
        ]
        assert repair_store(path, report.shards, fill).different == ()
        assert contents(path) == good


@pytest.mark.parametrize("step", [1, 512, 4096])
def test_stores_with_other_gaps_hold_the_same(
    step: int, good: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without any, as stores were written before there were gaps, and with larger ones."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    restore(ours, good)
    monkeypatch.setattr(sharding, "ALIGNMENT", step)
    extract(theirs, LARGE)
    assert len(gaps(theirs, "vit/patch")) == (step > 1)
    assert all(end % step == 0 for _, end in gaps(theirs, "vit/dense"))
    assert verify_store(theirs).whole
    assert tokens(theirs) == tokens(ours)


def test_shards_of_stores_without_gaps_are_mended_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stores of before chunks were aligned stay as they are."""
    path = tmp_path / "store"
    with monkeypatch.context() as before:
        before.setattr(sharding, "ALIGNMENT", 1)
        extract(path, LARGE)
    old = contents(path)
    assert not gaps(path, "vit/patch")
    for space in ("patch", "dense"):
        flip(path / f"spaces/vit/{space}/codes/c.0.0.0", np.random.default_rng(0))
    done = repair_store(path, verify_store(path).shards, fill)
    assert done.extracted == (("vit", 0),)
    assert done.different == ()
    assert contents(path) == old


def test_larger_gaps_than_the_format_allows_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharding, "ALIGNMENT", 8192)
    extract(tmp_path / "store", LARGE)
    problems = {str(problem) for problem in verify_store(tmp_path / "store").problems}
    assert problems == {
        f"shard {shard} of vit: spaces/vit/{name}/codes/c.{shard}.0.0 has more than a few zeros "
        "before group 1"
        for name in ("patch", "dense")
        for shard in (0, 1)
    }


@pytest.mark.parametrize("piece", [1, 2, 3, 4])
def test_large_rows_are_read_in_pieces_of_any_size(
    piece: int, good: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of 16 kB: alone, repeated, and in batches, against all of them at once."""
    restore(tmp_path / "store", good)
    whole = Cache.open(tmp_path / "store")
    valid = np.flatnonzero(whole.valid)
    every = {name: whole[name].read(valid).parts for name in SPACES}
    monkeypatch.setattr(source, "_PIECE", piece * 50 * 331)
    cache = Cache.open(tmp_path / "store")
    for rows in ([3], [9, 2, 9, 11], [0, 1, 2, 3], [3, 2, 1, 1], [13, 12]):
        at = np.searchsorted(valid, rows)
        for name in SPACES:
            for part, values in cache[name].read(rows).parts.items():
                assert values.numpy().tobytes() == every[name][part][at].numpy().tobytes()
    seen = 0
    for batch in cache.batches(SPACES, 3, window_rows=6, drop_last=False, pixels=True):
        at = np.searchsorted(valid, batch.rows.numpy())
        seen += len(at)
        for name in SPACES:
            for part, values in batch.tokens[name].parts.items():
                assert values.numpy().tobytes() == every[name][part][at].numpy().tobytes()
    assert seen == len(valid)
