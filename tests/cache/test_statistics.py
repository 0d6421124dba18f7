"""Streaming moments, and the statistics of stores, against NumPy in float64 over all tokens."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from preceptor.cache import Cache, SpaceSpec, StoreWriter, TeacherRecord
from preceptor.cache.commit import Commit, record_name
from preceptor.cache.convert import convert_store
from preceptor.cache.finish import shard_moments
from preceptor.cache.mend import repair_store
from preceptor.cache.statistics import (
    Accumulator,
    CalibrationSums,
    Moments,
    calibration,
)
from preceptor.cache.verify import verify_store
from preceptor.errors import StoreError
from small_stores import facts_of, make_plan


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=6),
    dim=st.integers(1, 6),
    offset=st.sampled_from([0.0, 1e4]),
    seed=st.integers(0, 2**31),
)
def test_merged_parts_are_the_whole(lengths, dim: int, offset: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = [(rng.standard_normal((n, dim)) + offset).astype(np.float32) for n in lengths]
    merged = Moments.empty(dim)
    for part in parts:
        sums = Accumulator(torch.full((dim,), offset + 0.5))
        for piece in np.array_split(part, 3):
            sums.add(torch.from_numpy(piece))
        moments = sums.moments()
        again = Moments.unpacked(moments.packed(), dim)
        assert again.count == moments.count
        assert (again.mean == moments.mean).all()
        assert np.allclose(again.scatter, moments.scatter, rtol=1e-12, atol=1e-12)
        merged = merged.merged(again)
    whole = np.concatenate(parts).astype(np.float64)
    assert merged.count == len(whole)
    if len(whole):
        assert np.allclose(merged.mean, whole.mean(0), rtol=1e-13)
        reference = (whole - whole.mean(0)).T @ (whole - whole.mean(0))
        assert np.allclose(merged.scatter, reference, rtol=1e-9, atol=1e-8)
        assert np.allclose(merged.covariance, reference / len(whole), rtol=1e-9, atol=1e-9)
        about = whole[0] - 2
        square = ((whole - about) ** 2).mean(0)
        assert np.allclose(merged.mean_square(about), square, rtol=1e-9, atol=1e-8)


def test_what_does_not_move_has_no_variance_below_zero() -> None:
    """A channel that is off in all images of a shard, though it was not in the calibration."""
    rng = np.random.default_rng(0)
    raw, constants = [], rng.integers(0, 2, 400) * rng.standard_normal(400)
    for count in (650, 333, 7):
        tokens = torch.from_numpy(constants).float().expand(count, -1).clone()
        tokens[:, 0] = torch.from_numpy(rng.standard_normal(count))
        sums = Accumulator(torch.from_numpy(rng.standard_normal(400)).float())
        sums.add(tokens)
        moments = sums.moments()
        raw.append((sums._products - torch.outer(sums._sum, sums._sum) / count).diagonal().min())
        assert moments.possible
        assert (np.diag(moments.scatter) >= 0).all()
        assert np.allclose(np.diag(moments.scatter)[1:], 0, atol=1e-9)
    assert min(raw) < 0  # or this tests nothing


def test_variances_below_zero_by_rounding_can_be_finished_and_others_cannot() -> None:
    mean, scatter = np.array([0.0, 2.0]), np.diag([-2.4e-11, 30.0])
    assert Moments(650, mean, scatter).possible
    assert not Moments(650, mean, np.diag([-1e-3, 30.0])).possible
    assert not Moments(650, mean, np.diag([np.nan, 30.0])).possible
    assert not Moments(650, np.array([0.0, np.inf]), np.diag([0.0, 30.0])).possible


def test_a_vector_of_another_dimension_is_refused() -> None:
    with pytest.raises(ValueError, match="not the moments of 3"):
        Moments.unpacked(np.zeros(5), 3)


AWKWARD = SpaceSpec("odd", "map", tokens=2, dim=5, grid=(1, 2), encoding="fp16")
LATER = SpaceSpec("later", "cls", tokens=1, dim=3, grid=None)
EMPTY = (4, 5, 6, 7, 11)
"""Invalid rows: a shard of four has none that is valid, another one row."""


def awkward(space: SpaceSpec, rows: np.ndarray) -> np.ndarray:
    """float32 [rows, N, D]: far from zero and hardly moving, at rest, wide, rectified, drifting."""
    parts = []
    for row in rows:
        rng = np.random.default_rng([len(space.id), int(row)])
        z = rng.standard_normal((space.tokens, 5))
        x = z * [0.01, 0, 300, 1, 1] + [1e4, 1e4, -1e4, 0, 50 * row]
        x[:, 3] = np.maximum(x[:, 3], 0)
        parts.append(x[:, : space.dim])
    found = np.array(parts, np.float32)
    return found.reshape(len(rows), space.tokens, space.dim)


def extract(writer: StoreWriter, order: int = 1, batch: int = 3) -> None:
    """Calibrate on the first rows, so that the centre is off, and fill the pending shards."""
    for space in writer.uncalibrated:
        sums = CalibrationSums(torch.from_numpy(awkward(space, np.arange(1))[0].mean(0)))
        sums.add(torch.from_numpy(awkward(space, np.arange(3))))
        mean, std = calibration(sums)
        writer.calibrate(space.id, mean, std, rows_used=3)
    for shard, units in writer.pending()[::order]:
        first = shard * writer.plan.shard_rows
        rows = np.arange(first, first + writer.plan.rows_in(shard))
        spaces = [space for unit in units for space in writer.plan.spaces_of(unit)]
        with writer.shard(shard, units) as out:
            for at in range(0, len(rows), batch):
                facts = facts_of(rows[at : at + batch], EMPTY)
                seen = rows[at : at + batch][facts.valid]
                out.append(facts, {space.id: awkward(space, seen) for space in spaces})


def assert_exact(path: Path, space: SpaceSpec, rows: int) -> None:
    """The store's moments of a space against NumPy over all of its tokens, centred first."""
    valid = np.array([row for row in range(rows) if row not in EMPTY])
    x = awkward(space, valid).reshape(-1, space.dim).astype(np.float64)
    moments = Cache.open(path)[space.id].statistics()
    assert moments.count == len(x)
    assert np.allclose(moments.mean, x.mean(0), rtol=1e-14, atol=1e-12)
    y = x - x.mean(0)
    reference = y.T @ y / len(y)
    spread = np.sqrt(np.outer(np.diag(reference), np.diag(reference)))
    assert (np.abs(moments.covariance - reference) <= 1e-10 * spread + 1e-18).all()
    assert (moments.covariance == moments.covariance.T).all()


@pytest.mark.parametrize("shard_rows", [1, 4, 16])
def test_statistics_of_a_store_are_those_of_all_tokens_whatever_became_of_it(
    shard_rows: int, tmp_path: Path
) -> None:
    """Shards of one row, without a valid row, in any order; a teacher added, a shard repaired, and
    the store converted."""
    rows, path = 13, tmp_path / "store"
    plan = make_plan([AWKWARD], rows=rows, shard_rows=shard_rows, group_rows=1)
    writer = StoreWriter.open_or_create(path, plan)
    extract(writer, order=-1)
    writer.finish()
    assert_exact(path, AWKWARD, rows)
    sealed = (path / "commits/odd/complete.json").read_bytes()
    writer.add(TeacherRecord("later", (LATER,), {"source": "another"}))
    extract(writer)
    writer.finish()
    assert_exact(path, LATER, rows)
    assert (path / "commits/odd/complete.json").read_bytes() == sealed
    repair_store(path, [("odd", 0)], extract)
    assert (path / "commits/odd/complete.json").read_bytes() == sealed
    convert_store(path, tmp_path / "half", "fp16", [LATER.id])
    for space in (AWKWARD, LATER):
        assert_exact(path, space, rows)
        assert_exact(tmp_path / "half", space, rows)
    assert not (path / "partial").exists()


def test_a_store_without_a_token_has_statistics_of_none(tmp_path: Path) -> None:
    plan = make_plan([LATER], rows=2, shard_rows=1, group_rows=1)
    writer = StoreWriter.open_or_create(tmp_path / "store", plan)
    writer.calibrate(LATER.id, np.zeros(3), np.ones(3), rows_used=0)
    for shard, units in writer.pending():
        with writer.shard(shard, units) as out:
            none = awkward(LATER, np.zeros(0, int))
            out.append(facts_of(np.array([shard]), [shard]), {LATER.id: none})
    writer.finish()
    moments = Cache.open(tmp_path / "store")[LATER.id].statistics()
    assert moments.count == 0
    assert not moments.covariance.any()


def unfinished(path: Path) -> StoreWriter:
    other = SpaceSpec("odd", "twin", tokens=2, dim=5, grid=(1, 2), encoding="fp16")
    plan = make_plan([AWKWARD, other], rows=12, shard_rows=4, group_rows=4)
    writer = StoreWriter.open_or_create(path, plan)
    extract(writer)
    return writer


def test_moments_that_were_harmed_before_they_were_merged_are_named(tmp_path: Path) -> None:
    path = tmp_path / "store"
    writer = unfinished(path)
    file, twin = path / "partial/odd/map.0.f64", path / "partial/odd/twin.0.f64"
    good = file.read_bytes()
    assert len(good) == 8 * (1 + 5 + 15)
    flipped = bytes([*good[:60], good[60] ^ 1, *good[61:]])
    swaps = [twin.read_bytes(), file.with_name("map.2.f64").read_bytes()]
    for harmed in (flipped, good[:-8], good[:-1], b"", good + bytes(8), *swaps):
        file.write_bytes(harmed)
        with pytest.raises(StoreError, match=r"map\.0\.f64, the statistics of shard 0 of odd/map"):
            writer.finish()
        assert [str(problem) for problem in verify_store(path).problems][:1] == [
            "shard 0 of odd: partial/odd/map.0.f64 is damaged"
        ]
        assert not (path / "commits/odd/complete.json").exists()
    file.unlink()
    with pytest.raises(StoreError, match=r"shard 0 of odd/map, is missing: run `preceptor repair`"):
        writer.finish()
    repair_store(path, verify_store(path).shards, extract)
    assert verify_store(path).whole


def test_moments_that_cannot_be_are_not_merged_though_a_record_vouches_for_them(
    tmp_path: Path,
) -> None:
    """As a writer with an error of its own would leave them."""
    path = tmp_path / "store"
    writer = unfinished(path)
    file, record = path / "partial/odd/map.0.f64", path / record_name("odd", 0)
    good = np.frombuffer(file.read_bytes(), "<f8")
    commit = Commit.from_bytes(record.read_bytes(), str(record))
    assert shard_moments(path, AWKWARD, commit).count == 8
    changes = ((0, 6.0), (0, np.nan), (1, np.nan), (6, -1e9), (7, np.inf))
    for at, value in (*changes, (None, 0)):
        harmed = good[:-1] if at is None else good.copy()
        if at is not None:
            harmed[at] = value
        file.write_bytes(harmed.tobytes())
        commit.statistics["map"] = hashlib.sha256(harmed.tobytes()).hexdigest()  # type: ignore[index]
        record.write_bytes(commit.to_bytes())
        with pytest.raises(
            StoreError, match=r"map\.0\.f64.* does not hold the moments of 8 tokens"
        ):
            writer.finish()
        assert verify_store(path).shards == [("odd", 0)]
    repair_store(path, verify_store(path).shards, extract)
    assert verify_store(path).whole


def test_merged_statistics_that_are_not_the_sealed_ones_are_not_passed_on(tmp_path: Path) -> None:
    """Swapped between two spaces, with their copies or without, and when a store is converted."""
    path = tmp_path / "store"
    writer = unfinished(path)
    writer.finish()
    for prefixes in (("",), ("", "spare/")):
        for prefix in prefixes:
            names = [path / f"{prefix}spaces/odd/{n}/statistics/mean/c.0" for n in ("map", "twin")]
            one, other = (name.read_bytes() for name in names)
            assert one != other
            names[0].write_bytes(other)
            names[1].write_bytes(one)
        with pytest.raises(StoreError, match=rf"^{path}: the statistics of odd/map are not what"):
            Cache.open(path)["odd/map"].statistics()
        with pytest.raises(StoreError, match=rf"^{path}: the statistics of odd/"):
            convert_store(path, tmp_path / "out", "int8", ["odd/map"])
        found = {problem.file for problem in verify_store(path).problems}
        assert {f"{p}spaces/odd/map/statistics/mean/c.0" for p in prefixes} <= found
        if len(prefixes) == 1:
            repair_store(path, [], None)
            assert verify_store(path).whole
        else:
            with pytest.raises(StoreError, match="both damaged"):
                repair_store(path, [], None)
    assert not (tmp_path / "out/commits/odd/complete.json").exists()
