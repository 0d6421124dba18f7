"""Whole runs from stored pixels, past damage, and on crops."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from preceptor.cache import StoreWriter
from preceptor.errors import ConfigError, DataError, StoreError
from preceptor.train.loop import train
from safetensors.torch import load_file


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": value
        for name in ("student", "alignment")
        for key, value in load_file(folder / f"{name}.safetensors").items()
    }


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return all(torch.equal(value, b[name]) for name, value in a.items())


def test_stored_pixels_give_the_weights_that_decoding_gives(
    train_config, pixel_bed, tmp_path: Path, capsys
) -> None:
    jitter = "recipe.color_jitter={brightness: 0.3, contrast: 0.2, saturation: 0.1, blur: 0.5}"
    common = (f"cache={pixel_bed.cache}", "recipe.steps=5", jitter)
    train(train_config(*common, "data.shards=null", out="stored"))
    assert "pixels: from the store (32 x 32, bicubic)" in capsys.readouterr().out
    # The same store without its pixels: the images are decoded.
    plain = tmp_path / "plain"
    shutil.copytree(pixel_bed.cache, plain)
    StoreWriter.open(plain).drop("pixels")
    train(train_config(*common, f"cache={plain}", f"data.shards={pixel_bed.shards}", out="decoded"))
    told = capsys.readouterr().out
    assert "pixels: decoded from data.shards (the store holds none)" in told
    assert "an epoch: 40 images, one of 2 stored views each in 2 batches of 16; 8 fill no" in told
    assert same(tmp_path / "stored", tmp_path / "decoded")


def test_a_run_that_decodes_can_go_on_with_stored_pixels(
    train_config, pixel_bed, tmp_path: Path, interrupted
) -> None:
    """Pixels are no part of what determines the weights."""
    path = tmp_path / "store"
    shutil.copytree(pixel_bed.cache, path)
    whole = (f"cache={pixel_bed.cache}", "recipe.steps=6", "recipe.checkpoint_every=3")
    train(train_config(*whole, "data.shards=null", out="whole"))
    StoreWriter.open(path).drop("pixels")
    config = train_config(
        f"cache={path}", f"data.shards={pixel_bed.shards}", *whole[1:], out="parts"
    )
    with interrupted(4):
        train(config)
    train(train_config(*whole, "data.shards=null", out="parts"))
    assert same(tmp_path / "whole", tmp_path / "parts")


@pytest.fixture
def damaged(pixel_bed, tmp_path: Path) -> Path:
    """The store with one damaged group, of rows 40 to 43."""
    path = tmp_path / "damaged"
    shutil.copytree(pixel_bed.cache, path)
    file = path / "spaces/vit/patch/codes/c.1.0.0"
    raw = bytearray(file.read_bytes())
    raw[2 * (4 * 16 * 24 + 4) + 7] ^= 1
    file.write_bytes(bytes(raw))
    return path


def test_a_damaged_shard_stops_a_run_or_is_skipped_and_counted(
    train_config, damaged: Path, pixel_bed, tmp_path: Path, capsys, interrupted
) -> None:
    common = (f"cache={damaged}", f"data.shards={pixel_bed.shards}", "recipe.steps=6")
    with pytest.raises(StoreError, match=r"shard 1 of vit: group 2 .*preceptor repair"):
        train(train_config(*common, out="stopped"))
    with pytest.raises(ConfigError, match="on_damaged=ignore: valid are stop, skip"):
        train(train_config(*common, "on_damaged=ignore"))

    common = (*common, "on_damaged=skip", "recipe.checkpoint_every=2")
    whole = train(train_config(*common, out="whole"))
    assert 0 < whole["rows_skipped"] <= 6
    told = json.loads((tmp_path / "whole/summary.json").read_text())
    assert told["rows_skipped"] == whole["rows_skipped"]
    assert (told["images_an_epoch"], told["images_an_epoch_left_over"]) == (40, 8)
    warnings = capsys.readouterr().err
    assert warnings.count("warning: skipped: ") == 1
    assert "shard 1 of vit: group 2 of spaces/vit/patch/codes/c.1.0.0" in warnings

    # Reproducible, and the count goes on with the run.
    config = train_config(*common, out="parts")
    with interrupted(5):
        train(config)
    parts = train(config)
    assert parts["rows_skipped"] == whole["rows_skipped"]
    assert same(tmp_path / "whole", tmp_path / "parts")


def test_a_skipping_run_with_the_knn_ends_past_damaged_pixels(
    train_config, pixel_bed, tmp_path: Path, capsys
) -> None:
    path = tmp_path / "damaged"
    shutil.copytree(pixel_bed.cache, path)
    file = path / "pixels/c.0.0.0.0"
    raw = bytearray(file.read_bytes())
    raw[7] ^= 1
    file.write_bytes(bytes(raw))
    common = (f"cache={path}", "data.shards=null", "recipe.steps=2", "log.knn_every=2")
    summary = train(train_config(*common, "on_damaged=skip"))
    assert 0 < summary["knn"] <= 1
    told = capsys.readouterr().err
    assert told.count("left out of the k-NN: ") == 1
    assert "shard 0 of pixels" in told
    with pytest.raises(StoreError, match="shard 0 of pixels"):
        train(train_config(*common, out="stopped"))


def test_crops_of_whole_images_learn_and_resume(
    train_config, full_bed, tmp_path: Path, interrupted
) -> None:
    common = (
        f"cache={full_bed.cache}", f"data.shards={full_bed.shards}", "recipe.lr=0.003",
        "recipe.steps=12", "recipe.checkpoint_every=5",
    )  # fmt: skip
    crop = "recipe.crop={scale: [0.3, 1.0]}"
    whole = train(train_config(*common, crop, out="whole"))
    assert {name for name in whole["losses"] if ":" not in name} == {"vit/patch", "vit/cls"}
    config = train_config(*common, crop, out="parts")
    with interrupted(8):
        train(config)
    assert train(config)["loss"] == whole["loss"]
    assert same(tmp_path / "whole", tmp_path / "parts")

    # Without the descriptors of whole images the mean of the region's tokens stands for each.
    only = "recipe.crop={scale: [0.3, 1.0], descriptors: false}"
    summary = train(train_config(*common, only, out="only"))
    of_tokens = (":stream", ":tokens")
    compared = {name for name in summary["losses"] if not name.endswith(of_tokens)}
    assert compared == {"vit/patch", "vit/patch:mean"}
    with pytest.raises(ConfigError, match=r"nothing else of vit/cls to learn"):
        train(train_config(*common, only, "align.spaces=[vit/patch,vit/cls]", out="lost"))


def test_crops_of_other_views_are_refused(train_config) -> None:
    with pytest.raises(ConfigError, match=r"views.name=full, or set recipe.crop=null"):
        train(train_config("recipe.crop={scale: [0.3, 1.0]}"))


def test_images_that_are_not_the_store_s_are_refused(
    train_config, tmp_path: Path, write_shard
) -> None:
    write_shard(tmp_path / "train.tar", 30, 0)
    with pytest.raises(DataError, match=r"10 of the 40 images .* such as 'train-030'"):
        train(train_config(f"data.shards={tmp_path / 'train.tar'}"))
