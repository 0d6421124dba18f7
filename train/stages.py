"""The depths of a timm backbone: read them, add to them, mask its patches. By hooks, so that the
model keeps its own forward pass and its own names of weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import ConfigError


@dataclass(frozen=True)
class Stage:
    """One depth of a backbone, the output of one of its modules.

    Attributes:
        module: the module's name in the timm model.
        dim: width C of its tokens.
        grid: (rows, columns) of its map.
        prefix: number P of class and register tokens before the map's.
        layout: how the module gives it: maps [B, C, H, W] or [B, H, W, C], or tokens [B, P + N, C].
    """

    module: str
    dim: int
    grid: tuple[int, int]
    prefix: int
    layout: Literal["NCHW", "NHWC", "NLC"]

    def __str__(self) -> str:
        return f"{self.module} ({self.grid[0]} x {self.grid[1]}, {self.dim})"

    def tokens(self, output: Tensor) -> Tensor:
        """The module's output as tokens [B, P + N, C]: a view."""
        if self.layout == "NCHW":
            return output.flatten(2).transpose(1, 2)
        if self.layout == "NHWC":
            return output.flatten(1, 2)
        return output.view_as(output)

    def added(self, output: Tensor, update: Tensor) -> Tensor:
        """The module's output with tokens [B, P + N, C] added."""
        if self.layout == "NCHW":
            update = update.transpose(1, 2)
        return output + update.reshape(output.shape).to(output.dtype)


class StageTokens(NamedTuple):
    """What one depth holds: prefix [B, P, C] (class and register tokens) and tokens [B, N, C]."""

    prefix: Tensor
    tokens: Tensor


class Interaction(Protocol):
    """Something that lives inside a backbone: carried from stage to stage, it reads and writes."""

    @property
    def stages(self) -> tuple[int, ...]:
        """Numbers of the stages that it visits, rising."""

    def begin(self, batch: int) -> Tensor:
        """What is carried before the first stage, [batch, ...]."""

    def visit(self, stage: int, carried: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """At one stage: what is carried on, and what is added to the stage's tokens [B, P + N, C].

        Args:
            tokens: [B, P + N, C], class and register tokens first.
        """


class Backstage:
    """Hooks on the stages of one model. They do nothing but in a pass that asks for something.

    Attributes:
        stages: all depths that timm names, in order; empty for a model whose depths timm does not
            give as outputs of modules.
        patch_dim: width of the patch embedding of a backbone that is a sequence of tokens from the
            start; None for others, whose patches cannot be replaced.
    """

    def __init__(self, model: Any, pixels: Tensor) -> None:
        self.stages, self.patch_dim = _explore(model, pixels)
        # All at once: a hook that came after torch.compile would not be seen. Bound methods, so
        # that a copy of the student has hooks of its own.
        for number, stage in enumerate(self.stages):
            module = model.get_submodule(stage.module)
            module.register_forward_hook(partial(self._at_stage, number))
        if self.patch_dim is not None:
            model.patch_embed.register_forward_hook(self._at_patches)
        self._wanted: tuple[int, ...] = ()
        self._interaction: Interaction | None = None
        self._mask: Tensor | None = None
        self._mask_token: Tensor | None = None
        self.read: dict[int, StageTokens] = {}
        self.carried: Tensor | None = None

    def begin(
        self,
        pixels: Tensor,
        wanted: Sequence[int],
        interaction: Interaction | None,
        mask: Tensor | None,
        mask_token: Tensor | None,
    ) -> None:
        """Say what the next pass is to do; `end` must follow it."""
        self._wanted, self._interaction = tuple(wanted), interaction
        self._mask, self._mask_token = mask, mask_token
        self.read = {}
        self.carried = None if interaction is None else interaction.begin(pixels.shape[0])

    def end(self) -> tuple[dict[int, StageTokens], Tensor | None]:
        """What was read, and what the interaction carried out of its last stage."""
        # A node of its own in autograd's graph, aside from the way into the last stage.
        read = self.read
        carried = None if self.carried is None else self.carried.view_as(self.carried)
        self._wanted, self._interaction = (), None
        self._mask = self._mask_token = self.carried = None
        self.read = {}
        return read, carried

    def _at_stage(
        self, number: int, module: nn.Module, inputs: Any, output: Tensor
    ) -> Tensor | None:
        stage, changed = self.stages[number], None
        interaction = self._interaction
        if interaction is not None and number in interaction.stages:
            assert self.carried is not None
            self.carried, update = interaction.visit(number, self.carried, stage.tokens(output))
            output = changed = stage.added(output, update)
        if number in self._wanted:
            tokens = stage.tokens(output)
            self.read[number] = StageTokens(tokens[:, : stage.prefix], tokens[:, stage.prefix :])
        return changed

    def _at_patches(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        if self._mask is None or self._mask_token is None:
            return None
        mask = self._mask.view(*output.shape[:-1], 1)
        return torch.where(mask, self._mask_token.to(output.dtype), output)


def mask_pixels(pixels: Tensor, mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Normalised pixels [B, 3, H, W] with the blocks of masked cells [B, rows * columns] at 0, the
    mean colour."""
    cells = mask.view(-1, 1, *grid).to(pixels.dtype)
    blocks = functional.interpolate(cells, pixels.shape[-2:], mode="nearest")
    return pixels * (1 - blocks)


def choose_stages(
    stages: Sequence[Stage],
    wanted: int | Sequence[int],
    option: str,
    *,
    before_last: bool = False,
) -> tuple[int, ...]:
    """Numbers of the stages that an option asks for, rising.

    Args:
        wanted: a list of numbers from 0, negative ones counted from the end; or how many: evenly
            spaced up to the last where all have one grid (a ViT), the last ones where grids shrink.
        option: its name, for messages.
        before_last: where a number is wanted, leave out the last stage.

    Raises:
        ConfigError: the student has no such depth; the message lists what it has.
    """
    count = len(stages)
    there = ", ".join(f"{number} {stage}" for number, stage in enumerate(stages)) or "none"
    numbers = [wanted] if isinstance(wanted, int) else list(wanted)
    if any(isinstance(number, bool) or not isinstance(number, int) for number in numbers):
        raise ConfigError(f"align.{option}={wanted}: a number of depths, or a list of them")
    if isinstance(wanted, int):
        most = count - before_last
        if not 0 <= wanted <= max(most, 0):
            raise ConfigError(
                f"align.{option}={wanted}: at most {most} depths of this student can be asked for "
                f"by number; it has {there}"
            )
        if len({stage.grid for stage in stages}) == 1:
            parts = wanted + before_last
            return tuple((i + 1) * count // parts - 1 for i in range(wanted))
        return tuple(range(most - wanted, most))
    for number in numbers:
        if not -count <= number < count:
            raise ConfigError(
                f"align.{option}={list(numbers)}: the student has no depth {number}; it has {there}"
            )
    return tuple(sorted({number % count for number in numbers}))


def _explore(model: Any, pixels: Tensor) -> tuple[tuple[Stage, ...], int | None]:
    """Run a model once and see which modules give which of its intermediate maps."""
    info = model.feature_info
    names = [str(entry["module"]) for entry in getattr(info, "info", info)]
    given: dict[str, Tensor] = {}
    hooks = []
    modules = dict(model.named_modules())
    watched = [*names, "patch_embed"]
    for name in watched:
        if name in modules:
            hooks.append(
                modules[name].register_forward_hook(
                    lambda _, inputs, output, name=name: given.setdefault(name, output)
                )
            )
    try:
        maps = model.forward_intermediates(
            pixels, norm=False, output_fmt="NCHW", intermediates_only=True
        )
    finally:
        for hook in hooks:
            hook.remove()
    if len(maps) != len(names):
        return (), None
    stages = []
    for name, expected in zip(names, maps, strict=True):
        stage = _stage(name, given.get(name), expected)
        if stage is None:
            return (), None
        stages.append(stage)
    patches = given.get("patch_embed")
    first = stages[0]
    tokens = first.grid[0] * first.grid[1]
    if (
        first.layout == "NLC"
        and isinstance(patches, Tensor)
        and patches.shape[-1] == first.dim
        and patches[..., 0].numel() == len(pixels) * tokens
        and _sees_itself_alone(modules["patch_embed"], pixels, patches, first.grid)
    ):
        return tuple(stages), int(first.dim)
    return tuple(stages), None


def _sees_itself_alone(
    embed: nn.Module, pixels: Tensor, patches: Tensor, grid: tuple[int, int]
) -> bool:
    """Whether other pixels of one patch leave the embeddings of all others as they were. Not so
    where a stem's windows overlap: those would tell what a token in a patch's place hides."""
    cell = torch.zeros(len(pixels), grid[0] * grid[1], dtype=torch.bool)
    cell[:, cell.shape[1] // 2] = True
    shown = mask_pixels(torch.ones_like(pixels), cell, grid) > 0
    changed = embed(torch.where(shown, pixels, pixels + 3))
    others = ~cell.view(patches.shape[:-1])
    return torch.allclose(changed[others], patches[others], rtol=1e-4, atol=1e-5)


def _stage(name: str, output: Any, expected: Tensor) -> Stage | None:
    """The stage whose module gave `output` for the map [B, C, H, W] that timm reports."""
    if not isinstance(output, Tensor):
        return None
    _, dim, height, width = expected.shape
    prefix = output.shape[1] - height * width if output.ndim == 3 else 0
    layouts: tuple[Literal["NCHW", "NHWC", "NLC"], ...] = ("NCHW", "NHWC")
    for layout in layouts if output.ndim == 4 else ("NLC",):
        stage = Stage(name, dim, (height, width), prefix, layout)
        if prefix < 0 or stage.tokens(output).shape[1:] != (prefix + height * width, dim):
            continue
        if torch.equal(stage.tokens(output)[:, prefix:], expected.flatten(2).transpose(1, 2)):
            return stage
    return None
