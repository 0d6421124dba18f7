"""The stores of the bed: six teachers, asked about the pool, its held-out part and every task."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from ...cli import main as preceptor
from ...extract.images import PREFETCHED, SHARED_MEMORY
from . import shards
from .specialists import NETWORKS
from .surfaces import SIZE

PACKAGED = """\
efficientnet_lite0:   # CNN, ImageNet-1k classes
  source: call:preceptor.examples.teachers:efficientnet_lite0
  size: {cnn}
  encoding: {encoding}
  spaces: {{map: {{block: 4}}, pooled: {{}}}}
vit_s_focus:          # ViT-S/14 of a saliency model
  source: call:preceptor.examples.teachers:vit_s_focus
  size: {vit}
  encoding: {encoding}
  spaces: {{patch: {{block: 7}}, mean: {{block: 7}}}}
u2netp:               # saliency CNN
  source: call:preceptor.benchmarks.testbed.saliency:u2netp
  size: {saliency}
  encoding: {encoding}
  spaces: {{map: {{block: {block}}}, mean: {{block: {block}}}}}
"""
SPECIALIST = """\
{name}:
  source: call:preceptor.benchmarks.testbed.specialists:{name}
  checkpoint: {checkpoint}
  encoding: {encoding}
  spaces: {{map: {{}}, mean: {{}}}}
"""
TASKS = "tasks"
"""The one store of all tasks' parts, where they have one."""


def pool_store(encoding: str) -> str:
    """Name of the pool's store as it was extracted; students learn from ``pool``, which is int8."""
    return "pool" if encoding == "int8" else f"pool-{encoding}"


def teachers_sizes(size: int) -> dict[str, int]:
    """What the pretrained teachers see of images of a size: pixels, and u2netp's block.

    Larger images than the default's are seen at about their own size, the CNN's enlarged as far as
    160 pixels; of them the saliency network gives a coarser block, a grid of about the same size.
    """
    if size == SIZE:
        return {"cnn": 96, "vit": 84, "saliency": 64, "block": 7}
    return {
        "cnn": min(160, 32 * max(3, size // 16)),
        "vit": 14 * max(4, round(size / 14)),
        "saliency": 16 * max(4, round(size / 16)),
        "block": 6,
    }


def room_for_decoders(batch: int, sides: Sequence[int]) -> int:
    """How many processes may hand over batches of images through shared memory, two each.

    Args:
        sides: of the squares that a batch holds its images as, in pixels.
    """
    each = PREFETCHED * batch * sum(3 * side * side for side in sides)
    return shutil.disk_usage(SHARED_MEMORY).free // each if Path(SHARED_MEMORY).is_dir() else 1


def write_teachers(out: Path, size: int, encoding: str, *, packaged: bool) -> None:
    """Write the configuration group ``teachers=testbed`` of a bed.

    Args:
        packaged: with the three pretrained teachers.
    """
    text = PACKAGED.format(encoding=encoding, **teachers_sizes(size)) if packaged else ""
    for name in NETWORKS:
        path = json.dumps(str(checkpoint(out, name).resolve()))
        text += SPECIALIST.format(name=name, checkpoint=path, encoding=encoding)
    (out / "configs" / "teachers").mkdir(parents=True, exist_ok=True)
    (out / "configs" / "teachers" / "testbed.yaml").write_text(text, encoding="utf-8")


def checkpoint(out: Path, name: str) -> Path:
    """Of a specialist."""
    return out / "specialists" / f"{name}.safetensors"


def extract(
    out: Path, name: str, folders: Sequence[str], encoding: str, options: Sequence[str]
) -> None:
    """Make a store of the shards of folders, in their order, where it is not there.

    Args:
        name: of the store; all but the pool's take its calibration.
        options: further ones of `preceptor extract`.

    Raises:
        SystemExit: it failed, and has said why.
    """
    pool, store = f"{out}/stores/{pool_store(encoding)}", f"{out}/stores/{name}"
    if Path(f"{store}.extract.json").exists():
        return
    borrowed = [] if store == pool else [f"calibration.store={pool}"]
    patterns = [f"'{shards.pattern(out / folder)}'" for folder in folders]
    listed = patterns[0] if len(patterns) == 1 else f"[{','.join(patterns)}]"
    run(
        "extract", "--config-dir", str(out / "configs"), "teachers=testbed",
        f"data.shards={listed}", f"cache={store}", "views.name=full",
        "calibration.images=1024", *borrowed, *options,
    )  # fmt: skip


def run(*arguments: str) -> None:
    """A command of the package, in this process.

    Raises:
        SystemExit: it failed, and has said why.
    """
    print(f"$ preceptor {' '.join(arguments)}", flush=True)
    if status := preceptor(arguments):
        raise SystemExit(status)
