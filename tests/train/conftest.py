"""Real images in a tar, a real timm teacher with random weights, and the store of its tokens."""

from __future__ import annotations

import contextlib
import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from omegaconf import DictConfig
from PIL import Image
from preceptor.cache import (
    CalibrationSums,
    PixelSpec,
    RowBatch,
    SpaceSpec,
    StorePlan,
    StoreWriter,
    TeacherRecord,
    calibration,
)
from preceptor.cache.samples import SampleIndex
from preceptor.cache.views import ViewPolicy
from preceptor.train import loop

SIDE = 32
SMALL_CNN = ("student=resnet_micro", "student.options.channels=[8,8,16,16]")
SPACES = (SpaceSpec("vit", "patch", 16, 24, (4, 4)), SpaceSpec("vit", "cls", 1, 24, None))


@dataclass(frozen=True)
class Bed:
    """A tar of images and the store made from it."""

    shards: str
    cache: str
    index: SampleIndex
    policy: ViewPolicy


def _write_shard(path: Path, count: int, seed: int, *, label: bool = True) -> None:
    """Photographs of nothing: smooth colour fields whose slope tells the class."""
    random = np.random.default_rng(seed)
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            kind = number % 3
            width, height = int(random.integers(36, 60)), int(random.integers(36, 60))
            x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
            field = (x, y, (x + y) / 2)[kind]
            colour = random.uniform(0.5, 1, size=3)
            noise = random.normal(0, 0.05, size=(height, width, 3))
            pixels = np.clip(field[..., None] * colour + noise, 0, 1)
            buffer = io.BytesIO()
            Image.fromarray((255 * pixels).astype(np.uint8)).save(buffer, "png")
            members = {"png": buffer.getvalue()} | ({"cls": str(kind).encode()} if label else {})
            for extension, data in members.items():
                member = tarfile.TarInfo(f"{path.stem}-{number:03d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def write_store(
    path: Path,
    index: SampleIndex,
    policy: ViewPolicy,
    invalid: int = -1,
    stored: PixelSpec | None = None,
) -> None:
    torch.manual_seed(7)
    teacher = timm.create_model(
        "vit_tiny_patch16_224", img_size=SIDE, patch_size=8, embed_dim=24, depth=1, num_heads=2
    ).eval()
    rows = [(sample, view) for sample in range(len(index)) for view in range(policy.count)]
    images = [index.image(sample) for sample, _ in rows]
    views = [
        policy.draw(index.keys[sample], view, *image.size)
        for (sample, view), image in zip(rows, images, strict=True)
    ]
    pixels = np.stack([v.pixels(i, (SIDE, SIDE)) for v, i in zip(views, images, strict=True)])
    with torch.no_grad():
        out = teacher.forward_features(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1)
    tokens = {"vit/patch": out[:, 1:], "vit/cls": out[:, :1]}
    plan = StorePlan(
        samples=index.describe(),
        views=policy.describe(),
        rows=len(rows),
        shard_rows=32,
        group_rows=4,
        teachers=(TeacherRecord("vit", SPACES, {"source": "random"}),),
        pixels=stored,
    )
    writer = StoreWriter.open_or_create(path, plan)
    for space in writer.uncalibrated:
        sums = CalibrationSums(torch.zeros(space.dim))
        sums.add(tokens[space.id])
        mean, std = calibration(sums)
        writer.calibrate(space.id, mean, std, rows_used=len(rows))
    valid = np.arange(len(rows)) != invalid
    for shard, units in writer.pending():
        at = slice(32 * shard, 32 * shard + plan.rows_in(shard))
        facts = RowBatch(
            keys=[index.keys[sample] for sample, _ in rows[at]],
            labels=np.array([index.labels[sample] for sample, _ in rows[at]]),
            sizes=np.array([image.size[::-1] for image in images[at]], np.int32),
            boxes=np.array([view.box for view in views[at]], np.float32),
            flips=np.array([view.flip for view in views[at]]),
            valid=valid[at],
        )
        kept = torch.from_numpy(valid[at])
        shown = None
        if stored is not None:
            shown = np.stack(
                [
                    view.pixels(image, stored.size, stored.interpolation)
                    for view, image, keep in zip(views[at], images[at], valid[at], strict=True)
                    if keep
                ]
            )
        with writer.shard(shard, units) as out_shard:
            given = {name: part[at][kept] for name, part in tokens.items()}
            out_shard.append(facts, given, shown)
    writer.finish()


def make_bed(
    folder: Path,
    stem: str,
    images: int,
    seed: int,
    invalid: int = -1,
    stored: PixelSpec | None = None,
    **views,
) -> Bed:
    shard = folder / f"{stem}.tar"
    _write_shard(shard, images, seed)
    index, policy = SampleIndex.from_shards(str(shard)), ViewPolicy(**views)
    write_store(folder / stem, index, policy, invalid, stored)
    return Bed(str(shard), str(folder / stem), index, policy)


@pytest.fixture(scope="session")
def make_store():
    """Writes the store of a small random ViT: (path, index, policy)."""
    return write_store


@pytest.fixture
def write_shard():
    """Writes a tar of labelled images: (path, count, seed)."""
    return _write_shard


@pytest.fixture(scope="session")
def bed(tmp_path_factory) -> Bed:
    """40 images, two random mirrored views of each; row 5 has no tokens."""
    folder = tmp_path_factory.mktemp("bed")
    return make_bed(folder, "train", 40, 0, invalid=5, name="random", count=2, flip=True)


@pytest.fixture(scope="session")
def pixel_bed(tmp_path_factory) -> Bed:
    """The same images and views, with their pixels of 32 x 32 in the store."""
    folder, stored = tmp_path_factory.mktemp("pixel-bed"), PixelSpec((SIDE, SIDE))
    return make_bed(folder, "train", 40, 0, 5, stored, name="random", count=2, flip=True)


@pytest.fixture(scope="session")
def full_bed(tmp_path_factory) -> Bed:
    """The same images whole, plain and mirrored."""
    folder = tmp_path_factory.mktemp("full-bed")
    return make_bed(folder, "train", 40, 0, name="full", count=2, flip=True)


@pytest.fixture(scope="session")
def test_bed(tmp_path_factory) -> Bed:
    """21 other images, centred."""
    return make_bed(tmp_path_factory.mktemp("test-bed"), "test", 21, 1)


def compose(name: str, *overrides: str) -> DictConfig:
    from hydra import compose, initialize_config_module

    with initialize_config_module("preceptor.configs", version_base="1.3"):
        return compose(name, list(overrides))


@pytest.fixture
def at_step(monkeypatch):
    """Calls something when the learning rate of a step is asked for: before the step begins."""
    original = loop.learning_rate

    def plan(calls):
        def called(step, *rest):
            calls.get(step, lambda: None)()
            return original(step, *rest)

        monkeypatch.setattr(loop, "learning_rate", called)

    return plan


@pytest.fixture
def interrupted(at_step):
    """A context that ends, within training, with Ctrl-C before a step begins."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    @contextlib.contextmanager
    def before(step: int):
        at_step({step: interrupt})
        with pytest.raises(KeyboardInterrupt):
            yield
        at_step({})

    return before


@pytest.fixture
def train_config(bed: Bed, tmp_path: Path):
    """Composes configs/train.yaml for the bed and a very small student."""

    def make(*overrides: str, student: tuple[str, ...] = SMALL_CNN, out: str = "run") -> DictConfig:
        return compose(
            "train",
            f"cache={bed.cache}",
            f"data.shards={bed.shards}",
            f"out={tmp_path / out}",
            "student.size=32",
            *student,
            "recipe=short",
            "recipe.steps=8",
            "recipe.batch_size=16",
            "recipe.log_every=4",
            "recipe.checkpoint_every=0",
            "engine=cpu",
            "workers=0",
            *overrides,
        )

    return make


@pytest.fixture
def eval_config(bed: Bed, test_bed: Bed, tmp_path: Path):
    """Composes configs/eval.yaml for both beds."""

    def make(*overrides: str) -> DictConfig:
        return compose(
            "eval",
            f"train.cache={bed.cache}",
            f"train.shards={bed.shards}",
            f"test.cache={test_bed.cache}",
            f"test.shards={test_bed.shards}",
            f"out={tmp_path / 'eval'}",
            "engine=cpu",
            "workers=0",
            *overrides,
        )

    return make
