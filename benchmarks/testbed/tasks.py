"""The nine tasks and the mixed pool: what every image shows and what is known of it."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from . import scenes, sources, surfaces
from .shards import Sample
from .surfaces import SIZE, Random

LETTERS = "ABCDEFGHJKLPQRSTUY"
"""Upright or turned, no two of them are alike."""
FAR_LETTERS = "БГДЖЗЛПФЦЧЯΔΘΛΞΣΨΩ"
"""Cyrillic and Greek ones that do not look like those."""
SPECIMEN = {
    "pool": "abdegh2",
    "train": "kmnpqrtw3456",
    "validation": "fijs7",
    "test": "cuvxyz89",
}
"""Characters of the typeface task by split; its classes are the pool's typefaces in all of them."""


@dataclass(frozen=True)
class Task:
    """A downstream task.

    Attributes:
        kind: linear | fewshot | regression | dense | retrieval; the protocol that judges it.
        domain: whose domain it is: a teacher's name, or what no teacher was made for.
        draw: one sample of a split, by its number, from a generator of its own, at a size.
        counts: images of the train, validation and test part, no more than there are garments and
            cells where those are what is told apart: no test image counts twice.
    """

    kind: str
    domain: str
    draw: Callable[[str, int, Random, int], Sample]
    counts: tuple[int, int, int] = (1000, 1000, 2000)


def samples(
    name: str, split: str, count: int, seed: int, size: int = SIZE, first: int = 0
) -> Iterator[Sample]:
    """The samples of a task's part, or of the ``pool``; each depends on its own number alone.

    Args:
        name: a key of `TASKS`, or ``pool`` or ``heldout`` for unlabelled images.
        split: one of `sources.SPLITS`.
        size: side of the images in pixels.
        first: number of the first of the `count` samples.
    """
    draw = TASKS[name].draw if name in TASKS else _mixed
    for number in range(first, first + count):
        entropy = [seed, zlib.crc32(name.encode()), sources.SPLITS.index(split), number]
        yield draw(split, number, np.random.default_rng(entropy), size)


def _garments(split: str, number: int, random: Random, size: int) -> Sample:
    names, pixels, labels = sources.garments(split)
    place = _spread(number, len(names))
    square = Image.new("L", (32, 32))
    square.paste(Image.fromarray(pixels[place]), (2, 2))
    enlarged = square.resize((size, size), Image.Resampling.BICUBIC)
    return Sample(names[place], np.asarray(enlarged), label=int(labels[place]))


def _letters(split: str, number: int, random: Random, size: int) -> Sample:
    return written(LETTERS, sources.FACES[split], split, number, random, size)


def _symbols(split: str, number: int, random: Random, size: int) -> Sample:
    faces = [face for face in sources.FACES[split] if not face.startswith("cm")]
    return written(FAR_LETTERS, faces, split, number, random, size)


def written(
    alphabet: str,
    faces: list[str] | tuple[str, ...],
    split: str,
    number: int,
    random: Random,
    size: int = SIZE,
    clear: bool = False,
) -> Sample:
    """A character at any angle; which one is asked. A clear one stands before a plain ground."""
    label = number % len(alphabet)
    figure = scenes.letter(str(random.choice(faces)), alphabet[label], label)
    behind, ground = scenes.ground(split, random, size=size)
    if clear:
        behind, ground = "made", surfaces.plain(random, size)
    made = behind == "made" and not clear and random.uniform() < 0.15
    fill = surfaces.any_surface(random, size) if made else None
    scene = scenes.compose(figure, scenes.Pose.draw(random), ground, random, fill)
    return Sample(f"{figure.source} {behind}", scene.pixels, label=label)


def _materials(split: str, number: int, random: Random, size: int) -> Sample:
    """A figure made of a surface; which surface is asked."""
    families = list(surfaces.FAMILIES)
    label = number % len(families)
    fill = surfaces.surface(families[label], random, size)
    figure = _any_figure(split, random)
    scene = scenes.compose(figure, _large(random), surfaces.plain(random, size), random, fill)
    return Sample(figure.source, scene.pixels, label=label)


def _pose(split: str, number: int, random: Random, size: int) -> Sample:
    figure = scenes.garment(split, _spread(number, len(sources.garments(split)[0])))
    behind, ground = scenes.ground(split, random, size=size)
    scene = scenes.compose(figure, scenes.Pose.draw(random), ground, random)
    return Sample(f"{figure.source} {behind}", scene.pixels, targets=scene.pose.named)


def _masks(split: str, number: int, random: Random, size: int) -> Sample:
    """A garment or letter before a photograph; which pixels are the figure is asked."""
    figure = _any_figure(split, random)
    behind, ground = surfaces.photograph(split, random, size)
    scene = scenes.compose(figure, scenes.Pose.draw(random), ground, random)
    return Sample(f"{figure.source} {behind}", scene.pixels, mask=scene.mask)


def _typefaces(split: str, number: int, random: Random, size: int) -> Sample:
    """An upright letter in one of eight typefaces; which typeface is asked."""
    label = number % len(sources.FACES["pool"])
    character = str(random.choice(list(SPECIMEN[split])))
    figure = scenes.letter(sources.FACES["pool"][label], character, label)
    pose = scenes.Pose(0.0, *(float(v) for v in random.uniform(-0.1, 0.1, 2)), 0.85)
    scene = scenes.compose(figure, pose, surfaces.plain(random, size), random)
    return Sample(f"character/{character}", scene.pixels, label=label)


def _cells(split: str, number: int, random: Random, size: int) -> Sample:
    names, pixels, labels = sources.cells(split)
    place = _spread(number, len(names))
    square = Image.fromarray(pixels[place]).resize((size, size), Image.Resampling.BICUBIC)
    return Sample(names[place], np.asarray(square), label=int(labels[place]))


_SIGHTS = 5


def _instances(split: str, number: int, random: Random, size: int) -> Sample:
    """Five sights of every garment, turned, moved and before another ground; which one is asked."""
    place = _spread(number // _SIGHTS, len(sources.garments(split)[0]))
    figure = scenes.garment(split, place)
    behind, ground = scenes.ground(split, random, size=size)
    pose = scenes.Pose.draw(random, turn=math.pi / 4)
    scene = scenes.compose(figure, pose, ground, random)
    return Sample(f"{figure.source} {behind}", scene.pixels, label=number // _SIGHTS)


TASKS: dict[str, Task] = {
    "garments": Task("linear", "none (photographs of things, grey)", _garments, (950, 500, 1000)),
    "letters": Task("linear", "letters", _letters),
    "symbols": Task("fewshot", "none (other alphabets)", _symbols),
    "materials": Task("linear", "materials", _materials),
    "pose": Task("regression", "pose", _pose),
    "masks": Task("dense", "u2netp", _masks),
    "typefaces": Task("linear", "none", _typefaces),
    "cells": Task("linear", "none (real photographs of solar cells)", _cells, (650, 295, 600)),
    "instances": Task("retrieval", "none", _instances, (100, 1000, 2000)),
}


def _mixed(split: str, number: int, random: Random, size: int) -> Sample:
    """An unlabelled image: something of everything that tasks show, and photographs."""
    kind = random.choice(len(_POOL), p=np.array(list(_POOL.values())) / sum(_POOL.values()))
    name = list(_POOL)[kind]
    if name == "photographs":
        source, pixels = surfaces.photograph(split, random, size)
        return Sample(source, pixels)
    if name == "digits":
        figure = scenes.digit(split, int(random.integers(1 << 30)))
        behind, ground = scenes.ground(split, random, size=size)
        scene = scenes.compose(figure, scenes.Pose.draw(random), ground, random)
        return Sample(f"{figure.source} {behind}", scene.pixels)
    drawn = TASKS[name].draw(split, int(random.integers(1 << 20)), random, size)
    return Sample(drawn.source, drawn.pixels)


_POOL = {"photographs": 6, "garments": 4, "letters": 5, "symbols": 3, "materials": 4, "pose": 4,
         "masks": 4, "typefaces": 3, "cells": 4, "digits": 3}  # fmt: skip
"""Shares of the pool; the pool sees sources of its own."""


def _any_figure(split: str, random: Random) -> scenes.Figure:
    place = int(random.integers(1 << 30))
    if random.uniform() < 0.5:
        return scenes.garment(split, place)
    label = place % len(LETTERS)
    return scenes.letter(str(random.choice(sources.FACES[split])), LETTERS[label], label)


def _large(random: Random) -> scenes.Pose:
    """Nearly as large as the image, so that the surface shows."""
    turn, x, y = random.uniform(-math.pi, math.pi), *random.uniform(-0.1, 0.1, 2)
    return scenes.Pose(float(turn), float(x), float(y), float(random.uniform(0.95, 1.25)))


def _spread(number: int, count: int) -> int:
    """Walks through `count` things without following their order; a permutation of them."""
    step = next(s for s in range(int(0.618 * count) | 1, count + 2) if math.gcd(s, count) == 1)
    return number * step % count
