"""From how many query rows on projecting keys and values beats absorbing the projections.

The module of `preceptor.train.attention` in both forms, forward and backward, over M model tokens
of H heads for growing M. `implementation="auto"` projects where M H > 0.6 D; this is what that
choice rests on. The summary gives, per width and kind of tokens, the M H / D at which both take the
same time, linearly interpolated, or null where one form wins throughout.

    python benchmarks/attention_crossover.py --device cpu --threads 2 --json results.json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

# First: it decides how torch's threads wait.
import cross_attention as attention  # isort: skip
import itertools

import device_timing as timing
import torch
from preceptor.train.attention import CrossAttention

WIDTHS = {384: 6, 768: 12}
"""Width D of the tokens and its heads H."""
MODEL_TOKENS = (8, 16, 32, 48, 64)
KINDS = ("cached", "student")


def measure(size: attention.Size, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    model, tokens, scale = attention.inputs(size, kind, options.device, dtype)
    works = {}
    for form in ("absorbed", "standard"):
        torch.manual_seed(0)
        module = CrossAttention(size.dim, size.dim, size.heads).to(options.device, dtype)
        # On CUDA the absorbed form is the fused kernels, up to their 128 rows.
        fused = options.device == "cuda" and form == "absorbed"
        rows = size.model_tokens * size.heads
        module.implementation = "triton" if fused and rows <= 128 else form
        wanted = [model, *([tokens] if tokens.requires_grad else []), *module.parameters()]

        def work(module: CrossAttention = module, wanted: list[Any] = wanted) -> Any:
            return torch.autograd.grad(module(model, tokens, scale).sum(), wanted)

        works[form] = work
    return timing.alternate(works, options.device, options.rounds, 1)


def crossing(points: list[tuple[float, float]]) -> float | None:
    """Where standard over absorbed, falling with the share M H / D, passes 1."""
    for (low, before), (high, after) in itertools.pairwise(points):
        if before >= 1 > after:
            return round(low + (high - low) * (before - 1) / (before - after), 2)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="of torch on the CPU")
    parser.add_argument("--batch", type=int, help="samples; 4 on CPU, 256 on CUDA")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is available; use --device cpu")
    torch.set_num_threads(options.threads)
    batch = options.batch or (256 if options.device == "cuda" else 4)
    results, summary, rows = [], {}, []
    for dim, heads in WIDTHS.items():
        for kind in KINDS:
            points = []
            for count in MODEL_TOKENS:
                size = attention.Size(batch, 196, dim, heads, count)
                found = measure(size, kind, options)
                ratio = found["standard"]["median_s"] / found["absorbed"]["median_s"]
                share = count * heads / dim
                points.append((share, ratio))
                results.append({"size": size.name, "tokens": kind, "share": share, **found})
                times = [found[form]["median_s"] * 1e3 for form in ("absorbed", "standard")]
                rows.append((f"{size.name} {kind}", share, *times, ratio))
            summary[f"D{dim} {kind}"] = crossing(points)
    columns = ("", "M H / D", "absorbed ms", "standard ms", "standard / absorbed")
    print(timing.table(columns, rows))
    described = timing.describe(options.device)
    timing.save(options.json, {**described, "summary": summary, "results": results})


if __name__ == "__main__":
    main()
