"""One picture: images beside the PCA-coloured token grids of every teacher and student."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from preceptor.cache import Cache, SampleIndex, View
from preceptor.cache.pictures import Panel, draw_panels, principal_colours
from preceptor.train.students import load_student

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
    for name, space in cache.spaces.items():
        if space.grid is not None:
            tokens = space.read(rows).standardised().numpy()
            colours = principal_colours(tokens, space.grid)
            panels.append(
                Panel(f"teacher\n{name} {space.grid[0]}x{space.grid[1]}", colours[:count])
            )
    for folder in arguments.students:
        student, mean, std = load_student(folder)
        inputs = torch.from_numpy(pixels(student.size)).permute(0, 3, 1, 2) / 255
        with torch.inference_mode():
            inputs = (inputs - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
            output = student.eval()(inputs)
        colours = principal_colours(output.tokens.numpy(), output.grid)
        title = f"student\n{folder.name} {output.grid[0]}x{output.grid[1]}"
        panels.append(Panel(title, colours[:count]))
    notes = {place: CLASSES[labels[row]] for place, row in enumerate(shown)}
    draw_panels(arguments.out, panels, notes)
    print(f"{arguments.out}: {count} images, {len(panels) - 1} token grids")


if __name__ == "__main__":
    main()
