"""Kill a training run anywhere, again and again; it must end with the bits of an undisturbed one.

Every attempt is a process of its own (one for each rank) that goes on where the last one was killed
with SIGKILL, after a random number of calls of Python functions in its main thread: in the middle
of a step, of a checkpoint, of the log, and one in ten while it sets itself up. All losses that any
attempt saw, and all weights in the end, are compared with those of a run that nobody disturbed.

    python benchmarks/torture_train.py --kills 100
    python benchmarks/torture_train.py --kills 20 --ranks 2
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

if __name__ == "__main__":  # before torch is there: a pool of threads does not survive a fork
    os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
from hydra import compose, initialize_config_module
from preceptor.train import loop

STEPS_BEFORE, STEPS_WITHIN = 4, 2
"""Fewer than so many steps of an attempt are spared; it is killed within the calls of the next."""
IN_SET_UP = 0.1
"""Share of the attempts that are killed before their first step."""
WEIGHTS = ("student.safetensors", "alignment.safetensors")


class Doomed:
    """Counts the calls in this thread from `begin` on; the ``last`` one kills this process."""

    def __init__(self, last: int | None) -> None:
        self.count, self._last, self._counts = 0, last, False
        sys.setprofile(self._called)

    def begin(self) -> None:
        self._counts = True

    def end(self) -> None:
        sys.setprofile(None)

    def _called(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and self._counts:
            self.count += 1
            if self.count == self._last:
                os.kill(os.getpid(), signal.SIGKILL)


def config(out: Path, store: str, shards: str, steps: int) -> Any:
    """A ViT that drops paths, so that random numbers matter, with everything that has a state."""
    with initialize_config_module("preceptor.configs", version_base="1.3"):
        return compose(
            "train",
            [
                f"cache={store}",
                f"data.shards={shards}",
                f"out={out}",
                "student=vit_micro",
                "student.options.depth=2",
                "student.options.embed_dim=48",
                "+student.options.drop_path_rate=0.2",
                "recipe=short",
                f"recipe.steps={steps}",
                "recipe.batch_size=8",
                "recipe.accumulate=2",
                "recipe.ema=0.9",
                "recipe.color_jitter.brightness=0.2",
                "recipe.log_every=3",
                "recipe.checkpoint_every=2",
                "keep.last=2",
                "keep.best=loss",
                "log.to=[csv]",
                "log.gradients_every=5",
                "log.knn_every=4",
                "engine=cpu",
                "workers=0",
            ],
        )


def attempt(run: Any, losses: Path, doom: int | None, spared: int) -> None:
    """Train in this process, noting every loss; with `doom`, die after so many calls.

    Args:
        spared: steps before calls count; -1 for counting from the start.
    """
    import torch

    torch.set_num_threads(1)
    see = loop.FiniteWatch.see
    rank = os.environ.get("RANK", "0")
    micro: dict[int, int] = {}

    def noted(self: Any, step: int, output: Any) -> None:
        micro[step] = micro.get(step, -1) + 1
        line = f"{step} {rank} {micro[step]} {float(output.loss.detach()).hex()}\n"
        file = os.open(losses, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(file, line.encode())
        os.close(file)
        see(self, step, output)

    loop.FiniteWatch.see = noted  # type: ignore[method-assign]
    calls, rate = Doomed(doom), loop.learning_rate
    steps = 0

    def stepping(step: int, *rest: Any) -> float:
        nonlocal steps
        if steps == spared:
            calls.begin()
        if steps == 0 and spared < 0:
            (losses.parent / "set-up").write_text(str(calls.count))
        steps += 1
        return rate(step, *rest)

    loop.learning_rate = stepping  # type: ignore[assignment]
    if spared < 0:
        calls.begin()
    loop.train(run)
    calls.end()
    (losses.parent / "calls").write_text(str(calls.count))


def start(work: Callable[[], object], rank: int, world: int, port: int) -> int:
    """Fork a child that does some work as one of several ranks; returns its process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        if world > 1:
            os.environ |= {
                "TORCHELASTIC_RUN_ID": "torture",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "GROUP_RANK": "0",
                "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world),
            }
        work()
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def train(
    run: Any,
    losses: Path,
    world: int,
    doomed: int = 0,
    doom: int | None = None,
    spared: int = 0,
) -> bool:
    """One attempt of all ranks; `doomed` is the one that dies. Returns whether it ended well."""
    port = free_port()
    children = {}
    for rank in range(world):
        fate = doom if rank == doomed else None
        work = partial(attempt, run, losses, fate, spared)
        children[start(work, rank, world, port)] = rank
    died = {}
    while children:
        child, status = os.wait()
        died[children.pop(child)] = status
        if doom is not None and doomed in died:  # as a launcher does when a process has gone
            for other in children:
                os.kill(other, signal.SIGKILL)
    if not any(died.values()):
        return True
    # Ranks whose partner was killed fail in ways of their own.
    if doom is None or died[doomed] != signal.SIGKILL:
        raise SystemExit(f"ranks failed by themselves, with status {died}")
    return False


def torture(folder: Path, store: str, shards: str, kills: int, ranks: int, seed: int) -> Any:
    """Kill a run `kills` times, let it end, and compare; see the module."""
    started = time.monotonic()
    random = np.random.default_rng(seed)
    steps = 4 + 3 * kills // 2
    whole, parts = folder / "whole", folder / "parts"
    for run in (whole, parts):
        run.mkdir(parents=True)
    if not train(config(whole, store, shards, steps), whole / "losses", ranks):
        raise SystemExit("the undisturbed run was killed by somebody else")
    calls = int((whole / "calls").read_text()) // steps
    truth = noted(whole / "losses")
    # A run of one step, to know how many calls its set-up takes.
    short = folder / "short"
    short.mkdir()
    train(config(short, store, shards, 1), short / "losses", ranks, spared=-1)
    set_up = int((short / "set-up").read_text())
    where: list[int] = []
    while len(where) < kills:
        early = bool(random.random() < IN_SET_UP)
        spared = -1 if early else int(random.integers(STEPS_BEFORE))
        doom = int(random.integers(1, set_up if early else STEPS_WITHIN * calls))
        doomed, run = int(random.integers(ranks)), config(parts, store, shards, steps)
        if train(run, parts / "losses", ranks, doomed, doom, spared):
            shutil.rmtree(parts)  # it came through: begin again
            parts.mkdir()
            continue
        lines = (parts / "losses").read_text().splitlines() if (parts / "losses").exists() else ()
        where.append(-1 if early or not lines else int(lines[-1].split()[0]))
    if not train(config(parts, store, shards, steps), parts / "losses", ranks):
        raise SystemExit("the last attempt was killed by somebody else")
    found = noted(parts / "losses")
    different = sum(values != truth[key] for key, values in found.items())
    weights = [f"{place}{name}" for place in ("", "ema/", "best/") for name in WEIGHTS]
    other = [name for name in weights if (whole / name).read_bytes() != (parts / name).read_bytes()]
    return {
        "seed": seed,
        "steps": steps,
        "ranks": ranks,
        "step_of_each_kill": where,  # -1: in the set-up
        "summary": {
            "kills": len(where),
            "steps_with_kills": len(set(where) - {-1}),
            "ranks": ranks,
            "losses_compared": sum(map(len, found.values())),
            "losses_different": different,
            "files_of_weights_different": other,
            "seconds": round(time.monotonic() - started, 1),
        },
    }


def noted(path: Path) -> dict[tuple[int, ...], set[str]]:
    """The losses that attempts have seen, by (step, rank, micro-batch)."""
    found: dict[tuple[int, ...], set[str]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        *key, loss = line.split()
        found.setdefault(tuple(map(int, key)), set()).add(loss)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--store", help="default: a small one that is made")
    parser.add_argument("--shards", help="its images")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="torture-") as temporary:
        folder = Path(temporary)
        if options.store is None:
            # In a child: what is forked from here must not have computed anything before.
            def bed() -> None:
                from preceptor.tests.train.conftest import make_bed

                make_bed(folder, "bed", 40, 0, invalid=5, name="random", count=2, flip=True)

            child = start(bed, 0, 1, 0)
            if os.waitpid(child, 0)[1]:
                raise SystemExit("the store could not be made")
            options.store, options.shards = str(folder / "bed"), str(folder / "bed.tar")
        result = torture(
            folder, options.store, options.shards, options.kills, options.ranks, options.seed
        )
    print(json.dumps({"summary": result["summary"]}))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if result["summary"]["losses_different"] or result["summary"]["files_of_weights_different"]:
        raise SystemExit("an interrupted run is not the undisturbed one")


if __name__ == "__main__":
    main()
