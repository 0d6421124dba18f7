"""The pixels of the views, stored beside the tokens."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr
from preceptor.benchmarks.small_store import (
    INVALID,
    ROWS,
    TEACHERS,
    batch,
    calibrate,
    contents,
    extract,
    fill,
    pixels,
    plan,
    restore,
)
from preceptor.cache import Cache, PixelSpec, StorePlan, StoreWriter, TeacherRecord
from preceptor.cache.convert import convert_store
from preceptor.cache.report import describe, print_tables
from preceptor.errors import StoreError

VALID = np.array([row for row in range(ROWS) if row != INVALID])


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with pixels that tests only read."""
    path = tmp_path_factory.mktemp("pixels") / "store"
    extract(path)
    return path


def without_pixels() -> StorePlan:
    return replace(plan(), pixels=None)


def test_rows_come_back_exactly_in_any_order(shown: Path) -> None:
    cache = Cache.open(shown)
    assert cache.pixels == PixelSpec((5, 3), "bicubic")
    rows = np.array([13, 0, 6, 6, 2])
    assert (cache.read_pixels(rows).numpy() == pixels(rows)).all()
    assert cache.teachers == ("vit", "cnn")
    assert set(cache.spaces) == {"vit/patch", "vit/cls", "cnn/patch", "cnn/cls"}
    with pytest.raises(StoreError, match=r"row 5 .* has no tokens"):
        cache.read_pixels([INVALID])


def test_batches_bring_them_beside_the_tokens(shown: Path) -> None:
    cache = Cache.open(shown)
    plain = list(cache.batches(["vit/patch"], 3, seed=2, window_rows=6))
    both = list(cache.batches(["vit/patch"], 3, seed=2, window_rows=6, pixels=True))
    assert len(both) == len(plain) == 4
    for one, other in zip(plain, both, strict=True):
        assert one.pixels is None
        assert other.pixels is not None
        assert one.rows.tolist() == other.rows.tolist()
        assert (one.tokens["vit/patch"].codes == other.tokens["vit/patch"].codes).all()
        assert (other.pixels.numpy() == pixels(other.rows.numpy())).all()
        assert other.to("cpu").pixels is not None


def test_they_are_open_beside_the_teachers_asked_for_where_they_are_whole(
    shown: Path, tmp_path: Path
) -> None:
    cache = Cache.open(shown, teachers=["vit"])
    assert cache.pixels == PixelSpec((5, 3))
    assert (cache.read_pixels([3, 0]).numpy() == pixels(np.array([3, 0]))).all()
    assert cache.teachers == ("vit",)
    path, told = tmp_path / "store", r"the pixels of .*store are not whole: `preceptor verify`"
    for name in ("pixels/c.1.0.0.0", "pixels/zarr.json", "commits/pixels/complete.json"):
        restore(path, contents(shown))
        raw = (path / name).read_bytes()
        for damage in (raw[:-9], None):
            (path / name).write_bytes(damage) if damage else (path / name).unlink()
            cache = Cache.open(path, teachers=["vit"])
            assert cache.pixels is None
            with pytest.raises(StoreError, match=told):
                cache.read_pixels([0])
    with pytest.raises(
        StoreError, match=r"teachers='vit' is a text: give a list, such as \['vit'\]"
    ):
        Cache.open(shown, teachers="vit")


def test_other_libraries_read_the_array_that_the_document_describes(shown: Path) -> None:
    by_zarr = np.asarray(zarr.open_array(shown / "pixels", mode="r")[...])
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(shown / "pixels")}}
    by_tensorstore = np.asarray(tensorstore.open(spec).result().read().result())
    assert (by_zarr[VALID] == pixels(VALID)).all()
    assert (by_tensorstore[VALID] == pixels(VALID)).all()
    assert by_zarr.shape == (ROWS, 5, 3, 3)
    assert not by_zarr[INVALID].any()  # the fill value


def test_the_configuration_is_hashed_as_the_document_says(shown: Path) -> None:
    manifest = json.loads((shown / "manifest.json").read_text())
    assert manifest["pixels"] == {"size": [5, 3], "interpolation": "bicubic"}

    def digest(value: object) -> str:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    members = (
        "format", "samples", "views", "rows", "shard_rows", "group_rows", "key_bytes",
    )  # fmt: skip
    rows = digest({"version": 1, **{name: manifest[name] for name in members}})
    done = json.loads((shown / "commits/pixels/complete.json").read_text())
    assert done["configuration"] == digest({"rows": rows, "pixels": manifest["pixels"]})


def test_added_and_dropped_no_other_file_changes(tmp_path: Path, shown: Path) -> None:
    path = tmp_path / "store"
    writer = StoreWriter.open_or_create(path, without_pixels())
    with pytest.raises(StoreError, match="no teacher 'pixels'"):
        writer.drop("pixels")
    calibrate(writer)
    fill(writer)
    writer.finish()
    before = contents(path)
    assert "pixels" not in json.loads(before["manifest.json"])
    with pytest.raises(StoreError, match=r"holds no pixels.*preceptor add"):
        Cache.open(path).read_pixels([0])
    with pytest.raises(StoreError, match="holds no pixels"):
        Cache.open(path).batches(["vit/cls"], 2, pixels=True)

    writer.add_pixels(PixelSpec((5, 3)))
    assert {unit for _, units in writer.pending() for unit in units} == {"pixels"}
    with pytest.raises(StoreError, match="pixels lacks 2 of 2 shards"):
        Cache.open(path)
    fill(writer)
    writer.finish()
    after = contents(path)
    assert after == contents(shown)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"manifest.json", "spare/manifest.json"}
    with pytest.raises(StoreError, match="has pixels already"):
        writer.add_pixels(PixelSpec((4, 4)))

    with pytest.raises(StoreError, match="no teacher 'rows'"):
        writer.drop("rows")
    writer.drop("pixels")
    assert contents(path) == before


def test_another_size_does_not_continue_a_store(tmp_path: Path) -> None:
    StoreWriter.open_or_create(tmp_path / "store", plan())
    other = replace(plan(), pixels=PixelSpec((5, 4)))
    with pytest.raises(StoreError, match=r"pixels\.size\[1\] is 3 in the store and 4 in this"):
        StoreWriter.open_or_create(tmp_path / "store", other)
    with pytest.raises(StoreError, match="only the store has pixels"):
        StoreWriter.open_or_create(tmp_path / "store", without_pixels())


def test_other_than_the_promised_pixels_are_refused(tmp_path: Path) -> None:
    writer = StoreWriter.open_or_create(tmp_path / "store", plan())
    for given in (None, np.zeros((3, 3, 5, 3), np.uint8), np.zeros((3, 5, 3, 3), np.float32)):
        shard = writer.shard(0, ("rows", "pixels"))
        with pytest.raises(StoreError, match=r"shard 0 wants pixels of shape \(3, 5, 3, 3\)"):
            shard.append(batch(0, 3), {}, given)
    with pytest.raises(StoreError, match="wants pixels of shape None"):
        writer.shard(0, ("rows",)).append(batch(0, 3), {}, pixels(np.arange(3)))


def test_a_teacher_may_have_the_name_where_there_are_no_pixels(tmp_path: Path) -> None:
    named = tuple(replace(space, teacher="pixels") for space in TEACHERS[0].spaces)
    teacher = TeacherRecord("pixels", named, {})
    with pytest.raises(StoreError, match="cannot have a teacher named 'pixels'"):
        plan(teacher)
    only = replace(without_pixels(), teachers=(teacher,))
    assert only.units == ("rows", "pixels")
    assert only.spaces_of("pixels") == named
    with pytest.raises(StoreError, match="cannot have a teacher named"):
        StoreWriter.open_or_create(tmp_path / "store", only).add_pixels(PixelSpec((5, 3)))


def test_converting_copies_them(tmp_path: Path, shown: Path) -> None:
    convert_store(shown, tmp_path / "out", "fp16")
    before, after = contents(shown), contents(tmp_path / "out")
    mine = [name for name in before if name.startswith(("pixels/", "commits/pixels/"))]
    assert len(mine) == 3 + 3
    assert all(before[name] == after[name] for name in mine)
    assert (Cache.open(tmp_path / "out").read_pixels(VALID).numpy() == pixels(VALID)).all()


def test_info_tells(shown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = describe(shown)
    files = sum(file.stat().st_size for file in (shown / "pixels").glob("c.*"))
    assert found["pixels"] == {"size": [5, 3], "interpolation": "bicubic", "bytes": files}
    print_tables(found)
    assert "pixels: 5 x 3, bicubic" in capsys.readouterr().out
