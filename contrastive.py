"""Contrastive models of images and text: what ``open_clip:ARCH/PRETRAINED`` names."""

from __future__ import annotations

import warnings
from typing import Any

import open_clip
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

from .checkpoints import read_checkpoint
from .errors import PreceptorWarning, TeacherError, closest, first_sentence
from .hub import hub_or_cache

SCHEME = "open_clip"
"""Of a source."""
_PREPROCESSING = ("mean", "std", "interpolation")


def architecture_of(source: str) -> str:
    """ARCH of ``open_clip:ARCH`` or ``open_clip:ARCH/PRETRAINED``."""
    return source.partition(":")[2].partition("/")[0]


def own_size(source: str) -> tuple[int, int]:
    """(height, width) in pixels that an architecture takes by itself."""
    config = open_clip.get_model_config(architecture_of(source))
    size = config["vision_cfg"].get("image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def create(
    name: str, source: str, size: tuple[int, int] | None = None, checkpoint: str | None = None
) -> Any:
    """The model ``open_clip:ARCH/PRETRAINED``, or ``open_clip:ARCH`` with a local ``checkpoint``.

    A checkpoint holds the whole model. PRETRAINED then says which preprocessing and activation
    the weights were trained with, and may be left out where all weights of the architecture that
    open_clip knows agree in them, or else the architecture's own are meant, with a warning.

    Args:
        name: of the teacher, for messages.
        size: (height, width) in pixels of the image tower's input; None for its own.

    Returns:
        The ``open_clip.CLIP`` or its like, float32, on the CPU.

    Raises:
        TeacherError: there is no such architecture or tag, or the weights cannot be had or do not
            fit.
    """
    architecture, tag = architecture_of(source), source.partition("/")[2]
    if architecture not in open_clip.list_models():
        raise TeacherError(
            f"teacher {name}: open_clip has no architecture {architecture!r}"
            + closest(architecture, open_clip.list_models())
        )
    config = get_pretrained_cfg(architecture, tag) if tag else {}
    if (tag and not config) or (not tag and checkpoint is None):
        tags = ", ".join(list_pretrained_tags_by_model(architecture)) or "none"
        raise TeacherError(
            f"teacher {name}: source {source!r} names {'unknown' if tag else 'no'} weights of "
            f"{architecture}; known: {tags}"
        )
    if not tag:
        common = _common(architecture)
        if common is None:
            tags = ", ".join(list_pretrained_tags_by_model(architecture))
            warnings.warn(
                f"teacher {name}: weights of {architecture} differ in activation or normalisation, "
                f"and {checkpoint} is taken to have the architecture's own: if it is one of "
                f"{tags}, name it, as in source={SCHEME}:{architecture}/{tags.partition(',')[0]}",
                PreceptorWarning,
                stacklevel=2,
            )
        config = common or {}
    options: dict[str, Any] = {
        "precision": "fp32",
        "force_quick_gelu": bool(config.get("quick_gelu", False)),
        "force_image_size": _image_size(name, architecture, size),
        "force_preprocess_cfg": {key: config[key] for key in _PREPROCESSING if key in config},
        "require_pretrained": True,
    }
    if checkpoint is None:
        return _from_hub(name, architecture, tag, options)
    read_checkpoint(checkpoint, TeacherError)  # refuses what is damaged in clear words
    try:
        return open_clip.create_model(architecture, pretrained=checkpoint, **options)
    except Exception as error:  # a mismatch shows as any of several exceptions
        text = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise TeacherError(
            f"teacher {name}: checkpoint {checkpoint} does not fit open_clip:{architecture}: "
            f"{text[:400]}"
        ) from error


def tokenizer(name: str, source: str) -> Any:
    """What turns texts into the numbers that the model's text tower takes.

    Args:
        name: of the teacher, for messages.

    Raises:
        TeacherError: it is the hub's and cannot be had.
    """
    architecture = architecture_of(source)
    text: dict[str, Any] = open_clip.get_model_config(architecture).get("text_cfg") or {}
    if "hf_tokenizer_name" not in text:  # CLIP's own comes with open_clip
        return open_clip.get_tokenizer(architecture)
    with hub_or_cache() as hub:
        try:
            return open_clip.get_tokenizer(architecture)
        except ImportError as error:
            raise TeacherError(
                f"teacher {name}: the tokenizer of {source} needs another package: pip install "
                f"transformers ({first_sentence(error)})"
            ) from error
        except Exception as error:  # the hub's libraries raise many kinds
            raise TeacherError(
                f"teacher {name}: the tokenizer of {source} could not be had from {hub} "
                f"({first_sentence(error)}); try again with a network"
            ) from error


def _common(architecture: str) -> dict[str, Any] | None:
    """The preprocessing and activation of all known weights of an architecture; None if they
    differ, {} if there are none."""
    found = []
    for tag in list_pretrained_tags_by_model(architecture):
        config = get_pretrained_cfg(architecture, tag)
        found.append({key: config.get(key) for key in (*_PREPROCESSING, "quick_gelu")})
    if any(config != found[0] for config in found):
        return None
    return {key: value for key, value in found[0].items() if value is not None} if found else {}


def _image_size(
    teacher: str, architecture: str, size: tuple[int, int] | None
) -> int | tuple[int, int] | None:
    """A size as open_clip takes it: its ResNets know squares alone."""
    if size is None:
        return None
    height, width = size
    if height == width:
        return height
    if isinstance(open_clip.get_model_config(architecture)["vision_cfg"].get("layers"), list):
        raise TeacherError(
            f"teachers.{teacher}.size: {architecture} takes squares, not {height} x {width} pixels"
        )
    return height, width


def _from_hub(teacher: str, architecture: str, tag: str, options: dict[str, Any]) -> Any:
    with hub_or_cache() as hub:
        try:
            return open_clip.create_model(architecture, pretrained=tag, **options)
        except Exception as error:
            raise TeacherError(
                f"teacher {teacher}: the weights of open_clip:{architecture}/{tag} could not be "
                f"had from {hub} ({first_sentence(error)}); try again with a network, or set "
                f"teachers.{teacher}.checkpoint to a local .safetensors or .pt file of them"
            ) from error
