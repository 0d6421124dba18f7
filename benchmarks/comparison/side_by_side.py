"""Runs of a comparison side by side on one device: processes that take them from one list."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ...errors import PreceptorError, first_line
from ...kernels.availability import NO_TRITON
from ...train.checkpoint import write_json
from .plan import Plan
from .runs import RESULT, UNTRAINED, run
from .variants import OURS, Variant

FIRST, FURTHER = (OURS, "regression", "masked"), ("ladder", "relational", "attention_pool")
BEST_TEACHER = "only the best teacher"
"""Stands for the variant of the teacher that is best on validation, which is known later."""
TAIL = 4000
"""Characters of a failed run's output that are kept."""
TAKEN, AGAIN, FAILURES = "taken", "again", "failed"
"""Folders of the runs' folder: a file a job that a process has taken, has taken once more after it
had failed, or that failed."""
FAILED, STARTS = 3, 4
"""The status of a process whose run failed, and how often a process is started."""


@dataclass(frozen=True)
class Job:
    """A run to be done."""

    student: str
    variant: str
    seed: int

    def __str__(self) -> str:
        return f"{self.student}-{self.variant.replace(' ', '-')}-s{self.seed}"


def queue(students: Sequence[str], seeds: int = 2, names: Sequence[str] = ()) -> list[Job]:
    """What is run, the most important first, students in turn.

    Ours, the two rivals that came nearest to it on the small bed and the untrained student, of seed
    0; the first three of further seeds; the other rivals; and regression from the best teacher.

    Args:
        names: of the variants that are run; all of these where there are none.
    """
    rounds = [(name, 0) for name in (*FIRST, UNTRAINED)]
    rounds += [(name, seed) for seed in range(1, seeds) for name in FIRST]
    rounds += [(name, 0) for name in (*FURTHER, BEST_TEACHER)]
    chosen = [(name, seed) for name, seed in rounds if not names or name in names]
    return [Job(student, name, seed) for name, seed in chosen for student in students]


def work(
    plan: Plan,
    jobs: Sequence[Job],
    known: Mapping[str, Variant],
    until: float,
    best: Callable[[], str | None],
) -> None:
    """Do the jobs that nobody has taken, until they or the time are at an end; in each of several
    processes.

    What a run prints goes to a file of its own. One that fails leaves its last lines; a process
    that was begun anew, which does without Triton, tries it once more.

    Args:
        known: variants by name.
        until: when all is to be done, as `time.time` counts. No run is begun that took another one
            of its student longer than what is left.
        best: name of the best teacher, None while it is not known.

    Raises:
        SystemExit: with `FAILED` after a run that failed, which may have left the device unusable
            to this process.
    """
    for job in jobs:
        name = job.variant
        if name == BEST_TEACHER:
            teacher = best()
            while teacher is None and time.time() < until:
                time.sleep(1)
                teacher = best()
            name = f"only_{teacher}"
        if (plan.folder(job.student, name, job.seed) / RESULT).exists():
            continue
        if time.time() + _expected(plan, job) > until or not _take(plan, job):
            continue
        with _printing_to(log_of(plan, job)):
            try:
                with _on_device(plan):
                    run(plan, job.student, name, known[name], job.seed)
                _done(plan, job)
            except (Exception, SystemExit) as error:
                if not isinstance(error, PreceptorError):
                    traceback.print_exc()
                # What was printed is on disk only once it has left this process.
                sys.stdout.flush()
                sys.stderr.flush()
                _fail(plan, job, first_line(error))
                raise SystemExit(FAILED) from error


def oversee(
    commands: Sequence[Sequence[str]], folder: Path, until: float, threads: int = 0
) -> list[dict[str, Any]]:
    """Run commands side by side until the last has ended or it is time, when all are ended.

    One that fails is begun anew, `STARTS` times in all, and then does without Triton: what of a
    run depends on the device most are its kernels.

    Args:
        folder: of their output, a file each.
        threads: of each one's libraries for arrays; 0 leaves it to them.

    Returns:
        Of the processes that failed, but not for a run, the ``command``, its ``status`` and the
        end of its ``output``.
    """
    failures: list[dict[str, Any]] = []
    running = {
        number: start(command, folder / f"{number}.log", threads)
        for number, command in enumerate(commands)
    }
    starts = dict.fromkeys(running, 1)
    try:
        while running and time.time() < until:
            time.sleep(0.2)
            for number, process in list(running.items()):
                status = process.poll()
                if status is None:
                    continue
                del running[number]
                if status not in (0, FAILED):
                    failures.append(
                        {
                            "command": " ".join(commands[number]),
                            "status": status,
                            "output": tail(folder / f"{number}.log"),
                        }
                    )
                if status and starts[number] < STARTS:
                    starts[number] += 1
                    running[number] = start(
                        commands[number], folder / f"{number}.log", threads, {NO_TRITON: "1"}
                    )
    finally:
        for process in running.values():
            end(process)
    return failures


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process of `start` with all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def start(
    command: Sequence[str], log: Path, threads: int = 0, variables: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a process whose output is added to a file; arguments as those of `oversee`.

    Args:
        variables: of its environment, beside those of this process.
    """
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS") if threads else ()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        return subprocess.Popen(
            list(command),
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **dict.fromkeys(names, str(threads)), **(variables or {})},
            start_new_session=True,  # so that it can be ended with its own processes
        )


def begin(plan: Plan) -> None:
    """Forget who had taken what, before the first process is started."""
    for folder in (TAKEN, AGAIN, FAILURES):
        for path in (plan.out / folder).glob("*"):
            path.unlink()


def unfinished(plan: Plan, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """The runs that failed or were not done with when the time was over, with the end of what they
    printed."""
    found = []
    for job in jobs:
        failed, taken = (plan.out / folder / str(job) for folder in (FAILURES, TAKEN))
        if failed.exists():
            found.append(json.loads(failed.read_text(encoding="utf-8")))
        elif taken.exists() and not taken.read_text(encoding="utf-8"):
            what = "it was not done with when the time was over, and goes on when asked for again"
            found.append({"run": str(job), "error": what, "output": tail(log_of(plan, job))})
    return found


@contextmanager
def _on_device(plan: Plan) -> Iterator[None]:
    """Where one run of several computes."""
    if plan.place.type != "cuda":
        yield
        return
    torch.cuda.init()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    if os.environ.get(NO_TRITON) or find_spec("triton") is None:
        yield
        return
    from ...kernels import autotune

    # Beside others the times of a kernel's configurations say little, and take theirs.
    with autotune.only(0):
        yield


def log_of(plan: Plan, job: Job) -> Path:
    """What a run prints."""
    return plan.out / "logs" / f"{job}.log"


def tail(path: Path) -> str:
    """The end of a file; nothing where there is none."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    # A progress line is many lines that end where the next one begins.
    lines = [line.rpartition("\r")[2] for line in text.replace("\r\n", "\n").split("\n")]
    return "\n".join(lines)[-TAIL:]


def _expected(plan: Plan, job: Job) -> float:
    """Seconds of the longest run of a student that is done; of an untrained one, of its judging."""
    results = [
        json.loads(path.read_text(encoding="utf-8"))["seconds"]
        for path in plan.out.glob(f"{job.student}/*/s*/{RESULT}")
    ]
    judging = job.variant == UNTRAINED
    return max((own["all"] - own["train"] * judging for own in results), default=0.0)


def _take(plan: Plan, job: Job) -> bool:
    """Whether a job is this process's: nobody has taken it, or it failed and is tried again."""
    if _claim(plan.out / TAKEN, job):
        return True
    failed = bool(os.environ.get(NO_TRITON)) and (plan.out / FAILURES / str(job)).exists()
    return failed and _claim(plan.out / AGAIN, job)


def _done(plan: Plan, job: Job) -> None:
    (plan.out / TAKEN / str(job)).write_text("done\n", encoding="utf-8")
    failed = plan.out / FAILURES / str(job)
    if failed.exists():
        told = json.loads(failed.read_text(encoding="utf-8"))
        write_json(failed, {**told, "then": "it was done without Triton"})


def _claim(folder: Path, job: Job) -> bool:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        os.close(os.open(folder / str(job), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    return True


def _fail(plan: Plan, job: Job, sentence: str) -> None:
    told = {"run": str(job), "error": sentence, "output": tail(log_of(plan, job))}
    write_json(plan.out / FAILURES / str(job), told)


@contextmanager
def _printing_to(path: Path) -> Iterator[None]:
    """Both outputs of this process, and of those that it starts, go to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    before = [os.dup(number) for number in (1, 2)]
    with path.open("a", encoding="utf-8") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, kept in zip((1, 2), before, strict=True):
                os.dup2(kept, number)
                os.close(kept)
