"""The whole job on the embedded images: two teachers, one store, two students, a table, a picture.

Runs the same `preceptor` commands a user would type, from the repository's root, and prints them.
A second run finds the store complete and only trains and evaluates again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
SHARDS = {
    "train": "examples/data/fashion-mnist/train-{000000..000003}.tar.gz",
    "test": "examples/data/fashion-mnist/test-000000.tar.gz",
}
STUDENTS = ("resnet_micro", "vit_micro")
GROUPS = ["--config-dir", "examples/configs"]


class MemoryMeter(threading.Thread):
    """Largest memory of this process and everything it started, in MiB, sampled twice a second.

    Counts proportional shares (PSS), so that pages shared by processes count once.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_mb = 0.0
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.5):
            total = 0
            me = psutil.Process()
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:
                    continue  # it ended between being listed and being read
            self.peak_mb = max(self.peak_mb, total / 2**20)

    def stop(self) -> float:
        """End the sampling and return the peak."""
        self._ended.set()
        self.join()
        return self.peak_mb


@contextmanager
def stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Announce a stage and keep how long it took."""
    print(f"\n== {name}", flush=True)
    started = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - started, 1)
    print(f"   {seconds[name]} s", flush=True)


def preceptor(*arguments: str) -> None:
    """Run one command as a user would; a failure ends the demo with the command's own status."""
    print(f"$ preceptor {shlex.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "preceptor", *arguments], cwd=ROOT)
    if done.returncode:
        sys.exit(done.returncode)


def main() -> None:
    """Chain the commands and write `summary.json` and `tokens.png`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("outputs/demo"))
    out: Path = parser.parse_args().out
    (ROOT / out).mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    meter = MemoryMeter()
    meter.start()
    stores = {split: out / f"store-{split}" for split in SHARDS}

    with stage("stage 1: two teachers read every image once", seconds):
        for split in SHARDS:
            borrowed = [f"calibration.store={stores['train']}"] if split == "test" else []
            preceptor(
                "extract", *GROUPS, "data=fashion_mnist", "teachers=fashion_mnist",
                f"data.shards={quoted(SHARDS[split])}", f"cache={stores[split]}",
                "calibration.images=512", "shard_rows=512", *borrowed,
            )  # fmt: skip
    for student in STUDENTS:
        with stage(f"stage 2: {student} learns from the store", seconds):
            preceptor(
                "train", *GROUPS, "data=fashion_mnist", f"data.shards={quoted(SHARDS['train'])}",
                f"cache={stores['train']}", f"student={student}", "align=model_token",
                "recipe=fashion_mnist", f"out={out / student}", "resume=false",
            )  # fmt: skip
    with stage("evaluation: students, teachers and the untrained floor", seconds):
        preceptor(
            "eval", *GROUPS,
            f"train.cache={stores['train']}", f"train.shards={quoted(SHARDS['train'])}",
            f"test.cache={stores['test']}", f"test.shards={quoted(SHARDS['test'])}",
            f"students=[{','.join(str(out / student) for student in STUDENTS)}]",
            f"out={out / 'eval'}", "readouts=[pooled,both]",
        )  # fmt: skip
    with stage("picture: what every model sees", seconds):
        command = [sys.executable, "examples/token_picture.py", "--store", str(stores["test"])]
        command += ["--shards", SHARDS["test"], "--out", str(out / "tokens.png")]
        command += ["--students", *(str(out / student) for student in STUDENTS)]
        if subprocess.run(command, cwd=ROOT).returncode:
            sys.exit(1)

    extraction = json.loads((ROOT / f"{stores['train']}.extract.json").read_text())
    summary = {
        "accuracy": json.loads((ROOT / out / "eval" / "summary.json").read_text())["rows"],
        "seconds": {**seconds, "total": round(sum(seconds.values()), 1)},
        "store": {key: extraction[key] for key in ("rows", "bytes", "bytes_per_row", "spaces")},
        "peak_memory_mb": round(meter.stop(), 1),
    }
    (ROOT / out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(
        f"\n{sum(seconds.values()):.0f} s in all, {summary['peak_memory_mb']:,.0f} MiB at most; "
        f"summary: {out}/summary.json, picture: {out}/tokens.png"
    )


def quoted(shards: str) -> str:
    """A value for Hydra's override grammar, in which braces have a meaning of their own."""
    return f"'{shards}'"


if __name__ == "__main__":
    main()
