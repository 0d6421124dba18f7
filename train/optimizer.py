"""How weights move: timm's optimisers over a run's parameters, the learning rate, the average."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Protocol

from omegaconf import DictConfig
from timm.optim import create_optimizer_v2, list_optimizers
from timm.optim import param_groups_layer_decay as layer_groups
from timm.optim import param_groups_weight_decay as decay_groups
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer

from ..errors import ConfigError, counted, first_line
from ..options import plain
from .alignment import Alignment
from .students import Student


class Trained(Protocol):
    """The module that is trained: a student and an alignment."""

    student: Student
    alignment: Alignment

    def no_weight_decay(self) -> set[str]: ...


FUSED = ("adam", "adamw")
"""Optimisers whose step PyTorch can do in one pass over the weights, on CPUs too."""


def build_optimizer(module: nn.Module, recipe: DictConfig, *, fused: bool = True) -> Optimizer:
    """The optimiser of a recipe, from timm.

    Biases, norms and what the modules name themselves are not decayed. With ``layer_decay`` below 1
    the learning rate of a backbone's layer i of n is lr * layer_decay ** (n - 1 - i), layers as
    timm counts them (Bao et al. 2022, arXiv:2106.08254). The alignment's learning rate is
    lr * alignment_lr.

    Args:
        module: a `Trained` module.
        recipe: keys ``optimizer``, ``optimizer_options``, ``lr``, ``weight_decay``,
            ``layer_decay``, ``alignment_lr``.
        fused: whether a fused step may be taken, where there is one; a gradient scaler and clipping
            do not go with it.

    Raises:
        ConfigError: timm has no such optimiser, it does not take an option, needs what is not
            there, or second derivatives.
    """
    if not isinstance(recipe.optimizer_options, DictConfig):
        raise ConfigError(
            f"recipe.optimizer_options={recipe.optimizer_options}: expected options by name, as "
            "in '+recipe.optimizer_options.betas=[0.9,0.98]'"
        )
    options = plain(recipe.optimizer_options)
    if fused and recipe.optimizer in FUSED:
        options.setdefault("fused", True)
    parameters: Any = module
    if recipe.layer_decay < 1 or recipe.alignment_lr != 1:
        parameters = _grouped(module, recipe)
    try:
        found: Optimizer = create_optimizer_v2(
            parameters,
            opt=recipe.optimizer,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            **options,
        )
    except ValueError as error:
        if recipe.optimizer.lower() in list_optimizers():
            raise ConfigError(f"recipe.optimizer={recipe.optimizer}: {error}") from error
        raise ConfigError(
            f"recipe.optimizer={recipe.optimizer}: timm has no such optimiser; valid are adamw, "
            "lamb, sgd and the others of timm.optim.list_optimizers()"
        ) from error
    except TypeError as error:
        raise ConfigError(
            f"recipe.optimizer_options={options}: {recipe.optimizer} does not take them: {error}"
        ) from error
    except (AssertionError, ImportError) as error:  # timm asserts that CUDA and packages are there
        raise ConfigError(
            f"recipe.optimizer={recipe.optimizer} cannot be used here: {first_line(error)}"
        ) from error
    if getattr(found, "is_second_order", False):
        raise ConfigError(
            f"recipe.optimizer={recipe.optimizer} differentiates gradients once more, and training "
            "keeps no graph of them: choose another, such as adamw"
        )
    return found


def _grouped(module: Any, recipe: DictConfig) -> list[dict[str, Any]]:
    """Groups of the backbone, by layer where their rates differ, then those of the alignment."""
    backbone: nn.Module = module.student.model
    prefix = "student.model."
    undecayed = module.no_weight_decay()
    own = {name.removeprefix(prefix) for name in undecayed}
    decay: float = recipe.weight_decay
    if recipe.layer_decay < 1:
        groups = layer_groups(
            backbone, decay, no_weight_decay_list=own, layer_decay=recipe.layer_decay
        )
    else:
        groups = decay_groups(backbone, decay, no_weight_decay_list=own)
    rest: Any = _Rest(
        (name, parameter)
        for name, parameter in module.named_parameters()
        if not name.startswith(prefix)
    )
    others = decay_groups(rest, decay, no_weight_decay_list=undecayed)
    return [*groups, *({**group, "lr_scale": recipe.alignment_lr} for group in others)]


class _Rest:
    """Some named parameters, as timm's grouping wants them."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        self._named = list(named)

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return self._named


def parts_of_a_step(recipe: DictConfig, world: int) -> tuple[int, int]:
    """Rows of a rank's forward pass, and forward passes of an optimiser step.

    Where the recipe states ``images_a_step``, what its learning rate is for, the ranks share so
    many equally, in the fewest equal passes of at most ``batch_size`` rows; otherwise these are
    ``batch_size`` and ``accumulate``, whatever the number of ranks.

    Raises:
        ConfigError: so many images cannot be shared equally, or ``accumulate`` is given too.
    """
    images = recipe.get("images_a_step")
    if images is None:
        return recipe.batch_size, recipe.accumulate
    told = f"recipe.images_a_step={images}"
    if recipe.accumulate != 1:
        raise ConfigError(
            f"{told} decides how many forward passes there are: leave out "
            f"recipe.accumulate={recipe.accumulate}, or say recipe.images_a_step=null"
        )
    if not isinstance(images, int) or images < world or images % world:
        raise ConfigError(
            f"{told}: {counted(world, 'rank')} cannot share them equally; give a multiple of "
            f"{world}, or null for recipe.batch_size rows a rank"
        )
    own = images // world
    passes = next(n for n in range(-(-own // recipe.batch_size), own + 1) if not own % n)
    return own // passes, passes


def learning_rate(step: int, steps: int, recipe: DictConfig) -> float:
    """Linear warm-up over the first `recipe.warmup` share of the steps, then a half cosine to
    `recipe.min_lr`. A function of the step alone, so there is nothing to resume."""
    warm = round(recipe.warmup * steps)
    if step < warm:
        return float(recipe.lr * (step + 1) / warm)
    part = (step - warm) / max(1, steps - warm)
    return float(recipe.min_lr + (recipe.lr - recipe.min_lr) * 0.5 * (1 + math.cos(math.pi * part)))


def average_of(module: nn.Module, recipe: DictConfig) -> ModelEmaV3 | None:
    """timm's moving average of all weights and buffers, where ``recipe.ema`` is not 0.

    After t updates the decay is min(ema, 1 - (1 + t) ** (-2 / 3)), so that short runs forget their
    first weights too.
    """
    return ModelEmaV3(module, decay=recipe.ema, use_warmup=True) if recipe.ema else None
