"""Frozen pretrained networks as teachers: one file a library, one line here."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Any

from ...errors import TeacherError
from .base import Preprocessing, SpaceShape, Teacher, named

OPTIONS = ("source", "size", "checkpoint", "encoding", "spaces")
"""What a configuration may say of a teacher."""
LOADERS = {
    "timm": ("from_timm", "NAME"),
    "open_clip": ("from_open_clip", "ARCH/PRETRAINED"),
    "call": ("from_callable", "module:function"),
}
"""Of a source's scheme the module here whose load() understands it, imported when asked for, and
what follows the scheme."""


def load_teacher(
    name: str,
    source: str,
    *,
    size: int | tuple[int, int] | None = None,
    spaces: Mapping[str, Mapping[str, Any] | None] | None = None,
    checkpoint: str | None = None,
) -> Teacher:
    """A teacher with its weights, ready to run on the CPU.

    Args:
        name: what to call it in the store.
        source: ``timm:NAME``, ``open_clip:ARCH/PRETRAINED`` or ``call:module:function``.
        size: side of the input in pixels or (height, width); None for the network's own.
        spaces: what to take of it, ``{space: {take:, block:, norm:}}`` (see ``network.taps_from``);
            None for its last tokens and its descriptor.
        checkpoint: local weights, ``.safetensors`` or a file of ``torch.save``; None for the hub.

    Raises:
        TeacherError: in one sentence, what could not be found, loaded or taken.
    """
    if not isinstance(source, str) or not isinstance(checkpoint, str | os.PathLike | None):
        raise TeacherError(
            f"teacher {name}: source={source!r}, checkpoint={checkpoint!r}: "
            "expected text, and of the checkpoint text or null"
        )
    scheme = source.partition(":")[0]
    if scheme not in LOADERS or not source.partition(":")[2]:
        forms = ", ".join(f"{known}:{form}" for known, (_, form) in LOADERS.items())
        raise TeacherError(f"teacher {name}: source {source!r} is none of {forms}")
    if not name or any(sign in name for sign in "/\\.") or name != name.strip():
        raise TeacherError(f"teacher {name!r}: a name has no dot, slash or space around it")
    loader = importlib.import_module(f".{LOADERS[scheme][0]}", __name__)
    with named(name, "source" if checkpoint is None else "checkpoint"):
        teacher: Teacher = loader.load(
            name, source, size=size, spaces=spaces, checkpoint=checkpoint
        )
    return teacher


__all__ = [
    "LOADERS",
    "OPTIONS",
    "Preprocessing",
    "SpaceShape",
    "Teacher",
    "load_teacher",
]
