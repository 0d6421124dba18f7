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
from preceptor.benchmarks.harness import machine
from preceptor.benchmarks.testbed import shards
from preceptor.benchmarks.testbed.specialists import NETWORKS
from preceptor.benchmarks.testbed.surfaces import SIZE
from preceptor.benchmarks.testbed.tasks import TASKS, samples
from preceptor.benchmarks.testbed.training import Course, train_specialist
from preceptor.cache.durable import write_whole
from preceptor.cli import main as preceptor
from preceptor.errors import DataError

PARTS = ("train", "validation", "test")

PACKAGED = """\
efficientnet_lite0:   # CNN, ImageNet-1k classes
  source: call:preceptor.examples.teachers:efficientnet_lite0
  size: 96
  encoding: {encoding}
  spaces: {{map: {{block: 4}}, pooled: {{}}}}
vit_s_focus:          # ViT-S/14 of a saliency model
  source: call:preceptor.examples.teachers:vit_s_focus
  size: 84
  encoding: {encoding}
  spaces: {{patch: {{block: 7}}, mean: {{block: 7}}}}
u2netp:               # saliency CNN
  source: call:preceptor.benchmarks.testbed.saliency:u2netp
  size: 64
  encoding: {encoding}
  spaces: {{map: {{block: 7}}, mean: {{block: 7}}}}
"""
SPECIALIST = """\
{name}:
  source: call:preceptor.benchmarks.testbed.specialists:{name}
  checkpoint: {checkpoint}
  encoding: {encoding}
  spaces: {{map: {{}}, mean: {{}}}}
"""


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
    """

    seed: int = 0
    pool: int = 16000
    heldout: int = 400
    share: float = 1.0
    tasks: tuple[str, ...] = tuple(TASKS)
    packaged: bool = True
    course: Course = field(default_factory=Course)
    encoding: str = "fp16"

    def count(self, task: str, part: str) -> int:
        """Images of a task's part; a whole number of sights where tasks show things repeatedly."""
        return max(20, round(self.share * TASKS[task].counts[PARTS.index(part)] / 5) * 5)


def make(out: Path, plan: Plan) -> dict[str, Any]:
    """Make what is not there yet, and write ``bed.json``.

    Raises:
        DataError: a package is missing, or `out` holds the bed of another plan.
        SystemExit: a command failed; it has said why.
    """
    out.mkdir(parents=True, exist_ok=True)
    _same_plan(out / "plan.json", plan)
    seconds: dict[str, float] = {}
    started = time.monotonic()
    digests = _images(out, plan)
    seconds["images"] = time.monotonic() - started

    started = time.monotonic()
    scores = {name: _specialist(out, name, plan) for name in NETWORKS}
    seconds["specialists"] = time.monotonic() - started

    groups = out / "configs"
    (groups / "teachers").mkdir(parents=True, exist_ok=True)
    (groups / "teachers" / "testbed.yaml").write_text(_teachers(out, plan), encoding="utf-8")
    started = time.monotonic()
    for name in digests:
        _store(out, name, plan)
    _run("convert", f"cache={out}/stores/pool-{plan.encoding}", f"out={out}/stores/pool",
         "encoding=int8")  # fmt: skip
    seconds["stores"] = time.monotonic() - started

    bed = {
        "plan": _describe(plan),
        "size": SIZE,
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
    write_whole(out / "bed.json", (json.dumps(bed, indent=2) + "\n").encode())
    return bed


def folders(plan: Plan) -> dict[str, tuple[str, str, int]]:
    """Of every shard set, by its folder: the name and split that are drawn, and the count."""
    found = {"pool": ("pool", "pool", plan.pool), "heldout": ("heldout", "pool", plan.heldout)}
    for task in plan.tasks:
        for part in PARTS:
            found[f"tasks/{task}/{part}"] = (task, part, plan.count(task, part))
    return found


def _images(out: Path, plan: Plan) -> dict[str, str]:
    digests = {}
    for folder, (name, split, count) in folders(plan).items():
        if not (out / folder / "sources.json").exists():
            print(f"{out / folder}: {count} images", flush=True)
            drawn = samples(name, split, count, plan.seed)
            shards.write(out / folder, folder.replace("/", "-"), drawn)
        digests[folder] = shards.digest(out / folder)
    return digests


def _specialist(out: Path, name: str, plan: Plan) -> dict[str, float]:
    path, record = _checkpoint(out, name), out / "specialists" / f"{name}.json"
    if not (path.exists() and record.exists()):
        path.parent.mkdir(parents=True, exist_ok=True)
        found = train_specialist(name, path, plan.seed, plan.course)
        write_whole(record, (json.dumps(found) + "\n").encode())
    return dict(json.loads(record.read_text()))


def _store(out: Path, folder: str, plan: Plan) -> None:
    pool = f"{out}/stores/pool-{plan.encoding}"
    store = pool if folder == "pool" else f"{out}/stores/{folder}"
    if Path(f"{store}.extract.json").exists():
        return
    borrowed = [] if folder == "pool" else [f"calibration.store={pool}"]
    _run(
        "extract", "--config-dir", str(out / "configs"), "teachers=testbed",
        f"data.shards='{shards.pattern(out / folder)}'", f"cache={store}", "views.name=full",
        f"seed={plan.seed}", "workers=0", "calibration.images=1024", *borrowed,
    )  # fmt: skip


def _teachers(out: Path, plan: Plan) -> str:
    text = PACKAGED.format(encoding=plan.encoding) if plan.packaged else ""
    for name in NETWORKS:
        checkpoint = json.dumps(str(_checkpoint(out, name).resolve()))
        text += SPECIALIST.format(name=name, checkpoint=checkpoint, encoding=plan.encoding)
    return text


def _checkpoint(out: Path, name: str) -> Path:
    return out / "specialists" / f"{name}.safetensors"


def _run(*arguments: str) -> None:
    print(f"$ preceptor {' '.join(arguments)}", flush=True)
    if status := preceptor(arguments):
        raise SystemExit(status)


def _describe(plan: Plan) -> dict[str, Any]:
    counts = {task: [plan.count(task, part) for part in PARTS] for task in plan.tasks}
    described = {**vars(plan), "course": vars(plan.course), "tasks": counts}
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
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: its own choice")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    plan = Plan(seed=options.seed, pool=options.pool, share=options.share)
    try:
        bed = make(options.out, plan)
    except DataError as error:
        sys.exit(str(error))
    print(json.dumps({"seconds": bed["seconds"], "specialists": bed["specialists"]}, indent=2))


if __name__ == "__main__":
    main()
