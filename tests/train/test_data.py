"""Images and tokens of a real store, joined."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from preceptor import pixels as pixels_module
from preceptor.cache import Cache
from preceptor.cache.samples import SampleIndex
from preceptor.errors import ConfigError, DataError
from preceptor.train.batch import normalise
from preceptor.train.data import TrainData
from preceptor.train.loading import prefetched
from preceptor.train.photometric import ColorJitter
from preceptor.train.views import StoredViews, choose_views, join

BOTH = ["vit/patch", "vit/cls"]


@pytest.fixture
def cache(bed):
    return Cache.open(bed.cache)


def data(bed, cache, **options) -> TrainData:
    views = StoredViews(cache, bed.index, (24, 16))
    return TrainData(cache, views, BOTH, 8, **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_join_the_stored_view_with_its_tokens(bed, cache, workers):
    seen = []
    for batch in data(bed, cache, seed=3, workers=workers).batches(0, 10):
        assert batch.pixels.shape == (8, 24, 16, 3)
        for place, row in enumerate(batch.rows.tolist()):
            seen.append(row)
            sample, view = divmod(row, 2)
            image = bed.index.image(sample)
            drawn = bed.policy.draw(bed.index.keys[sample], view, *image.size)
            assert np.array_equal(batch.pixels[place].numpy(), drawn.pixels(image, (24, 16)))
            for space in BOTH:
                codes = cache[space].read([row]).codes[0]
                assert torch.equal(batch.tokens[space].codes[place], codes)
    for epoch in (seen[:40], seen[40:]):
        assert sorted(row // 2 for row in epoch) == list(range(40))  # a pass over the images
    assert set(seen) == set(range(80)) - {5}  # two epochs use both views; row 5 has no tokens


def test_any_step_is_reached_directly_and_epochs_differ(bed, cache):
    rows = [b.rows.tolist() for b in data(bed, cache, seed=3).batches(0, 20)]
    assert data(bed, cache).steps_per_epoch == 5
    later = [b.rows.tolist() for b in data(bed, cache, seed=3).batches(13, 20)]
    assert later == rows[13:]
    assert rows[:5] != rows[5:10]
    assert rows != [b.rows.tolist() for b in data(bed, cache, seed=4).batches(0, 20)]


def test_an_epoch_of_the_first_view_has_the_pixels_and_tokens_of_no_other(bed, cache):
    one = data(bed, cache, seed=3, first_views=1)
    assert one.describe().startswith("an epoch: 40 images, the first of 2 stored views each in 5 b")
    rows = []
    for batch in one.batches(0, 10):
        rows += batch.rows.tolist()
        image = bed.index.image(rows[-1] // 2)
        drawn = bed.policy.draw(bed.index.keys[rows[-1] // 2], 0, *image.size)
        assert np.array_equal(batch.pixels[-1].numpy(), drawn.pixels(image, (24, 16)))
    assert sorted(rows[:40]) == sorted(rows[40:]) == list(range(0, 80, 2))
    assert rows[:40] != rows[40:]
    both = data(bed, cache, seed=3, first_views=2)
    expected = [b.rows.tolist() for b in data(bed, cache, seed=3).batches(0, 10)]
    assert [b.rows.tolist() for b in both.batches(0, 10)] == expected
    with pytest.raises(ConfigError, match=r"views=3: the store has 2 of every image, so 1 to 2"):
        data(bed, cache, first_views=3)


def test_ranks_share_the_rows_in_equal_steps(bed, cache):
    parts = [data(bed, cache, seed=3, rank=rank, world=2) for rank in range(2)]
    assert [part.steps_per_epoch for part in parts] == [2, 2]
    images = [[r // 2 for b in part.batches(0, 2) for r in b.rows.tolist()] for part in parts]
    assert len(images[0]) == len(images[1]) == 16
    assert len(set(images[0] + images[1])) == 32
    assert [part.left_over for part in parts] == [8, 8]
    assert parts[0].describe() == (
        "an epoch: 40 images, one of 2 stored views each in 2 batches of 8 of 2 ranks; "
        "8 fill no batch, other ones every epoch"
    )


def test_other_order_of_images_gives_the_same_pixels(bed, cache):
    plain = StoredViews(cache, bed.index, (16, 16))
    mixed = StoredViews(cache, bed.index.permuted(9), (16, 16))
    assert torch.equal(plain.__getitems__([3, 70]), mixed.__getitems__([3, 70]))


def test_missing_images_are_counted_and_named(bed, cache, tmp_path, write_shard):
    write_shard(tmp_path / "train.tar", 38, 0)
    fewer = SampleIndex.from_shards(str(tmp_path / "train.tar"))
    with pytest.raises(DataError, match=r"2 of the 40 images .* such as 'train-038', 'train-039'"):
        join(cache, fewer)


def test_images_without_rows_are_counted(bed, cache, tmp_path, write_shard):
    write_shard(tmp_path / "train.tar", 43, 0)
    more = SampleIndex.from_shards(str(tmp_path / "train.tar"))
    samples, left_out = join(cache, more)
    assert left_out == ["train-040", "train-041", "train-042"]
    views, told = choose_views(cache, lambda: more, (16, 16))
    assert views.unused == 3
    assert "3 images there have no row in the store and are left out, such as 'train-040'" in told
    assert samples.tolist() == [row // 2 for row in range(80)]


@pytest.mark.parametrize("workers", [0, 2])
def test_other_images_of_the_same_name_are_refused(bed, cache, tmp_path, write_shard, workers):
    write_shard(tmp_path / "train.tar", 40, 5)
    other = SampleIndex.from_shards(str(tmp_path / "train.tar"))
    views = StoredViews(cache, other, (16, 16))
    with pytest.raises(DataError, match=r"^image 'train-\d+' is \d+ x \d+ pixels and the store"):
        list(TrainData(cache, views, BOTH, 8, workers=workers).batches(0, 2))


def test_other_labels_are_refused_and_named(bed, cache, tmp_path, write_shard):
    write_shard(tmp_path / "train.tar", 40, 0)
    index = SampleIndex.from_shards(str(tmp_path / "train.tar"))
    index.labels[[7, 3]] = [9, -1]  # an image without a label agrees with any
    with pytest.raises(DataError, match=r"1 images .*'train-007' \(1 in the store, 9 there\)"):
        join(cache, index)


def test_a_batch_larger_than_the_store_is_refused(bed, cache):
    views = StoredViews(cache, bed.index, (16, 16))
    with pytest.raises(DataError, match="40 images with tokens"):
        TrainData(cache, views, BOTH, 41)


def test_jitter_depends_on_seed_epoch_and_row_alone(bed, cache):
    jitter = ColorJitter(0.4, 0.4, 0.4)
    views = StoredViews(cache, bed.index, (16, 16), jitter=jitter, seed=1)
    first = views.__getitems__([(3, 0), (3, 1), (4, 0)])
    assert torch.equal(first[2], views.__getitems__([(4, 0)])[0])
    assert not torch.equal(first[0], first[1])
    plain = StoredViews(cache, bed.index, (16, 16), jitter=ColorJitter())
    assert torch.equal(plain[3], StoredViews(cache, bed.index, (16, 16))[3])


def test_normalised_pixels_are_float32_whatever_the_default():
    """As under Fabric's autocast of 64-true; what is kept must not depend on who came first."""
    pixels, mean = torch.zeros(1, 3, 2, 2, dtype=torch.uint8), (0.123, 0.4, 0.5)
    torch.set_default_dtype(torch.float64)
    try:
        found = pixels_module.normalise(pixels, mean, mean, torch.device("cpu"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32


def test_normalise_is_imagenets():
    pixels = torch.randint(0, 256, (2, 4, 5, 3), dtype=torch.uint8)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = ((pixels.numpy() / 255 - mean) / std).transpose(0, 3, 1, 2)
    found = normalise(pixels, torch.device("cpu"))
    assert found.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-5)


def test_prefetching_keeps_order_and_passes_errors_on():
    def source():
        yield from range(5)
        raise DataError("the sixth")

    found = prefetched(source(), 2)
    assert list(islice(found, 5)) == [0, 1, 2, 3, 4]
    with pytest.raises(DataError, match="the sixth"):
        next(found)


def test_a_closed_prefetch_stops_its_source():
    drawn = []

    def endless():
        while True:
            drawn.append(len(drawn))
            yield drawn[-1]

    found = prefetched(endless(), 2)
    assert next(found) == 0
    found.close()
    count = len(drawn)
    assert count <= 5
    assert len(drawn) == count
