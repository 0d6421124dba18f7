"""From runs to a table: means over tasks, and paired differences with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...train.evaluation import over_seeds
from .judge import chosen
from .variants import OURS

RESAMPLES = 10_000
NOT_SHARED = "tokens"
"""The readout that not every alignment has: a choice more on validation for those that do."""
READOUTS = ("pooled", "spatial", "predictions", NOT_SHARED)

Run = Mapping[str, Any]


def figures(run: Run, part: str, readout: str = "chosen") -> dict[str, float]:
    """The figure of every task on a part.

    Args:
        readout: ``chosen`` takes each task's best on validation, ``shared`` the best of those that
            all variants have; else one readout for all tasks but the dense ones, which have ``map``
            alone.
    """
    scores = run["scores"]
    if readout == "shared":
        scores = {
            task: {name: score for name, score in own.items() if name != NOT_SHARED}
            for task, own in scores.items()
        }
    best = chosen(scores)
    return {
        task: readouts[readout if readout in readouts else best[task]][part]
        for task, readouts in scores.items()
    }


def mean(runs: Sequence[Run], part: str, readout: str = "chosen") -> float:
    """Over seeds and tasks."""
    return float(np.mean([list(figures(run, part, readout).values()) for run in runs]))


def _by_readout(runs: Mapping[str, Sequence[Run]], readout: str) -> dict[str, float]:
    """Test means of one readout for all tasks, of the variants that have it."""
    return {
        name: mean(own, "test", readout)
        for name, own in runs.items()
        if any(readout in readouts for readouts in own[0]["scores"].values())
    }


def by_task(runs: Sequence[Run]) -> dict[str, float]:
    """The test figure of every task, averaged over seeds."""
    found = [figures(run, "test") for run in runs]
    return {task: float(np.mean([own[task] for own in found])) for task in found[0]}


def difference(
    ours: Sequence[Run], theirs: Sequence[Run], part: str = "test", readout: str = "chosen"
) -> dict[str, Any]:
    """Ours minus theirs, paired by seed and task.

    Two intervals of 95 % answer two questions. ``over_tasks``: would it hold on other tasks of the
    kind? A bootstrap that draws tasks, and seeds, the same ones for all tasks, since a seed is one
    student in all of them. ``over_seeds``: would it hold on these tasks if students were trained
    anew? Student's t over the seeds' means. A model without seeds of its own, a teacher, stands
    beside every seed.

    Returns:
        ``mean``, ``over_tasks`` and ``over_seeds`` ([low, high]; None from a single seed),
        ``seeds``, ``tasks``, and the mean ``by_task``.
    """
    pairs = paired(ours, theirs, part, readout)
    tasks = list(figures(ours[0], part, readout))
    random = np.random.default_rng(0)
    seeds, count = pairs.shape
    drawn = random.integers(count, size=(RESAMPLES, count))
    rows = random.integers(seeds, size=(RESAMPLES, 1, seeds))
    resampled = pairs[rows, drawn[..., None]].mean((1, 2))
    of_seeds = over_seeds(pairs.mean(1).tolist())
    return {
        "mean": float(pairs.mean()),
        "over_tasks": [float(v) for v in np.quantile(resampled, [0.025, 0.975])],
        "over_seeds": None if seeds < 2 else [of_seeds.low, of_seeds.high],
        "seeds": seeds,
        "tasks": count,
        "by_task": dict(zip(tasks, pairs.mean(0).tolist(), strict=True)),
    }


def can_be_paired(ours: Sequence[Run], theirs: Sequence[Run]) -> bool:
    """Whether some seed has been run for both."""
    return bool({run["seed"] for run in ours} & {run["seed"] for run in theirs})


def paired(
    ours: Sequence[Run], theirs: Sequence[Run], part: str, readout: str = "chosen"
) -> NDArray[np.float64]:
    """Differences [seeds, tasks] of the seeds that both have."""
    other = {run["seed"]: run for run in theirs}
    found = []
    for run in ours:
        match = other.get(run["seed"], other.get(None))
        if match is not None:
            a, b = figures(run, part, readout), figures(match, part, readout)
            found.append([a[task] - b[task] for task in a])
    if not found:
        raise ValueError("no seed has been run for both")
    return np.array(found)


def summarise(
    runs: Mapping[str, Sequence[Run]],
    teachers: Mapping[str, Sequence[Run]],
    times: Mapping[str, Any] | None = None,
    of: str = OURS,
) -> dict[str, Any]:
    """The summary of one student's runs.

    Args:
        runs: by variant.
        teachers: by teacher, one "run" each.
        times: what `timing` measured of this student.
        of: the variant whose differences from the others are given.
    """
    kinds = {name: own[0]["kind"] for name, own in runs.items()}
    summary: dict[str, Any] = {
        "means": {name: mean(own, "test") for name, own in runs.items()},
        "validation": {name: mean(own, "validation") for name, own in runs.items()},
        "shared": {name: mean(own, "test", "shared") for name, own in runs.items()},
        **{readout: _by_readout(runs, readout) for readout in READOUTS},
        "deviation_over_seeds": {
            name: float(np.std([mean([run], "test") for run in own], ddof=1))
            for name, own in runs.items()
            if len(own) > 1
        },
        "kinds": kinds,
        "seeds": {name: sorted(run["seed"] for run in own) for name, own in runs.items()},
        "teachers": {name: mean(own, "test") for name, own in teachers.items()},
        "cost": {name: own[0]["cost"] for name, own in runs.items()},
        # The least of the seeds: whatever else the machine did only adds to it.
        "train_seconds": {
            name: min(r["seconds"]["train"] for r in own) for name, own in runs.items()
        },
    }
    if times:
        summary["inference_ms"] = times["settings"]
    # Before training and after it, of the student that all teachers teach by regression.
    summary["cosines"] = {
        when: _means([run["cosines"] for run in runs[name]])
        for when, name in (("start", "random"), ("end", "regression"))
        if name in runs
    }
    if of not in runs:
        return summary
    ours = runs[of]
    others = {name: own for name, own in runs.items() if name != of and can_be_paired(ours, own)}
    summary["against"] = {name: difference(ours, own) for name, own in others.items()} | {
        f"teacher {name}": difference(ours, own) for name, own in teachers.items()
    }
    for readout in ("shared", "pooled"):
        summary[f"against_{readout}"] = {
            name: difference(ours, own, readout=readout) for name, own in others.items()
        }
    rivals = [name for name in others if kinds[name] == "rival"]
    if rivals:
        # On the seeds that both have: a mean of other seeds would be another comparison.
        best = max(rivals, key=lambda name: paired(runs[name], ours, "validation").mean())
        summary["best_rival"] = {"name": best, **summary["against"][best]}
    # What learning from all costs a teacher's own space: its loss beside that of a student that
    # learnt from it alone.
    summary["company"] = {
        name.removeprefix("only_"): _cost_of_company(runs["regression"], own)
        for name, own in runs.items()
        if kinds[name] == "teacher" and can_be_paired(runs.get("regression", ()), own)
    }
    return summary


def _means(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: float(np.mean([one[key] for one in found])) for key in found[0]}


def _cost_of_company(joint: Sequence[Run], alone: Sequence[Run]) -> dict[str, float]:
    """Mean losses on the spaces that were learnt alone, of the seeds that both have."""
    spaces = list(alone[0]["losses"])
    seeds = {run["seed"] for run in joint} & {run["seed"] for run in alone}
    return {
        name: float(np.mean([r["losses"][s] for r in runs if r["seed"] in seeds for s in spaces]))
        for name, runs in (("joint", joint), ("alone", alone))
    }


def rows(summary: Mapping[str, Any]) -> list[list[Any]]:
    """The table of one student: name, kind, figures, cost, and ours minus it."""
    found: list[list[Any]] = []
    against = summary.get("against", {})
    for name, value in sorted(summary["means"].items(), key=lambda item: -item[1]):
        found.append(
            [
                name,
                summary["kinds"][name],
                summary["validation"][name],
                value,
                summary["shared"][name],
                summary["pooled"][name],
                summary["cost"][name]["student"] / 1e6,
                summary["cost"][name]["operations"] / 1e6,
                text(against.get(name)),
            ]
        )
    for name, value in summary["teachers"].items():
        of_teacher = text(against.get(f"teacher {name}"))
        found.append([name, "teacher", None, value, *(None,) * 4, of_teacher])
    return found


def text(difference: Mapping[str, Any] | None) -> str:
    """A difference with its interval over seeds; over tasks, as it then says, of a single one."""
    if difference is None:
        return "–"
    low, high = difference["over_seeds"] or difference["over_tasks"]
    over = "" if difference["over_seeds"] else " over tasks"
    return f"{difference['mean']:+.2f} [{low:+.2f}, {high:+.2f}]{over}"
