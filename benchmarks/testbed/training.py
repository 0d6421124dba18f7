"""Trains the specialists, each on labelled images of its own domain that no task shows."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from ...cache.durable import write_whole
from ...progress import ProgressLine
from ..harness import side_by_side
from . import scenes, sources, surfaces
from .specialists import NETWORKS
from .surfaces import SIZE, Random
from .tasks import LETTERS, TASKS, written

PIECE = 16
"""Side of the squares in pixels that are shuffled for the specialist of materials."""
DRAWN = 500
"""Images that a process draws at a time."""


@dataclass(frozen=True)
class Course:
    """How long a specialist is taught: images drawn, passes over them, and the learning rate."""

    images: int = 6000
    epochs: int = 12
    lr: float = 3e-3
    batch: int = 64


def train_specialist(
    name: str,
    path: Path,
    seed: int,
    course: Course,
    *,
    size: int = SIZE,
    device: str = "cpu",
    workers: int = 1,
) -> dict[str, float]:
    """Train a specialist and write its weights.

    Args:
        name: a key of `specialists.NETWORKS`.
        path: of the checkpoint (safetensors), whole or absent.
        seed: of the images, the weights and their order.
        size: that its images are drawn at; it sees them reduced to 48 pixels, as the bed's.
        device: of the training; weights are the same from run to run on a CPU.
        workers: processes that draw.

    Returns:
        ``score`` on fresh images of the same domain: accuracy, or R2 for ``pose``.
    """
    count = max(200, course.images // 10)
    taught = draw(name, course.images, seed, size, workers)
    fresh = draw(name, count, seed + 1, size, workers)
    pixels, truth, held_pixels, held_truth = (part.to(device) for part in (*taught, *fresh))
    torch.manual_seed(seed)
    network = NETWORKS[name]().to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=course.lr, weight_decay=0.05)
    steps = course.epochs * (len(pixels) // course.batch)
    random = np.random.default_rng(seed)
    done = 0
    network.train()
    with ProgressLine(f"specialist {name}", steps * course.batch, "images") as line:
        for _ in range(course.epochs):
            order = torch.from_numpy(random.permutation(len(pixels)))
            for rows in order[: len(order) // course.batch * course.batch].split(course.batch):
                for group in optimizer.param_groups:
                    group["lr"] = course.lr * _schedule(done / steps)
                seen = pixels[rows]
                if name == "materials":
                    seen = _shuffled(seen)
                loss = _loss(network(_normalised(seen)), truth[rows])
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), 3.0)
                optimizer.step()
                done += 1
                line.advance(course.batch, f"loss {float(loss.detach()):.3f}")
    network.eval()
    with torch.no_grad():
        found = torch.cat([network(_normalised(part)) for part in held_pixels.split(256)])
    write_whole(path, save({k: v.cpu().contiguous() for k, v in network.state_dict().items()}))
    return {"score": _score(found, held_truth)}


def draw(
    name: str, count: int, seed: int, size: int = SIZE, workers: int = 1
) -> tuple[Tensor, Tensor]:
    """Images uint8 [n, 3, 48, 48] of a specialist's domain and their classes or targets."""
    parts = [
        (name, first, min(first + DRAWN, count), seed, size) for first in range(0, count, DRAWN)
    ]
    drawn = side_by_side(_draw, parts, workers)
    images, truths = ([one for part in drawn for one in part[side]] for side in (0, 1))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.tensor(truths)


def _draw(
    name: str, first: int, last: int, seed: int, size: int
) -> tuple[list[NDArray[np.uint8]], list[int | tuple[float, ...]]]:
    images: list[NDArray[np.uint8]] = []
    truths: list[int | tuple[float, ...]] = []
    for number in range(first, last):
        entropy = [seed, zlib.crc32(f"specialist {name}".encode()), number]
        random = np.random.default_rng(entropy)
        clear = number % 2 == 0  # without an easy half, nothing is learnt for long
        if name == "pose":
            scene = _any_pose(random, clear, size)
            images.append(reduced(scene.pixels))
            truths.append(scene.pose.targets)
        elif name == "letters":
            faces = sources.FACES["pool"]
            place = int(random.integers(1 << 20))
            sample = written(LETTERS, faces, "pool", place, random, size, clear)
            images.append(reduced(sample.pixels))
            truths.append(sample.label or 0)
        else:
            sample = TASKS[name].draw("pool", number, random, size)
            images.append(reduced(sample.pixels))
            truths.append(sample.label or 0)
    return images, truths


def reduced(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """An image as a specialist sees it: uint8 [48, 48, 3], by the filter of its preprocessing."""
    if len(pixels) == SIZE:
        return pixels
    image = Image.fromarray(pixels)
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def _any_pose(random: Random, clear: bool, size: int) -> scenes.Scene:
    place = int(random.integers(1 << 30))
    if random.uniform() < 0.5:
        figure = scenes.digit("pool", place)
    else:
        face = str(random.choice(sources.FACES["pool"]))
        figure = scenes.letter(face, LETTERS[place % len(LETTERS)], 0)
    ground = surfaces.plain(random, size) if clear else scenes.ground("pool", random, size=size)[1]
    return scenes.compose(figure, scenes.Pose.draw(random), ground, random)


def _shuffled(pixels: Tensor) -> Tensor:
    """The pieces of every image in a random order, the same for the batch."""
    side = pixels.shape[-1] // PIECE
    pieces = functional.unfold(pixels.float(), PIECE, stride=PIECE)
    mixed = pieces[..., torch.randperm(side * side)]
    return functional.fold(mixed, pixels.shape[-2:], PIECE, stride=PIECE)


def _normalised(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1.0


def _loss(found: Tensor, truth: Tensor) -> Tensor:
    if truth.dtype == torch.int64:
        return functional.cross_entropy(found, truth, label_smoothing=0.05)
    return functional.smooth_l1_loss(found, truth, beta=0.2)


def _score(found: Tensor, truth: Tensor) -> float:
    if truth.dtype == torch.int64:
        return float((found.argmax(1) == truth).double().mean())
    residual = (found - truth).square().sum(0)
    return float((1 - residual / (truth - truth.mean(0)).square().sum(0)).mean())


def _schedule(part: float) -> float:
    return min(1.0, part / 0.1) * 0.5 * (1 + math.cos(math.pi * part))
