"""What workers hand to the process that runs the teachers."""

from __future__ import annotations

import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from preceptor.cache import RowBatch, SampleIndex, ViewPolicy
from preceptor.cli import main
from preceptor.errors import ConfigError
from preceptor.extract import images
from preceptor.extract.images import ViewBatch, ViewDataset, view_batches
from preceptor.tests.extract.tiny_store import CALL
from torch.utils.data._utils.pin_memory import pin_memory


def test_a_loader_pins_the_pixels_of_views(monkeypatch):
    """`DataLoader` passes by what has no method of its own for it, without a word."""
    pinned = []

    def pin(self, device=None):
        pinned.append(self.data_ptr())
        return self.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    shapes = {((4, 4), "bicubic"): 3, ((2, 6), "bilinear"): 5}
    pixels = {
        (size, how): torch.full((2, 3, *size), value, dtype=torch.uint8)
        for (size, how), value in shapes.items()
    }
    rows = RowBatch(["a"], *(np.zeros((1, width)) for width in (1, 2, 4, 1, 1)))
    batch = ViewBatch(rows, pixels, ["a"], "b")
    found = pin_memory(batch)
    assert sorted(pinned) == sorted(tensor.data_ptr() for tensor in pixels.values())
    assert found.pixels.keys() == pixels.keys()
    for geometry, tensor in found.pixels.items():
        assert torch.equal(tensor, pixels[geometry])
        assert tensor.data_ptr() not in pinned
    assert found.rows is rows
    assert (found.problems, found.unread) == (["a"], "b")


def test_more_workers_than_shared_memory_has_room_for_are_refused(monkeypatch):
    """A worker that finds none hands over nothing, and its batch is waited for without end."""
    monkeypatch.setattr(images, "SHARED_MEMORY", "/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=64 * 2**20))
    geometries = [((512, 512), "bicubic"), ((224, 224), "bicubic"), ((224, 224), "bicubic")]
    dataset = ViewDataset(None, None, geometries, [range(64), range(64, 96)], 1)
    with pytest.raises(
        ConfigError, match=r"workers=4: .* 458 MiB .* has 64 MiB free: say workers=0"
    ):
        view_batches(dataset, 4, pin=False)
    view_batches(dataset, 0, pin=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=230 * 2**20))
    with pytest.raises(ConfigError, match="say workers=2 or"):
        view_batches(dataset, 4, pin=False)


def test_an_image_is_decoded_once_for_all_its_views(shards, monkeypatch):
    index = SampleIndex.from_shards(shards)
    policy = ViewPolicy(name="random", count=3, flip=True)
    geometries = [((24, 24), "bicubic"), ((16, 32), "bilinear")]
    alone = ViewDataset(index, policy, geometries, [[row] for row in range(2, 14)], 10**6)
    together = ViewDataset(index, policy, geometries, [range(2, 14)], 10**6)
    expected = [alone[place] for place in range(12)]
    decoded = []
    image = SampleIndex.image
    monkeypatch.setattr(
        SampleIndex, "image", lambda self, i, *a: decoded.append(i) or image(self, i, *a)
    )
    found = together[0]
    assert decoded == [0, 1, 2, 3, 4]
    assert found.rows.keys == [key for one in expected for key in one.rows.keys]
    for column in ("labels", "sizes", "boxes", "flips", "valid"):
        apart = np.concatenate([getattr(one.rows, column) for one in expected])
        assert np.array_equal(getattr(found.rows, column), apart)
    for geometry in geometries:
        apart = torch.cat([one.pixels[geometry] for one in expected])
        assert torch.equal(found.pixels[geometry], apart)


def test_an_image_that_is_rgb_is_never_copied_whole(shards, monkeypatch):
    index = SampleIndex.from_shards(shards)
    views = ViewDataset(index, ViewPolicy(), [((24, 24), "bicubic")], [range(4)], 10**6)
    expected = views[0].pixels
    copies = []
    copy = Image.Image.copy
    monkeypatch.setattr(Image.Image, "copy", lambda self: copies.append(self.mode) or copy(self))
    found = views[0].pixels
    assert "RGB" not in copies
    assert all(torch.equal(found[shape], pixels) for shape, pixels in expected.items())


LOSES_A_WORKER = """
import os, signal, sys
from torch.utils.data import get_worker_info
from preceptor.cli import main
from preceptor.extract.images import ViewDataset
end, *given = sys.argv[1:]
plain = ViewDataset.__getitem__
def get(self, item):
    if get_worker_info() is not None and item == 2:
        if end == "memory":
            raise MemoryError
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, item)
ViewDataset.__getitem__ = get
sys.exit(main(given))
"""


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ("killed", "a process that decodes images was ended from outside"),
        ("memory", "there is no memory left"),
    ],
)
def test_a_worker_that_is_lost_is_told_with_the_way_out(end, words, shards, tmp_path):
    (tmp_path / "teachers").mkdir()
    (tmp_path / "teachers" / "one.yaml").write_text(f"vit: {{source: '{CALL}:vit'}}\n")
    options = [f"cache={tmp_path / 'store'}", f"data.shards='{shards}'", "engine=cpu"]
    options += ["batch_size=2", "shard_rows=4", "group_rows=2", "calibration.images=2"]
    given = ["extract", "--config-dir", str(tmp_path), "teachers=one", *options]
    # In a process of its own: torch goes on telling of that worker in the one that had it.
    script = [sys.executable, "-c", LOSES_A_WORKER, end]
    done = subprocess.run([*script, *given, "workers=1"], capture_output=True, text=True)
    assert done.returncode == 1
    told = done.stderr
    assert words in told
    assert "say workers=N for fewer of them, or a smaller batch_size" in told
    assert "Traceback (most" not in told.replace("Original Traceback", "")
    assert main([*given, "workers=0"]) == 0
