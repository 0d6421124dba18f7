"""Images from folders, and the pixels of their views: extracted, added, mended, dropped."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from preceptor.benchmarks.faults import flip
from preceptor.benchmarks.small_store import contents
from preceptor.cache import Cache, ViewPolicy
from preceptor.cli import main
from preceptor.extract.live import _levels
from preceptor.tests.extract.tiny_store import run, teachers


def test_pixels_are_extracted_added_mended_and_dropped(
    shards: str, configs: Path, good: dict[str, bytes], store: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    size = "pixels.size=[24,16]"
    made = tmp_path / "made"
    tiny = ("--config-dir", str(configs), "teachers=tiny")
    assert run("extract", made, shards, *tiny, size) == 0
    assert json.loads((tmp_path / "made.extract.json").read_text())["pixels"] == {
        "size": [24, 16], "interpolation": "bicubic",
    }  # fmt: skip
    cache = Cache.open(made)
    for sample in webdataset.WebDataset(shards, shardshuffle=False):
        row = int(sample["__key__"][2:])
        if not cache.valid[row]:
            continue
        image = Image.open(io.BytesIO(sample["png"])).convert("RGB")
        left = (image.width - image.height) / 2
        box = (left, 0, left + image.height, image.height)
        expected = np.asarray(image.resize((16, 24), Image.Resampling.BICUBIC, box=box))
        assert (cache.read_pixels([row])[0].numpy() == expected).all()

    assert run("add", store, shards, size, *tiny) == 0
    assert f"{store}: pixels added, cnn, vit there already, 11 rows" in capsys.readouterr().out
    assert contents(store) == contents(made)
    assert main(["drop", f"cache={store}", "teacher=pixels"]) == 0
    assert run("add", store, shards, size) == 0  # no teacher is needed
    assert contents(store) == contents(made)
    assert run("add", store, shards, size) == 0  # nothing left to do
    assert run("verify", store, shards, teachers(vit="vit"), "sample=6") == 0
    live = json.loads(Path(f"{store}.verify.json").read_text())["live"]
    assert live["pixels"] == {"equal_rows": 6, "largest_mean_difference": 0.0, "other_rows": []}
    rows = np.flatnonzero(cache.valid)[:2]
    shown = cache.read_pixels(rows).permute(0, 3, 1, 2).int()
    shown[1] += 3
    assert _levels(cache, rows, shown).tolist() == [0, 3]
    assert run("add", store, shards, "pixels.size=24") == 1
    assert "other pixels already: pixels.size[1] is 16 in the store" in capsys.readouterr().err

    flip(store / "pixels/c.1.0.0.0", np.random.default_rng(0))
    (store / "commits/pixels/2.json").unlink()
    assert main(["verify", f"cache={store}"]) == 1
    told = json.loads((tmp_path / "store.verify.json").read_text())
    assert told["shards"] == {"pixels": [1, 2]}
    assert run("repair", store, shards) == 0
    assert contents(store) == contents(made)

    assert main(["drop", f"cache={store}", "teacher=pixels"]) == 0
    assert contents(store) == good


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("pixels.size=0", "pixels.size=0: expected a side in pixels"),
        ("pixels.size=[1,2,3]", "expected a side in pixels, or [height,width]"),
        ("pixels.size=224px", "pixels.size=224px"),
        ("pixels={size: 8, interpolation: cubic}", "pixels.interpolation=cubic: valid are"),
    ],
)
def test_mistaken_pixels_are_told(
    shards: str, store: Path, option: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("add", store, shards, option) == 1
    assert expected in capsys.readouterr().err


def test_a_folder_of_class_folders_is_extracted_and_mended(
    shards: str, configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    for sample in webdataset.WebDataset(shards, shardshuffle=False):
        folder = images / f"class-{sample['cls'].decode()}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{sample['__key__']}.png").write_bytes(sample["png"])
    (images / "class-1/list.txt").write_text("no image")
    store, tiny = tmp_path / "store", ("--config-dir", str(configs), "teachers=tiny")
    assert run("extract", store, str(images), *tiny) == 0
    err = capsys.readouterr().err
    assert "one file of" in err
    assert "left out: 'class-1/list.txt'" in err
    cache, good = Cache.open(store), contents(store)
    assert list(cache.keys) == sorted(
        str(p.relative_to(images))[:-4] for p in images.rglob("*.png")
    )
    assert [key[:7] for key in cache.keys] == [f"class-{label}" for label in cache.labels]
    assert [cache.keys[row][-5:] for row in np.flatnonzero(~cache.valid)] == ["im006"]
    (store / "commits/cnn/1.json").unlink()
    assert run("repair", store, str(images), *tiny) == 0
    assert contents(store) == good


def test_random_views_are_those_of_the_seed(shards: str, configs: Path, tmp_path: Path) -> None:
    tiny = ("--config-dir", str(configs), "teachers=tiny")
    views = ("views.name=random", "views.count=2", "views.flip=true")
    boxes = {}
    for seed in (3, 4):
        path = tmp_path / str(seed)
        assert run("extract", path, shards, *tiny, *views, f"seed={seed}") == 0
        cache = Cache.open(path)
        policy = ViewPolicy("random", 2, scale=(0.35, 1.0), flip=True, seed=seed)
        for row in np.flatnonzero(cache.valid).tolist():
            height, width = cache.sizes[row].tolist()
            drawn = policy.draw(cache.keys[row], row % 2, width, height)
            assert tuple(cache.boxes[row].tolist()) == drawn.box
            assert cache.flips[row] == drawn.flip
        boxes[seed] = cache.boxes
    assert not np.array_equal(boxes[3], boxes[4])
