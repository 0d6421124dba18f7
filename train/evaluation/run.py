"""preceptor eval: the same protocols for students, their teachers and the untrained floor."""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from ...cache.durable import write_whole
from ...engine import launch, precision, refuse_several
from ...errors import ConfigError, DataError
from ...measure import peak_memory_mb
from ...options import plain
from ..checkpoint import write_json
from . import PROTOCOLS, build_suite
from .feature_cache import FeatureCache
from .features import LabelledRows
from .intervals import Bootstrap
from .labels import KINDS, Task, check_same_classes
from .reduction import reduce_width
from .runs import Run, distinct_names, repeats
from .stored import space_features
from .subjects import check_same_teachers, choose_readouts, subjects
from .suite import Suite
from .table import Row, print_seeds, print_tables, seed_means
from .truths import Spaces, Truth, Words
from .words import embedded, words_of
from .zeroshot import ZeroShot

RESULT = "summary.json"
RESAMPLES = "resamples.safetensors"
"""Every figure on every bootstrap resample, by row and key: for paired differences of runs."""


def evaluate(config: DictConfig) -> dict[str, Any]:
    """Score what `config` (configs/eval.yaml) names, print the tables and write `summary.json`.

    Returns:
        What the file holds: ``rows`` (see `Row`), ``seeds`` (means over runs that differ in their
        seed alone), ``repeated`` (runs that are no seed of their own -> the run that they repeat),
        the protocol, counts and seconds. `read_resamples` gives what is beside it.

    Raises:
        ConfigError, DataError, StoreError: an input cannot be used.
    """
    started = time.perf_counter()
    refuse_several("eval", config.engine)
    if not config.students and not config.with_teachers:
        raise ConfigError("nothing to score: students is empty and with_teachers is false")
    suite, train, test, truths = prepare(config)
    warn_of_views(train, test)
    # One run named twice is one.
    folders = {Path(folder).resolve(): Path(folder) for folder in config.students}
    runs = [Run.load(folder) for folder in folders.values()]
    names = distinct_names(runs)
    again = repeats(runs)
    repeated = {names[folder]: names[first] for folder, first in again.items()}
    for name, first in repeated.items():
        print(
            f"warning: {name} has the configuration and the seed of {first}: it has rows of its "
            "own and does not count as another seed in the means",
            file=sys.stderr,
            flush=True,
        )
    readouts = choose_readouts(config, runs)
    if str(precision(config.engine)) == "64-true":
        raise ConfigError("engine.precision=64-true: students are evaluated in 32-true or mixed")
    fabric = launch(config.engine)
    suite = suite.on(fabric.device)
    out = Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out: {out} cannot be made: {error.strerror or error}") from error
    rows = []
    with _feature_cache(config) as kept:
        if "cka" in suite.protocols:
            spaces = {name: space_features(test, name, "mean", kept) for name in test.cache.spaces}
            truths.append(Spaces("spaces", spaces))
        asked = suite.protocols.get("zeroshot")
        if isinstance(asked, ZeroShot):
            truths = [
                embedded(truth, asked, test.cache, kept, fabric.device)
                if isinstance(truth, Words)
                else truth
                for truth in truths
            ]
        for subject in subjects(
            config, suite, fabric, runs, names, readouts, train, test, kept, again
        ):
            for width in [None] if subject.features.space else _widths(config):
                features = subject.features
                if width is not None:
                    features = reduce_width(features, width)
                rows.append(
                    Row(
                        kind=subject.kind,
                        name=subject.name,
                        readout=subject.readout,
                        dim=features.width,
                        width=width,
                        reads=features.kind,
                        scores=suite.score(features, truths),
                        family=subject.family,
                    )
                )
    seeds = seed_means(rows)
    result: dict[str, Any] = {
        "rows": [row.as_json() for row in rows],
        "seeds": seeds,
        "repeated": repeated,
        "images": {"train": len(train.rows), "test": len(test.rows)},
        "features": {"computed": kept.computed, "from_cache": kept.found},
        "protocol": {
            key: plain(value)
            for key, value in config.items()
            if key not in ("engine", "hydra", "out", "features", "workers", "batch_size")
        },
        "device": str(fabric.device),
        "seconds": time.perf_counter() - started,
        "peak_memory_mb": peak_memory_mb(),
    }
    if fabric.global_rank == 0:
        _keep_other(out, result["protocol"])
        write_json(out / RESULT, result)
        _write_resamples(out / RESAMPLES, rows)
        print_tables(
            rows, f"{len(test.rows):,} test images, probes learnt from {len(train.rows):,}"
        )
        print_seeds(seeds)
        print(f"{out / RESULT}: {len(rows)} rows in {result['seconds']:.0f} s")
    return result


def _keep_other(out: Path, protocol: Mapping[str, Any]) -> None:
    """Put aside what an evaluation by other options has left where this one's results go."""
    with suppress(OSError, ValueError, LookupError, TypeError):  # damaged, or of another kind
        found = json.loads((out / RESULT).read_text(encoding="utf-8"))["protocol"]
        if found == json.loads(json.dumps(protocol)):
            return
    if not (out / RESULT).exists():
        return
    number = next(n for n in itertools.count(1) if not (out / f"{n}-{RESULT}").exists())
    for name in (RESULT, RESAMPLES):
        if (out / name).exists():
            (out / name).rename(out / f"{number}-{name}")
    print(
        f"warning: {out / RESULT} was of other options and is {number}-{RESULT} now",
        file=sys.stderr,
        flush=True,
    )


def prepare(config: DictConfig) -> tuple[Suite, LabelledRows, LabelledRows, list[Truth]]:
    """All that can be refused before a student is looked at: options, stores, labels.

    Returns:
        The protocols, both sides, and the labels of the tasks that some protocol reads.

    Raises:
        ConfigError, DataError, StoreError: an input cannot be used.
    """
    _validate(config)
    given = [
        Task.parse(str(name), options) for name, options in (plain(config.tasks) or {}).items()
    ]
    suite = _suite(config, given)
    tasks = _read_by(suite, given)
    train, test = (
        LabelledRows.open(
            config[side].cache,
            plain(config[side].shards),
            tasks,
            max_pixels=config.max_pixels,
            option=f"{side}.shards",
        )
        for side in ("train", "test")
    )
    if any(task.label == "cls" for task in tasks):
        check_same_classes(train.index, test.index)
    if config.with_teachers or "cka" in suite.protocols:
        check_same_teachers(train.cache, test.cache)
    if train.index.sha256 == test.index.sha256 and {*suite.protocols} != {"cka"}:
        print(
            "warning: train.shards and test.shards are the same images, so figures tell how well "
            "probes know what they have learnt from",
            file=sys.stderr,
            flush=True,
        )
    truths: list[Truth] = [
        task.truth(task.name, train.truths[task.name], test.truths[task.name])  # type: ignore[call-arg]
        for task in tasks
    ]
    asked = suite.protocols.get("zeroshot")
    if isinstance(asked, ZeroShot):
        truths.append(words_of(asked, given, test))
    suite.check([*truths, Spaces("spaces", {})])
    return suite, train, test, truths


def warn_of_views(train: LabelledRows, test: LabelledRows) -> None:
    """Say on standard error that probes learn from other views than they are scored on, where a
    random crop makes them worse."""
    ours, theirs = (side.cache.plan.views.get("name") for side in (train, test))
    if ours == "random" != theirs:
        print(
            "warning: probes learn from random crops, the first stored view of each training "
            f"image, and are scored on views.name={theirs}: figures are lower than from a training "
            "store of such views",
            file=sys.stderr,
            flush=True,
        )


def read_resamples(out: Path) -> list[dict[str, NDArray[np.float64]]]:
    """What the figures of each row of `summary.json` were on every resample, float64 [B] by key.

    Evaluations of the same test images with the same seed used the same resamples, so what one run
    gives may be subtracted from what another gives. Empty where there were no resamples.

    Raises:
        DataError: the file is damaged.
    """
    path = out / RESAMPLES
    if not path.exists():
        return []
    try:
        stored = load_file(path)
        found: list[dict[str, NDArray[np.float64]]] = []
        for name in sorted(stored, key=lambda name: int(name.split("/")[0])):
            row, key = name.split("/", 1)
            found += [{} for _ in range(int(row) + 1 - len(found))]
            found[int(row)][key] = stored[name]
    except (OSError, SafetensorError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): evaluate again") from error
    return found


def _write_resamples(path: Path, rows: Sequence[Row]) -> None:
    found = {
        f"{number}/{score.key}": score.resampled
        for number, row in enumerate(rows)
        for score in row.scores
        if len(score.resampled)
    }
    if found:
        write_whole(path, save(found))
    else:
        path.unlink(missing_ok=True)  # of an earlier evaluation


@contextmanager
def _feature_cache(config: DictConfig) -> Iterator[FeatureCache]:
    """Where features are kept; where none shall be, they are for as long as they are read, since
    they may be too many to be held in memory."""
    with ExitStack() as stack:
        folder = config.features
        if folder is None:
            aside = TemporaryDirectory(prefix="features-", dir=config.out)
            folder = stack.enter_context(aside)
        yield FeatureCache(Path(folder))


def _widths(config: DictConfig) -> list[int | None]:
    """The widths at which every readout is scored, each once; None for its own."""
    return list(dict.fromkeys(config.width)) if OmegaConf.is_list(config.width) else [config.width]


def _suite(config: DictConfig, tasks: Sequence[Task]) -> Suite:
    """The protocols that are named; all that have a task where all are asked for."""
    named = list(config.protocols)
    if config.protocols == "all":
        truths = {Spaces, *(task.truth for task in tasks)}
        if config.zeroshot.names is not None:
            truths.add(Words)
        named = [name for name, protocol in PROTOCOLS.items() if protocol.truth in truths]
        if idle := [name for name in PROTOCOLS if name not in named]:
            print(
                f"protocols=all: all but {', '.join(idle)}, for which there is no task",
                flush=True,
            )
    return build_suite(
        named,
        {name: plain(config[name]) for name in PROTOCOLS if name in config},
        validation=config.validation,
        seed=config.seed,
        bootstrap=Bootstrap(**(plain(config.intervals) or {}), seed=config.seed),
    )


def _read_by(suite: Suite, tasks: Sequence[Task]) -> list[Task]:
    """The tasks that some protocol reads.

    Raises:
        ConfigError: a protocol has none.
    """
    read = {protocol.truth for protocol in suite.protocols.values()}
    asked = suite.protocols.get("zeroshot")
    for name, protocol in suite.protocols.items():
        kinds = [kind for kind, truth in KINDS.items() if truth is protocol.truth]
        if kinds and not any(task.kind in kinds for task in tasks):
            there = ", ".join(f"{task.name} ({task.kind})" for task in tasks)
            raise ConfigError(
                f"protocols: {name} needs a {kinds[0]} task and there are {there or 'none'}; name "
                f"one, such as '+tasks.NAME={{kind: {kinds[0]}, label: ...}}'"
            )
    named = asked.task if isinstance(asked, ZeroShot) else None
    return [task for task in tasks if task.truth in read or task.name == named]


def _validate(config: DictConfig) -> None:
    for side in ("train", "test"):
        for key in ("cache", "shards"):
            if OmegaConf.is_missing(config[side], key):
                raise ConfigError(f"{side}.{key} is required: say {side}.{key}=...")
    for key in ("students", "readouts", "protocols"):
        value = config[key]
        if value is None or (isinstance(value, str) and (value != "all" or key == "students")):
            either = "a list" if key == "students" else "all, or a list"
            such = "" if value is None else f", {key}=[{value}]"
            raise ConfigError(f"{key}={'null' if value is None else value}: write {either}{such}")
    for width in _widths(config) or [0]:
        if width is not None and (not isinstance(width, int) or width < 1 or width is True):
            raise ConfigError(
                f"width={config.width}: expected a positive number, null to reduce nothing, or a "
                "list of these"
            )
    for key, least in (("batch_size", 1), ("seed", 0)):
        if config[key] < least:
            raise ConfigError(f"{key}={config[key]}: expected a number from {least} up")
