"""preceptor eval: the same protocols for students, their teachers and the untrained floor."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ...engine import launch
from ...errors import ConfigError
from ...measure import peak_memory_mb
from ..checkpoint import write_json
from . import PROTOCOLS, build_suite
from .base import Spaces, Suite, Truth
from .feature_cache import FeatureCache
from .features import LabelledRows, space_features
from .intervals import Bootstrap
from .labels import KINDS, Task
from .reduction import reduce_width
from .subjects import Run, check_same_teachers, choose_readouts, subjects
from .table import Row, print_seeds, print_tables, seed_means

RESULT = "summary.json"


def evaluate(config: DictConfig) -> dict[str, Any]:
    """Score what `config` (configs/eval.yaml) names, print the tables and write `summary.json`.

    Returns:
        What the file holds: ``rows`` (see `Row`), ``seeds`` (means over runs that differ in their
        seed alone), the protocol, counts and seconds.

    Raises:
        ConfigError, DataError, StoreError: an input cannot be used.
    """
    started = time.perf_counter()
    _validate(config)
    suite = _suite(config)
    tasks = _tasks(config, suite)
    runs = [Run.load(Path(folder)) for folder in config.students]
    readouts = choose_readouts(config, runs)
    fabric = launch(config.engine)
    train, test = (
        LabelledRows.open(side.cache, _plain(side.shards), tasks, max_pixels=config.max_pixels)
        for side in (config.train, config.test)
    )
    if config.with_teachers or "cka" in suite.protocols:
        check_same_teachers(train.cache, test.cache)
    kept = FeatureCache(
        None if config.features is None else Path(config.features),
        writes=fabric.global_rank == 0,
    )
    truths: list[Truth] = [
        task.truth(task.name, train.truths[task.name], test.truths[task.name])  # type: ignore[call-arg]
        for task in tasks
    ]
    suite.check([*truths, Spaces("spaces", {})])
    if "cka" in suite.protocols:
        spaces = {name: space_features(test, name, "mean", kept) for name in test.cache.spaces}
        truths.append(Spaces("spaces", spaces))

    rows = []
    for subject in subjects(config, suite, fabric, runs, readouts, train, test, kept):
        features = subject.features
        if config.width is not None:
            features = reduce_width(features, config.width)
        scores = suite.score(features, truths)
        rows.append(
            Row(
                subject.kind,
                subject.name,
                subject.readout,
                features.width,
                features.grid is not None,
                scores,
                subject.family,
            )
        )
    seeds = seed_means(rows)
    result = {
        "rows": [row.as_json() for row in rows],
        "seeds": seeds,
        "images": {"train": len(train.rows), "test": len(test.rows)},
        "features": {"computed": kept.computed, "from_cache": kept.found},
        "protocol": {
            key: _plain(value)
            for key, value in config.items()
            if key not in ("engine", "hydra", "out", "features", "workers", "batch_size")
        },
        "device": str(fabric.device),
        "seconds": time.perf_counter() - started,
        "peak_memory_mb": peak_memory_mb(),
    }
    if fabric.global_rank == 0:
        write_json(Path(config.out) / RESULT, result)
        print_tables(
            rows, f"{len(test.rows):,} test images, probes learnt from {len(train.rows):,}"
        )
        print_seeds(seeds)
        print(f"{Path(config.out) / RESULT}: {len(rows)} rows in {result['seconds']:.0f} s")
    return result


def _suite(config: DictConfig) -> Suite:
    named = list(PROTOCOLS) if config.protocols == "all" else list(config.protocols)
    return build_suite(
        named,
        {name: _plain(config[name]) for name in PROTOCOLS if name in config},
        validation=config.validation,
        seed=config.seed,
        bootstrap=Bootstrap(**_plain(config.intervals), seed=config.seed),
    )


def _tasks(config: DictConfig, suite: Suite) -> list[Task]:
    """The tasks that some protocol reads."""
    tasks = [
        Task.parse(str(name), options) for name, options in (_plain(config.tasks) or {}).items()
    ]
    read = {protocol.truth for protocol in suite.protocols.values()}
    for name, protocol in suite.protocols.items():
        kinds = [kind for kind, truth in KINDS.items() if truth is protocol.truth]
        if kinds and not any(task.kind in kinds for task in tasks):
            there = ", ".join(f"{task.name} ({task.kind})" for task in tasks)
            raise ConfigError(
                f"protocols: {name} needs a {kinds[0]} task and there are {there or 'none'}; name "
                f"one, such as '+tasks.NAME={{kind: {kinds[0]}, label: ...}}'"
            )
    return [task for task in tasks if task.truth in read]


def _validate(config: DictConfig) -> None:
    for side in ("train", "test"):
        for key in ("cache", "shards"):
            if OmegaConf.is_missing(config[side], key):
                raise ConfigError(f"{side}.{key} is required: say {side}.{key}=...")
    for key in ("students", "readouts", "protocols"):
        value = config[key]
        if isinstance(value, str) and (value != "all" or key == "students"):
            either = "a list" if key == "students" else "all, or a list"
            raise ConfigError(f"{key}={value}: write {either}, {key}=[{value}]")
    if not config.students and not config.with_teachers:
        raise ConfigError("nothing to score: students is empty and with_teachers is false")
    if config.batch_size < 1:
        raise ConfigError(f"batch_size={config.batch_size}: expected a positive number")


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
