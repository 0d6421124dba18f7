"""One run: train with `preceptor train`, look at every image once, judge, leave ``result.json``."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ...cache import Cache, SampleIndex
from ...cli import main as preceptor
from ...errors import ConfigError, PreceptorError
from ...kernels.availability import NO_TRITON
from ...train.alignment import Alignment
from ...train.batch import normalise, to_device
from ...train.batch_norm import IMAGES, settle_batch_norms, settling_images
from ...train.checkpoint import load_model, write_json
from ...train.data import TrainData
from ...train.students import Student, build_student
from ...train.views import StoredViews
from ..harness import machine
from ..testbed import shards
from .bed import Bed, OnDemand, Outputs
from .conflict import weight_cosines
from .judge import judge
from .plan import Plan
from .supervised import train_supervised
from .variants import Variant

BATCH = 128
CPU = torch.device("cpu")
RESULT = "result.json"
TAUGHT, UNTRAINED = "supervised", "random"
SPEED = ("images_per_second", "wait_share")
"""What a result keeps of a training's summary, beside its seconds."""
_WATCHED = ("regression", UNTRAINED)
"""Whose teachers' gradients are compared: after training, and before it."""
_SETTLED = {"settled": IMAGES}
"""What the result of an untrained student says: its batch norms have statistics, of pool images."""


def run(plan: Plan, student: str, name: str, variant: Variant, seed: int) -> dict[str, Any]:
    """Do one run, or read what it has left; it goes on where it was stopped.

    A finished run that was judged on another bed's tasks is judged anew, not trained again.

    Raises:
        ConfigError: the reference that labels teach is asked for in a plan with options, which it
            does not heed.
        PreceptorError: the training failed; it has said why.
        DataError: a run is to be judged anew whose weights are gone.
    """
    folder = plan.folder(student, name, seed)
    if (folder / RESULT).exists():
        kept = _read(folder)
        if _judged(plan, kept):
            return kept
        if name != TAUGHT:
            return judge_anew(plan, folder)
    started = time.monotonic()
    if name == TAUGHT:
        if plan.options:
            raise ConfigError(f"{TAUGHT} heeds no --option: choose --variants without it")
        model, alignment = train_supervised(plan, student, variant, seed)
        summary: dict[str, Any] = {}
    else:
        steps = 1 if name == UNTRAINED else plan.steps
        options = [*variant.all_options(student), *plan.options]
        summary = _train(plan, folder, options, seed, steps)
        model, alignment = load_trained(plan.bed, folder, name, seed, plan.place)
    trained = time.monotonic()
    # Of all starts, where it was stopped and went on.
    taken = float(summary.get("seconds", trained - started))
    result = {
        "student": student,
        "variant": name,
        "kind": variant.kind,
        "seed": seed,
        "steps": plan.steps,
        "precision": plan.precision,
        "bed": plan.bed.identity,
        "processor": machine(())["processor"],
        "scores": _scores(plan.bed, model, alignment, variant.kind),
        "losses": {} if variant.kind == "reference" else held_out(plan, model, alignment),
        "train_losses": summary.get("losses", {}),
        "cosines": weight_cosines(plan, model, alignment) if name in _WATCHED else {},
        # on the CPU, where the counter leaves out the same everywhere
        "cost": cost(model.to(CPU), alignment.to(CPU)),
        "speed": {key: summary[key] for key in SPEED if key in summary} | _of_device(plan),
        **(_SETTLED if name == UNTRAINED else {}),
        "seconds": {
            "train": round(taken, 1),
            "all": round(taken + time.monotonic() - trained, 1),
        },
    }
    write_json(folder / RESULT, result)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return result


def judge_anew(plan: Plan, folder: Path) -> dict[str, Any]:
    """A finished run's scores from its weights, where they are of another bed's tasks, or of a
    floor whose batch norms had no statistics.

    Raises:
        DataError: the weights are gone.
    """
    result = _read(folder)
    if not _judged(plan, result):
        name = result["variant"]
        model, alignment = load_trained(plan.bed, folder, name, result["seed"], plan.place)
        result["scores"] = _scores(plan.bed, model, alignment, result["kind"])
        result["bed"] = plan.bed.identity
        if name == UNTRAINED:
            result |= {**_SETTLED, "cosines": weight_cosines(plan, model, alignment)}
        write_json(folder / RESULT, result)
    return result


def finished(plan: Plan, folder: Path) -> dict[str, Any]:
    """What a run has left, if it is one of this plan.

    Raises:
        ConfigError: as `belongs`.
    """
    result = _read(folder)
    belongs(plan, result, str(folder))
    return result


def belongs(plan: Plan, result: Mapping[str, Any], where: str) -> None:
    """Refuse a finished run that is none of this plan.

    Raises:
        ConfigError: it is of other steps or another precision, or was judged on other tasks.
    """
    for what, ours in (("steps", plan.steps), ("precision", plan.precision)):
        if result[what] != ours:
            raise ConfigError(
                f"{where}: a run with {what}={result[what]}, not {ours}: choose another --out "
                "or --runs"
            )
    if result.get("bed") != plan.bed.identity:
        raise ConfigError(
            f"{where} was judged on other images than {plan.bed.folder} has: --judge judges it "
            "anew where its weights are, and a run that was taught by their labels has to be done "
            "again"
        )


def _read(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / RESULT).read_text(encoding="utf-8")))


def _judged(plan: Plan, result: Mapping[str, Any]) -> bool:
    """Whether a run's scores are of these tasks and, of a floor, of one that was settled."""
    settled = result["variant"] != UNTRAINED or _SETTLED.items() <= result.items()
    return settled and result.get("bed") == plan.bed.identity


def load_trained(
    bed: Bed, folder: Path, name: str, seed: int, device: torch.device = CPU
) -> tuple[Student, Alignment]:
    """The student of a finished run and its alignment; of the floor, with its initial weights."""
    model, alignment, facts = load_model(folder)
    if name == UNTRAINED:
        model = build_student(facts["student"], seed)
    model, alignment = model.to(device), alignment.to(device)
    if name == UNTRAINED:
        pool = torch.from_numpy(bed.pixels["pool"])
        parts = settling_images(len(pool))
        settle_batch_norms(model, (normalise(pool[part], device) for part in parts))
    return model, alignment


def _scores(bed: Bed, model: Student, alignment: Alignment, kind: str) -> dict[str, Any]:
    own = ("pooled", "spatial") if kind == "reference" else None
    return dict(judge(bed, look(bed, model, alignment, own)))


def look(
    bed: Bed, student: Student, alignment: Alignment, readouts: Sequence[str] | None = None
) -> Mapping[str, Outputs]:
    """Every readout of every image set of the bed.

    Args:
        readouts: names of the alignment's; all that are of one kind with everybody's where None.
    """
    student.eval()
    alignment.eval()
    known = [name for name in alignment.readouts if name != "both"]
    chosen = known if readouts is None else list(readouts)
    pixels = bed.pixels
    return OnDemand(list(pixels), lambda name: _look(student, alignment, chosen, pixels[name]))


def _look(
    student: Student, alignment: Alignment, readouts: Sequence[str], pixels: NDArray[np.uint8]
) -> Outputs:
    vectors: dict[str, list[torch.Tensor]] = {name: [] for name in readouts}
    device = device_of(student)
    maps = []
    with torch.inference_mode():
        for part in torch.from_numpy(pixels).split(BATCH):
            output = alignment.run_student(student, normalise(part, device))
            for name in readouts:
                vectors[name].append(alignment.readout(output, name).float().cpu())
            maps.append(output.tokens.float().cpu())
    return Outputs(
        {name: torch.cat(parts).numpy() for name, parts in vectors.items()},
        torch.cat(maps).numpy(),
        student.grid,
    )


def held_out(plan: Plan, student: Student, alignment: Alignment) -> dict[str, float]:
    """The unweighted loss of every space on held-out images of the pool's kind."""
    cache = Cache.open(plan.bed.folder / "stores" / "heldout")
    index = SampleIndex.from_shards(shards.pattern(plan.bed.folder / "heldout"))
    views = StoredViews(cache, index, student.size)
    count = min(100, len(index))
    data = TrainData(cache, views, alignment.required_spaces, count)
    found: dict[str, list[float]] = {}
    student.eval()
    alignment.eval()
    with torch.inference_mode():
        for batch in data.batches(0, len(index) // count):
            pixels, targets = to_device(batch, device_of(student))
            losses = alignment(alignment.run_student(student, pixels), targets).losses
            for space, loss in losses.items():
                found.setdefault(space, []).append(float(loss))
    return {space: float(np.mean(losses)) for space, losses in found.items()}


def cost(student: Student, alignment: Alignment) -> dict[str, float]:
    """Parameters and operations of a forward pass of one image: of the student as it is used, with
    whatever runs inside it, and parameters of the whole alignment.

    The operations are those that torch's counter knows: without the products within attention."""
    student.eval()
    alignment.eval()
    with FlopCounterMode(display=False) as counter:
        alignment.run_student(student, torch.zeros(1, 3, *student.size, device=device_of(student)))
    return {
        "student": _count(student) + alignment.readout_parameters("pooled"),
        "alignment": _count(alignment),
        "operations": counter.get_total_flops(),
    }


def _train(
    plan: Plan, folder: Path, options: Sequence[str], seed: int, steps: int
) -> dict[str, Any]:
    arguments = [
        "train", f"cache={plan.store}", f"data.shards='{plan.shards}'", f"out={folder}",
        "recipe=short", *options, f"recipe.steps={steps}", f"seed={seed}", "workers=0",
        "log.to=[]", "log.gradients_every=0", "log.knn_every=0", "engine=auto",
        f"engine.accelerator={plan.device}", f"engine.precision={plan.precision}",
    ]  # fmt: skip
    print(f"$ preceptor {' '.join(arguments)}", flush=True)
    with plan.computing():
        failed = preceptor(arguments)
    if failed:
        raise PreceptorError(f"{folder}: the training failed")
    return dict(json.loads((folder / "summary.json").read_text(encoding="utf-8")))


def device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _of_device(plan: Plan) -> dict[str, Any]:
    if plan.place.type != "cuda":
        return {}
    return {
        "device": torch.cuda.get_device_name(plan.place),
        "triton": not os.environ.get(NO_TRITON),
        "peak_gpu_mb": torch.cuda.max_memory_allocated(plan.place) / 2**20,
    }


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
