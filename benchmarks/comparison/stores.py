"""What the cache costs a student: the same run on the same pool, stored otherwise.

Encodings: ``fp16``, ``int8``, ``compact``, ``int4``, each of one view, the whole image. Stored
views: ``online`` is a store with so many random crops of every image that no step sees one twice,
which is what teachers that run beside the student give; ``views1``, ``views2`` and ``views4`` are
runs on the first ones of them alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ...cli import main as preceptor
from ...errors import ConfigError, PreceptorError
from ...train.evaluation import over_seeds
from ..testbed import shards
from . import report
from .plan import Plan
from .runs import RESULT, finished, run
from .variants import Variant

ENCODINGS = ("fp16", "int8", "compact", "int4")
VIEWS = ("views1", "views2", "views4", "online")
BATCH = 64
"""Rows a step, as configs/recipe/short.yaml has it."""


def compare(
    plan: Plan,
    names: Sequence[str],
    students: Sequence[str],
    seeds: Sequence[int],
    name: str,
    variant: Variant,
) -> None:
    """Make every store that is not there, and train one variant on each.

    Raises:
        ConfigError: a name is none of those above.
    """
    for store in names:
        if store not in ENCODINGS + VIEWS:
            raise ConfigError(f"--stores {store}: valid are {', '.join(ENCODINGS + VIEWS)}")
        own = replace(plan, out=plan.out / "stores" / store, store=_made(plan, store))
        first = (f"views={store[5:]}",) if store.startswith("views") else ()
        one = replace(variant, options=(*variant.options, *first))
        for seed in seeds:
            for student in students:
                found = run(own, student, name, one, seed)
                figure = report.mean([found], "test")
                print(f"{store}, {student} {name} s{seed}: {figure:.2f}", flush=True)


def collect(plan: Plan) -> dict[str, dict[str, Any]]:
    """By student and store: the mean over tasks and the loss on held-out images, and the paired
    differences to what loses nothing, ``fp16`` for an encoding and ``online`` for stored views.

    The loss tells small differences that tasks do not: it deviates less from seed to seed.
    """
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for path in sorted((plan.out / "stores").glob(f"*/*/*/s*/{RESULT}")):
        result = finished(plan, path.parent)
        runs.setdefault(result["student"], {}).setdefault(path.parents[3].name, []).append(result)
    found: dict[str, dict[str, Any]] = {}
    for student, by_store in runs.items():
        found[student] = {}
        for store in [name for name in ENCODINGS + VIEWS if name in by_store]:
            own, best = by_store[store], "fp16" if store in ENCODINGS else "online"
            paired = store != best and report.can_be_paired(own, by_store.get(best, ()))
            found[student][store] = {
                "mean": report.mean(own, "test"),
                "seeds": len(own),
                "variant": own[0]["variant"],
                "against": best,
                "difference": report.difference(own, by_store[best]) if paired else None,
                "held_out_loss": float(np.mean(list(_losses(own).values()))),
                "held_out_difference": _loss_difference(own, by_store[best]) if paired else None,
            }
    return found


def _losses(runs: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """By seed: the mean over spaces of the loss on held-out images."""
    return {run["seed"]: float(np.mean(list(run["losses"].values()))) for run in runs}


def _loss_difference(
    ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    own, other = _losses(ours), _losses(theirs)
    gaps = [own[seed] - other[seed] for seed in own if seed in other]
    interval = over_seeds(gaps)
    return {
        "mean": float(np.mean(gaps)),
        "over_seeds": None if len(gaps) < 2 else [interval.low, interval.high],
    }


def rows(found: Mapping[str, Mapping[str, Any]]) -> list[list[Any]]:
    """Of the table: student, store, mean, difference, to what, and the loss on held-out images."""
    return [
        [
            student,
            store,
            own["mean"],
            report.text(own["difference"]),
            own["against"],
            f"{own['held_out_loss']:.4f}",
        ]
        for student, by_store in found.items()
        for store, own in by_store.items()
    ]


def _made(plan: Plan, name: str) -> Path:
    folder = plan.bed.folder
    whole = folder / "stores" / f"pool-{plan.bed.facts['plan']['encoding']}"
    if name in ENCODINGS:
        store = folder / "stores" / f"pool-{name}"
        arguments = ["convert", f"cache={whole}", f"out={store}", f"encoding={name}"]
    else:
        images = int(plan.bed.facts["plan"]["pool"])
        count = math.ceil(plan.steps * BATCH / images)
        store = folder / "stores" / f"pool-random{count}"
        arguments = [
            "extract", "--config-dir", str(folder / "configs"), "teachers=testbed",
            f"data.shards='{shards.pattern(folder / 'pool')}'", f"cache={store}",
            "views.name=random", f"views.count={count}", "views.flip=false", "workers=0",
            f"calibration.store={whole}",
        ]  # fmt: skip
    if store != whole and preceptor(arguments):
        raise PreceptorError(f"{store} could not be made")
    return store
