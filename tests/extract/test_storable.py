"""A blank image, of which one teacher gives tokens that cannot be stored: left out, or told."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from preceptor.benchmarks.small_store import contents, restore
from preceptor.cache import Cache, StoreWriter
from preceptor.cli import main
from preceptor.extract import calibration

COUNT, BLANK, BROKEN = 11, 5, 9
CALL = "call:preceptor.tests.extract"
TEACHERS = {
    "cnn": f"cnn: {{source: '{CALL}.tiny_teachers:cnn', encoding: int4}}\n",
    "fine": f"fine: {{source: '{CALL}.tiny_teachers:vit', encoding: fp16}}\n",
    "beacon": f"beacon: {{source: '{CALL}.awkward_teachers:beacon', encoding: fp16}}\n",
    "touchy": f"touchy: {{source: '{CALL}.awkward_teachers:contrast'}}\n",
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("shards") / "s-0.tar"
    (path.parent / "teachers").mkdir()
    several = {"all": ("cnn", "fine", "touchy"), "far": ("cnn", "beacon")}
    texts = {group: "".join(TEACHERS[name] for name in names) for group, names in several.items()}
    for name, text in {**TEACHERS, **texts}.items():
        (path.parent / "teachers" / f"{name}.yaml").write_text(text)
    random = np.random.default_rng(0)
    with webdataset.TarWriter(str(path)) as tar:
        for key in range(COUNT):
            data = io.BytesIO()
            pixels = random.integers(0, 255, (40 + key, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels if key != BLANK else np.full_like(pixels, 255)).save(data, "PNG")
            raw = data.getvalue() if key != BROKEN else b"no image"
            tar.write({"__key__": f"im{key:03d}", "png": raw, "cls": str(key % 3)})
    return str(path)


def run(verb: str, store: Path, shards: str, teachers: str, *options: str) -> int:
    if verb == "extract":
        options = ("shard_rows=4", "group_rows=2", "on_corrupt=skip", *options)
    if verb in ("extract", "add"):
        options = (f"calibration.images={COUNT}", *options)
    given = [f"cache={store}", f"data.shards='{shards}'", "batch_size=3", "workers=0", "engine=cpu"]
    chosen = ["--config-dir", str(Path(shards).parent), f"teachers={teachers}"]
    return main([verb, *chosen, *given, *options])


def sound(shards: str) -> str:
    """The shard without the image that is broken."""
    whole = shards.replace("s-0", "whole")
    with webdataset.TarWriter(whole) as tar:
        for sample in webdataset.WebDataset(shards, shardshuffle=False):
            if sample["__key__"] != f"im{BROKEN:03d}":
                tar.write({key: sample[key] for key in ("__key__", "png", "cls")})
    return whole


@pytest.fixture(scope="module")
def good(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "store"
    assert run("extract", path, shards, "all", "pixels.size=8") == 0
    return path


def test_such_a_row_is_left_out_for_all_teachers_and_counted(good: Path, shards: str) -> None:
    cache = Cache.open(good)
    assert np.flatnonzero(~np.asarray(cache.valid)).tolist() == [BLANK, BROKEN]
    summary = json.loads(good.with_name("store.extract.json").read_text())
    assert summary["rows_invalid"] == 2
    assert ["im005" in text for text in summary["damaged_images"]] == [True, False]
    told = [text for text in summary["damage"] if "im005" in text]
    assert len(told) == 1
    assert "s-0.tar: the tokens of touchy/patch are not finite" in told[0]
    for name in cache.spaces:
        with pytest.raises(Exception, match="im005"):
            cache[name].read(np.array([4, BLANK]))
    # the teachers on their own say that all other rows, and their pixels, are where they belong
    assert run("verify", good, shards, "all", f"sample={COUNT - 2}") == 0
    live = json.loads(good.with_name("store.verify.json").read_text())["live"]
    assert live["pixels"]["equal_rows"] == COUNT - 2
    assert len(live["spaces"]) == 6


@pytest.mark.parametrize("borrowed", [True, False])
def test_it_stops_with_the_names_of_all_that_is_concerned(
    borrowed: bool, good: Path, shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the calibration's sample, and, where that is another store's, in its shard."""
    more = [f"calibration.store={good}"] if borrowed else []
    assert run("extract", tmp_path / "store", sound(shards), "all", "on_corrupt=stop", *more) == 1
    told = capsys.readouterr().err
    assert "teacher touchy gives tokens of space patch that are not finite" in told
    assert "'im005' in shard " in told
    assert "row 5 in shard 1 of the store" in told
    assert "on_corrupt=skip" in told


@pytest.mark.parametrize(
    "gone",
    [
        ["commits/rows/1.json"],
        ["rows/valid/c.1"],
        ["commits/cnn/1.json", "commits/rows/1.json"],
        ["commits/cnn/1.json", "commits/fine/1.json", "commits/rows/1.json"],
        ["commits/touchy/1.json"],
        ["commits/pixels/1.json"],
        [f"commits/{unit}/1.json" for unit in ("rows", "pixels", "cnn", "fine", "touchy")],
    ],
)
@pytest.mark.parametrize("verb", ["repair", "extract"])
def test_what_is_extracted_again_is_as_it_was(
    verb: str, gone: list[str], good: Path, shards: str, tmp_path: Path
) -> None:
    """Whether the row was left out is told by whichever unit is still there."""
    before, store = contents(good), tmp_path / "store"
    restore(store, before)
    for name in gone:
        (store / name).unlink()
    more = [] if verb == "repair" else ["pixels.size=8"]
    assert run(verb, store, shards, "all", *more) == 0
    assert contents(store) == before


def test_a_teacher_is_added_to_the_rows_that_there_are(
    good: Path, shards: str, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    assert run("extract", store, shards, "touchy") == 0
    assert run("add", store, shards, "fine") == 0
    found, theirs = Cache.open(store), Cache.open(good)
    rows = np.flatnonzero(found.valid)
    assert rows.tolist() == np.flatnonzero(theirs.valid).tolist()
    for ours, expected in zip(
        found["fine/patch"].read(rows).parts.values(),
        theirs["fine/patch"].read(rows).parts.values(),
        strict=True,
    ):
        assert (ours == expected).all()


@pytest.mark.parametrize("in_sample", [True, False])
def test_a_teacher_that_is_added_cannot_leave_out_a_row_that_others_have(
    in_sample: bool, shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    store = tmp_path / "store"
    assert run("extract", store, shards, "cnn") == 0
    if not in_sample:
        monkeypatch.setattr(calibration, "sample_rows", lambda rows, wanted, seed: [0, 1, 7])
    assert run("add", store, shards, "touchy") == 1
    told = capsys.readouterr().err
    assert (
        "teacher touchy gives tokens of space patch that are not finite for image 'im005'" in told
    )
    assert "leave this teacher out" in told
    assert main(["drop", f"cache={store}", "teacher=touchy"]) == 0
    assert Cache.open(store).valid[BLANK]


@pytest.fixture
def without_the_blank_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A calibration's sample that lacks it."""
    monkeypatch.setattr(calibration, "sample_rows", lambda rows, wanted, seed: [0, 1, 3, 7])


@pytest.mark.usefixtures("without_the_blank_one")
def test_tokens_beyond_the_encoding_are_left_out_for_all_teachers_and_never_clipped(
    shards: str, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    assert run("extract", store, shards, "far") == 0
    cache = Cache.open(store)
    rows = np.flatnonzero(np.asarray(cache.valid))
    assert [row for row in range(COUNT) if row not in rows] == [BLANK, BROKEN]
    damage = json.loads(store.with_name("store.extract.json").read_text())["damage"]
    told = next(text for text in damage if "im005" in text)
    assert "s-0.tar: the tokens of beacon/patch are too far from the calibrated mean" in told
    # the other rows are those of the teacher alone, whose tokens are the same but for that image
    assert run("extract", tmp_path / "alone", shards, "cnn") == 0
    theirs = Cache.open(tmp_path / "alone")
    assert theirs.valid[BLANK]
    for ours, expected in zip(
        cache["cnn/patch"].read(rows).parts.values(),
        theirs["cnn/patch"].read(rows).parts.values(),
        strict=True,
    ):
        assert (ours == expected).all()
    before = contents(store)
    for unit in ("rows", "cnn", "beacon"):
        (store / f"commits/{unit}/1.json").unlink()
    assert run("extract", store, shards, "far") == 0
    assert contents(store) == before


@pytest.mark.usefixtures("without_the_blank_one")
@pytest.mark.parametrize("added", [False, True])
def test_tokens_beyond_the_encoding_are_told_with_all_that_is_concerned(
    added: bool, shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    whole = sound(shards)
    if added:
        assert run("extract", store, whole, "cnn") == 0
        assert run("add", store, whole, "beacon") == 1
    else:
        assert run("extract", store, whole, "far", "on_corrupt=stop") == 1
    told = capsys.readouterr().err
    for words in (
        "teacher beacon gives tokens of space patch that are too far from the calibrated mean",
        "for the encoding fp16, which holds 65,504 deviations (they have ",
        "for image 'im005' in shard ",
        "row 5 in shard 1 of the store",
        "teachers.beacon.encoding=int8 or teachers.beacon.encoding=compact would hold",
        "leave this teacher out" if added else "on_corrupt=skip",
    ):
        assert words in told


def test_a_store_says_nothing_of_rows_before_a_shard_of_them_is_there(
    good: Path, tmp_path: Path
) -> None:
    writer = StoreWriter.open_or_create(tmp_path / "begun", Cache.open(good).plan)
    assert writer.stored_valid(1) is None
    found = StoreWriter.open(good).stored_valid(1)
    assert found is not None
    assert found.tolist() == [True, BLANK != 5, True, True]
