"""The fused cross-attention of model tokens against the usual ways of computing it.

Each contender is the whole module (query projection to output projection) with the same weights;
they are timed in turns. `standard` projects keys and values and calls PyTorch's attention,
`absorbed_bmm` and `absorbed_sdpa` fold the projections but leave the rest to PyTorch operations,
`standard_compiled` and `absorbed_bmm_compiled` are the same under torch.compile, `flex` is
`standard` with compiled flex_attention, and `ours_whole`, on CUDA, is ours where one block may hold
all tokens of a sample (`kernels.autotune.whole_samples`). Tokens: `cached` floats without
gradients, `int8` codes (rivals decode them first), `student` floats with gradients. Bandwidth
counts the tokens' bytes once a pass, and their gradient's, and is held against a measured copy.

On CUDA every contender is timed as a CUDA graph over inputs taken in turns, so that neither Python
nor the L2 cache is measured, and once more `as called` by eager Python, launches and all: small
calls cost the host more than the device there.

    python benchmarks/cross_attention.py --device cpu --threads 2 --json results.json --png roof.png
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

# Read when torch starts its threads: they sleep while they wait, so that waiting costs no time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import checkout
import torch
from torch import Tensor, nn
from torch.nn import functional

checkout.ensure_importable()

import device_timing as timing  # noqa: E402
from preceptor.train.attention import CrossAttention  # noqa: E402


class Size(NamedTuple):
    batch: int
    tokens: int
    dim: int
    heads: int
    model_tokens: int

    @property
    def name(self) -> str:
        return f"B{self.batch} N{self.tokens} D{self.dim} H{self.heads} M{self.model_tokens}"


# DINOv2-S/B/L at 224 (256 patches), CLIP-B/16 (196), ConvNeXt-B's last stage (49).
SIZES = {
    "cpu": {
        "vit_s16": Size(32, 196, 384, 6, 1),
        "clip_b16": Size(32, 196, 768, 12, 4),
        "convnext_b": Size(32, 49, 1024, 16, 4),
    },
    "cuda": {
        "dinov2_s": Size(256, 256, 384, 6, 4),
        "dinov2_b": Size(256, 256, 768, 12, 4),
        "dinov2_b_one": Size(256, 256, 768, 12, 1),
        "dinov2_l": Size(256, 256, 1024, 16, 4),
        "clip_b16": Size(256, 196, 768, 12, 4),
        "convnext_b": Size(256, 49, 1024, 16, 4),
    },
}

COLUMNS = ("", "forward ms", "+backward ms", "q1", "q3", "x ours", "peak MiB", "as called ms")

# Of no size worth timing: whether everything runs, on the CPU under Triton's interpreter as well.
TINY = Size(2, 5, 32, 2, 1)

# At least as many as `row_tiles` and `token_tiles` give for one width.
MOST_CONFIGURATIONS = 9

Contender = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def decoded(tokens: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return tokens if scale is None else tokens.to(dtype) * scale.unsqueeze(-1).to(dtype)


def folded(module: CrossAttention, model_tokens: Tensor) -> tuple[Tensor, Tensor]:
    heads = module.heads
    q = module.q_proj(model_tokens).unflatten(-1, (heads, -1))
    q = q * q.shape[-1] ** -0.5
    keys = module.k_proj.weight.unflatten(0, (heads, -1))
    query = torch.einsum("bmhd,hdt->bmht", q, keys).flatten(1, 2)
    return query, module.v_proj.weight.unflatten(0, (heads, -1))


def unfolded(module: CrossAttention, y: Tensor, values: Tensor) -> Tensor:
    y = y.unflatten(1, (-1, module.heads))
    out = torch.einsum("bmht,hdt->bmhd", y, values).flatten(-2) + module.v_proj.bias
    return module.out_proj(out)


def absorbed_bmm(module: CrossAttention) -> Contender:
    def run(model_tokens: Tensor, tokens: Tensor, scale: Tensor | None) -> Tensor:
        x = decoded(tokens, scale, model_tokens.dtype)
        query, values = folded(module, model_tokens)
        p = torch.softmax(torch.bmm(query, x.transpose(1, 2)), dim=-1)
        return unfolded(module, torch.bmm(p, x), values)

    return run


def absorbed_sdpa(module: CrossAttention) -> Contender:
    def run(model_tokens: Tensor, tokens: Tensor, scale: Tensor | None) -> Tensor:
        x = decoded(tokens, scale, model_tokens.dtype)
        query, values = folded(module, model_tokens)
        y = functional.scaled_dot_product_attention(query, x, x, scale=1.0)
        return unfolded(module, y, values)

    return run


def flex(module: CrossAttention) -> Contender:
    from torch.nn.attention.flex_attention import flex_attention

    attend = torch.compile(flex_attention)

    def run(model_tokens: Tensor, tokens: Tensor, scale: Tensor | None) -> Tensor:
        x = decoded(tokens, scale, model_tokens.dtype)
        q, k, v = (
            projection(source).unflatten(-1, (module.heads, -1)).transpose(1, 2).contiguous()
            for projection, source in (
                (module.q_proj, model_tokens), (module.k_proj, x), (module.v_proj, x),
            )
        )  # fmt: skip
        return module.out_proj(attend(q, k, v).transpose(1, 2).flatten(-2))

    return run


def contenders(
    size: Size, device: str, dtype: torch.dtype, compiled: bool
) -> dict[str, tuple[Contender, nn.Module]]:
    torch.manual_seed(0)
    ours = CrossAttention(size.dim, size.dim, size.heads).to(device, dtype)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    ours.implementation = "triton" if device == "cuda" or interpreted else "absorbed"
    standard = CrossAttention(size.dim, size.dim, size.heads, implementation="standard")
    standard = standard.to(device, dtype)
    standard.load_state_dict(ours.state_dict())
    found: dict[str, Contender] = {"ours": ours, "standard": standard}
    if compiled:
        found["standard_compiled"] = torch.compile(standard)
        if device == "cuda":
            found["flex"] = flex(standard)
    if ours.implementation == "triton":
        found["ours_whole"] = ours
    found["absorbed_bmm"] = absorbed_bmm(standard)
    if compiled:
        found["absorbed_bmm_compiled"] = torch.compile(absorbed_bmm(standard))
    found["absorbed_sdpa"] = absorbed_sdpa(standard)
    return {name: (run, ours if run is ours else standard) for name, run in found.items()}


def allowed(name: str) -> contextlib.AbstractContextManager[None]:
    """What a contender's calls, and its backward passes, are made within."""
    from preceptor.kernels import autotune

    return autotune.whole_samples() if name == "ours_whole" else contextlib.nullcontext()


def inputs(
    size: Size, kind: str, device: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    shape = (size.batch, size.tokens, size.dim)
    model = torch.randn(size.batch, size.model_tokens, size.dim, generator=generator)
    model = model.to(device, dtype).requires_grad_()
    if kind == "int8":
        codes = torch.randint(-127, 128, shape, generator=generator).to(torch.int8).to(device)
        return model, codes, torch.full(shape[:2], 0.02, device=device)
    tokens = torch.randn(shape, generator=generator).to(device, dtype)
    return model, tokens.requires_grad_(kind == "student"), None


def kinds_of(name: str, device: str) -> list[str]:
    """On CUDA, where everything is compiled first, students' tokens at one size only."""
    if device == "cuda" and name != "dinov2_b":
        return ["cached", "int8"]
    return ["cached", "int8", "student"]


def warm(size: Size, kind: str, device: str, dtype: torch.dtype, compiled: bool) -> None:
    """Compiles what `measure` will run, every launch configuration included, timing nothing."""
    from preceptor.kernels import autotune

    model, tokens, scale = inputs(size, kind, device, dtype)
    for name, (run, _) in contenders(size, device, dtype, compiled).items():
        for position in range(MOST_CONFIGURATIONS if name.startswith("ours") else 1):
            try:
                with allowed(name), autotune.only(position), torch.no_grad():
                    run(model, tokens, scale)
                with allowed(name), autotune.only(position):
                    run(model, tokens, scale).sum().backward()
            except Exception as error:
                if name == "ours":
                    raise
                print(f"{name} {size.name} {kind}: {type(error).__name__}")


def measure(size: Size, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    drawn = inputs(size, kind, options.device, dtype)
    tokens = drawn[1]
    turns = [drawn]
    for number in range(1, timing.copies_beyond_caches(tokens.nbytes, options.device)):
        moved = tokens.detach().roll(number, 0).requires_grad_(tokens.requires_grad)
        turns.append((drawn[0], moved, drawn[2]))
    forwards: dict[str, list[Callable[[], Any]]] = {}
    both: dict[str, list[Callable[[], Any]]] = {}
    failed = {}
    if options.device == "cpu":
        failed["flex"] = "flex_attention has no backward pass on a CPU"
    agreed = None
    torch.compiler.reset()
    for name, (run, module) in contenders(size, options.device, dtype, options.compile).items():

        def forward(turn: int, run: Contender = run, name: str = name) -> Tensor:
            with allowed(name), torch.no_grad():
                return run(*turns[turn])

        def forward_backward(
            turn: int, run: Contender = run, module: nn.Module = module, name: str = name
        ) -> tuple[Tensor, ...]:
            model, tokens, scale = turns[turn]
            wanted = [model, *([tokens] if tokens.requires_grad else []), *module.parameters()]
            with allowed(name):
                return torch.autograd.grad(run(model, tokens, scale).sum(), wanted)

        try:
            result = forward(0).float()
            forward_backward(0)
        except Exception as error:
            # A rival that cannot run this size is reported as such, not left out.
            if name == "ours":
                raise
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
            continue
        agreed = result if agreed is None else agreed
        gap = float((result - agreed).norm() / agreed.norm())
        if gap > (2e-2 if dtype == torch.bfloat16 else 1e-3):
            raise RuntimeError(f"{name} differs from ours by {gap:.1e} at {size.name} {kind}")
        forwards[name] = [partial(forward, turn) for turn in range(len(turns))]
        both[name] = [partial(forward_backward, turn) for turn in range(len(turns))]
    found: dict[str, Any] = {
        "size": size.name, "shape": list(size), "tokens": kind, "failed": failed,
    }  # fmt: skip
    take = partial(
        timing.alternate, device=options.device, rounds=options.rounds, repeats=options.repeats
    )
    called = {name: works[0] for name, works in both.items()}
    if options.device == "cuda":
        for phase, works in (("forward", forwards), ("forward_backward", both)):
            graphs = {name: timing.captured(each) for name, each in works.items()}
            found[phase] = take(graphs, calls=len(turns))
            del graphs
        found["called"] = take(called)
    else:
        found["forward"] = take({name: works[0] for name, works in forwards.items()})
        found["forward_backward"] = take(called)
    for name, entry in found["forward_backward"].items():
        entry["peak_bytes"] = timing.peak_bytes(called[name], options.device)
    passes = {"forward": 1, "forward_backward": 3 if kind == "student" else 2}
    for phase, count in passes.items():
        ours = found[phase]["ours"]
        ours["bytes"] = tokens.nbytes * count
        ours["bytes_per_s"] = ours["bytes"] / ours["median_s"]
    return found


def summarise(name: str, found: dict[str, Any], copy: float, summary: dict[str, Any]) -> None:
    times = found["forward_backward"]
    ratios: dict[str, Any] = {
        rival: round(entry["median_s"] / times["ours"]["median_s"], 2)
        for rival, entry in times.items()
        if rival != "ours"
    }
    if "called" in found:
        ours = found["called"]["ours"]["median_s"]
        ratios["as_called"] = {
            rival: round(entry["median_s"] / ours, 2)
            for rival, entry in found["called"].items()
            if rival != "ours"
        }
    ratios["forward_share_of_copy"] = round(found["forward"]["ours"]["bytes_per_s"] / copy, 3)
    summary[f"{name} {found['size']} {found['tokens']}"] = ratios


def work_of(size: Size, kind: str, phase: str, itemsize: int) -> tuple[float, float]:
    """FLOPs and least bytes of the module: the attention, and the four projections of M tokens."""
    both = phase == "forward_backward"
    products = 2 if not both else 7 if kind == "student" else 5
    rows = size.model_tokens * size.heads
    attention = 2.0 * products * size.batch * rows * size.tokens * size.dim
    projections = 2.0 * 4 * (3 if both else 1) * size.batch * size.model_tokens * size.dim**2
    passes = 1 if not both else 3 if kind == "student" else 2
    tokens = size.batch * size.tokens * size.dim * (1 if kind == "int8" else itemsize)
    weights = 4 * size.dim**2 * itemsize * (3 if both else 1)
    return attention + projections, float(passes * tokens + weights)


def roofline(
    path: Path, device: str, results: list[dict[str, Any]], ceilings: dict[str, float]
) -> None:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("no matplotlib: the picture is left out")
        return
    figure, axes = pyplot.subplots(figsize=(8.5, 5), layout="constrained")
    copy, peak = ceilings["copy_bytes_per_s"], ceilings["matmul_flops_per_s"]
    ridge = peak / copy
    ends = [ridge / 20, ridge, 1000 * ridge]
    roof = [min(copy * x, peak) / 1e9 for x in ends]
    axes.plot(ends, roof, color="black", label="measured copy, matrix product")
    markers = {"cached": "o", "int8": "s", "student": "^"}
    phases = {"forward": 0.45, "forward_backward": 1.0}
    names = list(dict.fromkeys(entry["name"] for entry in results))
    furthest = ridge
    for entry in results:
        colour = f"C{names.index(entry['name'])}"
        for phase, alpha in phases.items():
            itemsize = 2 if device == "cuda" else 4
            size = Size(*entry["shape"])
            flops, moved = work_of(size, entry["tokens"], phase, itemsize)
            furthest = max(furthest, flops / moved)
            axes.scatter(
                flops / moved, flops / entry[phase]["ours"]["median_s"] / 1e9,
                color=colour, alpha=alpha, marker=markers[entry["tokens"]], zorder=3,
            )  # fmt: skip
    for number, name in enumerate(names):
        label = f"{name}: {next(e['size'] for e in results if e['name'] == name)}"
        axes.scatter([], [], color=f"C{number}", marker="D", label=label)
    for label, marker in markers.items():
        axes.scatter([], [], color="grey", marker=marker, label=f"{label} tokens")
    for phase, alpha in phases.items():
        axes.scatter(
            [], [], color="black", alpha=alpha, marker="D", label=phase.replace("_", " + ")
        )
    axes.set(
        xscale="log", yscale="log", xlim=(ends[0], 2 * furthest), ylim=(peak / 5e10, peak / 7e8),
        xlabel="FLOP per byte that must be moved", ylabel="GFLOP/s",
        title=f"Cross-attention module under the roofline, {device}",
    )  # fmt: skip
    axes.grid(which="both", alpha=0.2)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> None:
    parser = timing.arguments(__doc__)
    parser.add_argument("--sizes", nargs="*", help="some of the device's sizes")
    parser.add_argument("--kinds", nargs="*", help="of tokens: cached, int8, student")
    parser.add_argument("--warm", action="store_true", help="compile everything and time nothing")
    parser.add_argument("--png", type=Path)
    options = timing.chosen(parser)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    ceilings = (
        {}
        if options.warm
        else {
            "copy_bytes_per_s": timing.copy_bandwidth(options.device),
            "matmul_flops_per_s": timing.matmul_rate(options.device, dtype),
        }
    )
    summary: dict[str, Any] = {}
    results: list[dict[str, Any]] = []
    report = {**timing.describe(options.device), **ceilings, "summary": summary, "results": results}
    sizes = {"tiny": TINY} if options.tiny else SIZES[options.device]
    for name in options.sizes or sizes:
        for kind in options.kinds or kinds_of(name, options.device):
            if options.warm:
                warm(sizes[name], kind, options.device, dtype, options.compile)
                continue
            found = measure(sizes[name], kind, options)
            results.append({"name": name, **found})
            summarise(name, found, ceilings["copy_bytes_per_s"], summary)
            timing.write(options.json, report)
            rows = [
                (
                    rival,
                    found["forward"][rival]["median_s"] * 1e3,
                    entry["median_s"] * 1e3,
                    entry["quartiles_s"][0] * 1e3,
                    entry["quartiles_s"][1] * 1e3,
                    entry["median_s"] / found["forward_backward"]["ours"]["median_s"],
                    entry["peak_bytes"] / 2**20,
                    found["called"][rival]["median_s"] * 1e3 if "called" in found else None,
                )
                for rival, entry in found["forward_backward"].items()
            ]
            print(f"\n{name} {found['size']} {kind} tokens, {str(dtype).split('.')[1]}")
            print(timing.table(COLUMNS, rows))
            for rival, reason in found["failed"].items():
                print(f"{rival}: {reason}")
            share = found["forward"]["ours"]["bytes_per_s"] / ceilings["copy_bytes_per_s"]
            if math.isfinite(share):
                print(f"forward reads tokens at {100 * share:.0f} % of a copy's bytes a second")
    if options.warm:
        return
    if options.png:
        roofline(options.png, options.device, results, ceilings)
    timing.save(options.json, report)


if __name__ == "__main__":
    main()
