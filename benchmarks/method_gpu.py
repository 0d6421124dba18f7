"""The comparison of docs/method.md at a larger scale, on one CUDA device, by one command.

    pip install 'preceptor[testbed]'
    python benchmarks/method_gpu.py --json benchmarks/results/method_gpu.json
    python benchmarks/method_gpu.py --rehearse      # the same, tiny, on a CPU

Makes a bed of 32,000 images of 112 pixels (images, specialists, stores), trains ResNet-50 and
ViT-S/16 from scratch by every alignment in turn, several runs side by side on the device, judges
them and their teachers as `method.py` does, and writes what there is when --deadline is near. What
failed is named in the result with its last lines. What is whole already is kept and not done again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from preceptor.benchmarks import device_timing
from preceptor.benchmarks.comparison import records, report
from preceptor.benchmarks.comparison.bed import Bed
from preceptor.benchmarks.comparison.plan import PRECISION, Plan
from preceptor.benchmarks.comparison.side_by_side import (
    Job,
    begin,
    end,
    oversee,
    queue,
    start,
    tail,
    unfinished,
    work,
)
from preceptor.benchmarks.comparison.variants import LARGER, variants
from preceptor.benchmarks.harness import save, show
from preceptor.benchmarks.method import COLUMNS, results, teachers_of
from preceptor.benchmarks.testbed import shards
from preceptor.engine import decoders
from preceptor.errors import PreceptorError, first_line

MAKE = Path(__file__).resolve().parent / "testbed" / "make.py"
REPORT = 45.0
"""Seconds before the deadline at which runs are ended for the report."""
REHEARSAL = (
    "--device=cpu", "--size=48", "--pool=160", "--share=0.1", "--course=96", "--steps=2",
    "--processes=2", "--workers=2", "--seeds=1", "--deadline=1200",
    "--option=recipe.batch_size=8", "--variants=model_token,regression,random",
)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The options, for every process of the comparison alike."""
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--bed", type=Path, default=None, help="outputs/testbed-SIZE by default")
    found.add_argument("--out", type=Path, default=None, help="runs; BED/method-gpu-STEPS")
    found.add_argument("--json", type=Path, default=None)
    found.add_argument("--runs", type=Path, default=None, help="a file for the finished runs' own "
                       "figures, a line a run")  # fmt: skip
    found.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    found.add_argument("--size", type=int, default=112, help="side of all images in pixels")
    found.add_argument("--pool", type=int, default=32000, help="unlabelled images")
    found.add_argument("--share", type=float, default=1.0, help="of every task's images")
    found.add_argument("--course", type=int, default=6000, help="images of every specialist")
    found.add_argument("--packaged", action=argparse.BooleanOptionalAction, default=True,
                       help="whether there are the three pretrained teachers")  # fmt: skip
    found.add_argument("--students", default=",".join(LARGER))
    found.add_argument("--variants", default="", help="those of the queue that are run; all")
    found.add_argument("--steps", type=int, default=1500)
    found.add_argument("--seeds", type=int, default=2, help="of the first three alignments")
    found.add_argument("--option", action="append", default=[], help="of preceptor train, for "
                       "every run; repeatable")  # fmt: skip
    found.add_argument("--processes", type=int, default=6, help="runs at a time")
    found.add_argument(
        "--workers", type=int, default=decoders("auto"), help="processes that draw and decode"
    )
    found.add_argument("--deadline", type=float, default=480, help="seconds for everything: no run "
                       "is begun that would not end before it")  # fmt: skip
    found.add_argument("--rehearse", action="store_true", help="tiny, on a CPU; measures nothing")
    found.add_argument("--part", choices=("runs", "teachers"), help=argparse.SUPPRESS)
    found.add_argument("--until", type=float, help=argparse.SUPPRESS)
    return found


def plan_of(options: argparse.Namespace) -> Plan:
    """What all runs share.

    Raises:
        DataError: the bed is not whole.
    """
    bed = Bed(options.bed)
    cuda = options.device == "cuda"
    own = (
        f"student.size={bed.facts['size']}",
        "recipe.checkpoint_every=750",  # a state is large; a later sitting goes on from the last
        "recipe.log_every=100",
        *options.option,
    )
    return Plan(
        bed,
        options.out,
        options.steps,
        options.bed / "stores" / "pool",
        shards.pattern(options.bed / "pool"),
        PRECISION if cuda else "32-true",
        own,
        "cuda" if cuda else "cpu",
    )


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """What is to be run, the most important first."""
    names = options.variants.split(",") if options.variants else ()
    return queue(options.students.split(","), options.seeds, names)


def do_runs(options: argparse.Namespace) -> None:
    """One of the processes that train and judge students."""
    plan = plan_of(options)
    torch.set_num_threads(_threads(options))

    def best() -> str | None:
        if not (plan.out / "teachers.json").exists():
            return None
        teachers = teachers_of(plan)
        return max(teachers, key=lambda name: report.mean(teachers[name], "validation"))

    work(plan, jobs_of(options), variants(plan.bed.teachers), options.until, best)


def _threads(options: argparse.Namespace) -> int:
    """Of each process, which shares the cores with the others."""
    return max(1, options.workers // options.processes)


def make_bed(options: argparse.Namespace, until: float) -> list[dict[str, Any]]:
    """Make the bed where it is not whole, in a process of its own, whose memory on the device is
    free afterwards; what failed, as `oversee`."""
    if (options.bed / "bed.json").exists():
        return []
    command = [
        sys.executable, str(MAKE), "--out", str(options.bed), "--one-store",
        "--size", str(options.size), "--pool", str(options.pool), "--share", str(options.share),
        "--course", str(options.course), "--device", options.device,
        "--workers", str(options.workers),
        "--packaged" if options.packaged else "--no-packaged",
    ]  # fmt: skip
    log = options.bed.with_name(options.bed.name + ".log")
    print(f"the bed is made in {options.bed}; {log} tells how far it is", flush=True)
    process = start(command, log)
    try:
        process.wait(max(1.0, until - time.time()))
    except subprocess.TimeoutExpired:
        print("the bed is not whole, and the time is over", flush=True)
    finally:
        end(process)
    if not process.returncode:
        return []
    told = {"command": " ".join(command), "status": process.returncode, "output": tail(log)}
    return [told]


def collect(options: argparse.Namespace, plan: Plan) -> dict[str, Any]:
    """The figures of all runs that are there, as `method.py` has them, and what they cost."""
    finished = records.gather(plan)
    if options.runs is not None:
        records.keep(options.runs, finished)
    judged = (plan.out / "teachers.json").exists()
    found = results(plan, finished, teachers_of(plan) if judged else {})
    found["runs"] = [
        {key: record.get(key) for key in ("student", "variant", "seed", "seconds", "speed", "cost",
                                          "losses", "train_losses")}
        for record in finished
    ]  # fmt: skip
    found["by_seed"] = {
        f"{record['student']}/{record['variant']}/s{record['seed']}": report.by_task([record])
        for record in finished
    }
    of_bed = ("plan", "size", "seconds", "machine", "peak_gpu_mb")
    found["bed"] = {key: plan.bed.facts.get(key) for key in of_bed}
    found["extraction"] = {}
    for path in sorted((options.bed / "stores").glob("*.extract.json")):
        told = json.loads(path.read_text(encoding="utf-8"))
        keys = ("rows", "seconds", "rows_per_second", "bytes_per_row", "device", "peak_memory_mb")
        found["extraction"][path.name.removesuffix(".extract.json")] = {k: told[k] for k in keys}
    return found


def everything(options: argparse.Namespace, arguments: Sequence[str]) -> bool:
    """All stages; whether nothing failed. The result is written whatever happens."""
    started = time.time()
    until = started + options.deadline - REPORT
    seconds: dict[str, float] = {}
    result: dict[str, Any] = {"summary": {}, "failures": [], "seconds": seconds}
    try:
        result = {**device_timing.describe(options.device), **result}
        result["failures"] += make_bed(options, until)
        seconds["bed"] = time.time() - started
        device_timing.write(options.json, result)
        begun = time.time()
        plan = plan_of(options)
        print(
            f"bed {plan.bed.identity}; {plan.out / 'logs'} tells how far the runs are", flush=True
        )
        begin(plan)
        again = [sys.executable, str(Path(__file__).resolve()), *arguments, "--until", str(until)]
        processes = [[*again, "--part", "runs"]] * options.processes
        processes.append([*again, "--part", "teachers"])
        result["failures"] += oversee(processes, plan.out / "logs", until, _threads(options))
        seconds["runs"] = time.time() - begun
        result["failures"] += unfinished(plan, jobs_of(options))
        begun = time.time()
        result.update(collect(options, plan))
        seconds["report"] = time.time() - begun
    except PreceptorError as error:
        result["failures"].append({"error": str(error)})
    except Exception as error:
        result["failures"].append({"error": f"{type(error).__name__}: {first_line(error)}"})
        raise
    finally:
        seconds["all"] = time.time() - started
        save(options.json, result)
    for student, summary in result["summary"].items():
        show(f"{student}: mean over tasks, %", COLUMNS, report.rows(summary))
    for failure in result["failures"]:
        name = failure.get("run") or failure.get("command") or "the comparison"
        told = failure.get("error") or f"status {failure.get('status')}"
        print(f"{name}: {told}\n{failure.get('output', '')}", file=sys.stderr)
    return not result["failures"]


def main(argv: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parser().parse_args(arguments)
    if options.rehearse and options.part is None:
        # What was said beside it counts.
        arguments = [*REHEARSAL, *arguments]
        options = parser().parse_args(arguments)
        if options.bed is None:
            options.bed = Path(tempfile.mkdtemp(prefix="rehearsal-")) / "bed"
            arguments += ["--bed", str(options.bed)]
    options.bed = options.bed or Path("outputs") / f"testbed-{options.size}"
    options.out = options.out or options.bed / f"method-gpu-{options.steps}"
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device is available: --rehearse does the same, tiny, on a CPU")
    if options.part == "runs":
        do_runs(options)
    elif options.part == "teachers":
        teachers_of(plan_of(options), workers=max(1, options.workers // 5))
    elif not everything(options, arguments):
        sys.exit(1)


if __name__ == "__main__":
    main()
