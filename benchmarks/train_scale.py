"""Training speed with one and with two ranks: images a second in all, with the same batch in all.

The whole command is run, under torchrun where there are two ranks: every rank has its share of the
rows, of the processor's cores and of the batch. On a CPU both ranks live on the same cores, so the
ideal there is the speed of one rank with all cores, not twice its speed; on CUDA it is twice.

    python benchmarks/train_scale.py --student resnet18 --size 112 --json results.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import machine, median, save, show
from train_step import make_store


def measure(options: argparse.Namespace, folder: Path, ranks: int, number: int) -> dict[str, Any]:
    """One run; what its summary says."""
    shard, store = make_store(folder, options.images, options.size)
    out = folder / f"scale-{ranks}-{number}"
    cores = len(os.sched_getaffinity(0))
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [
        sys.executable, *launcher, "-m", "preceptor", "train",
        f"cache={store}", f"data.shards={shard}", f"out={out}", f"student={options.student}",
        f"student.size={options.size}", "recipe=short", f"recipe.steps={options.steps}",
        f"recipe.batch_size={options.batch // ranks}", "recipe.checkpoint_every=0",
        f"engine={'cuda_bf16' if options.device == 'cuda' else 'cpu'}",
        f"workers={options.workers}", "resume=false", "log.to=[csv]", "log.knn_every=0",
        f"recipe.log_every={options.steps // 2}",
    ]  # fmt: skip
    if options.device == "cuda":
        command.append(f"engine.devices={ranks}")
    threads = {"OMP_NUM_THREADS": str(max(1, cores // ranks)), "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, env={**os.environ, **threads}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    summary = json.loads((out / "summary.json").read_text())
    rows = (out / "logs" / "csv" / "metrics.csv").read_text().splitlines()
    header = rows[0].split(",")
    last = dict(zip(header, [r for r in rows[1:] if r][-1].split(","), strict=True))
    return {
        # Of the second half of the run: the first one runs in.
        "images_per_second": float(last["images_per_second"]),
        "wait_share": float(last["wait_share"]),
        "peak_memory_mb": summary["peak_memory_mb"],
        "ranks": summary["ranks"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", default="resnet18")
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--batch", type=int, default=32, help="images a step, over all ranks")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--folder", type=Path, help="keeps images and store for another run")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        found: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
        for number in range(options.rounds):
            for ranks, runs in found.items():
                runs.append(measure(options, folder, ranks, number))
                print(f"{ranks} rank(s): {runs[-1]}", file=sys.stderr, flush=True)
    results = {}
    for ranks, runs in found.items():
        speeds = [run["images_per_second"] for run in runs]
        results[f"{ranks} rank(s)"] = {
            "images_per_second": median(speeds),
            "spread": [min(speeds), max(speeds)],
            "wait_share": median([run["wait_share"] for run in runs]),
            "peak_memory_mb_of_a_rank": median([run["peak_memory_mb"] for run in runs]),
        }
    show(
        f"{options.student} at {options.size} px, {options.batch} images a step, {options.device}",
        ("", "images/s", "least", "most", "wait %", "MiB a rank"),
        [
            (
                name,
                entry["images_per_second"],
                *entry["spread"],
                100 * entry["wait_share"],
                entry["peak_memory_mb_of_a_rank"],
            )
            for name, entry in results.items()
        ],
    )
    one, two = (entry["images_per_second"] for entry in results.values())
    save(
        options.json,
        {
            "machine": machine(("torch", "lightning-fabric")),
            "options": {
                key: str(value)
                for key, value in vars(options).items()
                if key not in ("folder", "json")
            },
            "summary": {"speed_of_two_over_one": round(two / one, 3)},
            "results": results,
        },
    )


if __name__ == "__main__":
    main()
