"""The committed shards against the idx files they were made from."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from preceptor.cache.samples import SampleIndex
from preceptor.examples import make_fashion_mnist as maker

DATA = Path(maker.OUT)
SHARDS = {"train": "train-{000000..000003}.tar.gz", "test": "test-000000.tar.gz"}
needs_source = pytest.mark.skipif(
    not maker.SOURCE.exists(), reason="the Debian package dataset-fashion-mnist is not installed"
)


@pytest.mark.parametrize(("split", "count"), [("train", 4000), ("test", 1000)])
def test_shards_are_balanced_and_unsorted(split: str, count: int) -> None:
    index = SampleIndex.from_shards(str(DATA / SHARDS[split]))
    assert len(index) == count
    assert np.bincount(index.labels).tolist() == [count // 10] * 10
    # In a random order two neighbours share their class one time in ten.
    repeats = (index.labels[1:] == index.labels[:-1]).mean()
    assert 0.07 < repeats < 0.13


def test_shards_and_licence_take_at_most_three_megabytes() -> None:
    assert {"LICENSE", "README.md"} < {path.name for path in DATA.iterdir()}
    assert sum(path.stat().st_size for path in DATA.iterdir()) < 3_000_000


@needs_source
@pytest.mark.parametrize("split", ["train", "test"])
def test_pixels_and_labels_equal_the_source(split: str) -> None:
    prefix = {"train": "train", "test": "t10k"}[split]
    with gzip.open(maker.SOURCE / f"{prefix}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8)[16:].reshape(-1, 28, 28)
    with gzip.open(maker.SOURCE / f"{prefix}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8)[8:]
    stream = wds.WebDataset(str(DATA / SHARDS[split]), shardshuffle=False).decode("l8")
    seen = set()
    for sample in stream:  # WebDataset reads the gzipped shards as they are
        place = int(sample["__key__"].removeprefix(f"{split}-"))
        seen.add(place)
        assert np.array_equal(sample["png"], images[place])
        assert sample["cls"] == labels[place]
    index = SampleIndex.from_shards(str(DATA / SHARDS[split]))
    assert len(seen) == len(index)
    place = int(index.keys[17].removeprefix(f"{split}-"))
    assert np.array_equal(np.asarray(index.image(17)), images[place][..., None].repeat(3, -1))


@needs_source
def test_making_again_gives_the_same_samples(tmp_path: Path) -> None:
    names = [path.name for path in maker.make(out=tmp_path)]
    assert names == [f"train-00000{n}.tar.gz" for n in range(4)] + ["test-000000.tar.gz"]
    for name in names:
        again, committed = (SampleIndex.from_shards(folder / name) for folder in (tmp_path, DATA))
        assert again.keys == committed.keys
        assert again.labels.tolist() == committed.labels.tolist()
