"""Alignments by name. A new one is one file here and one line in `ALIGNMENTS`."""

from __future__ import annotations

import difflib
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

from ...errors import ConfigError
from .attention_pool import AttentionPool
from .base import Alignment, AlignmentOutput, StudentShape
from .ladder import Ladder
from .masked import Masked
from .model_token import ModelToken
from .regression import Regression
from .relational import Relational
from .spaces import SpaceTarget, select_spaces
from .targets import Codes, StoredSpace, Target

ALIGNMENTS: dict[str, type[Alignment]] = {
    "model_token": ModelToken,
    "regression": Regression,
    "ladder": Ladder,
    "masked": Masked,
    "relational": Relational,
    "attention_pool": AttentionPool,
}

__all__ = [
    "ALIGNMENTS",
    "Alignment",
    "AlignmentOutput",
    "Codes",
    "SpaceTarget",
    "Target",
    "alignment_options",
    "build_alignment",
]


def build_alignment(
    config: Mapping[str, Any],
    student: StudentShape,
    available: Mapping[str, SpaceTarget],
    stored: Callable[[str], StoredSpace] | None = None,
) -> Alignment:
    """The alignment of an ``align`` configuration group, for one student and one store.

    Args:
        config: ``method`` (a key of `ALIGNMENTS`; ``name`` where absent), ``spaces`` (names of
            spaces or teachers; all that are available where absent or null), and the options of
            that alignment.
        student: gives widths, grid and depths.
        available: the spaces of the store.
        stored: gives the open space of a name, to which the units of the targets are fitted;
            without it they are left to be loaded with the weights.

    Raises:
        ConfigError: no such alignment, option or space; the message lists what there is.
    """
    options = dict(config)
    name = options.pop("name", None)
    method = str(options.pop("method", None) or name)
    spaces = options.pop("spaces", None)
    if method not in ALIGNMENTS:
        close = difflib.get_close_matches(method, ALIGNMENTS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ConfigError(f"align.method={method}{hint}: valid are {', '.join(ALIGNMENTS)}")
    kind = ALIGNMENTS[method]
    known = alignment_options(kind)
    for option in options:
        if option not in known:
            raise ConfigError(
                f"align.{option}: {method} has no such option; it has {', '.join(known)}"
            )
        if options[option] is None and option not in _may_be_none(kind):
            raise ConfigError(f"align.{option}=null: it needs a value, such as {known[option]}")
    chosen = select_spaces(available, [spaces] if isinstance(spaces, str) else spaces)
    return kind(student, chosen, stored=stored, **options)


def _may_be_none(kind: type[Alignment]) -> set[str]:
    """Options that take None."""
    found: dict[str, Any] = {}
    for owner in (Alignment, kind):
        found |= typing.get_type_hints(owner.__init__)
    return {name for name, hint in found.items() if type(None) in typing.get_args(hint)}


def alignment_options(kind: type[Alignment]) -> dict[str, Any]:
    """Options of an alignment with their defaults, its own before those that all share."""
    found: dict[str, Any] = {}
    for owner in (kind, Alignment):
        for name, parameter in inspect.signature(owner.__init__).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY and name != "stored":
                found.setdefault(name, parameter.default)
    return found
