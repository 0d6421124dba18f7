"""How long a student takes at inference, with whatever of its alignment runs inside it."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...cache import Cache
from ...options import compose_options, plain
from ...train.alignment import Alignment, build_alignment
from ...train.checkpoint import write_json
from ...train.students import Student, build_student
from ..harness import machine, median
from .plan import Plan
from .variants import OURS, Variant

BATCHES = (64, 1)
ROUNDS = 25
LEAST_SECONDS = 0.05
"""Of one sample: as many passes in a row as take that long."""

READ = f"{OURS}, tokens"
"""Ours where its tokens are read, and not the pooled feature as of all others."""


def timed(known: Mapping[str, Variant], student: str) -> dict[str, Variant]:
    """A student's variants whose forward passes differ: ours, regression (as every rival: the plain
    backbone), the controls that have a backbone of their own, and tokens inside the backbone."""
    return {
        name: variant
        for name, variant in known.items()
        if student in variant.students
        and (
            name in (OURS, "regression", "ours_inside_backbone")
            or (variant.kind == "control" and variant.of_student)
        )
    }


def keep(plan: Plan, students: Sequence[str], known: Mapping[str, Variant]) -> dict[str, Any]:
    """Measure students and leave ``times.json`` in the folder of the runs, for `collect`.

    Args:
        known: all variants; those of `timed` are measured.
    """
    path = plan.out / "times.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for student in students:
        models = {
            name: (*build(plan, variant.all_options(student)), "pooled")
            for name, variant in timed(known, student).items()
        }
        models[READ] = (*models[OURS][:2], "tokens")
        found[student] = {"machine": machine(("torch", "timm")), **measure(models)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, found)
    return found


def collect(plan: Plan) -> dict[str, Any]:
    """What `keep` has left, by student; nothing where it was not run."""
    path = plan.out / "times.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def build(plan: Plan, options: Sequence[str]) -> tuple[Student, Alignment]:
    """An untrained student and its alignment, for the spaces of the pool's store.

    Args:
        options: of `preceptor train`.
    """
    config = compose_options(
        "train", [f"cache={plan.store}", "data.shards=unused", "recipe=short", *options]
    )
    cache = Cache.open(plan.store)
    student = build_student(plain(config.student), 0)
    spaces = {name: cache[name].spec for name in cache.spaces}
    return student, build_alignment(plain(config.align), student, spaces)


def measure(
    models: Mapping[str, tuple[Student, Alignment, str]], rounds: int = 0
) -> dict[str, Any]:
    """Time models, in turns.

    Wall-clock time of the forward pass in inference mode, float32, for batches of 64 and 1, on one
    thread and on as many as torch takes by itself. Every round samples every model once, beginning
    with another one each time; ratios are of samples of one round, so that a slow spell of the
    machine falls on both sides.

    Args:
        models: student, alignment and readout by name; ours among them.
        rounds: `ROUNDS` where 0.

    Returns:
        ``rounds``, ``threads`` (the default number), and ``settings``: for each of ``batch 64, 1
        thread``, ``batch 64, default threads``, ... by name the ``ms`` of a pass (median),
        its ``quartiles_ms`` and the ``ratio`` to ours (median) with its ``quartiles``.
    """
    threads = torch.get_num_threads()
    settings: dict[str, Any] = {}
    try:
        for batch in BATCHES:
            works = {name: _pass(*model, batch) for name, model in models.items()}
            for count, words in ((1, "1 thread"), (threads, "default threads")):
                torch.set_num_threads(count)
                samples = _alternate(works, rounds or ROUNDS)
                settings[f"batch {batch}, {words}"] = _summary(samples)
    finally:
        torch.set_num_threads(threads)
    return {"rounds": rounds or ROUNDS, "threads": threads, "settings": settings}


def _pass(student: Student, alignment: Alignment, readout: str, batch: int) -> Callable[[], Tensor]:
    student.eval()
    alignment.eval()
    pixels = torch.randn(batch, 3, *student.size, generator=torch.Generator().manual_seed(0))

    def work() -> Tensor:
        with torch.inference_mode():
            return alignment.readout(alignment.run_student(student, pixels), readout)

    return work


def _alternate(works: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of a pass, [rounds] by name."""
    repeats = {}
    for name, work in works.items():
        work()
        repeats[name] = max(1, round(LEAST_SECONDS / max(_seconds(work, 2), 1e-6)))
    samples: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(_seconds(works[name], repeats[name]))
    return samples


def _seconds(work: Callable[[], Any], repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - begin) / repeats


def _summary(samples: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
    found = {}
    for name, own in samples.items():
        ratios = [a / b for a, b in zip(own, samples[OURS], strict=True)]
        found[name] = {
            "ms": 1e3 * median(own),
            "quartiles_ms": [1e3 * value for value in _quartiles(own)],
            "ratio": median(ratios),
            "quartiles": _quartiles(ratios),
        }
    return found


def _quartiles(values: Sequence[float]) -> list[float]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]


def rows(times: Mapping[str, Any]) -> list[list[Any]]:
    """Of the table of one student: variant, and of every setting the time and the ratio."""
    settings = times["settings"]
    names = next(iter(settings.values()))
    return [
        [name, *(f"{own[name]['ms']:.2f} ({own[name]['ratio']:.2f})" for own in settings.values())]
        for name in names
    ]
