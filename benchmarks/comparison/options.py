"""Whether a finished run was trained as its variant is today."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ...options import compose_options, plain
from .variants import Variant

SECTIONS = ("student", "align", "recipe")
STEPS = "recipe.steps"
"""Of the plan, which is compared by itself; the untrained student makes one."""


def trained_with(folder: Path) -> dict[str, Any]:
    """The options of a run's student, alignment and recipe, by dotted name; none where it has left
    no ``config.yaml``, such as the one that was taught by labels."""
    path = folder / "config.yaml"
    return dict(_flat(plain(OmegaConf.load(path)))) if path.exists() else {}


def changed(
    then: Mapping[str, Any], student: str, variant: Variant, of_all: Sequence[str] = ()
) -> dict[str, list[Any]]:
    """What a run was trained with and today's variant would not be: [then, today] by option.

    An option that there was not when the run was made counts only where the variant names it: its
    default is taken to be what was done before there was a choice. One that there is no more counts
    unless it was off. Of a reference the student alone is compared.

    Args:
        then: `trained_with`; nothing differs from none.
        of_all: what every run of the plan is given (`Plan.options`).
    """
    if not then:
        return {}
    options = [*variant.all_options(student), *of_all]
    today = _composed(tuple(options))
    named = {text.partition("=")[0].lstrip("+") for text in options}
    found = {}
    for key in sorted(then.keys() | today.keys()):
        if key == STEPS or (variant.kind == "reference" and not key.startswith("student.")):
            continue
        if key not in then:
            differs = key in named
        elif key not in today:
            differs = bool(then[key])
        else:
            differs = then[key] != today[key]
        if differs:
            found[key] = [then.get(key), today.get(key)]
    return found


@cache
def _composed(options: tuple[str, ...]) -> Mapping[str, Any]:
    defaults = ["cache=unused", "data.shards=unused", "recipe=short"]
    return dict(_flat(plain(compose_options("train", [*defaults, *options]))))


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if not prefix and key not in SECTIONS:
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
