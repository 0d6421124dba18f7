"""Stage 2: train a student against a store. The rest of `train` is parts of this loop."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from lightning_fabric import Fabric
from lightning_fabric.loggers import TensorBoardLogger
from omegaconf import DictConfig, OmegaConf
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from ..cache import Cache
from ..cache.samples import SampleIndex
from ..engine import launch, precision
from ..errors import ConfigError
from ..measure import peak_memory_mb
from ..progress import ProgressLine
from .alignment import Alignment, AlignmentOutput, Codes, Target, build_alignment
from .checkpoint import (
    LAST,
    check_same_run,
    load_checkpoint,
    save_checkpoint,
    save_model,
    write_json,
)
from .data import ColorJitter, StoredViews, TrainBatch, TrainData, normalise
from .meter import FiniteWatch, Meter
from .students import Student, build_student

SUMMARY = "summary.json"


class Distiller(nn.Module):
    """Student and alignment as one module, so that every strategy wraps and synchronises both."""

    def __init__(self, student: Student, alignment: Alignment) -> None:
        super().__init__()
        self.student, self.alignment = student, alignment

    def forward(self, pixels: Tensor, targets: Mapping[str, Target]) -> AlignmentOutput:
        """Normalised pixels [B, 3, H, W] and standardised targets [B, N, D] per space."""
        return self.alignment(self.student(pixels), targets)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that stay undecayed, besides all that have one dimension."""
        return {
            f"{part}.{name}"
            for part in ("student", "alignment")
            for name in getattr(self, part).no_weight_decay()
        }


def train(config: DictConfig) -> dict[str, Any]:
    """Train the student that `config` (configs/train.yaml) describes, or go on where it stopped.

    The same configuration gives the same weights: on the CPU bitwise, whether or not the run was
    interrupted (the learning rate is a function of the step, the order of rows of seed and epoch,
    and the checkpoint holds the rest).

    Returns:
        What `summary.json` in the output folder holds.

    Raises:
        ConfigError, DataError, StoreError: an input cannot be used.
        TrainingError: the loss is not finite.
    """
    _validate(config)
    recipe, out = config.recipe, Path(config.out)
    fabric = launch(config.engine)
    rank_zero, world = fabric.global_rank == 0, fabric.world_size

    # What is read: the store, its images, and which of its spaces the alignment asks for.
    cache = Cache.open(config.cache)
    index = SampleIndex.from_shards(_plain(config.data)["shards"])
    student = build_student(_plain(config.student), config.seed)
    available = {name: cache[name].spec for name in cache.spaces}
    alignment = build_alignment(_plain(config.align), student, available)
    views = StoredViews(
        cache,
        index,
        student.size,
        interpolation=recipe.interpolation,
        max_pixels=config.data.max_pixels,
        jitter=ColorJitter(**_plain(recipe.color_jitter)),
        seed=config.seed,
    )
    data = TrainData(
        cache,
        views,
        alignment.required_spaces,
        recipe.batch_size,
        seed=config.seed,
        workers=config.workers,
        rank=fabric.global_rank,
        world=world,
        pin=fabric.device.type == "cuda",
    )
    images_a_step = recipe.batch_size * recipe.accumulate * world
    steps = recipe.steps or max(1, recipe.epochs * data.steps_per_epoch // recipe.accumulate)

    # What is trained.
    distiller = Distiller(student, alignment)
    if config.engine.channels_last:
        student.to(memory_format=torch.channels_last)
    if config.engine.compile:
        student.compile()
    optimizer = create_optimizer_v2(
        distiller,
        opt=recipe.optimizer,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        **_plain(recipe.optimizer_options),
    )
    module, optimizer = fabric.setup(distiller, optimizer)
    torch.manual_seed(config.seed + fabric.global_rank)  # drop-path must differ between ranks

    # Where it starts.
    identity = _identity(config, cache)
    checkpoint = out / LAST
    first = 0
    if config.resume and checkpoint.exists():
        state = load_checkpoint(checkpoint)
        check_same_run(checkpoint, state["identity"], identity)
        first = int(state["step"])
        if first >= steps and (out / SUMMARY).exists():
            fabric.print(f"{out}: trained already ({first} steps); resume=false trains anew")
            return dict(json.loads((out / SUMMARY).read_text(encoding="utf-8")))
        _restore(state, distiller, optimizer, fabric)
        fabric.print(f"{out}: going on from step {first} of {steps}")
    elif rank_zero:
        shutil.rmtree(out / "logs", ignore_errors=True)
        checkpoint.unlink(missing_ok=True)
    if rank_zero:
        out.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(config, out / "config.yaml", resolve=True)
        if views.unused:
            print(f"{views.unused:,} images of data.shards have no row in the store: left out")

    logger = TensorBoardLogger(out, name="logs", version="")
    watch = FiniteWatch(fabric.device)
    meter = Meter(fabric)
    line = ProgressLine(f"train {out.name}", (steps - first) * images_a_step, "images")
    batches = data.batches(first * recipe.accumulate, steps * recipe.accumulate)
    distiller.train()
    saved = first if first else None

    with line if rank_zero else contextlib.nullcontext():
        for step in range(first, steps):
            lr = learning_rate(step, steps, recipe)
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)

            for micro in range(recipe.accumulate):
                batch = meter.timed(batches)
                more = micro + 1 < recipe.accumulate
                with fabric.no_backward_sync(module, enabled=more and world > 1):
                    pixels, targets = to_device(batch, fabric.device)
                    output: AlignmentOutput = module(pixels, targets)
                    fabric.backward(output.loss / recipe.accumulate)
                watch.see(step, output)
                meter.count(output, len(batch.rows))
            if recipe.clip:
                fabric.clip_gradients(
                    module, optimizer, max_norm=recipe.clip, error_if_nonfinite=False
                )
            optimizer.step()
            optimizer.zero_grad()

            done = step + 1
            if fabric.device.type == "cpu":
                watch.check(saved, checkpoint)
            if done % recipe.log_every == 0 or done == steps:
                watch.check(saved, checkpoint)
                scalars = meter.read()
                logger.log_metrics({**scalars, "lr": lr}, step=done)
                note = f"loss {scalars['loss']:.3f}, wait {100 * meter.wait_share:.0f} %"
            if rank_zero:
                line.advance(images_a_step, note if done >= recipe.log_every else "")
            if done == steps or (recipe.checkpoint_every and done % recipe.checkpoint_every == 0):
                watch.check(saved, checkpoint)
                state = _state(done, data, distiller, optimizer, fabric, identity)
                if rank_zero:
                    save_checkpoint(checkpoint, state)
                saved = done
    logger.finalize("success")

    # What is left behind.
    summary = {
        "out": str(out),
        "cache": str(config.cache),
        "student": config.student.name,
        "align": config.align.name,
        "seed": config.seed,
        "steps": steps,
        "epochs": steps * recipe.accumulate / data.steps_per_epoch,
        "images": (steps - first) * images_a_step,
        "seconds": meter.seconds,
        "images_per_second": meter.images * world / meter.seconds,
        "wait_share": meter.wait_share,
        "loss": scalars["loss"],
        "losses": {
            name.removeprefix("loss/"): value
            for name, value in scalars.items()
            if name.startswith("loss/")
        },
        "parameters": {"student": _parameters(student), "alignment": _parameters(alignment)},
        "device": str(fabric.device),
        "precision": str(precision(config.engine)),
        "ranks": world,
        "peak_memory_mb": peak_memory_mb(),
    }
    if rank_zero:
        save_model(out, student, alignment, identity, cache)
        write_json(out / SUMMARY, summary)
        print(
            f"{out}: {steps} steps in {meter.seconds:.0f} s, "
            f"{summary['images_per_second']:,.0f} images/s, loss {summary['loss']:.4f}"
        )
    fabric.barrier()
    return summary


def learning_rate(step: int, steps: int, recipe: DictConfig) -> float:
    """Linear warm-up over the first `recipe.warmup` share of the steps, then a half cosine to
    `recipe.min_lr`. A function of the step alone, so there is nothing to resume."""
    warm = round(recipe.warmup * steps)
    if step < warm:
        return float(recipe.lr * (step + 1) / warm)
    part = (step - warm) / max(1, steps - warm)
    return float(recipe.min_lr + (recipe.lr - recipe.min_lr) * 0.5 * (1 + math.cos(math.pi * part)))


def to_device(batch: TrainBatch, device: torch.device) -> tuple[Tensor, dict[str, Target]]:
    """Normalised pixels [B, 3, H, W] and standardised targets [B, N, D] per space.

    Tokens travel as codes; int8 ones stay codes until the loss reads them.
    """
    targets: dict[str, Target] = {}
    for name, tokens in batch.tokens.items():
        moved = tokens.to(device, non_blocking=True)
        if moved.encoding == "int8" and moved.scales is not None:
            targets[name] = Codes(moved.codes, moved.scales)
        else:
            targets[name] = moved.standardised()
    return normalise(batch.pixels, device), targets


def _state(
    step: int,
    data: TrainData,
    distiller: Distiller,
    optimizer: Any,
    fabric: Fabric,
    identity: Mapping[str, Any],
) -> dict[str, Any]:
    """All that the rest of the run depends on, beside its configuration and the store."""
    random = {"cpu": torch.get_rng_state()}
    if fabric.device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(fabric.device)
    world = fabric.world_size
    gathered = {
        name: cast(Tensor, fabric.all_gather(state.to(fabric.device))).cpu().view(world, -1)
        for name, state in random.items()
    }
    return {
        "step": step,
        "epoch": step // max(1, data.steps_per_epoch),
        "ranks": world,
        "student": distiller.student.state_dict(),
        "alignment": distiller.alignment.state_dict(),
        "optimizer": optimizer.state_dict(),
        "precision": fabric.strategy.precision.state_dict(),
        "random": gathered,
        "identity": dict(identity),
    }


def _restore(
    state: Mapping[str, Any], distiller: Distiller, optimizer: Any, fabric: Fabric
) -> None:
    distiller.student.load_state_dict(state["student"])
    distiller.alignment.load_state_dict(state["alignment"])
    optimizer.load_state_dict(state["optimizer"])
    fabric.strategy.precision.load_state_dict(state["precision"])
    if state["ranks"] != fabric.world_size:
        fabric.print(
            f"the checkpoint was written by {state['ranks']} rank(s) and this run has "
            f"{fabric.world_size}: the rest of the run is valid but not the same"
        )
        return
    torch.set_rng_state(state["random"]["cpu"][fabric.global_rank])
    if fabric.device.type == "cuda" and "cuda" in state["random"]:
        torch.cuda.set_rng_state(state["random"]["cuda"][fabric.global_rank], fabric.device)


def _identity(config: DictConfig, cache: Cache) -> dict[str, Any]:
    """What determines the weights: plain containers, kept in every checkpoint."""
    recipe = _plain(config.recipe)
    for key in ("log_every", "checkpoint_every"):
        recipe.pop(key)
    return {
        "seed": config.seed,
        "student": _plain(config.student),
        "align": _plain(config.align),
        "recipe": recipe,
        "precision": str(precision(config.engine)),
        "store": {unit: cache.manifest.configuration(unit) for unit in cache.manifest.plan.units},
    }


def _validate(config: DictConfig) -> None:
    for group, prefix in ((config, ""), (config.data, "data.")):
        for key in map(str, group):
            if OmegaConf.is_missing(group, key):
                raise ConfigError(f"{prefix}{key} is required: say {prefix}{key}=...")
    recipe = config.recipe
    if (recipe.steps is None) == (recipe.epochs is None):
        raise ConfigError("recipe: give either steps or epochs, and null for the other")
    length = "epochs" if recipe.steps is None else "steps"
    for key in (length, "batch_size", "accumulate", "lr", "log_every"):
        if not recipe[key] > 0:
            raise ConfigError(f"recipe.{key}={recipe[key]}: expected a positive number")
    if not 0 <= recipe.warmup <= 1:
        raise ConfigError(f"recipe.warmup={recipe.warmup}: a share of the steps, from 0 to 1")


def _plain(config: Any) -> dict[str, Any]:
    return dict(OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
