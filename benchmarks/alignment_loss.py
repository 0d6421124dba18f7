"""The fused alignment losses over int8 targets against the same losses over decoded targets.

Codes are decoded by a scale a token and a gain a dimension, as `align.targets=standardise` has it.
`eager` decodes the codes into a float tensor and calls torch.nn.functional; `compiled` is the same
under torch.compile; `ours_compiled` is the fused loss inside a compiled function, which on a CPU
is traced and left to the compiler. Times are of the forward and the backward pass together, taken
in turns; on CUDA those of a CUDA graph, and once more `as called` by eager Python.

    python benchmarks/alignment_loss.py --device cpu --threads 2 --json results.json
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import checkout
import torch
from torch import Tensor
from torch.nn import functional

checkout.ensure_importable()

import device_timing as timing  # noqa: E402
from preceptor.kernels import alignment_loss  # noqa: E402

SIZES = {
    "cpu": {"vit_s16": (32, 196, 384), "clip_b16": (32, 196, 768)},
    "cuda": {
        "dinov2_s": (256, 256, 384),
        "dinov2_b": (256, 256, 768),
        "dinov2_l": (256, 256, 1024),
    },
}


TINY = {"tiny": (2, 5, 32)}


def fused(prediction: Tensor, codes: Tensor, scale: Tensor, gain: Tensor) -> Tensor:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    implementation = "triton" if interpreted else "auto"
    cosine, smooth = alignment_loss(
        prediction, codes, scale, gain=gain, implementation=implementation
    )
    return 0.9 * cosine + 0.1 * smooth


def eager(prediction: Tensor, codes: Tensor, scale: Tensor, gain: Tensor) -> Tensor:
    target = (codes.float() * scale.unsqueeze(-1) * gain).to(prediction.dtype)
    cosine = (1 - functional.cosine_similarity(prediction, target, dim=-1)).mean()
    return 0.9 * cosine + 0.1 * functional.smooth_l1_loss(prediction, target)


def measure(shape: tuple[int, int, int], options: argparse.Namespace) -> dict[str, Any]:
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randn(shape, generator=generator).to(options.device, dtype).requires_grad_()
    codes = torch.randint(-127, 128, shape, generator=generator).to(torch.int8).to(options.device)
    scale = torch.full(shape[:2], 0.02, device=options.device)
    gain = torch.linspace(0.5, 2.0, shape[2], device=options.device)
    rivals: dict[str, Callable[..., Tensor]] = {"ours": fused, "eager": eager}
    if options.compile:
        torch.compiler.reset()
        rivals["ours_compiled"] = torch.compile(fused)
        rivals["compiled"] = torch.compile(eager)
    # Each turn reads and writes memory of its own.
    nbytes = prediction.nbytes + codes.nbytes
    turns = [(prediction, codes)]
    for number in range(1, timing.copies_beyond_caches(nbytes, options.device)):
        rolled = prediction.detach().roll(number, 0).requires_grad_()
        turns.append((rolled, codes.roll(number, 0)))
    works: dict[str, list[Callable[[], Tensor]]] = {}
    failed, agreed = {}, None
    for name, loss in rivals.items():

        def work(turn: int, loss: Callable[..., Tensor] = loss) -> Tensor:
            prediction, codes = turns[turn]
            (gradient,) = torch.autograd.grad(loss(prediction, codes, scale, gain), prediction)
            return gradient

        try:
            gradient = work(0).float()
        except Exception as error:
            if name == "ours":
                raise
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
            continue
        agreed = gradient if agreed is None else agreed
        if float((gradient - agreed).norm() / agreed.norm()) > 2e-2:
            raise RuntimeError(f"the gradient of {name} differs from ours at {shape}")
        works[name] = [partial(work, turn) for turn in range(len(turns))]
    take = partial(
        timing.alternate, device=options.device, rounds=options.rounds, repeats=options.repeats
    )
    called = {name: each[0] for name, each in works.items()}
    eagerly = take(called)
    found = eagerly
    if options.device == "cuda":
        graphs = {name: timing.captured(each) for name, each in works.items()}
        found = take(graphs, calls=len(turns))
    for name, entry in found.items():
        entry["peak_bytes"] = timing.peak_bytes(called[name], options.device)
    # Prediction and codes are read by both passes, the gradient is written.
    moved = 3 * prediction.nbytes + 2 * codes.nbytes
    found["ours"]["bytes_per_s"] = moved / found["ours"]["median_s"]
    measured = {"shape": shape, "failed": failed, "forward_backward": found}
    return measured if found is eagerly else {**measured, "called": eagerly}


def main() -> None:
    options = timing.chosen(timing.arguments(__doc__))
    copy = timing.copy_bandwidth(options.device)
    summary: dict[str, Any] = {}
    results: dict[str, Any] = {}
    report = {
        **timing.describe(options.device),
        "copy_bytes_per_s": copy,
        "summary": summary,
        "results": results,
    }
    for name, shape in (TINY if options.tiny else SIZES[options.device]).items():
        found = results[name] = measure(shape, options)
        times = found["forward_backward"]
        ours = times["ours"]["median_s"]
        rows = [
            (
                rival,
                entry["median_s"] * 1e3,
                entry["quartiles_s"][0] * 1e3,
                entry["quartiles_s"][1] * 1e3,
                entry["median_s"] / ours,
                entry["peak_bytes"] / 2**20,
                found["called"][rival]["median_s"] * 1e3 if "called" in found else None,
            )
            for rival, entry in times.items()
        ]
        print(f"\n{name} B{shape[0]} N{shape[1]} D{shape[2]}")
        columns = ("", "ms", "q1", "q3", "x ours", "peak MiB", "as called ms")
        print(timing.table(columns, rows))
        summary[name] = {
            rival: round(entry["median_s"] / ours, 2)
            for rival, entry in times.items()
            if rival != "ours"
        }
        share = round(times["ours"]["bytes_per_s"] / copy, 3)
        summary[name]["share_of_copy"] = share
        summary[name]["peak_bytes_over_ours"] = round(
            times["eager"]["peak_bytes"] / max(1, times["ours"]["peak_bytes"]), 2
        )
        timing.write(options.json, report)
    timing.save(options.json, report)


if __name__ == "__main__":
    main()
