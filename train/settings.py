"""The configuration of a run: what may be asked, and what of it determines the weights."""

from __future__ import annotations

from collections.abc import Collection
from importlib import resources
from typing import Any

import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig, OmegaConf

from ..cache import Cache
from ..cache.plan import ROWS
from ..cache.views import INTERPOLATIONS
from ..engine import precision
from ..errors import ConfigError, TrainingError, first_line
from ..kernels.availability import why_not_on
from ..options import plain
from .logs import check_loggers
from .optimizer import parts_of_a_step
from .state import METRICS

GENERAL = "imagenet_100ep"
"""The recipe that a run has where none is chosen."""


def identity_of(config: DictConfig, cache: Cache, spaces: Collection[str]) -> dict[str, Any]:
    """What determines the weights: plain containers, kept in every checkpoint.

    Args:
        spaces: that the alignment learns from. Where ``align.spaces`` names them, teachers of
            others may come and go.
    """
    named = plain(config.align).get("spaces") is not None
    recipe = plain(config.recipe)
    for key in ("log_every", "checkpoint_every"):
        recipe.pop(key)
    return {
        "seed": config.seed,
        "views": config.get("views"),
        "student": plain(config.student),
        "align": plain(config.align),
        "recipe": recipe,
        "precision": str(precision(config.engine)),
        "store": {
            unit: cache.manifest.configuration(unit)
            for unit in cache.plan.units
            if unit == ROWS
            # stored pixels change no weight
            or any(space.id in spaces or not named for space in cache.plan.spaces_of(unit))
        },
    }


def check_settings(config: DictConfig) -> None:
    """Refuse what the composition cannot: numbers out of range, and choices that need another.

    Raises:
        ConfigError: the option, what it was and what it may be.
    """
    for group, prefix in ((config, ""), (config.data, "data.")):
        for key in map(str, group):
            if OmegaConf.is_missing(group, key):
                raise ConfigError(f"{prefix}{key} is required: say {prefix}{key}=...")
    recipe, log, keep = config.recipe, config.log, config.keep
    if config.on_damaged not in ("stop", "skip"):
        raise ConfigError(f"on_damaged={config.on_damaged}: valid are stop, skip")
    first = config.get("views")
    if first is not None and (not isinstance(first, int) or first is True or first < 1):
        raise ConfigError(
            f"views={first}: how many of an image's stored views to train on, at least 1; "
            "null for all"
        )
    if lacking := sorted(_recipe_keys() - {"crop"} - set(recipe)):
        raise ConfigError(
            f"the recipe lacks {', '.join(lacking)}: a recipe has all the keys of "
            "configs/recipe/short.yaml"
        )
    if (recipe.steps is None) == (recipe.epochs is None):
        raise ConfigError("recipe: give either steps or epochs, and null for the other")
    length = "epochs" if recipe.steps is None else "steps"
    for key in (length, "batch_size", "accumulate", "log_every"):
        _check_number(recipe, f"recipe.{key}", whole=True, positive=True)
    if recipe.get("images_a_step") is not None:
        _check_number(recipe, "recipe.images_a_step", whole=True, positive=True)
    if recipe.interpolation not in INTERPOLATIONS:
        raise ConfigError(
            f"recipe.interpolation={recipe.interpolation}: valid are {', '.join(INTERPOLATIONS)}"
        )
    for key in ("lr", "alignment_lr"):
        _check_number(recipe, f"recipe.{key}", positive=True)
    for key in ("warmup", "layer_decay", "ema", "min_lr"):
        _check_number(recipe, f"recipe.{key}")
    if recipe.min_lr > recipe.lr:
        raise ConfigError(
            f"recipe.min_lr={recipe.min_lr} is above recipe.lr={recipe.lr}, which falls to it"
        )
    for key in ("clip", "weight_decay"):
        if recipe[key] is not None:
            _check_number(recipe, f"recipe.{key}")
    for group, option in (
        (config, "seed"),
        (recipe, "recipe.checkpoint_every"),
        (keep, "keep.last"),
        (log, "log.gradients_every"),
        (log, "log.knn_every"),
    ):
        _check_number(group, option, whole=True)
    for key in ("knn_images", "knn_neighbours") if log.knn_every else ():
        _check_number(log, f"log.{key}", whole=True, positive=True)
    if not isinstance(recipe.color_jitter, DictConfig):
        raise ConfigError(
            f"recipe.color_jitter={recipe.color_jitter}: expected strengths by name, such as "
            "{brightness: 0.3}; {} for none"
        )
    if not 0 <= recipe.warmup <= 1:
        raise ConfigError(f"recipe.warmup={recipe.warmup}: a share of the steps, from 0 to 1")
    if not 0 < recipe.layer_decay <= 1:
        raise ConfigError(f"recipe.layer_decay={recipe.layer_decay}: above 0, and 1 for none")
    if not 0 <= recipe.ema < 1:
        raise ConfigError(f"recipe.ema={recipe.ema}: a decay below 1, and 0 for none")
    check_loggers(log.to)
    if keep.last < 1:
        raise ConfigError(f"keep.last={keep.last}: at least the last checkpoint is kept")
    if keep.best not in (None, *METRICS):
        raise ConfigError(f"keep.best={keep.best}: valid are null, {', '.join(METRICS)}")
    balance = config.align.get("balance")
    if keep.best == "loss" and balance in ("normalised", "drop"):
        raise ConfigError(
            f"keep.best=loss: the loss of align.balance={balance} does not tell which weights are "
            "better; say keep.best=knn, or keep.best=null"
        )
    if keep.best == "knn" and not log.knn_every:
        raise ConfigError("keep.best=knn: say how often it is measured, log.knn_every=...")


def recipe_of_its_own(config: DictConfig) -> str | None:
    """A sentence for a student that takes the general recipe's rate and has a recipe with another.

    None where its rate is that of its recipe, or no longer the general recipe's.
    """
    name, keys = str(config.student.name), ("optimizer", "lr", "weight_decay")
    folder = resources.files("preceptor.configs").joinpath("recipe")
    file = folder.joinpath(f"{name}_100ep.yaml")
    if not file.is_file():
        return None
    general: dict[str, Any]
    general, changed = (
        plain(OmegaConf.create(path.read_text("utf-8")))
        for path in (folder.joinpath(f"{GENERAL}.yaml"), file)
    )
    own = {**general, **changed}
    if any(config.recipe.get(key) != general[key] for key in (*keys, "images_a_step", "epochs")):
        return None
    if not (differing := [f"{key} {own[key]}" for key in keys if own[key] != general[key]]):
        return None
    return (
        f"recipe={GENERAL} is for any student; recipe={name}_100ep is {name}'s own "
        f"({', '.join(differing)} at {own['images_a_step']} images a step)"
    )


def without_kernels(device: torch.device) -> str | None:
    """That a run on a GPU does without the fused kernels, which only their absence would show; None
    where there is nothing to tell."""
    reason = why_not_on(device) if device.type == "cuda" else None
    if reason is None:
        return None
    return f"torch's own operations stand in for the kernels: Triton {reason}"


def without_memory(config: DictConfig, fabric: Fabric, error: BaseException) -> TrainingError:
    """What to tell of a run for which there is not enough memory: how large it is, and what makes
    it smaller."""
    recipe, size = config.recipe, plain(config.student.size)
    rows, passes = parts_of_a_step(recipe, fabric.world_size)
    pixels = " x ".join(str(side) for side in (size if isinstance(size, list) else (size, size)))
    used = str(precision(config.engine))
    same = (
        "the ranks then take more passes for the images of a step"
        if recipe.get("images_a_step")
        else f"recipe.accumulate={2 * passes} with half of it keeps the images of a step"
    )
    ways = [f"lower recipe.batch_size={recipe.batch_size} to less than {rows} ({same})"]
    if used.startswith(("32", "64")) and fabric.device.type == "cuda":
        ways.append("say engine.precision=bf16-mixed")
    ways.append("take a smaller student.size")
    return TrainingError(
        f"there is not enough memory on {fabric.device} for {rows} images a rank and forward pass, "
        f"of {pixels} pixels, in {used} ({first_line(error)}): {', or '.join(ways)}"
    )


def _check_number(
    group: DictConfig, option: str, *, whole: bool = False, positive: bool = False
) -> None:
    """Refuse what is no (whole) number from 0 up, or is 0 and must be positive."""
    value = group[option.rpartition(".")[2]]
    if not isinstance(value, int if whole else int | float) or isinstance(value, bool):
        raise ConfigError(f"{option}={value}: expected a {'whole ' if whole else ''}number")
    if not 0 <= value < float("inf") or (positive and value == 0):
        raise ConfigError(
            f"{option}={value}: expected a {'positive number' if positive else 'number from 0 up'}"
        )


def _recipe_keys() -> set[str]:
    text = resources.files("preceptor.configs").joinpath("recipe", "short.yaml").read_text("utf-8")
    return set(map(str, OmegaConf.create(text)))
