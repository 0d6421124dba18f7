"""The writer: whole or absent, the same bytes whatever happened on the way."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from preceptor.benchmarks.small_store import contents
from preceptor.cache import Cache, RowBatch, StoreWriter
from preceptor.cache.commit import discard
from preceptor.errors import DataError, StoreError
from small_stores import (
    SPACES,
    calibrate,
    facts_of,
    make_plan,
    some_weights,
    tokens_of,
    write_shard,
)


def fill(
    writer: StoreWriter, shard: int, unit: str, facts: RowBatch, tokens: dict[str, Any]
) -> None:
    with writer.shard(shard, (unit,)) as out:
        out.append(facts, tokens)


def test_another_configuration_is_refused_with_both_sides(store: Path) -> None:
    plan = make_plan()
    other = replace(plan, samples={**plan.samples, "sha256": "cd" * 32})
    told = r"samples.sha256 is \"abab.* in the store and \"cdcd.*as many images, of other names"
    with pytest.raises(StoreError, match=told):
        StoreWriter.open_or_create(store, other)
    shards = [{"name": "other.tar", "bytes": 10240, "samples": 8}]
    renamed = replace(other, samples={**other.samples, "shards": shards}, key_bytes=192)
    with pytest.raises(StoreError, match=r"has samples\.shards"):  # what its hash is of
        StoreWriter.open_or_create(store, renamed)
    teacher = replace(plan.teachers[0], identity={"source": "call:other"})
    with pytest.raises(StoreError, match=r"teachers\[vit\].identity"):
        StoreWriter.open_or_create(store, replace(plan, teachers=(teacher, *plan.teachers[1:])))
    with pytest.raises(StoreError, match=r"group_rows is 4 in the store and 8"):
        StoreWriter.open_or_create(store, replace(plan, group_rows=8))
    views = {**plan.views, "count": 2}
    with pytest.raises(StoreError, match=r"views.count is 1 in the store and 2"):
        StoreWriter.open_or_create(store, replace(plan, views=views, rows=2 * plan.rows))


def test_a_directory_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(StoreError, match=r"thesis\.tex"):
        StoreWriter.open_or_create(tmp_path, make_plan())


def test_a_shard_that_is_not_full_commits_nothing(tmp_path: Path) -> None:
    writer = StoreWriter.open_or_create(tmp_path / "store", make_plan())
    before = contents(tmp_path)
    whole = facts_of(np.arange(16))
    with pytest.raises(StoreError, match="got 4 of its 16 rows"):
        fill(writer, 0, "rows", facts_of(np.arange(4)), {})
    with pytest.raises(StoreError, match="cannot be stored"):
        fill(writer, 0, "rows", replace(whole, keys=["", *whole.keys[1:]]), {})
    with pytest.raises(StoreError, match="takes 16 rows, not 17"):
        fill(writer, 0, "rows", facts_of(np.arange(17)), {})
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("value", "words"), [(np.nan, "not finite"), (np.inf, "not finite"), (1e30, "too far")]
)
def test_tokens_that_cannot_be_stored_are_named(tmp_path: Path, value: float, words: str) -> None:
    writer = StoreWriter.open_or_create(tmp_path / "store", make_plan(SPACES[:1]))
    calibrate(writer)
    rows = np.arange(3)
    x = tokens_of(SPACES[0], rows)
    x[2, 4, 1] = value
    with pytest.raises(DataError, match=rf"token 4 of vit/patch is {words}.*train/00002é"):
        fill(writer, 0, "vit", facts_of(rows), {"vit/patch": torch.from_numpy(x)})


def test_wrong_shapes_and_spaces_are_named(tmp_path: Path) -> None:
    writer = StoreWriter.open_or_create(tmp_path / "store", make_plan(SPACES[:1]))
    with pytest.raises(StoreError, match=r"vit/patch .* is not calibrated"):
        writer.shard(0, ("vit",))
    calibrate(writer)
    rows = facts_of(np.arange(3))
    shard = writer.shard(0, ("vit",))
    with pytest.raises(StoreError, match=r"\(3, 6, 70\), not \(2, 6, 70\)"):
        shard.append(rows, {"vit/patch": np.zeros((2, 6, 70), np.float32)})
    with pytest.raises(StoreError, match="wants tokens of"):
        shard.append(rows, {})
    with pytest.raises(StoreError, match="label of 3 rows"):
        shard.append(replace(rows, labels=np.zeros(2)), {})
    with pytest.raises(StoreError, match="1 to 128 bytes"):
        shard.append(replace(rows, keys=["a", "b" * 129, "c"]), {})
    with pytest.raises(StoreError, match=r"1 to 128 bytes .* of UTF-8"):
        shard.append(replace(rows, keys=["a", "b\udcff", "c"]), {})
    with pytest.raises(StoreError, match="shards 0 to 2, not 3"):
        writer.shard(3, ("vit",))
    with pytest.raises(StoreError, match="no teacher 'vgg'"):
        writer.shard(0, ("vgg",))


def test_a_calibration_is_frozen(tmp_path: Path) -> None:
    writer = StoreWriter.open_or_create(tmp_path / "store", make_plan(SPACES[:1]))
    assert [space.id for space in writer.uncalibrated] == ["vit/patch"]
    mean, std = np.arange(70.0), np.arange(70.0) + 1
    for bad in (std[:3], std * np.nan, std - 1):
        with pytest.raises(StoreError, match="vit/patch"):
            writer.calibrate("vit/patch", mean, bad, rows_used=3)
    writer.calibrate("vit/patch", mean, std, rows_used=3)
    writer.calibrate("vit/patch", mean, std, rows_used=3)
    with pytest.raises(StoreError, match="frozen"):
        writer.calibrate("vit/patch", mean, std + 1, rows_used=3)
    again = StoreWriter.open_or_create(tmp_path / "store", make_plan(SPACES[:1]))
    assert again.uncalibrated == []
    assert (again.calibration("vit/patch")["std"] == std.astype(np.float32)).all()


def test_weights_of_a_prediction_are_frozen_with_the_calibration(tmp_path: Path) -> None:
    writer = StoreWriter.open_or_create(tmp_path / "store", make_plan())
    ones = np.ones(9, np.float32)
    weights = some_weights(9, 100, np.random.default_rng(0))
    for bad, why in (
        (weights.astype(np.int16), "int8 of shape"),
        (weights[:8], "int8 of shape"),
        (weights.T.copy(), "earlier block"),
    ):
        with pytest.raises(StoreError, match=f"cnn/map.*{why}"):
            writer.calibrate("cnn/map", ones, ones, rows_used=3, weights=bad)
    with pytest.raises(StoreError, match="cnn/small is not predicted"):
        writer.calibrate("cnn/small", np.ones(129), np.ones(129), rows_used=3, weights=weights)
    writer.calibrate("cnn/map", ones, ones, rows_used=3, weights=weights)
    writer.calibrate("cnn/map", ones, ones, rows_used=3, weights=weights)
    with pytest.raises(StoreError, match="frozen"):
        writer.calibrate("cnn/map", ones, ones, rows_used=3)
    again = StoreWriter.open(tmp_path / "store")
    assert (again.calibration("cnn/map")["weights"] == weights).all()
    other = StoreWriter.open_or_create(tmp_path / "other", make_plan())
    other.calibrate("cnn/map", ones, ones, rows_used=3)
    assert not other.calibration("cnn/map")["weights"].any()


def test_tokens_of_other_rows_than_the_store_has_are_refused(store: Path) -> None:
    discard(store, StoreWriter.open(store).manifest, "vit", 1)
    writer = StoreWriter.open(store)
    assert writer.pending() == [(1, ("vit",))]
    rows = np.arange(16, 32)
    facts = facts_of(rows)
    facts.keys[3] = "another"
    spaces = [space for space in SPACES if space.teacher == "vit"]
    tokens = {space.id: tokens_of(space, rows) for space in spaces}
    told = "shard 1: key of the rows.*images and views .* and the same data.max_pixels"
    with pytest.raises(StoreError, match=told):
        fill(writer, 1, "vit", facts, tokens)


def test_finishing_names_what_is_pending(tmp_path: Path) -> None:
    writer = StoreWriter.open_or_create(tmp_path / "store", make_plan())
    calibrate(writer)
    write_shard(writer, 1, ("rows", "vit", "cnn"))
    write_shard(writer, 0, ("rows",))
    assert writer.pending() == [(0, ("vit", "cnn")), (2, ("rows", "vit", "cnn"))]
    with pytest.raises(StoreError, match=r"2 of 3 shards are not committed \(0, 2\)"):
        writer.finish()
    with pytest.raises(StoreError, match=r"vit lacks 2 of 3 shards \(0, 2\).*extract` that began"):
        Cache.open(tmp_path / "store")


def test_a_teacher_that_was_only_begun_may_have_been_added(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "store")
    for folder in ("store", "store/spare"):
        (tmp_path / folder / "commits" / "vit" / "complete.json").unlink()
    told = "vit is committed but not finished; run the `preceptor extract` or `preceptor add` that"
    with pytest.raises(StoreError, match=told):
        Cache.open(tmp_path / "store")
