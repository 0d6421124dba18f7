"""One run of an ablation, in a process of its own: train, evaluate, leave a result or a reason.

python -m preceptor.train.ablate.job FOLDER
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ...engine import IN_POOL, in_pool
from ...errors import DataError, PreceptorError, first_line
from ..checkpoint import write_json
from ..claim import claimed
from ..stop import NOTICES
from .devices import own_device, visible_devices
from .stopping import handle, leave_to_the_pool, stop_asked

TRAIN, EVAL = "train.yaml", "eval.yaml"
"""What the run is: composed configurations of the two commands."""
RESULT, FAILURE, LOG = "result.json", "failure.json", "log.txt"
_GLANCE = 1.0
"""Seconds after which a process of a pool looks again whether its run is to stop."""


def enter(config: DictConfig) -> None:
    """What a Hydra launcher calls, here or on another machine: one run of an ablation."""
    launched(Path(config.out).absolute(), str(config.job))


def launched(out: Path, name: str) -> None:
    """Do one run of an ablation and say how it went; it never raises for a run that failed."""
    started = time.time()
    reason = run_apart(out / "runs" / name)
    plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    ended = [
        name
        for name in plan["todo"]
        if any((out / "runs" / name / file).exists() for file in (RESULT, FAILURE))
    ]
    left = len(plan["todo"]) - len(ended)
    rest = (time.time() - plan["started"]) / max(1, len(ended)) * left
    how = f"failed: {reason}" if reason else f"done in {time.time() - started:.0f} s"
    print(
        f"[{len(ended)}/{len(plan['todo'])}] {name}: {how}"
        + (f"; about {rest:.0f} s left" if left and not stop_asked(out / "runs" / name) else ""),
        file=sys.stderr,
        flush=True,
    )


def run_apart(folder: Path) -> str | None:
    """Do a run in a process of its own, so that nothing which it does can stop another.

    Returns:
        Why it failed, in one sentence; None if it has a result.

    Raises:
        KeyboardInterrupt, SystemExit: this process was asked to stop, or is of a pool (joblib's)
            whose own process has ended; the run has ended, or was not begun.
        Exception: what submitit's handler of a notice raises, where it submits the job again.
    """
    with claimed(folder) as other:
        return f"is being done by {other}" if other else _run_apart(folder)


def _run_apart(folder: Path) -> str | None:
    pooled = multiprocessing.parent_process() is not None
    if pooled:
        leave_to_the_pool()
    if (folder / RESULT).exists():
        return None
    if _left_alone():
        raise SystemExit(128 + signal.SIGTERM)
    if stop_asked(folder):
        return "was not begun, as the ablation was asked to stop"
    (folder / FAILURE).unlink(missing_ok=True)
    with (folder / LOG).open("a", encoding="utf-8") as log:
        # -P: the folder that the user stands in is no place to import from.
        command = [sys.executable, "-P", "-m", "preceptor.train.ablate.job", str(folder)]
        own = {**os.environ, **({IN_POOL: "1"} if in_pool() else {})}
        quiet = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        if pooled:
            with own_device(folder.parent, visible_devices()) as device:
                status, asked = _run_for_a_pool(command, folder, env={**own, **device}, **quiet)
        else:
            status, asked = _run(command, env=own, **quiet)
    if not any((folder / file).exists() for file in (RESULT, FAILURE)):
        how = f"ended with status {status} before its result"
        if status == 0:
            how = "was stopped and is saved: the same command goes on"
        if status < 0:
            how = f"was ended by {signal.Signals(-status).name}"
        write_json(folder / FAILURE, {"error": f"{how}; see {folder / LOG}"})
    raise_for(asked)
    return read_failure(folder)


def raise_for(asked: int | None) -> None:
    """End as a process does that got a signal; go on where there was none.

    A notice goes to whoever handles it beside us.

    Raises:
        KeyboardInterrupt, SystemExit: there was one.
    """
    if asked == signal.SIGINT:
        raise KeyboardInterrupt
    if asked in NOTICES:
        signal.raise_signal(asked)
    elif asked is not None:
        raise SystemExit(128 + asked)


def _run(command: Sequence[str], **options: Any) -> tuple[int, int | None]:
    """Run a command to its end, however this process is asked to stop meanwhile.

    The first signal is passed on, so that the command can save what it did; the second kills it.
    Under srun neither is done: it tells the command itself, and kills it after a while.
    The command has a process group of its own: what a terminal sends reaches it from here alone,
    once.

    Returns:
        (its exit status, negative for a signal; the signal that this process got, if any; a notice
        before others, for whoever handles it submits the job again)
    """
    got: list[int] = []
    child: subprocess.Popen[bytes] | None = None
    told = _told_by_slurm()

    def pass_on(number: int, frame: FrameType | None) -> None:
        got.append(number)
        if child is None or told:
            return
        if len(got) > 1:
            child.kill()
        else:
            child.send_signal(number)

    before = handle(pass_on)
    try:
        child = subprocess.Popen(command, process_group=0, **options)
        if got and not told:  # before there was a child to tell
            child.send_signal(got[0])
        status = child.wait()
        return status, next((n for n in got if n in NOTICES), got[0] if got else None)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run_for_a_pool(command: Sequence[str], folder: Path, **options: Any) -> tuple[int, int | None]:
    """Run a command to its end; it is asked to stop where the ablation is, or has ended.

    No signal tells a process of a pool, and nobody would wait for the run.

    Returns:
        (its exit status, SIGTERM if it was asked because nobody is there any more)
    """
    child = subprocess.Popen(command, process_group=0, **options)
    asked = alone = False
    while True:
        try:
            return child.wait(_GLANCE), signal.SIGTERM if alone else None
        except subprocess.TimeoutExpired:
            alone = _left_alone()
            if not asked and (alone or stop_asked(folder)):
                asked = True
                if not _told_by_slurm():
                    child.send_signal(signal.SIGTERM)


def _told_by_slurm() -> bool:
    """Whether srun itself signals every process of the step that this one is of."""
    return "SLURM_STEP_ID" in os.environ


def _left_alone() -> bool:
    """Whether this process was started by one of `multiprocessing`'s or joblib's that has ended."""
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid is None:
        return False
    try:
        os.kill(parent.pid, 0)  # sends nothing
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's: it is there
        pass
    return False


def read_result(folder: Path) -> dict[str, Any]:
    """What `work` wrote.

    Raises:
        DataError: it is damaged.
    """
    path = folder / RESULT
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged: remove it, and the run is done again") from error
    return found


def read_failure(folder: Path) -> str | None:
    """Why the run of a folder failed; None where it did not."""
    path = folder / FAILURE
    return json.loads(path.read_text(encoding="utf-8"))["error"] if path.exists() else None


def work(folder: Path) -> dict[str, Any]:
    """Train and evaluate as the folder says, and write its result.

    Raises:
        PreceptorError: as training and evaluation do.
    """
    from ..evaluation.run import evaluate, read_resamples
    from ..loop import train

    configs = [OmegaConf.load(folder / name) for name in (TRAIN, EVAL)]
    assert all(isinstance(config, DictConfig) for config in configs)
    trained = train(configs[0])  # type: ignore[arg-type]
    evaluated = evaluate(configs[1])  # type: ignore[arg-type]
    scores: dict[str, float] = {}
    resampled: dict[str, list[float]] = {}
    drawn = read_resamples(Path(configs[1].out)) or [{} for _ in evaluated["rows"]]
    for row, on_resamples in zip(evaluated["rows"], drawn, strict=True):
        if row["kind"] == "student":
            # By the width that was asked for: a narrower feature has one `dim` at several.
            readout = f"{row['readout']}-{row['width']}" if row["reduced"] else row["readout"]
            for score in row["scores"]:
                name = f"{readout}/{score['key']}"
                scores[name] = score["value"]
                if score["key"] in on_resamples:
                    resampled[name] = on_resamples[score["key"]].tolist()
    result = {"train": trained, "scores": scores, "resampled": resampled}
    write_json(folder / RESULT, result)
    return result


def main(folder: Path) -> int:
    """Entry point of the process; returns the exit status."""
    try:
        work(folder)
    except PreceptorError as error:
        write_json(folder / FAILURE, {"error": str(error)})
        print(error, file=sys.stderr)
        return 1
    except Exception as error:
        traceback.print_exc()
        what = f"{type(error).__name__}: {first_line(error)}; see {folder / LOG}"
        write_json(folder / FAILURE, {"error": what})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
