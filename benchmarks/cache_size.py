"""Bytes, errors and k-NN accuracy of every encoding, on features of two pretrained networks.

Images: the Fashion-MNIST of examples/data, and where they are installed the solar cell photographs
of elpv-dataset and random crops of the ImageNet photographs in foolbox (their packages are read,
never imported). Teachers: examples/teachers.py. Every encoding is measured on a store that was
written for it and calibrated on all of its rows; `unseen` is the size of the half of the rows that
had no part in the calibration, where that decides it. Sizes are those of codes and scales; what a
space has once (mean, deviation, weights, statistics) does not grow with the rows.

    pip install 'preceptor[demo]' elpv-dataset==1.0.0.post1 foolbox==3.3.4
    python benchmarks/cache_size.py --json benchmarks/results/cache_size.json
"""

from __future__ import annotations

import argparse
import csv
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from preceptor.benchmarks.cache_read import facts
from preceptor.benchmarks.harness import machine, save, show
from preceptor.cache import (
    Cache,
    CalibrationSums,
    SampleIndex,
    SpaceSpec,
    StorePlan,
    StoreWriter,
    TeacherRecord,
    calibration,
    prediction_weights,
)
from preceptor.cache.encodings import ENCODINGS
from preceptor.cache.statistics import SAMPLE_ROWS
from preceptor.examples.teachers import efficientnet_lite0, vit_s_focus
from preceptor.pixels import normalise
from preceptor.progress import ProgressLine

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
SHARD, GROUP, NEIGHBOURS = 128, 32, 10


@dataclass(frozen=True)
class Images:
    """Pictures with a label each (-1: none); ``size`` is that of the networks' input."""

    name: str
    views: list[Image.Image]
    labels: np.ndarray
    size: int


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=384, help="images with labels, of each set")
    parser.add_argument("--folder", type=Path, help="keep features here, and use what is there")
    parser.add_argument("--json", type=Path, help="a PNG of the same name goes beside it")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="cache-size-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        result = measure(folder, arguments.rows)
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder)
    save(arguments.json, result)
    if arguments.json is not None:
        draw(result, arguments.json.with_suffix(".png"))


# -- features --------------------------------------------------------------------------------------


def image_sets(rows: int) -> Iterator[Images]:
    index = SampleIndex.from_shards(str(ROOT / "examples/data/fashion-mnist/test-000000.tar.gz"))
    chosen = np.random.default_rng(0).permutation(len(index))[:rows]
    views = [index.image(int(i)).convert("RGB") for i in chosen]
    yield Images("fashion-mnist", views, index.labels[chosen], 112)
    if (cells := package("elpv_dataset")) is not None:
        yield solar_cells(cells, rows)
    if (photos := package("foolbox")) is not None:
        yield Images("imagenet photographs", crops(photos), np.full(160, -1), 224)


def package(name: str) -> Path | None:
    spec = find_spec(name)
    found = list(spec.submodule_search_locations or []) if spec else []
    return Path(found[0]) if found else None


def solar_cells(folder: Path, rows: int) -> Images:
    """Photographs of solar cells, sound (0) and defective (1), in equal parts."""
    text = (folder / "data/labels.csv").read_text(encoding="utf-8")
    lines = [line for line in csv.reader(text.splitlines(), delimiter=" ", skipinitialspace=True)]
    pairs = [[field for field in line if field] for line in lines]
    random, views, labels = np.random.default_rng(0), [], []
    for label, share in ((0, "0.0"), (1, "1.0")):
        names = [line[0] for line in pairs if float(line[1]) == float(share)]
        for place in random.permutation(len(names))[: rows // 2]:
            views.append(Image.open(folder / "data" / names[place]).convert("RGB"))
            labels.append(label)
    return Images("solar cells (elpv)", views, np.array(labels), 112)


def crops(folder: Path) -> list[Image.Image]:
    """Eight random square crops of each of twenty photographs."""
    random, views = np.random.default_rng(0), []
    for file in sorted((folder / "data").glob("imagenet_*.jpg"))[:20]:
        image = Image.open(file).convert("RGB")
        for _ in range(8):
            side = int(min(image.size) * random.uniform(0.5, 1))
            left, top = (int(random.integers(0, edge - side + 1)) for edge in image.size)
            views.append(image.crop((left, top, left + side, top + side)))
    return views


def features(images: Images) -> dict[str, np.ndarray]:
    """float32 [rows, N, D] of every space with a grid and of the descriptors."""
    found: dict[str, np.ndarray] = {}
    for make in (vit_s_focus, efficientnet_lite0):
        teacher = make(size=images.size)
        parts: dict[str, list[torch.Tensor]] = {}
        with ProgressLine(f"{images.name}: {make.__name__}", len(images.views), "images") as line:
            for start in range(0, len(images.views), 16):
                views = images.views[start : start + 16]
                prepared = teacher.preprocessing
                resized = [view.resize(prepared.size, Image.Resampling.BICUBIC) for view in views]
                pixels = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)
                with torch.inference_mode():
                    spaces = teacher(normalise(pixels, prepared.mean, prepared.std, CPU))
                for name, tokens in spaces.items():
                    parts.setdefault(f"{make.__name__}/{name}", []).append(tokens.float())
                line.advance(len(views))
        found |= {name: torch.cat(part).numpy() for name, part in parts.items()}
    return found


def kept_features(folder: Path, images: Images) -> dict[str, np.ndarray]:
    file = folder / f"{images.name.replace(' ', '-')}.npz"
    if not file.exists():
        np.savez(file, **{name.replace("/", "@"): x for name, x in features(images).items()})
    with np.load(file) as kept:
        return {name.replace("@", "/"): kept[name] for name in kept.files}


# -- measuring -------------------------------------------------------------------------------------


def write(path: Path, name: str, x: np.ndarray, encoding: str, sample: np.ndarray) -> Cache:
    """A store of one space, calibrated on a sample of rows [n, N, D]; returns it opened."""
    rows, tokens, dim = x.shape
    side = int(tokens**0.5)
    teacher, short = name.split("/")
    grid = None if tokens == 1 else (side, side)
    spec = SpaceSpec(teacher, short, tokens, dim, grid, encoding)
    plan = StorePlan(
        samples={"count": rows},
        views={},
        rows=rows,
        shard_rows=SHARD,
        group_rows=GROUP,
        teachers=(TeacherRecord(teacher, (spec,), {}),),
    )
    writer = StoreWriter.open_or_create(path, plan)
    sums = CalibrationSums(torch.from_numpy(sample[0].mean(0)))
    sums.add(torch.from_numpy(sample))
    mean, std = calibration(sums)
    weights = None
    if spec.predicted:
        few = torch.from_numpy(sample[:: max(1, len(sample) // SAMPLE_ROWS)][:SAMPLE_ROWS])
        weights = prediction_weights(spec, sums.moments(), mean, std, few)
    writer.calibrate(name, mean, std, rows_used=len(sample), weights=weights)
    for shard, units in writer.pending():
        with writer.shard(shard, units) as out:
            first = shard * SHARD
            part = x[first : first + plan.rows_in(shard)]
            out.append(facts(first, len(part)), {name: part})
    writer.finish()
    return Cache.open(path)


def stored_bytes(cache: Cache, name: str) -> int:
    """Bytes of a space's tokens."""
    spec = cache[name].spec
    sizes = cache.completions[spec.teacher].sizes
    return sum(sum(sizes[array.path]) for array in cache.layout.space_arrays(spec).values())


def unseen(path: Path, name: str, x: np.ndarray, encoding: str) -> float:
    """Bytes against fp16 of half of the rows, calibrated on the others.

    Halves are made of runs of eight rows, which are the crops of one photograph.
    """
    left = np.arange(len(x)) // 8 % 2 == 0
    cache = write(path, name, x[~left], encoding, x[left])
    return stored_bytes(cache, name) / (2 * x[~left].size)


def compare(cache: Cache, name: str, x: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    rows, space = np.arange(len(x)), cache[name]
    stored = stored_bytes(cache, name)
    found = space.decode(space.read(rows)).double()
    live = torch.from_numpy(x).double()
    mean, std = space.mean.double(), space.std.double()
    z_found, z = (found - mean) / std, (live - mean) / std
    result: dict[str, Any] = {
        "shape": list(x.shape),
        "bytes": stored,
        "bytes_vs_fp16": stored / (2 * x.size),
        "relative_error": float((found - live).norm() / live.norm()),
        "relative_error_standardised": float((z_found - z).norm() / z.norm()),
        "p1_cosine": percentile(found, live),
        "p1_cosine_standardised": percentile(z_found, z),
    }
    if (labels >= 0).all():
        result["knn"] = knn(z_found.mean(1), labels)
        result["knn_live"] = knn(z.mean(1), labels)
    return result


def percentile(found: torch.Tensor, live: torch.Tensor) -> float:
    """1st percentile over tokens of the cosine."""
    cosine = torch.cosine_similarity(found, live, -1).flatten().numpy()
    return float(np.percentile(cosine, 1))


def knn(x: torch.Tensor, labels: np.ndarray) -> float:
    """Leave-one-out accuracy of the majority of the nearest by cosine."""
    unit = x / x.norm(dim=-1, keepdim=True)
    near = (unit @ unit.T).fill_diagonal_(-2).topk(NEIGHBOURS).indices.numpy()
    votes = np.array([np.bincount(labels[row]).argmax() for row in near])
    return float((votes == labels).mean())


def measure(folder: Path, rows: int) -> dict[str, Any]:
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for images in image_sets(rows):
        for space_name, x in kept_features(folder, images).items():
            title = f"{images.name}: {space_name}"
            found[title] = {}
            for encoding in ENCODINGS:
                path = folder / "store"
                shutil.rmtree(path, ignore_errors=True)
                cache = write(path, space_name, x, encoding, x)
                found[title][encoding] = compare(cache, space_name, x, images.labels)
                if cache[space_name].spec.predicted:
                    shutil.rmtree(path)
                    found[title][encoding]["bytes_vs_fp16_unseen"] = unseen(
                        path, space_name, x, encoding
                    )
            shutil.rmtree(folder / "store")
            table(title, found[title])
    return {
        "machine": machine(("numpy", "torch", "timm", "numcodecs")),
        "group_rows": GROUP,
        "spaces": found,
        "summary": summary(found),
    }


def summary(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """By encoding: bytes of all spaces together, and the worst of the spaces with a grid."""
    told = {}
    for encoding in ENCODINGS:
        every = [spaces[encoding] for spaces in found.values()]
        grids = [one for one in every if one["shape"][1] > 1]
        full = sum(2 * np.prod(one["shape"]) for one in every)
        told[encoding] = {
            "bytes_vs_fp16": float(sum(one["bytes"] for one in every) / full),
            "bytes_vs_fp16_worst": max(one["bytes_vs_fp16"] for one in grids),
            "bytes_vs_fp16_worst_unseen": max(
                one.get("bytes_vs_fp16_unseen", one["bytes_vs_fp16"]) for one in grids
            ),
            "relative_error": max(
                max(one["relative_error"], one["relative_error_standardised"]) for one in grids
            ),
            "p1_cosine": min(min(one["p1_cosine"], one["p1_cosine_standardised"]) for one in grids),
            "knn_change_worst": min(
                (one["knn"] - one["knn_live"] for one in every if "knn" in one), default=None
            ),
        }
    return told


def table(title: str, encodings: Mapping[str, Mapping[str, Any]]) -> None:
    columns = ("", "of fp16", "unseen", "error %", "std %", "p1 cosine", "std", "k-NN", "live")
    rows = [
        [
            name,
            one["bytes_vs_fp16"],
            one.get("bytes_vs_fp16_unseen"),
            100 * one["relative_error"],
            100 * one["relative_error_standardised"],
            f"{one['p1_cosine']:.5f}",
            f"{one['p1_cosine_standardised']:.5f}",
            one.get("knn"),
            one.get("knn_live"),
        ]
        for name, one in encodings.items()
    ]
    shape = next(iter(encodings.values()))["shape"]
    show(f"{title} {shape}", columns, rows)


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Error and cosine against size; a mark an encoding, a colour a space with a grid."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    marks = dict(zip(ENCODINGS, "osD^v", strict=False))
    for number, (title, encodings) in enumerate(result["spaces"].items()):
        grids = {n: e for n, e in encodings.items() if e["shape"][1] > 1}
        if not grids:
            continue
        colour = f"C{number // 2}"
        _, tokens, dim = next(iter(grids.values()))["shape"]
        right.plot([], [], color=colour, linewidth=5, label=f"{title}, {tokens} x {dim}")
        for name, one in grids.items():
            cosine = min(one["p1_cosine"], one["p1_cosine_standardised"])
            error = 100 * one["relative_error_standardised"]
            for axis, value in ((left, error), (right, 1 - cosine)):
                size = one["bytes_vs_fp16"]
                axis.plot(size, value, marks[name], color=colour, markersize=6, alpha=0.8)
    left.axhline(1, color="0.6", linestyle=":", linewidth=1)
    right.axhline(1e-3, color="0.6", linestyle=":", linewidth=1)
    left.set_ylabel("relative error, standardised tokens (%)")
    right.set_ylabel("1 - cosine, worst percentile of tokens\n(raw or standardised, the larger)")
    for axis in (left, right):
        axis.set_yscale("log")
        axis.set_xlabel("bytes, as a share of half floats")
        axis.grid(alpha=0.3)
        for name, mark in marks.items():
            axis.plot([], [], mark, color="0.3", linestyle="none", label=name)
    figure.legend(
        *right.get_legend_handles_labels(), loc="outside lower center", ncol=4, fontsize=7
    )
    figure.savefig(path, dpi=140)


if __name__ == "__main__":
    main()
