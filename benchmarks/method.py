"""Model tokens against every other alignment, their controls, single teachers and references.

    python benchmarks/testbed/make.py --out outputs/testbed
    python benchmarks/method.py --bed outputs/testbed --json benchmarks/results/method.json

Every run is `preceptor train` on the bed's pool: the same steps, images, order and initial weights
a seed. Its readouts are reduced to one width without labels, and probes, regularisation and readout
are chosen on validation; docs/method.md has the protocol. A finished run is kept in --out and not
done again, a begun one goes on, so the matrix can be collected over several sittings: with --report
the table is made of what there is. --runs names a file of finished runs that is read beside --out
and completed from it, so that it can be collected on several machines too. --judge judges runs anew
whose bed's tasks have changed since. --time measures how long the students take at inference.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from preceptor.benchmarks.comparison import records, report, stores, timing
from preceptor.benchmarks.comparison.bed import Bed
from preceptor.benchmarks.comparison.judge import WIDTH, judge
from preceptor.benchmarks.comparison.options import changed, trained_with
from preceptor.benchmarks.comparison.plan import PRECISION, PRECISIONS, Plan
from preceptor.benchmarks.comparison.records import Record
from preceptor.benchmarks.comparison.runs import RESULT, TAUGHT, judge_anew, run
from preceptor.benchmarks.comparison.variants import (
    LARGER,
    OURS,
    STUDENTS,
    Variant,
    choose,
    variants,
)
from preceptor.benchmarks.harness import machine, save, show, side_by_side
from preceptor.benchmarks.testbed import shards
from preceptor.errors import ConfigError, PreceptorError
from preceptor.train.checkpoint import write_json

COLUMNS = ("variant", "kind", "validation", "test", "without tokens", "pooled", "M param.", "M op.",
           "model_token − it")  # fmt: skip


def compare(
    plan: Plan,
    students: Sequence[str],
    chosen: Mapping[str, Variant],
    seeds: Sequence[int],
    kept: Path | None = None,
) -> None:
    """Do every run that is not there; seed by seed, so that whatever is done can be paired.

    Args:
        kept: a file of finished runs, which are not done again.

    Raises:
        ConfigError: a run that is there was trained with other options than its variant has today.
    """
    elsewhere = records.read(plan, kept)
    for seed in seeds:
        for name, variant in chosen.items():
            for student in [name for name in students if name in variant.students]:
                folder = plan.folder(student, name, seed)
                known, then, where = None, trained_with(folder), str(folder)
                if not (folder / RESULT).exists():
                    known = elsewhere.get((student, name, seed))
                    then = known["options"] if known else {}
                    where = f"{kept}: {_name(student, name, seed)}"
                if told := changed(then, student, variant, plan.options):
                    raise ConfigError(
                        f"{where} was trained with {_told(told)}: move it away to do it anew"
                    )
                found = known or run(plan, student, name, variant, seed)
                figure = report.mean([found], "test")
                print(
                    f"{student} {name} s{seed}: {figure:.2f} in {found['seconds']['all']:.0f} s",
                    flush=True,
                )


def _told(differences: Mapping[str, Sequence[Any]]) -> str:
    return ", ".join(f"{key}={a}, not {b}" for key, (a, b) in differences.items())


def _name(student: str, variant: str, seed: int) -> str:
    return f"{student}/{variant}/s{seed}"


def other_options(plan: Plan, found: Sequence[Record]) -> dict[str, dict[str, list[Any]]]:
    """By run, what it was trained with and its variant of today would not be."""
    known = variants(plan.bed.teachers)
    differing = {}
    for record in found:
        student, name, _ = records.identity(record)
        if name not in known:
            continue
        if told := changed(record["options"], student, known[name], plan.options):
            differing[_name(*records.identity(record))] = told
    return differing


def teachers_of(plan: Plan, workers: int = 1) -> dict[str, list[dict[str, Any]]]:
    """Every teacher judged from the stores, once.

    Args:
        workers: teachers judged at a time, by processes of their own.
    """
    path = plan.out / "teachers.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if kept.get("bed") != plan.bed.identity:
        names = plan.bed.teachers
        found = side_by_side(_judge_teacher, [(plan.bed.folder, name) for name in names], workers)
        scores = dict(zip(names, found, strict=True))
        kept = {"bed": plan.bed.identity, "scores": scores}
        write_json(path, kept)
    return {name: [{"scores": own, "seed": None}] for name, own in kept["scores"].items()}


def _judge_teacher(folder: Path, name: str) -> dict[str, Any]:
    return dict(judge(Bed(folder), Bed(folder).teacher(name)))


def judge_all(plan: Plan) -> None:
    """Judge anew every finished run that was judged on other tasks, and train nothing."""
    for pattern in (f"*/*/s*/{RESULT}", f"stores/*/*/*/s*/{RESULT}"):
        for path in sorted(plan.out.glob(pattern)):
            name = path.parents[1].name
            if name == TAUGHT:
                print(f"{path.parent}: taught by labels; do it again", flush=True)
                continue
            found = judge_anew(plan, path.parent)
            figure = report.mean([found], "test")
            print(f"{path.parents[2].name} {name} {path.parent.name}: {figure:.2f}", flush=True)


def results(
    plan: Plan,
    found: Sequence[Record],
    teachers: Mapping[str, Sequence[report.Run]],
    of: str = OURS,
) -> dict[str, Any]:
    """Everything that is there, as JSON.

    Args:
        teachers: what `teachers_of` gave.
        of: the variant whose differences from the others are given.
    """
    times = timing.collect(plan)
    runs: dict[str, dict[str, list[Record]]] = {}
    for record in found:
        student, name, _ = records.identity(record)
        runs.setdefault(student, {}).setdefault(name, []).append(record)
    others = other_options(plan, found)
    for name, told in others.items():
        print(f"{name} was trained with {_told(told)}", file=sys.stderr)
    summary: dict[str, Any] = {
        student: report.summarise(own, teachers, times.get(student), of)
        for student, own in runs.items()
    }
    return {
        "protocol": {
            "steps": plan.steps,
            "precision": plan.precision,
            "options": list(plan.options),
            "width": WIDTH,
            "pool": plan.bed.facts["plan"]["pool"],
            "tasks": plan.bed.tasks,
            "students": {name: list(own) for name, own in {**STUDENTS, **LARGER}.items()},
            "variants": {
                name: {
                    "kind": v.kind,
                    "options": list(v.options),
                    "of_student": v.of_student or {},
                    "says": v.says,
                }
                for name, v in variants(plan.bed.teachers).items()
            },
        },
        "other_options": others,
        "machine": machine(("numpy", "torch", "timm", "scikit-learn")),
        "specialists": plan.bed.facts["specialists"],
        "by_task": {
            student: {name: report.by_task(own) for name, own in by_variant.items()}
            for student, by_variant in {**runs, "teachers": teachers}.items()
        },
        "stores": stores.collect(plan),
        "times": times,
        "summary": summary,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bed", type=Path, default=Path("outputs/testbed"))
    parser.add_argument("--out", type=Path, default=None, help="runs; BED/method-STEPS by default")
    parser.add_argument("--students", default=",".join(STUDENTS))
    parser.add_argument("--variants", default="all", help="names or kinds, or none")
    parser.add_argument("--of", default=OURS, help="the variant whose differences are shown")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from --first-seed on")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--precision", choices=PRECISIONS, default=PRECISION, help="of training")
    parser.add_argument("--option", action="append", default=[], help="of preceptor train, for "
                        "every run, over its variant's; repeatable")  # fmt: skip
    parser.add_argument("--stores", default="", help="also of regression: fp16,int8,compact,int4,"
                        "views1,views2,views4,online")  # fmt: skip
    parser.add_argument("--time", action="store_true", help="also time the students' inference, on "
                        "a machine that does nothing else")  # fmt: skip
    parser.add_argument("--judge", action="store_true", help="as --report, after judging anew what "
                        "was judged on another bed's tasks")  # fmt: skip
    parser.add_argument("--report", action="store_true", help="run nothing: the table of what is")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: its own choice")
    parser.add_argument("--runs", type=Path, default=None, help="a file of finished runs, read "
                        "beside --out and completed from it")  # fmt: skip
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    bed = Bed(options.bed)
    out = options.out or options.bed / f"method-{options.steps}"
    store = options.bed / "stores" / "pool"
    pool, also = _pool(options.bed), tuple(options.option)
    plan = Plan(bed, out, options.steps, store, pool, options.precision, also)
    try:
        chosen = choose(options.variants, variants(bed.teachers))
        students = options.students.split(",")
        if unknown := set(students) - set(STUDENTS):
            raise ConfigError(f"--students {', '.join(unknown)}: there are {', '.join(STUDENTS)}")
        if options.time:
            timing.keep(plan, students, variants(bed.teachers))
        seeds = range(options.first_seed, options.first_seed + options.seeds)
        if options.judge:
            judge_all(plan)
        elif not options.report:
            compare(plan, students, chosen, seeds, options.runs)
            if options.stores:
                names, own = options.stores.split(","), variants(bed.teachers)["regression"]
                stores.compare(plan, names, students, seeds, "regression", own)
        gathered = records.gather(plan, options.runs)
        if options.runs is not None:
            records.keep(options.runs, gathered)
        choose(options.of, variants(bed.teachers))
        found = results(plan, gathered, teachers_of(plan), options.of)
    except PreceptorError as error:
        sys.exit(str(error))
    for student, summary in found["summary"].items():
        columns = (*COLUMNS[:-1], f"{options.of} − it")
        show(f"{student}: mean over {len(bed.tasks)} tasks, %", columns, report.rows(summary))
        if student in found["times"]:
            times = found["times"][student]
            columns = ("variant", *times["settings"])
            show(f"{student}: ms of a pass (ratio to ours)", columns, timing.rows(times))
    if found["stores"]:
        columns = ("student", "store", "test", "difference", "to", "held-out loss")
        show("what the cache costs", columns, stores.rows(found["stores"]))
    save(options.json, found)


def _pool(bed: Path) -> str:
    return shards.pattern(bed / "pool")


if __name__ == "__main__":
    main()
