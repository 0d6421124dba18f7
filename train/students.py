"""Students: any timm backbone as tokens on a grid and a pooled descriptor."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..checkpoints import misfit, read_checkpoint
from ..errors import ConfigError, DataError, first_line, first_sentence
from ..hub import hub_or_cache
from ..pixels import not_whole_patches
from .stages import Backstage, Interaction, Stage, StageTokens, mask_pixels
from .stem import expect

WEIGHTS = "student.safetensors"
"""The timm model's weights in a run's folder."""
CHECKPOINTS = "checkpoints"
"""The folder of a run's checkpoints, which a finished run keeps."""
MODEL = "model.json"
"""What the run's student and alignment were built from."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""How pixels from 0 to 1 are normalised for every student."""


@dataclass(frozen=True)
class StudentOutput:
    """What an alignment reads of a student.

    Attributes:
        tokens: [B, N, C] float; the last feature map in row-major order, after the backbone's final
            norm where it has one, without class or register tokens.
        grid: (rows, columns) of the tokens; rows * columns = N.
        pooled: [B, P] float; what the backbone's own classifier would read.
        stages: the depths that were asked for, by number.
        carried: what an interaction carried out of the last stage that it visited.
        masked: the output for the masked images, where an alignment looks at them too.
        mask: [B, N] bool, the cells that are hidden there.
    """

    tokens: Tensor
    grid: tuple[int, int]
    pooled: Tensor
    stages: Mapping[int, StageTokens] = field(default_factory=dict)
    carried: Tensor | None = None
    masked: StudentOutput | None = None
    mask: Tensor | None = None

    def ends(self) -> list[Tensor]:
        """All tensors through which an alignment's loss reaches the student. The gradient at one of
        them leaves out what reaches the student through another."""
        return list(self._ends())

    def _ends(self) -> Iterator[Tensor]:
        yield from (self.tokens, self.pooled)
        for stage in self.stages.values():
            yield from stage
        if self.carried is not None:
            yield self.carried
        if self.masked is not None:
            yield from self.masked._ends()


class Student(nn.Module):
    """A timm backbone without its classifier.

    Args:
        name: timm model name, such as ``resnet50`` or ``vit_small_patch16_224``.
        pretrained: start from timm's weights instead of random ones (needs the hub or its cache);
            if they were trained on pixels of another normalisation, see `stem.expect`.
        checkpoint: start from the weights in this file instead, .safetensors or of torch.save; a
            classifier in it is left out. No code in it is run.
        size: side, or (height, width), of the input in pixels.
        **options: passed to ``timm.create_model`` (``patch_size``, ``depth``, ``drop_path_rate``,
            ``output_stride``, ...).

    Attributes:
        model: the timm model itself.
        size: (height, width) of the input.
        grid: (rows, columns) of the tokens at that size.
        token_dim, pooled_dim: widths C and P of the output.
        stages: the depths that `forward` can read and let be written.
        patch_dim: width of a token that replaces a masked patch; None where pixels are masked.

    Raises:
        ConfigError: timm has no such model, or the model does not take an option or the size.
    """

    def __init__(
        self,
        name: str,
        *,
        pretrained: bool = False,
        checkpoint: str | None = None,
        size: int | tuple[int, int] = 224,
        **options: Any,
    ) -> None:
        super().__init__()
        self.size = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        self.model: Any = _create(name, pretrained, checkpoint, self.size, options)
        if not isinstance(getattr(self.model, "patch_drop", None), nn.Identity | None):
            raise ConfigError(
                f"student.options.patch_drop_rate of {name}: tokens that are dropped leave no grid "
                "to draw to the teachers'; leave the option out"
            )
        if wrong := not_whole_patches(self.model, self.size):
            raise ConfigError(f"student.size of {name}: {wrong}")
        self._norm = True
        with torch.no_grad():
            training, _ = self.model.training, self.model.eval()
            try:
                # Not zeros: maps of a constant could be told apart by nothing.
                pixels = torch.linspace(-1, 1, 3 * self.size[0] * self.size[1])
                self._backstage = Backstage(self.model, pixels.view(1, 3, *self.size))
                self._norm = _takes_norm(self.model, pixels.view(1, 3, *self.size))
                output = self(torch.zeros(1, 3, *self.size))
            except (RuntimeError, AssertionError, ValueError) as error:
                raise ConfigError(
                    f"student {name} does not take images of {self.size[0]} x {self.size[1]} "
                    f"pixels: {first_line(error)}; set student.size (and student.options.img_size)"
                ) from error
            self.model.train(training)
        if output.pooled.ndim != 2:
            raise ConfigError(
                f"student {name} pools nothing, so that it gives no descriptor: drop "
                "student.options.global_pool, or name one of its kinds, such as avg"
            )
        self.grid = output.grid
        self.token_dim = output.tokens.shape[-1]
        self.pooled_dim = output.pooled.shape[-1]

    @property
    def stages(self) -> tuple[Stage, ...]:
        return self._backstage.stages

    @property
    def patch_dim(self) -> int | None:
        return self._backstage.patch_dim

    def forward(
        self,
        pixels: Tensor,
        *,
        stages: tuple[int, ...] = (),
        interaction: Interaction | None = None,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
    ) -> StudentOutput:
        """Tokens and descriptor of normalised images.

        Args:
            pixels: [B, 3, H, W] float, normalised by ImageNet's mean and deviation.
            stages: numbers of the stages whose tokens the output is to hold.
            interaction: reads and writes the stages that it names.
            mask: [B, rows * columns] bool over the output's grid, True where the image is hidden:
                by `mask_token` in place of the patch's embedding, by the mean colour without one.
                Running statistics of batch norms are left alone.
            mask_token: [patch_dim] float; for a student that has a `patch_dim`.
        """
        if mask is not None and mask_token is None:
            pixels = mask_pixels(pixels, mask, self.grid)
        backstage = self._backstage
        with nullcontext() if mask is None else _keeping_statistics(self.model):
            if not stages and interaction is None and mask_token is None:
                return self._run(pixels)
            backstage.begin(pixels, stages, interaction, mask, mask_token)
            try:
                output = self._run(pixels)
            finally:
                read, carried = backstage.end()
            return replace(output, stages=read, carried=carried)

    def _run(self, pixels: Tensor) -> StudentOutput:
        # One pass gives both: the last stage's map with the final norm, and what the head reads.
        final, maps = self.model.forward_intermediates(
            pixels, indices=1, norm=self._norm, output_fmt="NCHW"
        )
        last = maps[-1]
        pooled = self.model.forward_head(final, pre_logits=True)
        height, width = last.shape[-2:]
        return StudentOutput(
            tokens=last.flatten(2).transpose(1, 2), grid=(height, width), pooled=pooled
        )

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters that the backbone wants undecayed (position embeddings and such)."""
        names: Callable[[], Iterable[str]] = getattr(self.model, "no_weight_decay", tuple)
        return {f"model.{name}" for name in names()}


def build_student(config: Mapping[str, Any], seed: int) -> Student:
    """The student of a ``student`` configuration group; the same seed gives the same weights.

    Sets torch's global generator, so build the student first and whatever else is random after it.

    Args:
        config: keys ``model``, ``size`` and optionally ``pretrained``, ``checkpoint`` and
            ``options``.
        seed: of the random initialisation.

    Raises:
        ConfigError: as `Student`, or ``size`` is none.
    """
    torch.manual_seed(seed)
    size = config["size"]
    sides = [size, size] if isinstance(size, int) else size
    if not isinstance(sides, list | tuple) or [type(side) for side in sides] != [int, int]:
        raise ConfigError(
            f"student.size={size}: expected pixels, a whole number or [height, width]"
        )
    return Student(
        str(config["model"]),
        pretrained=bool(config.get("pretrained", False)),
        checkpoint=config.get("checkpoint"),
        size=(sides[0], sides[1]),
        **dict(config.get("options") or {}),
    )


def load_student(folder: str | Path) -> tuple[Student, Tensor, Tensor]:
    """The trained student of a run's folder, in evaluation mode, and what normalises its pixels.

    Returns:
        (student, mean float32 [3], std float32 [3]): the student takes (pixels - mean) / std of RGB
        pixels from 0 to 1.

    Raises:
        DataError: the folder holds no finished run, its files do not fit each other, or the student
            carries its model tokens and is nothing without its alignment.
    """
    config = read_model_json(Path(folder))
    if config["align"].get("write_back"):
        raise DataError(
            f"{folder}: this student carries its model tokens inside the backbone "
            "(align.write_back): load it with train.checkpoint.load_model and run it with "
            "alignment.run_student"
        )
    student = load_backbone(Path(folder), config)
    return student, torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)


def load_backbone(folder: Path, config: Mapping[str, Any]) -> Student:
    """The student of a run's folder, in evaluation mode, without what an alignment adds to it.

    Args:
        config: what `read_model_json` gave.

    Raises:
        DataError: its weights are missing or do not fit.
    """
    fresh = {**config["student"], "pretrained": False, "checkpoint": None}
    student = build_student(fresh, config["seed"])
    load_weights(student.model, folder / WEIGHTS)
    return student.eval()


def read_model_json(folder: Path) -> dict[str, Any]:
    """model.json of a run's folder: student, align, seed, interpolation, spaces.

    Raises:
        DataError: it is missing or damaged.
    """
    try:
        found: dict[str, Any] = json.loads((folder / MODEL).read_text(encoding="utf-8"))
    except OSError as error:
        what = f"run preceptor train with out={folder}"
        if (folder / CHECKPOINTS).is_dir():
            what = "it was stopped, and the same preceptor train goes on with it"
        raise DataError(
            f"{folder} holds no trained student ({MODEL} is missing): {what}"
        ) from error
    except ValueError as error:
        raise DataError(f"{folder / MODEL} is damaged: train the student again") from error
    return found


def load_weights(module: nn.Module, path: Path) -> None:
    """Load all of a module's weights from a safetensors file.

    Raises:
        DataError: the file is missing, damaged, or another module's.
    """
    try:
        module.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise DataError(f"{path} cannot be loaded: {misfit(error)}") from error


@contextmanager
def _keeping_statistics(model: nn.Module) -> Iterator[None]:
    """The running statistics of batch norms stay those of whole images: evaluation sees no mask."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _takes_norm(model: Any, pixels: Tensor) -> bool:
    """Whether the model gives its last map with its final norm; some have no norm for maps."""
    try:
        model.forward_intermediates(pixels, indices=1, norm=True, output_fmt="NCHW")
    except AssertionError as error:
        if "norm" not in str(error):
            raise
        return False
    return True


def _create(
    name: str,
    pretrained: bool,
    checkpoint: str | None,
    size: tuple[int, int],
    options: dict[str, Any],
) -> nn.Module:
    if not timm.is_model(name):
        close = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else "; timm.list_models() lists them"
        raise ConfigError(f"student.model={name}: timm has no such model{hint}")
    options = timm_options(name, size, options)
    # timm takes lists from a configuration file where it documents tuples.
    options = {key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}
    start: dict[str, Any] = {"pretrained": pretrained}
    if checkpoint is not None:
        if pretrained:
            raise ConfigError("student: give pretrained=true or a checkpoint, not both")
        # timm translates the files of a network's authors, fits positions and leaves classes out.
        # It loads strictly only where the number of classes is the file's.
        given = {
            "state_dict": _without_classifier(name, checkpoint),
            "num_classes": 0,
            "label_offset": 0,
            "custom_load": False,
        }
        start = {"pretrained": True, "pretrained_cfg_overlay": given}
    hub = ""
    try:
        with hub_or_cache() if pretrained else nullcontext("") as hub:
            model: nn.Module = timm.create_model(name, num_classes=0, **start, **options)
    except TypeError as error:
        raise ConfigError(
            f"student.options of {name} are not what timm takes: {first_line(error)}"
        ) from error
    except Exception as error:  # a hub that is not there shows as any of several exceptions
        if checkpoint is not None:
            raise ConfigError(
                f"student {name}: student.checkpoint={checkpoint} does not fit it: {misfit(error)}"
            ) from error
        if pretrained:
            raise ConfigError(
                f"student {name}: its pretrained weights could not be had from {hub} "
                f"({first_sentence(error)}); try again with a network, or set "
                "student.pretrained=false and student.checkpoint to a local file of them"
            ) from error
        raise ConfigError(f"student {name}: timm refused it: {first_line(error)}") from error
    if not hasattr(model, "forward_intermediates") or not hasattr(model, "forward_head"):
        raise ConfigError(
            f"student {name} gives no intermediate features in timm; choose another backbone"
        )
    if start["pretrained"]:
        found = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
        expect(model, **found, name=name, checkpoint=checkpoint, run=MODEL, size=size)
    return model


def _without_classifier(name: str, checkpoint: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint that are no part of the model's classifier."""
    config = timm.models.get_pretrained_cfg(name)
    heads = getattr(config, "classifier", None) or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    state = read_checkpoint(checkpoint, ConfigError)
    return {key: tensor for key, tensor in state.items() if key.rpartition(".")[0] not in heads}


def timm_options(
    name: str, size: tuple[int, int], options: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What ``timm.create_model`` is given beside the name, for images of `size` (height, width)."""
    options = dict(options or {})
    # Models built for one image size say so; the others take any and know no such argument.
    if "img_size" not in options and _is_fixed(name):
        options = {"img_size": size, **options}
    return options


def _is_fixed(name: str) -> bool:
    config = timm.models.get_pretrained_cfg(name)
    return bool(config is not None and config.fixed_input_size)
