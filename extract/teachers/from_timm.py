"""``timm:NAME``: any network of timm, as a teacher."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import timm
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from ...checkpoints import read_checkpoint
from ...errors import TeacherError, closest, first_sentence
from ...hub import hub_or_cache
from .base import Preprocessing
from .network import NetworkTeacher, Offer, Tap, check_whole_patches, size_pair, taps_from

_FOLDER = "local-dir:"
_ELSEWHERE = ("hf-hub:", "hf_hub:", _FOLDER)


class TimmTeacher(NetworkTeacher):
    """A timm network with its weights; also for weights that come from elsewhere.

    Args:
        name: of the teacher.
        network: built by ``timm.create_model``, weights loaded, at its native input size.
        source: for the identity.
        size: (height, width) or one side of the input; None for the network's own. Networks with
            position embeddings get them resampled by timm.
        spaces: ``{name: {take, block, norm}}``; None for the last tokens and the descriptor.
        preprocessing: overrides timm's own data configuration; ``size`` goes first still.
    """

    def __init__(
        self,
        name: str,
        network: Any,
        source: str,
        size: int | tuple[int, int] | None = None,
        spaces: Mapping[str, Mapping[str, Any] | None] | None = None,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        self._prefix = int(getattr(network, "num_prefix_tokens", 0) or 0)
        self._is_vit = hasattr(network, "num_prefix_tokens") and hasattr(network, "blocks")
        has_class_token = self._prefix > 0 and getattr(network, "cls_token", None) is not None
        offer = Offer(
            takes=("tokens", "mean", *(("cls",) if has_class_token else ()), "pooled"),
            blocks=len(network.feature_info) if hasattr(network, "forward_intermediates") else 0,
            norm=self._is_vit and isinstance(getattr(network, "norm", None), nn.Module),
        )
        by_token = has_class_token and getattr(network, "global_pool", "") == "token"
        default: dict[str, dict[str, Any]] = {
            "patch" if self._is_vit else "map": {},
            "cls" if by_token else "pooled": {},
        }
        taps = taps_from(spaces, default, offer, name)
        self._asks_prefix = self._prefix > 0 and offer.blocks > 0 and _gives_prefix(network)
        for space, tap in taps.items():
            if tap.take == "cls" and tap.block is not None and not self._asks_prefix:
                raise TeacherError(
                    f"teachers.{name}.spaces.{space}: timm gives no class token of a block of "
                    "this network; drop block, or take tokens or mean of it"
                )
        self._blocks = sorted({tap.block for tap in taps.values() if tap.block is not None})
        self._final = any(tap.block is None for tap in taps.values())
        own = preprocessing or timm_preprocessing(network)
        chosen = own.size if size is None else size_pair(size)
        self._native = own.size
        self._timm = network
        super().__init__(
            name=name,
            source=source,
            network=network,
            preprocessing=Preprocessing(chosen, own.mean, own.std, own.interpolation),
            taps=taps,
            libraries=("timm",),
        )

    def _set_size(self, size: tuple[int, int]) -> None:
        if size == self._native:
            return
        check_whole_patches(self.name, self.network, size)
        if not hasattr(self.network, "set_input_size"):
            return
        try:
            self._timm.set_input_size(img_size=size)
        except Exception as error:  # timm asserts
            raise TeacherError(
                f"teacher {self.name} cannot take {size[0]} x {size[1]} pixels: "
                f"{first_sentence(error)}"
            ) from error

    def _features(self, pixels: Tensor) -> dict[str, Tensor]:
        final: Tensor | None = None
        stages: dict[int, tuple[Tensor, Tensor | None]] = {}
        if self._blocks:
            result = self._timm.forward_intermediates(
                pixels,
                indices=self._blocks,
                output_fmt="NCHW",
                intermediates_only=not self._final,
                stop_early=not self._final,
                **({"return_prefix_tokens": True} if self._asks_prefix else {}),
            )
            if self._final:
                final, result = result
            for block, stage in zip(self._blocks, result, strict=True):
                stages[block] = stage if isinstance(stage, tuple) else (stage, None)
        elif self._final:
            final = self._timm.forward_features(pixels)
        return {
            space: self._tap(tap, stages[tap.block])
            if tap.block is not None
            else self._tap_final(tap, final, pixels)
            for space, tap in self.taps.items()
        }

    def _tap(self, tap: Tap, stage: tuple[Tensor, Tensor | None]) -> Tensor:
        grid, prefix = stage
        if tap.take == "cls" and prefix is not None:
            return self._timm.norm(prefix[:, 0]) if tap.norm else prefix[:, 0]
        if tap.norm:  # the networks that have it normalise each token by itself
            grid = self._timm.norm(grid.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return grid.mean((2, 3)) if tap.take == "mean" else grid

    def _tap_final(self, tap: Tap, final: Any, pixels: Tensor) -> Tensor:
        if tap.take == "pooled":
            return self._timm.forward_head(final, pre_logits=True)
        if tap.take == "cls":
            return final[:, 0]
        grid = self._grid(final, pixels)
        return grid.mean((2, 3)) if tap.take == "mean" else grid

    def _grid(self, final: Any, pixels: Tensor) -> Tensor:
        """Final features of any of timm's layouts as ``[B, D, rows, columns]``."""
        if isinstance(final, Tensor) and final.ndim == 4:
            is_last = getattr(self.network, "output_fmt", "NCHW") == "NHWC"
            return final.permute(0, 3, 1, 2) if is_last else final
        if isinstance(final, Tensor) and final.ndim == 3:
            stride = self._timm.feature_info[-1]["reduction"]
            rows, columns = pixels.shape[2] // stride, pixels.shape[3] // stride
            tokens = final[:, self._prefix :]
            if tokens.shape[1] == rows * columns:
                return tokens.transpose(1, 2).unflatten(2, (rows, columns))
        raise TeacherError(
            f"teacher {self.name}: the final features of this network have no grid that is known "
            f"here; take a block instead, as in teachers.{self.name}.spaces="
            "{map: {block: -1}, pooled: {}}"
        )


def _gives_prefix(network: Any) -> bool:
    return "return_prefix_tokens" in inspect.signature(network.forward_intermediates).parameters


def timm_preprocessing(network: nn.Module) -> Preprocessing:
    """The preprocessing that timm's own configuration of a network prescribes.

    Its ``crop_pct`` is not part of it: which part of an image is seen is the view policy's.
    """
    config = resolve_model_data_config(network)
    _, height, width = config["input_size"]
    mean, std = (tuple(float(value) for value in config[key]) for key in ("mean", "std"))
    return Preprocessing((height, width), mean, std, config["interpolation"])  # type: ignore[arg-type]


def load(
    name: str,
    source: str,
    size: int | tuple[int, int] | None = None,
    spaces: Mapping[str, Mapping[str, Any] | None] | None = None,
    checkpoint: str | None = None,
) -> TimmTeacher:
    """The teacher ``timm:NAME``; weights from the hub or from the local file ``checkpoint``.

    Raises:
        TeacherError: timm has no such network, or its weights cannot be had or do not fit.
    """
    model = source.partition(":")[2]
    if not model.startswith(_ELSEWHERE):
        _check_name(name, model)
    network = _from_file(name, model, checkpoint) if checkpoint else _from_hub(name, model)
    return TimmTeacher(name, network, source, size, spaces)


def _check_name(teacher: str, model: str) -> None:
    architecture, _, tag = model.partition(".")
    if not timm.is_model(architecture):
        raise TeacherError(
            f"teacher {teacher}: timm has no network {architecture!r}"
            + closest(architecture, timm.list_models())
        )
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise TeacherError(
            f"teacher {teacher}: timm has no weights {tag!r} for {architecture}"
            f"; known: {', '.join(tags) or 'none'}"
        )


def _from_hub(teacher: str, model: str) -> nn.Module:
    advice = f"or set teachers.{teacher}.checkpoint to a local .safetensors or .pth file of them"
    if not model.startswith(_ELSEWHERE) and not timm.models.is_model_pretrained(model):
        raise TeacherError(
            f"teacher {teacher}: timm has no pretrained weights for {model}; {advice}"
        )
    with _place(model) as (place, remedy):
        try:
            return timm.create_model(model, pretrained=True)
        except Exception as error:
            raise TeacherError(
                f"teacher {teacher}: the weights of timm:{model} could not be had from {place} "
                f"({first_sentence(error)}); {remedy}, {advice}"
            ) from error


@contextlib.contextmanager
def _place(model: str) -> Iterator[tuple[str, str]]:
    """Where a network is looked for, and what may help where it is not found, for a message."""
    if model.startswith(_FOLDER):
        yield "that folder", "mend the folder"
    else:
        with hub_or_cache() as hub:
            yield hub, "try again with a network"


@contextlib.contextmanager
def _missing_keys() -> Iterator[list[str]]:
    """What networks built meanwhile did not find in their state: timm does not load all of them
    strictly, and would leave the rest as it was drawn."""
    load, missing = nn.Module.load_state_dict, list[str]()

    def told(module: nn.Module, *arguments: Any, **options: Any) -> Any:
        found = load(module, *arguments, **options)
        # Florence's DaViTs come without that norm, and timm means a fresh one.
        missing.extend(key for key in found.missing_keys if not key.startswith("head.norm."))
        return found

    nn.Module.load_state_dict = told  # type: ignore[method-assign, assignment]
    try:
        yield missing
    finally:
        nn.Module.load_state_dict = load  # type: ignore[method-assign]


def _from_file(teacher: str, model: str, checkpoint: str) -> nn.Module:
    """The network with every one of its weights from a file, whatever classifier that has."""
    state = read_checkpoint(checkpoint, TeacherError)
    with _place(model) if model.startswith(_ELSEWHERE) else contextlib.nullcontext() as found:
        try:
            bare: Any = timm.create_model(model, pretrained=False, num_classes=0)
        except Exception as error:
            if found is None:
                raise
            raise TeacherError(
                f"teacher {teacher}: what network timm:{model} is could not be had from {found[0]} "
                f"({first_sentence(error)}), and a checkpoint holds its weights alone: {found[1]}, "
                "or name the network itself, as timm lists it"
            ) from error
    config = bare.pretrained_cfg
    classifier = config.get("classifier")
    weight = state.get(f"{classifier}.weight") if isinstance(classifier, str) else None
    widths = [config.get("num_classes"), None if weight is None else len(weight), 0]
    problem: Exception | None = None
    lacking: list[str] = []
    for classes in dict.fromkeys(width for width in widths if width is not None):
        try:
            # timm translates the checkpoints of a network's authors.
            with _missing_keys() as lacking:
                network = timm.create_model(
                    model,
                    pretrained=True,
                    num_classes=classes,
                    pretrained_cfg_overlay={
                        "state_dict": dict(state),
                        "num_classes": classes,
                        "label_offset": 0,
                        "custom_load": False,
                    },
                )
            if not lacking:
                return network
        except Exception as error:  # a mismatch shows as any of several exceptions
            problem = problem or error
    lines = str(problem).strip().splitlines()
    if problem is None:
        lines = [f"it lacks {len(lacking)} of its weights, such as {', '.join(lacking[:3])}"]
    raise TeacherError(
        f"teacher {teacher}: checkpoint {checkpoint} does not fit timm:{model}: "
        f"{' '.join(line.strip() for line in lines[:2])[:400]}"
    ) from problem
