"""What the bed is made of: photographs, garments, digits, solar cells and letters in packages.

    pip install 'preceptor[testbed]'

Every single photograph, garment, digit, cell and typeface belongs to one split for good: what the
pool and the specialists see of it is never in a task, and what probes learn from is never in a
validation or test image. Packages are read, never imported.
"""

from __future__ import annotations

import csv
import hashlib
import io
import tarfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits, load_sample_images

from ...errors import DataError

SPLITS = ("pool", "train", "validation", "test")
"""Who may look: the pool and the specialists, then a task's three parts."""
_SHARES = {"pool": 0.4, "train": 0.25, "validation": 0.125, "test": 0.225}
_DATA = Path(__file__).resolve().parents[2] / "examples" / "data" / "fashion-mnist"
_FIGURE = 64

PHOTOGRAPHS = (
    *(("skimage", f"data/{name}") for name in (
        "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "coffee.png",
        "coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png",
        "motorcycle_left.png", "page.png", "retina.jpg", "rocket.jpg",
    )),
    ("foolbox", "data/imagenet_*.jpg"),
)  # fmt: skip

FACES = {
    "pool": ("DejaVuSans", "DejaVuSerif-Bold", "DejaVuSansMono-Oblique", "STIXGeneral", "cmtt10",
             "DejaVuSansMono-Bold", "cmr10", "DejaVuSerif-Italic"),
    "train": ("DejaVuSans-Bold", "DejaVuSerif", "STIXGeneralItalic", "cmss10",
              "DejaVuSansMono-BoldOblique", "cmb10"),
    "validation": ("DejaVuSans-Oblique", "STIXGeneralBol", "DejaVuSerif-BoldItalic"),
    "test": ("DejaVuSansMono", "STIXGeneralBolIta", "DejaVuSans-BoldOblique", "cmti10"),
}  # fmt: skip
"""Typefaces of Matplotlib by split; all hold Latin letters, those that are not cm* Greek too."""


def split_of(source: str) -> str:
    """The split that a source belongs to, by a hash of its name."""
    number = int.from_bytes(hashlib.sha256(source.encode()).digest()[:8], "big") / 2**64
    for split, share in _SHARES.items():
        if number < share:
            return split
        number -= share
    return SPLITS[-1]


@cache
def photographs(split: str) -> dict[str, NDArray[np.uint8]]:
    """uint8 [H, W, 3] by name. Dealt out in the order of a hash of the name, by the shares.

    Raises:
        DataError: a package is missing.
    """
    paths = {f"{package}/{path.name}": path for package, path in _photograph_paths()}
    for name, pixels in zip(("china", "flower"), load_sample_images()["images"], strict=True):
        paths[f"sklearn/{name}"] = pixels
    ordered = sorted(paths, key=lambda name: hashlib.sha256(name.encode()).digest())
    ends = np.round(np.cumsum([0.0, *_SHARES.values()]) * len(ordered)).astype(int)
    place = SPLITS.index(split)
    return {name: _rgb(paths[name]) for name in ordered[ends[place] : ends[place + 1]]}


@cache
def garments(split: str) -> tuple[list[str], NDArray[np.uint8], NDArray[np.int64]]:
    """Fashion-MNIST: names, uint8 [n, 28, 28], classes. Test garments are of the original test set.

    Raises:
        DataError: the embedded shards are missing.
    """
    names, pixels, labels = [], [], []
    for path in sorted(_DATA.glob("test-*.gz" if split == "test" else "train-*.gz")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file is None:
                    continue
                if member.name.endswith(".png"):
                    names.append(f"garment/{member.name.removesuffix('.png')}")
                    pixels.append(np.asarray(Image.open(io.BytesIO(file.read()))))
                else:
                    labels.append(int(file.read()))
    if not names:
        raise DataError(f"{_DATA} holds no images: run this from a checkout of the repository")
    kept = [i for i, name in enumerate(names) if split == "test" or split_of(name) == split]
    return [names[i] for i in kept], np.stack(pixels)[kept], np.array(labels)[kept]


@cache
def digits(split: str) -> tuple[list[str], NDArray[np.uint8], NDArray[np.int64]]:
    """scikit-learn's handwritten digits: names, uint8 [n, 8, 8], classes."""
    found = load_digits()
    names = [f"digit/{i:04d}" for i in range(len(found.target))]
    kept = [i for i, name in enumerate(names) if split_of(name) == split]
    pixels = np.clip(found.images * 16, 0, 255).astype(np.uint8)
    return [names[i] for i in kept], pixels[kept], found.target[kept].astype(np.int64)


@cache
def cells(split: str) -> tuple[list[str], NDArray[np.uint8], NDArray[np.int64]]:
    """Electroluminescence photographs of solar cells (elpv-dataset): names, uint8 [n, 64, 64].

    Classes: 0 and 1 monocrystalline without and with a defect (probability of at least a half), 2
    and 3 the same for polycrystalline.

    Raises:
        DataError: the package is missing.
    """
    folder = package("elpv_dataset") / "data"
    with (folder / "labels.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.reader(file, delimiter=" ", skipinitialspace=True) if row]
    names, pixels, labels = [], [], []
    for path, probability, kind in ([*row[:2], row[-1]] for row in rows):
        name = f"cell/{Path(path).stem}"
        if split_of(name) == split:
            names.append(name)
            image = Image.open(folder / path).convert("L").resize((64, 64), Image.Resampling.BOX)
            pixels.append(np.asarray(image))
            labels.append(2 * (kind == "poly") + (float(probability) >= 0.5))
    return names, np.stack(pixels), np.array(labels, dtype=np.int64)


def read_all() -> None:
    """Read everything that is kept in memory, once before a process is copied into many.

    Raises:
        DataError: a package is missing.
    """
    with ThreadPoolExecutor(len(SPLITS)) as threads:
        for kind in (cells, garments, photographs, digits):
            list(threads.map(kind, SPLITS))


@lru_cache(maxsize=4096)
def glyph(face: str, character: str) -> NDArray[np.uint8]:
    """A character's coverage, uint8 [64, 64], its box centred and 44 pixels at its longer side."""
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts/ttf", f"{face}.ttf")), 96)
    canvas = Image.new("L", (240, 240))
    ImageDraw.Draw(canvas).text((72, 60), character, 255, font)
    box = canvas.getbbox()
    if box is None:
        raise DataError(f"typeface {face} draws nothing for {character!r}")
    drawn = canvas.crop(box)
    scale = 44 / max(drawn.size)
    width, height = (max(1, round(edge * scale)) for edge in drawn.size)
    square = Image.new("L", (_FIGURE, _FIGURE))
    place = ((_FIGURE - width) // 2, (_FIGURE - height) // 2)
    square.paste(drawn.resize((width, height), Image.Resampling.LANCZOS), place)
    return np.asarray(square)


def package(name: str) -> Path:
    """The folder of an installed package, without importing it.

    Raises:
        DataError: it is not installed.
    """
    spec = find_spec(name)
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not folders:
        raise DataError(f"package {name} is not installed; pip install 'preceptor[testbed]'")
    return Path(folders[0])


def _photograph_paths() -> list[tuple[str, Path]]:
    found = []
    for name, files in PHOTOGRAPHS:
        paths = sorted(package(name).glob(files))
        if not paths:
            raise DataError(f"package {name} has no {files}; pip install 'preceptor[testbed]'")
        found += [(name, path) for path in paths]
    return found


def _rgb(source: Path | NDArray[np.uint8]) -> NDArray[np.uint8]:
    image = Image.open(source) if isinstance(source, Path) else Image.fromarray(source)
    image = image.convert("RGB")
    image.thumbnail((320, 320), Image.Resampling.BOX)  # of this size, crops show something
    return np.asarray(image)
