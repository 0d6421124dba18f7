"""From factors to runs: which there are, what each is called, and what it is compared with."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import ConfigError
from ...options import closest

ALIASES = {
    "alignment": "align",
    "teachers": "align.spaces",
    "spaces": "align.spaces",
    "seeds": "seed",
}
"""Words of the field for options of ``preceptor train``."""
ENCODING = "encoding"
"""A factor whose values are encodings: the store is converted to each."""
SEED = "seed"
OWN = {"out": "every run has a folder of its own in that of the ablation"}
"""Options of ``preceptor train`` that an ablation gives, with the reason."""
_BARE = re.compile(r"[A-Za-z_/][A-Za-z0-9_./+-]*")
_WORDS = ("null", "true", "false", "nan", "inf")


@dataclass(frozen=True)
class Level:
    """One value of a factor.

    Attributes:
        label: for names and tables.
        options: of ``preceptor train``, by key; ``encoding`` is not one and is resolved later.
    """

    label: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Variant:
    """One combination of levels of all factors but the seed.

    Attributes:
        levels: label by factor.
        options: of ``preceptor train``, by key.
    """

    levels: Mapping[str, str]
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        return ", ".join(self.levels.values()) or "one"


@dataclass(frozen=True)
class PlannedRun:
    """One training with its evaluation."""

    variant: Variant
    seed: int | None

    @property
    def name(self) -> str:
        """Of its folder."""
        parts = [re.sub(r"[^\w.+=]+", "_", label) for label in self.variant.levels.values()]
        return "-".join([*parts, *([] if self.seed is None else [f"s{self.seed}"])]) or "one"

    @property
    def options(self) -> dict[str, Any]:
        seed = {} if self.seed is None else {SEED: self.seed}
        return {**self.variant.options, **seed}


def plan_runs(factors: Mapping[str, Any]) -> list[PlannedRun]:
    """Every combination of the factors' levels, seed by seed.

    Args:
        factors: by factor a list of values, or a mapping of labels to values. A factor is an option
            of ``preceptor train`` (or one of `ALIASES`, or ``encoding``); under a label, a mapping
            is several options at once.

    Raises:
        ConfigError: a factor has no level, two factors decide one option, or two runs would have
            one name.
    """
    levels: dict[str, list[Level]] = {}
    decided: dict[str, str] = {}  # option -> the factor that decides it
    for factor, values in factors.items():
        own = _levels(factor, values)
        for key in dict.fromkeys(key for level in own for key in level.options):
            if key in OWN:
                raise ConfigError(f"factors.{factor}: {key} is no factor, {OWN[key]}")
            # A store of another encoding takes the place of the one that is converted.
            key = "cache" if key == ENCODING else key
            if (other := decided.setdefault(key, factor)) != factor:
                raise ConfigError(
                    f"factors.{other} and factors.{factor} both decide {key}: a run can have one "
                    "value only, so put them under one factor, as labelled sets of options"
                )
        levels[ALIASES.get(factor, factor)] = own
    seeds: list[int | None] = [None]
    if SEED in levels:
        seeds = [_seed(level) for level in levels.pop(SEED)]
    runs = []
    for seed in seeds:
        for combination in itertools.product(*levels.values()):
            options: dict[str, Any] = {}
            for level in combination:
                options |= level.options
            named = {f: level.label for f, level in zip(levels, combination, strict=True)}
            runs.append(PlannedRun(Variant(named, options), seed))
    names = [run.name for run in runs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"factors: several runs would be called {', '.join(twice)}; label them")
    return runs


def baseline_of(variants: Sequence[Variant], baseline: str | None) -> dict[str, str | None]:
    """Name of every variant -> name of the variant it is compared with; None for the baselines.

    Args:
        baseline: a level of one factor, as LABEL or FACTOR=LABEL: every variant is compared with
            the one that has this level and is otherwise the same. None: the first variant's level
            of the first factor that varies.

    Raises:
        ConfigError: no factor has such a level, or several have.
    """
    there: dict[str, list[str]] = {}
    for variant in variants:
        for factor, label in variant.levels.items():
            if label not in there.setdefault(factor, []):
                there[factor].append(label)
    if baseline is None:
        varying = [factor for factor, labels in there.items() if len(labels) > 1]
        if not varying:
            return {variant.name: None for variant in variants}
        factor, label = varying[0], there[varying[0]][0]
    else:
        factor, label = _find(there, baseline)
    by_levels = {tuple(variant.levels.items()): variant.name for variant in variants}
    found: dict[str, str | None] = {}
    for variant in variants:
        twin = tuple({**variant.levels, factor: label}.items())
        found[variant.name] = None if variant.levels[factor] == label else by_levels[twin]
    return found


def option(key: str, value: Any) -> str:
    """``key=value`` as it would be typed."""
    return f"{key}={_text(value)}"


def _find(there: Mapping[str, Sequence[str]], baseline: str) -> tuple[str, str]:
    found = [
        (factor, label)
        for factor, labels in there.items()
        for label in labels
        if baseline in (label, f"{factor}={label}")
    ]
    if len(found) == 1:
        return found[0]
    known = "; ".join(f"{factor}: {', '.join(labels)}" for factor, labels in there.items())
    known = known or "none, since only the seed varies"
    if not found:
        everything = [label for labels in there.values() for label in labels]
        raise ConfigError(
            f"baseline={baseline}: the comparison has no such level"
            f"{closest(baseline, everything)}; there are {known}"
        )
    raise ConfigError(
        f"baseline={baseline}: several factors have it; write FACTOR=LABEL, such as "
        f"{found[0][0]}={found[0][1]}"
    )


def _levels(factor: str, values: Any) -> list[Level]:
    key = ALIASES.get(factor, factor)
    if isinstance(values, Mapping) and values:
        return [
            Level(str(label), value if isinstance(value, Mapping) else {key: value})
            for label, value in values.items()
        ]
    if not isinstance(values, list) or not values:
        raise ConfigError(
            f"factors.{factor}: expected a list of values, such as {{{factor}: [A, B]}}, or a "
            "mapping of labels to values"
        )
    return [Level(_label(key, value), {key: value}) for value in values]


def _label(key: str, value: Any) -> str:
    if isinstance(value, list):
        value = "+".join(str(item) for item in value)
    if key in ("align", "student", "align.spaces", ENCODING) and value is not None:
        return str(value)
    shown = str(value).lower() if isinstance(value, bool) or value is None else str(value)
    return f"{key.rsplit('.', 1)[-1]}={'null' if value is None else shown}"


def _seed(level: Level) -> int:
    if more := [key for key in level.options if key != SEED]:
        raise ConfigError(
            f"factors.seed: {level.label} sets {', '.join(more)} too: runs of one variant differ "
            "in their seed alone, so give that to another factor"
        )
    value = level.options.get(SEED)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ConfigError(f"factors.seed: {value!r} is not a whole number from 0 up")
    return value


def _text(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}: {_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(_text(item) for item in value) + "]"
    if isinstance(value, str) and (not _BARE.fullmatch(value) or value.lower() in _WORDS):
        # Hydra takes backslashes as they are, except before a quote and at the end.
        escaped = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value)
        return f"'{escaped}'"
    return str(value)
