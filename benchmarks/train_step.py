"""A training step from the store against the step without teachers, and against live teachers.

`plain` trains the same student with cross-entropy on the same images: the limit. `cached ALIGNMENT`
trains it from the store. `online` runs both real teachers of examples/teachers.py on the images of
every step and aligns the student to what they say (`model_token`): multi-teacher distillation
without a store. All share the image pipeline, the optimiser, clipping and the size of the batch.

Each measurement starts the pipeline, lets it run in, and takes some steps in a row; rivals are
measured in turns. A step is all between two batches; the wait is the time until the next is there.
On a CPU a step's work is also given: the processor time of all threads of the process (which other
programs hardly lengthen; decoding has its own processes). Ratios are of that.

    python benchmarks/train_step.py --student resnet18 --size 112 --json results.json
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from harness import machine, median, save, show
from hydra import compose, initialize_config_module
from lightning_fabric import Fabric
from preceptor.benchmarks.device_timing import peak_bytes
from preceptor.cache import Cache
from preceptor.cache.samples import SampleIndex
from preceptor.errors import PreceptorError
from preceptor.extract.pipeline import extract, load_teachers
from preceptor.train.alignment import ALIGNMENTS, build_alignment
from preceptor.train.batch import normalise, to_device
from preceptor.train.data import AHEAD, TrainData
from preceptor.train.distiller import Distiller, Targets
from preceptor.train.loading import decoded, prefetched
from preceptor.train.optimizer import build_optimizer
from preceptor.train.students import IMAGENET_MEAN, IMAGENET_STD, Student, build_student
from preceptor.train.views import StoredViews
from torch import Tensor, nn
from torch.nn import functional

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "examples/data/fashion-mnist/train-000000.tar.gz"
SIDE = 256
STUDENTS = {"resnet18": "resnet18", "vit_small": "vit_small_patch16_224"}


@dataclass
class Bed:
    """Images, their store, and what a run needs of them."""

    cache: Cache
    views: StoredViews
    recipe: Any
    batch: int
    size: int
    student: str
    workers: int
    fabric: Fabric


def make_images(path: Path, count: int) -> None:
    """The embedded images as JPEG of 256 x 256 pixels, so that decoding costs what it does."""
    index = SampleIndex.from_shards(str(IMAGES))
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            buffer = io.BytesIO()
            index.image(number).convert("RGB").resize((SIDE, SIDE)).save(buffer, "jpeg", quality=90)
            for extension, raw in (
                ("jpg", buffer.getvalue()),
                ("cls", str(index.labels[number]).encode()),
            ):
                member = tarfile.TarInfo(f"{number:05d}.{extension}")
                member.size = len(raw)
                tar.addfile(member, io.BytesIO(raw))


def extraction(shard: Path, store: Path, size: int) -> Any:
    """Both teachers of the embedded images' configuration, at `size` pixels."""
    with initialize_config_module("preceptor.configs", version_base="1.3"):
        return compose(
            "extract",
            [
                f"hydra.searchpath=[file://{ROOT}/examples/configs]",
                "teachers=fashion_mnist",
                f"teachers.efficientnet_lite0.size={size}",
                f"teachers.vit_s_focus.size={size}",
                f"data.shards={shard}",
                f"cache={store}",
                "calibration.images=128",
                "shard_rows=128",
            ],
        )


def make_store(folder: Path, count: int, size: int) -> tuple[Path, Path]:
    """Images and the store of them; existing ones are used again."""
    shard, store = folder / f"images-{count}.tar", folder / f"store-{count}-{size}"
    if not shard.exists():
        make_images(shard, count)
    try:
        extract(extraction(shard, store, size))
    except PreceptorError as error:  # a size that a teacher does not take
        raise SystemExit(str(error)) from None
    return shard, store


# -- the rivals: each gives batches and takes a step ----------------------------------------------

Rival = tuple[Callable[[int], Iterator[Any]], Callable[[Any], Tensor]]
"""(batches of so many steps, one step: loss)."""


def images_only(bed: Bed, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Pixels and labels through the pipeline of the trainer, without the store's tokens."""
    random = np.random.default_rng(0)
    rows = [random.choice(len(bed.cache), bed.batch, replace=False) for _ in range(steps)]
    labels = np.asarray(bed.cache.labels)
    orders = [[(int(row), 0) for row in part] for part in rows]
    images = decoded(bed.views, orders, bed.workers)
    pin = bed.fabric.device.type == "cuda"  # as `cached` has them

    def joined() -> Iterator[tuple[Tensor, Tensor]]:
        for pixels, part in zip(images, rows, strict=True):
            of_part = torch.from_numpy(labels[part])
            yield (pixels.pin_memory(), of_part.pin_memory()) if pin else (pixels, of_part)

    return prefetched(joined(), AHEAD)


def plain(bed: Bed) -> Rival:
    student = new_student(bed)
    model = _Classifier(student, classes=1000)
    module, optimizer = bed.fabric.setup(model, build_optimizer(_WithStudent(model), bed.recipe))

    def step(batch: tuple[Tensor, Tensor]) -> Tensor:
        pixels = normalise(batch[0], bed.fabric.device)
        labels = batch[1].to(pixels.device, non_blocking=True)
        loss = functional.cross_entropy(module(pixels).float(), labels)
        return update(bed, module, optimizer, loss)

    return lambda steps: images_only(bed, steps), step


def cached(bed: Bed, align: str) -> Rival:
    distiller = new_distiller(bed, align)
    data = TrainData(
        bed.cache,
        bed.views,
        distiller.alignment.required_spaces,
        bed.batch,
        workers=bed.workers,
        pin=bed.fabric.device.type == "cuda",
    )
    module, optimizer = bed.fabric.setup(distiller, build_optimizer(distiller, bed.recipe))

    def step(batch: Any) -> Tensor:
        pixels, targets = to_device(batch, bed.fabric.device)
        given = Targets.of(targets, bed.fabric)
        return update(bed, module, optimizer, module(pixels, given).loss)

    return lambda steps: data.batches(0, steps), step


def online(bed: Bed, align: str) -> Rival:
    distiller = new_distiller(bed, align)
    device = bed.fabric.device
    options = extraction(Path(), Path(), bed.size)
    teachers = [teacher.to(device) for teacher in load_teachers(options.teachers)]
    module, optimizer = bed.fabric.setup(distiller, build_optimizer(distiller, bed.recipe))
    spaces = distiller.alignment.spaces
    units = {name: (bed.cache[name].mean, bed.cache[name].std) for name in spaces}
    units = {
        name: tuple(torch.as_tensor(unit, device=device) for unit in pair)
        for name, pair in units.items()
    }
    constants = {}
    for teacher in teachers:
        # One multiplication and addition takes the student's normalisation to the teacher's.
        ours = [torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD)]
        how = teacher.preprocessing
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (how.mean, how.std))
        constants[teacher.name] = ((ours[1] / std).to(device), ((ours[0] - mean) / std).to(device))

    def step(batch: tuple[Tensor, Tensor]) -> Tensor:
        pixels = normalise(batch[0], device)
        targets = {}
        with bed.fabric.autocast():
            for teacher in teachers:
                scale, shift = constants[teacher.name]
                for name, tokens in teacher(pixels * scale + shift).items():
                    mean, std = units[f"{teacher.name}/{name}"]
                    targets[f"{teacher.name}/{name}"] = (tokens.float() - mean) / std
        given = Targets.of(targets, bed.fabric)
        return update(bed, module, optimizer, module(pixels, given).loss)

    return lambda steps: images_only(bed, steps), step


class _Classifier(nn.Module):
    def __init__(self, student: Student, classes: int) -> None:
        super().__init__()
        self.student, self.head = student, nn.Linear(student.pooled_dim, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        # The descriptor alone, as a plain timm model computes it.
        model = self.student.model
        return self.head(model.forward_head(model.forward_features(pixels), pre_logits=True))


class _WithStudent(nn.Module):
    """A classifier as the optimiser's set-up wants it."""

    def __init__(self, model: _Classifier) -> None:
        super().__init__()
        self.student, self.head = model.student, model.head

    def no_weight_decay(self) -> set[str]:
        return {f"student.{name}" for name in self.student.no_weight_decay()}


def new_student(bed: Bed) -> Student:
    config = {"model": STUDENTS[bed.student], "size": bed.size}
    return build_student(config, 0).to(memory_format=torch.channels_last)


def new_distiller(bed: Bed, align: str) -> Distiller:
    student = new_student(bed)
    with initialize_config_module("preceptor.configs", version_base="1.3"):
        options = compose("train", [f"align={align}"]).align
    specs = {name: bed.cache[name].spec for name in bed.cache.spaces}
    return Distiller(
        student, build_alignment(dict(options), student, specs, bed.cache.__getitem__)
    ).train()


def update(bed: Bed, module: nn.Module, optimizer: Any, loss: Tensor) -> Tensor:
    bed.fabric.backward(loss)
    bed.fabric.clip_gradients(module, optimizer, max_norm=1.0, error_if_nonfinite=False)
    optimizer.step()
    optimizer.zero_grad()
    return loss


# -- measuring ------------------------------------------------------------------------------------


def measure(rival: Rival, bed: Bed, steps: int) -> dict[str, float]:
    """Median seconds of a step and of its work, and the share of all time that was waited."""
    batches, step = rival
    running_in = AHEAD + 1
    source = batches(running_in + steps)
    times, works, waits = [], [], []
    for number in range(running_in + steps):
        start, began = time.perf_counter(), time.process_time()
        batch = next(source)
        arrived = time.perf_counter()
        loss = step(batch)
        if bed.fabric.device.type == "cuda":
            torch.cuda.synchronize()
        if number >= running_in:
            times.append(time.perf_counter() - start)
            works.append(time.process_time() - began)
            waits.append(arrived - start)
    if not bool(loss.isfinite()):
        raise RuntimeError("a rival does not train: its loss is not finite")
    source.close()
    on_cpu = bed.fabric.device.type == "cpu"
    return {
        "step_s": statistics.median(times),
        "work_s": statistics.median(works if on_cpu else times),
        "wait_share": sum(waits) / sum(times),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", choices=tuple(STUDENTS), default="resnet18")
    parser.add_argument("--size", type=int, default=112, help="pixels, of student and teachers")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--align", nargs="*", default=list(ALIGNMENTS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", help="default: 32-true on the CPU, bf16-mixed on CUDA")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--steps", type=int, default=8, help="in a row")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="processes that decode images")
    parser.add_argument("--folder", type=Path, help="keeps images and store for another run")
    parser.add_argument("--store-only", action="store_true", help="make the store and end")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        run(options, options.folder or Path(temporary))


def run(options: argparse.Namespace, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shard, store = make_store(folder, options.images, options.size)
    if options.store_only:
        return
    cache, size = Cache.open(store), (options.size, options.size)
    with initialize_config_module("preceptor.configs", version_base="1.3"):
        recipe = compose("train").recipe
    precision = options.precision or ("bf16-mixed" if options.device == "cuda" else "32-true")
    bed = Bed(
        cache=cache,
        views=StoredViews(cache, SampleIndex.from_shards(str(shard)), size),
        recipe=recipe,
        batch=options.batch,
        size=options.size,
        student=options.student,
        workers=options.workers,
        fabric=Fabric(accelerator=options.device, devices=1, precision=precision),
    )
    rivals = {"plain": plain(bed)}
    rivals |= {f"cached {align}": cached(bed, align) for align in options.align}
    rivals["online model_token"] = online(bed, "model_token")
    for _ in cache.batches(list(cache.spaces), options.batch):
        pass  # the store's pages are warm

    samples: dict[str, list[dict[str, float]]] = {name: [] for name in rivals}
    for _ in range(options.rounds):
        for name, rival in rivals.items():
            found = measure(rival, bed, options.steps)
            samples[name].append(found)
            print(f"{name}: {found}", file=sys.stderr, flush=True)
    results: dict[str, dict[str, Any]] = {}
    for name, entries in samples.items():
        results[name] = {key: median([entry[key] for entry in entries]) for key in entries[0]}
        works = [entry["work_s"] for entry in entries]
        results[name]["work_spread_s"] = [min(works), max(works)]
        if options.memory:
            batches, step = rivals[name]
            source = batches(2)
            batch = next(source)
            results[name]["peak_mb"] = (
                peak_bytes(lambda step=step, batch=batch: step(batch), options.device) / 2**20
            )
            source.close()
    base, live = results["plain"]["work_s"], results["online model_token"]["work_s"]
    for entry in results.values():
        entry["over_plain"] = entry["work_s"] / base
    columns = ("", "s a step", "work s", "least", "most", "x plain", "wait %", "peak MiB")
    show(
        f"{options.student} at {options.size} px, batches of {options.batch}, {options.device}",
        columns,
        [
            (
                name,
                entry["step_s"],
                entry["work_s"],
                *entry["work_spread_s"],
                entry["over_plain"],
                100 * entry["wait_share"],
                entry.get("peak_mb"),
            )
            for name, entry in results.items()
        ],
    )
    summary: dict[str, Any] = {
        name: {
            "over_plain": round(entry["over_plain"], 3),
            "wait_share": round(entry["wait_share"], 4),
        }
        for name, entry in results.items()
    }
    token = results.get("cached model_token")
    if token is not None:
        # Of the time that live teachers add to the plain step, the part that the store takes away.
        summary["teachers_cost_removed"] = round((live - token["work_s"]) / (live - base), 3)
        summary["online_over_cached"] = round(live / token["work_s"], 2)
    save(
        options.json,
        {
            "machine": machine(("numpy", "torch", "timm", "zarr")),
            "threads": torch.get_num_threads(),
            "options": {
                key: str(value)
                for key, value in vars(options).items()
                if key not in ("folder", "json")
            },
            "summary": summary,
            "results": results,
        },
    )


if __name__ == "__main__":
    main()
