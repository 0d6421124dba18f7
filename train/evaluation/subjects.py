"""What is scored side by side: features of students, of teachers and of the untrained floor."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric
from omegaconf import DictConfig

from ...cache import Cache
from ...engine import decoders
from ...errors import ConfigError
from ..checkpoint import load_calibration
from ..students import Student, build_student
from .base import Array, Features, OnDemand
from .corruptions import Corruption
from .feature_cache import FeatureCache
from .features import (
    MAP,
    LabelledRows,
    Reader,
    Units,
    Wanted,
    aligned_reader,
    cached_run,
    plain_reader,
)
from .floor import floor_names, settle, settled_on
from .robustness import Robustness
from .runs import Run
from .stored import descriptors, space_features
from .suite import Suite
from .words import language_spaces
from .zeroshot import without_training


@dataclass(frozen=True)
class Subject:
    """One feature to be scored."""

    kind: str
    name: str
    readout: str
    features: Features
    family: str = ""


def choose_readouts(config: DictConfig, runs: Sequence[Run]) -> dict[Path, list[str]]:
    """Which readouts of each run are scored.

    Raises:
        ConfigError: no run has a readout that was asked for, or one has none of them.
    """
    if config.readouts == "all":
        return {run.folder: list(run.alignment.readouts) for run in runs}
    offered = list(dict.fromkeys(name for run in runs for name in run.alignment.readouts))
    for name in config.readouts:
        if runs and name not in offered:
            raise ConfigError(
                f"readouts={list(config.readouts)}: no student has {name}; there are "
                f"{', '.join(offered)}"
            )
    chosen = {}
    for run in runs:
        own = [name for name in config.readouts if name in run.alignment.readouts]
        if not own:
            raise ConfigError(
                f"readouts={list(config.readouts)}: {run.folder} has none of them; it has "
                f"{', '.join(run.alignment.readouts)}"
            )
        chosen[run.folder] = own
    return chosen


def subjects(
    config: DictConfig,
    suite: Suite,
    fabric: Fabric,
    runs: Sequence[Run],
    names_of: Mapping[Path, str],
    readouts: Mapping[Path, Sequence[str]],
    train: LabelledRows,
    test: LabelledRows,
    kept: FeatureCache,
    again: Collection[Path] = (),
) -> Iterator[Subject]:
    """Everything that `config` wants scored, one after the other: teachers, students, floors.

    Args:
        names_of: each run by its folder, what `distinct_names` gave.
        readouts: of each run, what `choose_readouts` gave.
        kept: where features are kept for the next time.
        again: folders of runs that are no seed of their own: see `repeats`.
    """
    asked = runs if suite.reads("space") else ()
    embeddings = {run.folder: _embeddings(run, test.cache) for run in asked}  # before any is run
    if config.with_teachers:
        yield from _teachers(config, suite, readouts, train, test, kept)
    robustness = suite.protocols.get("robustness")
    corruptions = robustness.wanted if isinstance(robustness, Robustness) else []
    floors = floor_names(runs, names_of) if config.with_floor else {}
    for run in runs:
        name, model = names_of[run.folder], run.model
        options = {
            "batch_size": config.batch_size,
            "workers": decoders(config.workers),
            "max_pixels": config.max_pixels,
            "interpolation": model["interpolation"],
        }
        own = [*(readouts[run.folder] if suite.reads("vector") else ())]
        run.alignment.to(fabric.device).eval()
        names = [*own, *([MAP] if suite.reads("grid") else [])]
        reader = aligned_reader(run.student, run.alignment, names, embeddings.get(run.folder))
        for readout, features in _run_sides(
            kept, fabric, run.student, reader, corruptions, run.weights, train, test, name, options
        ):
            family = "" if run.folder in again else run.family
            yield Subject("student", name, readout, features, family)

        described = run.untrained
        if (floor := floors.pop(described, None)) is not None:
            untrained = build_student(run.fresh, model["seed"])
            reader = plain_reader(untrained, ["pooled", *names] if suite.reads("vector") else names)
            weights = {"untrained": described, **settled_on(untrained, train)}
            reading = {key: value for key, value in options.items() if key != "batch_size"}
            # Before the first side that is not kept, and once.
            prepare = cache(partial(settle, untrained, train, fabric.device, **reading))
            for readout, features in _run_sides(
                kept, fabric, untrained, reader, corruptions, weights, train, test,
                f"{floor} untrained", {**options, "prepare": prepare},
            ):  # fmt: skip
                yield Subject("untrained", floor, readout, features)


def _run_sides(
    kept: FeatureCache,
    fabric: Fabric,
    student: Student,
    reader: Reader,
    corruptions: Sequence[Corruption],
    weights: Mapping[str, Any],
    train: LabelledRows,
    test: LabelledRows,
    title: str,
    options: Mapping[str, Any],
) -> Iterator[tuple[str, Features]]:
    """Features of every readout on both sides; the test side corrupted too, but for maps."""
    learnt = [name for name in reader.readouts if name not in reader.spaces]
    clean: list[Wanted] = [(name, None) for name in learnt]
    more: list[Wanted] = [(name, c) for name in learnt if name != MAP for c in corruptions]
    more += [(name, None) for name in reader.spaces]
    learn, judge = (
        cached_run(
            kept, fabric, student, reader, images, wanted, weights,
            **options, title=f"{title}, {side}",
        )
        for side, images, wanted in (("train", train, clean), ("test", test, [*clean, *more]))
    )  # fmt: skip
    by_key = {(c.name, c.severity): c for c in corruptions}

    def under(readout: str) -> OnDemand[tuple[str, int]]:
        return OnDemand(() if readout == MAP else by_key, lambda key: judge[readout, by_key[key]])

    for readout, space in reader.spaces.items():
        yield space.split("/")[0], without_training(space, judge[readout, None])
    for readout in learnt:
        yield (
            readout,
            Features(
                learn[readout, None],
                judge[readout, None],
                student.grid if readout == MAP else None,
                under(readout),
            ),
        )


def _teachers(
    config: DictConfig,
    suite: Suite,
    readouts: Mapping[Path, Sequence[str]],
    train: LabelledRows,
    test: LabelledRows,
    kept: FeatureCache,
) -> Iterator[Subject]:
    def both(space: str, readout: str) -> tuple[Array, Array]:
        learn, judge = (space_features(side, space, readout, kept) for side in (train, test))
        return learn, judge

    grids = {name: train.cache[name].grid for name in train.cache.spaces}
    if suite.reads("vector"):
        for label, space in descriptors(train.cache).items():
            yield Subject("teacher", label, "store", Features(*both(space, "mean")))
        offered = any("spatial" in names for names in readouts.values())
        if offered:
            for space, grid in grids.items():
                if grid is not None:
                    yield Subject("teacher", space, "spatial", Features(*both(space, "spatial")))
    if suite.reads("grid"):
        for space, grid in grids.items():
            if grid is not None:
                yield Subject("teacher", space, MAP, Features(*both(space, "map"), grid))

    if suite.reads("space"):
        for space in language_spaces(test.cache):
            embeddings = space_features(test, space, "mean", kept)
            yield Subject("teacher", space, "store", without_training(space, embeddings))


def _embeddings(run: Run, cache: Cache) -> dict[str, Units]:
    """Mean and deviation of the language spaces whose embeddings a run predicts.

    Raises:
        ConfigError: the run's teacher is another model than the store's.
    """
    found = {}
    for space, teacher in language_spaces(cache).items():
        if space not in run.alignment.descriptors.values():
            continue
        theirs, ours = run.model["teachers"][teacher], cache.plan.teacher(teacher).identity
        if theirs["weights_sha256"] != ours["weights_sha256"]:
            raise ConfigError(
                f"{run.folder} learnt from {teacher} with other weights ({theirs['source']}) than "
                f"those of {cache.location} ({ours['source']}), so its embeddings cannot be "
                "compared with that teacher's texts"
            )
        found[space] = load_calibration(run.folder)[space]
    return found


def check_same_teachers(train: Cache, test: Cache) -> None:
    """Refuse stores whose teachers are not the same.

    Raises:
        ConfigError: names the teacher or the space, and both sides.
    """
    for name, space in train.spaces.items():
        if name not in test.spaces:
            raise ConfigError(
                f"{test.location} lacks the teacher space {name} of {train.location}: extract the "
                "same teachers for both, or say with_teachers=false"
            )
        shapes = [f"{s.spec.tokens} tokens of {s.spec.dim}" for s in (space, test[name])]
        if shapes[0] != shapes[1]:
            raise ConfigError(
                f"the teacher space {name} has {shapes[0]} in {train.location} and {shapes[1]} in "
                f"{test.location}: extract the same teachers for both"
            )
    for teacher in train.teachers:
        theirs, ours = (dict(cache.plan.teacher(teacher).identity) for cache in (train, test))
        for part in sorted((theirs.keys() | ours.keys()) - {"versions", "precision", "converted"}):
            if theirs.get(part) != ours.get(part):
                raise ConfigError(
                    f"the teacher {teacher} of {train.location} is not that of {test.location}: "
                    f"its {part} is {theirs.get(part)} there and {ours.get(part)} here"
                )
