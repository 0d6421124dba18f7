"""One picture: images beside the PCA-coloured token grids of every teacher and student.

A student's column shows what it predicts a teacher's tokens to be, in that teacher's colours: the
closer to the teacher's own column, the more it has learnt.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from preceptor.cache import Cache, SampleIndex, View
from preceptor.cache.pictures import Palette, Panel, draw_panels
from preceptor.train.alignment.base import module_key
from preceptor.train.batch import normalise
from preceptor.train.checkpoint import load_model

CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
POOL = 200
"""Rows that fix the colours: with the few rows shown alone, noise would pick them."""


def main() -> None:
    """Draw the first test image of each of six classes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--shards", required=True)
    parser.add_argument("--students", type=Path, nargs="*", default=[])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    cache = Cache.open(arguments.store)
    index = SampleIndex.from_shards(arguments.shards)
    labels = np.asarray(cache.labels)
    shown = [int(np.flatnonzero(labels == label)[0]) for label in (0, 1, 3, 5, 8, 9)]
    rows = np.array(shown + [row for row in range(POOL) if row not in shown])
    views = [View(tuple(cache.boxes[row].tolist()), bool(cache.flips[row])) for row in rows]
    images = [index.image(int(row)) for row in rows]

    def pixels(size: tuple[int, int]) -> np.ndarray:
        pairs = zip(views, images, strict=True)
        return np.stack([view.pixels(image, size, "bicubic") for view, image in pairs])

    count = len(shown)
    panels = [Panel("image", pixels((112, 112))[:count] / 255)]
    palettes: dict[tuple[str, tuple[int, int]], Palette] = {}
    for name, space in cache.spaces.items():
        if space.grid is not None:
            tokens = space.read(rows).standardised().numpy()
            palette = palettes[name, space.grid] = Palette(tokens, space.grid)
            colours = palette(tokens[:count], space.grid)
            panels.append(Panel(f"teacher\n{name.replace('/', chr(10))}", colours))
    for folder in arguments.students:
        student, alignment, _ = load_model(folder)
        inputs = normalise(torch.from_numpy(pixels(student.size)), torch.device("cpu"))
        with torch.inference_mode():
            output = alignment.run_student(student, inputs)
            predicted = alignment.predict(output, dense=True).dense
            # The student's idea of a space, in the colours of the teacher's own tokens.
            for (name, grid), palette in palettes.items():
                said = alignment.grids[module_key(name)](predicted[name])
                tokens = alignment.standardised(name, said).numpy()
                title = f"{folder.name} on\n{name.replace('/', chr(10))}"
                panels.append(Panel(title, palette(tokens[:count], grid)))
    notes = {place: CLASSES[labels[row]] for place, row in enumerate(shown)}
    draw_panels(arguments.out, panels, notes)
    print(f"{arguments.out}: {count} images, {len(panels) - 1} token grids")


if __name__ == "__main__":
    main()
