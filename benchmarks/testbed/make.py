"""Makes the test bed: images, specialists, and the stores of six teachers, by one command.

    pip install 'preceptor[testbed]'
    python benchmarks/testbed/make.py --out outputs/testbed

Leaves a mixed pool and a held-out part of it, nine tasks of three parts each (WebDataset shards),
three specialists, the configuration of six teachers, a store of every teacher's tokens for all of
these, and ``bed.json``. What is whole already is kept, so a run that was stopped goes on. The same
seed gives the same bytes of every shard on one machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from preceptor.benchmarks.harness import machine, side_by_side
from preceptor.benchmarks.testbed import shards, sources
from preceptor.benchmarks.testbed.specialists import NETWORKS
from preceptor.benchmarks.testbed.stores import TASKS as TASKS_STORE
from preceptor.benchmarks.testbed.stores import (
    checkpoint,
    extract,
    pool_store,
    room_for_decoders,
    run,
    teachers_sizes,
    write_teachers,
)
from preceptor.benchmarks.testbed.surfaces import SIZE
from preceptor.benchmarks.testbed.tasks import TASKS, samples
from preceptor.benchmarks.testbed.training import Course, train_specialist
from preceptor.cache.durable import write_whole
from preceptor.errors import DataError

PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Plan:
    """What is made.

    Attributes:
        seed: of all images and specialists.
        pool, heldout: unlabelled images; the specialists' and the pool's sources are the same.
        share: of every task's images.
        tasks: names of `TASKS`.
        packaged: whether the three pretrained teachers of packages are used.
        course: how the specialists are taught.
        encoding: of the extracted stores; the pool is converted to int8 beside it.
        size: side of all images in pixels.
        one_store: all tasks' parts are in one store, and the stores hold the images' pixels: so
            that many images are asked about, and read, quickly.
    """

    seed: int = 0
    pool: int = 16000
    heldout: int = 400
    share: float = 1.0
    tasks: tuple[str, ...] = tuple(TASKS)
    packaged: bool = True
    course: Course = field(default_factory=Course)
    encoding: str = "fp16"
    size: int = SIZE
    one_store: bool = False

    def count(self, task: str, part: str) -> int:
        """Images of a task's part; a whole number of sights where tasks show things repeatedly."""
        return max(20, round(self.share * TASKS[task].counts[PARTS.index(part)] / 5) * 5)


@dataclass(frozen=True)
class Means:
    """By what it is made; the images are the same whatever they are.

    Attributes:
        device: of the specialists' training and, where it is cuda, of the teachers.
        workers: processes that draw images, and that decode them where the device is cuda, as many
            as shared memory has room for.
        batch: images that the teachers see at once on such a device.
    """

    device: str = "cpu"
    workers: int = 1
    batch: int = 256

    def extraction(self, plan: Plan) -> tuple[str, ...]:
        """Options of `preceptor extract`."""
        pixels = (f"pixels.size={plan.size}",) if plan.one_store else ()
        if self.device == "cpu":
            return (f"seed={plan.seed}", "workers=0", *pixels)
        # float32, as on a CPU: these teachers are small, and autocast would add kernels to start
        engine = (f"engine.accelerator={self.device}", "engine.precision=32-true")
        sides = [*teachers_sizes(plan.size).values(), SIZE, plan.size]
        workers = min(self.workers, room_for_decoders(self.batch, sides))
        batches = (f"batch_size={self.batch}", f"workers={workers}")
        return (f"seed={plan.seed}", *batches, *engine, *pixels)


def make(out: Path, plan: Plan, means: Means | None = None) -> dict[str, Any]:
    """Make what is not there yet, and write ``bed.json``.

    Raises:
        DataError: a package is missing, or `out` holds the bed of another plan.
        SystemExit: a command failed; it has said why.
    """
    means = means or Means()
    out.mkdir(parents=True, exist_ok=True)
    _same_plan(out / "plan.json", plan)
    seconds: dict[str, float] = {}
    started = time.monotonic()
    if means.workers > 1:
        sources.read_all()
    digests = _images(out, plan, means.workers)
    seconds["images"] = time.monotonic() - started

    started = time.monotonic()
    scores = {name: _specialist(out, name, plan, means) for name in NETWORKS}
    seconds["specialists"] = time.monotonic() - started

    write_teachers(out, plan.size, plan.encoding, packaged=plan.packaged)
    started = time.monotonic()
    options = means.extraction(plan)
    for name, parts in _stores(plan, list(digests)).items():
        extract(out, name, parts, plan.encoding, options)
    if pool_store(plan.encoding) != "pool":
        run("convert", f"cache={out}/stores/{pool_store(plan.encoding)}", f"out={out}/stores/pool",
            "encoding=int8")  # fmt: skip
    seconds["stores"] = time.monotonic() - started

    bed = {
        "plan": _describe(plan),
        "size": plan.size,
        "digests": digests,
        "specialists": scores,
        "tasks": {
            name: {
                "kind": TASKS[name].kind,
                "domain": TASKS[name].domain,
                "images": {part: plan.count(name, part) for part in PARTS},
            }
            for name in plan.tasks
        },
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "machine": machine(("numpy", "torch", "timm", "pillow")),
    }
    if means.device == "cuda":
        bed["peak_gpu_mb"] = torch.cuda.max_memory_allocated() / 2**20
    write_whole(out / "bed.json", (json.dumps(bed, indent=2) + "\n").encode())
    return bed


def folders(plan: Plan) -> dict[str, tuple[str, str, int]]:
    """Of every shard set, by its folder: the name and split that are drawn, and the count."""
    found = {"pool": ("pool", "pool", plan.pool), "heldout": ("heldout", "pool", plan.heldout)}
    for task in plan.tasks:
        for part in PARTS:
            found[f"tasks/{task}/{part}"] = (task, part, plan.count(task, part))
    return found


def _stores(plan: Plan, folders: Sequence[str]) -> dict[str, list[str]]:
    """By the name of every store the folders that it is made of; the pool's first."""
    found: dict[str, list[str]] = {}
    for folder in folders:
        name = TASKS_STORE if plan.one_store and folder.startswith("tasks/") else folder
        found.setdefault(pool_store(plan.encoding) if name == "pool" else name, []).append(folder)
    return found


def _images(out: Path, plan: Plan, workers: int) -> dict[str, str]:
    wanted = folders(plan)
    drawn: dict[str, list[str]] = {}
    parts: list[tuple[Path, str, str, str, int, Plan]] = []
    for folder, (name, split, count) in wanted.items():
        if not (out / folder / "sources.json").exists():
            print(f"{out / folder}: {count} images", flush=True)
            drawn[folder] = []
            numbers = range(-(-count // shards.SHARD))
            parts += [(out, folder, name, split, number, plan) for number in numbers]
    for part, shown in zip(parts, side_by_side(_shard, parts, workers), strict=True):
        drawn[part[1]] += shown
    for folder, names in drawn.items():
        shards.write_sources(out / folder, names)
    return {folder: shards.digest(out / folder) for folder in wanted}


def _shard(out: Path, folder: str, name: str, split: str, number: int, plan: Plan) -> list[str]:
    first = number * shards.SHARD
    count = min(shards.SHARD, folders(plan)[folder][2] - first)
    drawn = samples(name, split, count, plan.seed, plan.size, first)
    return shards.write_shard(out / folder, folder.replace("/", "-"), number, drawn)


def _specialist(out: Path, name: str, plan: Plan, means: Means) -> dict[str, float]:
    path, record = checkpoint(out, name), out / "specialists" / f"{name}.json"
    if not (path.exists() and record.exists()):
        path.parent.mkdir(parents=True, exist_ok=True)
        found = train_specialist(
            name, path, plan.seed, plan.course,
            size=plan.size, device=means.device, workers=means.workers,
        )  # fmt: skip
        write_whole(record, (json.dumps(found) + "\n").encode())
    return dict(json.loads(record.read_text()))


def _describe(plan: Plan) -> dict[str, Any]:
    counts = {task: [plan.count(task, part) for part in PARTS] for task in plan.tasks}
    described = {**vars(plan), "course": vars(plan.course), "tasks": counts}
    # Beds that were begun when there was no choice say nothing of it.
    for name, default in (("size", SIZE), ("one_store", False)):
        if described[name] == default:
            del described[name]
    return dict(json.loads(json.dumps(described)))


def _same_plan(path: Path, plan: Plan) -> None:
    ours = _describe(plan)
    if not path.exists():
        write_whole(path, (json.dumps(ours, indent=2) + "\n").encode())
    theirs = json.loads(path.read_text(encoding="utf-8"))
    for key in ours:
        if ours[key] != theirs.get(key):
            raise DataError(
                f"{path.parent} was begun with {key}={theirs.get(key)}, not {ours[key]}: choose "
                "another --out, or remove it"
            )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("outputs/testbed"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pool", type=int, default=Plan.pool, help="unlabelled images")
    parser.add_argument("--share", type=float, default=1.0, help="of every task's images")
    parser.add_argument("--size", type=int, default=SIZE, help="side of the images in pixels")
    parser.add_argument("--one-store", action="store_true", help="int8, for all tasks, with "
                        "the images' pixels: for a GPU")  # fmt: skip
    parser.add_argument("--course", type=int, default=Course.images, help="images of a specialist")
    parser.add_argument("--packaged", action=argparse.BooleanOptionalAction, default=True,
                        help="whether with the three pretrained teachers")  # fmt: skip
    parser.add_argument("--device", default="cpu", help="of specialists and teachers; or cuda")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw and decode")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: its own choice")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    plan = Plan(
        seed=options.seed, pool=options.pool, share=options.share,
        size=options.size, one_store=options.one_store,
        encoding="int8" if options.one_store else Plan.encoding,
        packaged=options.packaged, course=Course(images=options.course),
    )  # fmt: skip
    try:
        bed = make(options.out, plan, Means(options.device, options.workers))
    except DataError as error:
        sys.exit(str(error))
    print(json.dumps({"seconds": bed["seconds"], "specialists": bed["specialists"]}, indent=2))


if __name__ == "__main__":
    main()
