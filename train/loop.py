"""Stage 2: train a student against a store. The rest of `train` is parts of this loop."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..cache import Cache
from ..cache.samples import SampleIndex, list_samples
from ..engine import decoders, launch, not_compiled, one_first, out_of_memory, precision
from ..errors import ConfigError, TrainingError, counted, first_line
from ..measure import peak_memory_mb
from ..options import plain
from ..progress import ProgressLine
from .alignment import AlignmentOutput
from .batch import to_device
from .checkpoint import (
    AVERAGE,
    BEST,
    KEPT,
    Checkpoints,
    check_same_run,
    load_checkpoint,
    remove_model,
    save_model,
    write_json,
)
from .claim import training_alone
from .crops import random_crop
from .data import TrainData
from .diagnosis import Diagnosis
from .distiller import Distiller, Targets, alignment_of, check_gradients
from .logs import Logs
from .meter import FiniteWatch, Meter
from .monitor import KnnMonitor
from .optimizer import average_of, build_optimizer, learning_rate, parts_of_a_step
from .photometric import ColorJitter
from .settings import (
    check_settings,
    identity_of,
    recipe_of_its_own,
    without_kernels,
    without_memory,
)
from .state import RunState, judged_weights
from .stop import StopRequest, continuing_command
from .students import build_student
from .views import Views, choose_views

SUMMARY = "summary.json"
PATIENCE = timedelta(hours=2)
"""How long processes wait for each other: one lists shards first, which may lie far away."""


def train(config: DictConfig) -> dict[str, Any]:
    """Train the student that `config` (configs/train.yaml) describes, or go on where it stopped.

    The same configuration gives the same weights: on the CPU bitwise, whether or not the run was
    interrupted (the learning rate is a function of the step, the order of rows of seed and epoch,
    and the checkpoint holds the rest).

    Returns:
        What `summary.json` in the output folder holds.

    Raises:
        ConfigError, DataError, StoreError: an input cannot be used, or an output not be written;
            another process works in the output folder.
        TrainingError: the loss or a weight is not finite, logs cannot be written, or a device has
            not enough memory, or `torch.compile` fails.
        SystemExit: with status 0, when a signal asked the run to stop and its state is saved.
    """
    check_settings(config)
    fabric = launch(config.engine, patience=PATIENCE)
    with training_alone(fabric, Path(config.out)):
        try:
            return _train(config, fabric)
        except Exception as error:
            if out_of_memory(error):
                raise without_memory(config, fabric, error) from error
            if not_compiled(error):
                raise TrainingError(
                    f"torch.compile failed ({first_line(error)}): say engine.compile=false"
                ) from error
            raise


def _train(config: DictConfig, fabric: Fabric) -> dict[str, Any]:
    """`train`, after the options were checked and the folder is this run's alone."""
    recipe, log, out = config.recipe, config.log, Path(config.out)
    rank_zero, world = fabric.global_rank == 0, fabric.world_size
    batch_size, accumulate = parts_of_a_step(recipe, world)

    # What is read: the store, its images, and which of its spaces the alignment asks for.
    cache = Cache.open(config.cache)
    student = build_student(plain(config.student), config.seed)
    crop = random_crop(plain(recipe)["crop"] if "crop" in recipe else None, config.seed)
    alignment = alignment_of(config, student, cache, crop, fitted=True)
    shards = plain(config.data)["shards"]

    def open_index() -> SampleIndex:
        with one_first(fabric):
            return list_samples(shards, quiet=not rank_zero)

    views, pixels_from = choose_views(
        cache,
        None if shards is None else open_index,
        student.size,
        interpolation=recipe.interpolation,
        max_pixels=config.data.max_pixels,
        jitter=ColorJitter(**plain(recipe.color_jitter)),
        crop=crop,
        seed=config.seed,
    )
    data = TrainData(
        cache,
        views,
        alignment.required_spaces,
        batch_size,
        seed=config.seed,
        workers=decoders(config.workers),
        rank=fabric.global_rank,
        world=world,
        pin=fabric.device.type == "cuda",
        first_views=config.get("views"),
        on_damaged=config.on_damaged,
    )
    images_a_step = batch_size * accumulate * world
    if recipe.get("images_a_step") and images_a_step > data.epoch_views.images:
        raise ConfigError(
            f"{config.cache} has {data.epoch_views.images:,} images with tokens, fewer than "
            f"recipe.images_a_step={images_a_step}: lower it and recipe.lr, or say recipe=short"
        )
    steps = recipe.steps or max(1, recipe.epochs * data.steps_per_epoch // accumulate)
    knn = _monitor(config, fabric, cache, views)

    # What is trained.
    distiller = Distiller(student, alignment)
    if config.engine.channels_last:
        student.to(memory_format=torch.channels_last)
    if config.engine.compile:
        distiller.compile_parts()
        if rank_zero:
            print("engine.compile: the first steps are compiled, which takes minutes", flush=True)
    fused = getattr(fabric.strategy.precision, "scaler", None) is None
    module, optimizer = fabric.setup(distiller, build_optimizer(distiller, recipe, fused=fused))
    average = average_of(distiller, recipe)
    torch.manual_seed(config.seed + fabric.global_rank)  # drop-path must differ between ranks
    meter, watch = Meter(fabric, config.on_damaged == "skip"), FiniteWatch(fabric.device)
    identity = identity_of(config, cache, alignment.required_spaces)
    run = RunState(fabric, distiller, optimizer, average, meter, identity)

    # Where it starts.
    checkpoints = Checkpoints(out, config.keep.last)
    first = seen = 0  # steps, and images of all ranks, before this start
    spent = 0.0  # seconds before it
    if config.resume and (last := checkpoints.last):
        state = load_checkpoint(last)
        check_same_run(last, state["identity"], identity)
        first, seen = int(state["step"]), int(state["images"])
        spent = float(state.get("seconds", 0))  # older checkpoints do not say
        if recipe.epochs and state["ranks"] != world:
            # the same part of the way, in steps of another size, of which one is left to do
            first = min(seen // images_a_step, steps if (out / SUMMARY).exists() else steps - 1)
        if first >= steps and (out / SUMMARY).exists():
            fabric.print(f"{out}: trained already ({first} steps); resume=false trains anew")
            return dict(json.loads((out / SUMMARY).read_text(encoding="utf-8")))
        run.restore(state)
        run.best = checkpoints.held_as_best()
        fabric.print(f"{out}: going on from step {first} of {steps}")
    fabric.barrier()  # every rank has looked before the first one writes
    if rank_zero:
        out.mkdir(parents=True, exist_ok=True)
        if not first:
            # What an earlier run left would be taken for this one's, were it to end early.
            (out / SUMMARY).unlink(missing_ok=True)
            for part in KEPT.values():
                remove_model(out / part)
            checkpoints.clear()
        checkpoints.tidy()
        OmegaConf.save(config, out / "config.yaml", resolve=True)
        print(
            f"{pixels_from}\n{data.describe()}\n"
            f"a step: {images_a_step:,} images "
            f"({counted(world, 'rank')} x {accumulate} x {batch_size})",
            flush=True,
        )
        for told in (recipe_of_its_own(config), without_kernels(fabric.device)):
            if told is not None:
                print(told, flush=True)
    diagnosis = Diagnosis(fabric, alignment, after=round(recipe.warmup * steps))
    line = ProgressLine(f"train {out.name}", (steps - first) * images_a_step, "images")
    batches = data.batches(first * accumulate, steps * accumulate)
    latest = run.latest
    distiller.train()

    with (
        Logs(log, out, plain(config), first=first, active=rank_zero) as logs,
        StopRequest(fabric, PATIENCE) as stop,
        contextlib.closing(batches),
        line if rank_zero else contextlib.nullcontext(),
    ):
        for step in range(first, steps):
            lr = learning_rate(step, steps, recipe)
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)
            done, ends = step + 1, step + 1 == steps
            distiller.watched = _due(done, log.gradients_every)

            for micro in range(accumulate):
                batch = meter.timed(batches)
                more = micro + 1 < accumulate
                with fabric.no_backward_sync(module, enabled=more and world > 1):
                    pixels, targets = to_device(batch, fabric.device)
                    output: AlignmentOutput = module(pixels, Targets.of(targets, fabric))
                    if distiller.seen is not None:
                        logs.log(diagnosis.sample(done, distiller.seen), done)
                        distiller.watched, distiller.seen = False, None
                    fabric.backward(output.loss / accumulate)
                watch.see(step, output)
                meter.count(output, batch)
            check_gradients(module)
            if recipe.clip:
                fabric.clip_gradients(
                    module, optimizer, max_norm=recipe.clip, error_if_nonfinite=False
                )
            optimizer.step()
            optimizer.zero_grad()
            if average is not None:
                average.update(distiller, step=done)
            stopping = stop.agreed()

            # What it tells.
            if fabric.device.type == "cpu":
                watch.check(checkpoints)
            if ends or _due(done, recipe.log_every):
                watch.check(checkpoints)
                scalars = meter.read()
                logs.log({**scalars, "lr": lr}, done)
                latest |= scalars
            measured = knn is not None and (ends or _due(done, log.knn_every))
            if knn is not None and measured:
                judged = distiller if average is None else average.module
                latest.pop("knn", None)
                accuracy = knn.accuracy(judged.student, judged.alignment)
                if accuracy is not None:
                    latest["knn"] = accuracy
                    logs.log({"knn": accuracy}, done)
            if rank_zero:
                line.advance(images_a_step, _note(latest))

            # What it keeps.
            saves = ends or stopping or _due(done, recipe.checkpoint_every)
            judges = measured if config.keep.best == "knn" else saves
            best = judges and run.improves(config.keep.best, latest, done)
            if saves or best:
                watch.check(checkpoints)
                watch.check_weights(distiller, done, checkpoints)
                images = seen + (done - first) * images_a_step
                state = run.collect(done, images, spent + meter.seconds)
                if rank_zero:
                    logs.flush()
                    checkpoints.keep(state, last=saves, best=best, must=ends or stopping)
            if stopping and not ends:
                fabric.print(
                    f"{out}: stopped after step {done} of {steps}, which is saved; go on with\n"
                    f"  {continuing_command(world)}"
                )
                raise SystemExit(0)

    # What is left behind.
    summary = {
        "out": str(out),
        "cache": str(config.cache),
        "student": config.student.name,
        "align": config.align.name,
        "seed": config.seed,
        "steps": steps,
        "epochs": steps * accumulate / data.steps_per_epoch,
        # of all starts, as the steps are; the speed is this one's
        "images": seen + (steps - first) * images_a_step,
        "seconds": spent + meter.seconds,
        "images_per_second": meter.images * world / meter.seconds,
        "wait_share": meter.wait_share,
        "images_an_epoch": data.epoch_views.images,
        "images_an_epoch_left_over": data.left_over,
        "rows_skipped": int(latest.get("rows_skipped", 0)),
        "loss": latest["loss"],
        "losses": {
            name.removeprefix("loss/"): value
            for name, value in latest.items()
            if name.startswith("loss/")
        },
        "knn": latest.get("knn"),
        "best": run.best or None,
        "parameters": {
            "student": _parameters(student),
            "alignment": _parameters(alignment),
            # What evaluation runs, by readout: the student and what a readout needs beside it.
            "inference": {
                kind: _parameters(student) + alignment.readout_parameters(kind)
                for kind in alignment.readouts
            },
        },
        "device": str(fabric.device),
        "precision": str(precision(config.engine)),
        "ranks": world,
        "peak_memory_mb": peak_memory_mb(),
    }
    if rank_zero:
        save_model(out, student, alignment, identity, cache)
        if average is not None:
            save_model(
                out / AVERAGE, average.module.student, average.module.alignment, identity, cache
            )
        summary["best"] = checkpoints.held_as_best() or None
        if summary["best"]:
            state = load_checkpoint(checkpoints.best)
            distiller.load_state_dict(judged_weights(state))
            save_model(out / BEST, student, alignment, identity, cache)
        write_json(out / SUMMARY, summary)
        print(
            f"{out}: {steps} steps in {summary['seconds']:.0f} s, "
            f"{summary['images_per_second']:,.0f} images/s, loss {summary['loss']:.4f}"
        )
        if average is not None:
            print(
                f"{out} has the weights of the last step, whose loss this is; {out / AVERAGE} "
                f"their average{', of which k-NN tells' if knn is not None else ''}"
            )
    fabric.barrier()
    return summary


def _due(done: int, every: int) -> bool:
    return bool(every) and done % every == 0


def _note(latest: Mapping[str, float]) -> str:
    if "loss" not in latest:
        return ""
    note = f"loss {latest['loss']:.3f}, wait {100 * latest['wait_share']:.1f} %"
    return note + (f", k-NN {100 * latest['knn']:.1f} %" if "knn" in latest else "")


def _monitor(config: DictConfig, fabric: Fabric, cache: Cache, views: Views) -> KnnMonitor | None:
    """The k-NN that the configuration asks for; none where the store has no labels."""
    log = config.log
    if not log.knn_every:
        return None
    if config.keep.best != "knn" and not (np.asarray(cache.labels) >= 0).any():
        fabric.print("the store has no labels (.cls): no k-NN on the way")
        return None
    return KnnMonitor(
        fabric,
        cache,
        views,
        images=log.knn_images,
        neighbours=log.knn_neighbours,
        seed=config.seed,
        batch_size=config.recipe.batch_size,
        workers=decoders(config.workers),
        skip=config.on_damaged == "skip",
    )


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
