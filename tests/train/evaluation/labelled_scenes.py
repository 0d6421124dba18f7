"""Images of a bright square on a dark field: its class, its position and its pixels are labels."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Scenes:
    """A tar of images with every kind of label, and the store made from it."""

    shards: str
    cache: str


def members(number: int, random: np.random.Generator, width: int = 48, height: int = 40):
    kind = number % 3
    x, y = int(random.integers(0, width - 12)), int(random.integers(0, height - 12))
    pixels = random.normal(60, 8, size=(height, width, 3))
    pixels[y : y + 12, x : x + 12, kind] += 150
    mask = np.zeros((height, width), np.uint8)
    mask[y : y + 12, x : x + 12] = 1
    mask[0] = 255
    found = {
        "png": encoded(Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))),
        "cls": str(kind).encode(),
        "json": json.dumps({"x": x / width, "y": y / height, "kind": kind}).encode(),
        "mask.png": encoded(Image.fromarray(mask)),
    }
    if number % 9 == 4:
        found["json"] = json.dumps({"y": 0.5, "x": None}).encode()
    if number % 9 == 5:
        del found["json"], found["mask.png"]
    return found


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def write_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> str:
    with tarfile.open(path, "w") as tar:
        for key, parts in samples.items():
            for kind, data in parts.items():
                header = tarfile.TarInfo(f"{key}.{kind}")
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
    return str(path)
