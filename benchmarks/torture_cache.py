"""Kill writers, race them, damage every file; nothing may be lost or changed without a word.

Each killed or racing writer is a process of its own. After every kill the store must be refused
or whole, and going on must give the very bytes of an undisturbed run. After every fault, opening,
reading or verifying must notice it, and repair must bring the same bytes back.

    python benchmarks/torture_cache.py --seed 0 --kills 200 --races 50 --faults 500
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from preceptor.benchmarks import faults
from preceptor.benchmarks.small_store import contents, extract, fill, fill_shard, restore
from preceptor.cache import StoreWriter
from preceptor.cache.commit import discard
from preceptor.cache.mend import repair_store
from preceptor.cache.verify import verify_store

OPERATIONS = ("open", "write", "fsync", "replace", "unlink", "mkdir")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=200, help="kills of a writer, kill -9")
    parser.add_argument("--races", type=int, default=50, help="races of two writers for one shard")
    parser.add_argument("--faults", type=int, default=1000, help="damaged files, one at a time")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="torture-", dir=arguments.folder))
    try:
        result = torture(folder, arguments)
    finally:
        shutil.rmtree(folder)
    summary = result["summary"]
    for name, value in summary.items():
        print(f"{name:20} {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if summary["silent_differences"] or summary["not_identical"] or summary["not_noticed"]:
        raise SystemExit("the store did not withstand")


def torture(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    started = time.monotonic()
    random = np.random.default_rng(arguments.seed)
    extract(folder / "good")
    good, values = contents(folder / "good"), faults.everything(folder / "good")
    kills = kill_writers(folder, good, values, arguments.kills, random)
    races = race_writers(folder, good, arguments.races)
    damage = damage_files(folder, good, values, arguments.faults, random)
    parts = (kills, races, damage)
    return {
        "seed": arguments.seed,
        "kills": kills,
        "races": races,
        "faults": damage,
        "summary": {
            "kills": kills["kills"],
            "races": races["races"],
            "faults": damage["faults"],
            "silent_differences": sum(part.get("silent", 0) for part in parts),
            "not_noticed": damage["not_noticed"],
            "not_identical": sum(part["not_identical"] for part in parts),
            "seconds": round(time.monotonic() - started, 1),
        },
    }


def in_child(work: Callable[[], object]) -> int:
    """Fork, do the work in the child, and return the child's process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    finally:
        os._exit(status)


def operations(work: Callable[[], object]) -> int:
    """How many file operations some work does."""
    with Doomed(None) as doomed:
        work()
    return doomed.count


class Doomed:
    """While open, file operations of ``os`` are counted, and the ``last`` kills this process."""

    def __init__(self, last: int | None) -> None:
        self.count, self._last = 0, last

    def __enter__(self) -> Doomed:
        self._plain = {name: getattr(os, name) for name in OPERATIONS}
        for name, plain in self._plain.items():
            setattr(os, name, self._wrapped(name, plain))
        return self

    def __exit__(self, *error: object) -> None:
        for name, plain in self._plain.items():
            setattr(os, name, plain)

    def _wrapped(self, name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*given: Any, **named: Any) -> Any:
            self.count += 1
            if self.count == self._last:
                if name == "write":
                    plain(given[0], bytes(given[1])[: len(given[1]) // 2])  # a torn write
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*given, **named)

        return wrapped


def kill_writers(
    folder: Path,
    good: dict[str, bytes],
    values: dict[str, bytes],
    count: int,
    random: np.random.Generator,
) -> dict[str, int]:
    """Kill extraction at random operations and at random times, then go on."""
    path = folder / "killed"
    total = operations(lambda: extract(path))
    shutil.rmtree(path)
    found = {"kills": 0, "silent": 0, "not_identical": 0, "stores": 0, "operations": total}
    while found["kills"] < count:
        timed = bool(random.integers(2))
        last = int(random.integers(1, total + 1))

        def work(last: int | None = None if timed else last) -> None:
            with Doomed(last):
                extract(path)

        child = in_child(work)
        if timed:
            # a moment that has nothing to do with what the writer is doing
            time.sleep(float(random.uniform(0, 0.15)))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if status == signal.SIGKILL:
            found["kills"] += 1
        elif status:
            raise SystemExit(f"extraction failed with status {status}")
        if (path / "manifest.json").exists():
            verify_store(path)
        if faults.noticed_by_reader(path, values) is None:
            found["silent"] += 1
        finished = status == 0 or random.random() < 0.2
        if finished or found["kills"] == count:
            extract(path)
            found["stores"] += 1
            if (left := contents(path)) != good:
                found["not_identical"] += 1
                changed = [n for n in {*left, *good} if left.get(n) != good.get(n)]
                print(f"after kill {found['kills']}: {', '.join(sorted(changed))} differ")
            shutil.rmtree(path)
    return found


def race_writers(folder: Path, good: dict[str, bytes], count: int) -> dict[str, int]:
    """Two processes extract the same shard at once, with different features."""
    path = folder / "raced"
    restore(path, good)
    found = {"races": 0, "not_identical": 0, "won_by_second": 0}
    outcomes = []
    for version in (0, 1):
        restore(path, good)
        discard(path, StoreWriter.open(path).manifest, "vit", 0)
        writer = StoreWriter.open(path)
        fill(writer, version)
        writer.finish()
        outcomes.append(contents(path))
    for _ in range(count):
        restore(path, good)
        discard(path, StoreWriter.open(path).manifest, "vit", 0)
        gate = multiprocessing.get_context("fork").Barrier(2)

        def work(version: int, gate: Any = gate) -> None:
            writer = StoreWriter.open(path)
            gate.wait()
            fill_shard(writer, 0, ("vit",), version)

        children = [in_child(lambda version=version: work(version)) for version in (0, 1)]
        if any(os.waitpid(child, 0)[1] for child in children):
            raise SystemExit("a racing writer failed")
        StoreWriter.open(path).finish()
        left = contents(path)
        found["races"] += 1
        found["won_by_second"] += left == outcomes[1]
        found["not_identical"] += left not in outcomes or not verify_store(path).whole
    return found


def damage_files(
    folder: Path,
    good: dict[str, bytes],
    values: dict[str, bytes],
    count: int,
    random: np.random.Generator,
) -> dict[str, int]:
    """One fault at a time, over every file and every fault in random order."""
    path = folder / "damaged"
    restore(path, good)
    found = {
        "faults": 0, "refused_by_reader": 0, "silent": 0, "not_noticed": 0, "not_identical": 0,
    }  # fmt: skip
    kinds = [*faults.FAULTS, "swap"]
    todo = [(name, kind) for name in good for kind in kinds]
    while todo and found["faults"] < count:
        for number in random.permutation(len(todo)).tolist()[: count - found["faults"]]:
            name, kind = todo[number]
            if kind == "swap":
                other = str(random.choice([n for n in good if good[n] != good[name]]))
                faults.swap(path / name, path / other)
            else:
                faults.FAULTS[kind](path / name, random)
            noticed = faults.noticed_by_reader(path, values)
            report = verify_store(path)
            found["faults"] += 1
            found["refused_by_reader"] += noticed is True
            found["silent"] += noticed is None
            found["not_noticed"] += report.whole
            repair_store(path, report.shards, fill)
            if contents(path) != good:
                found["not_identical"] += 1
                restore(path, good)
    return found


if __name__ == "__main__":
    main()
