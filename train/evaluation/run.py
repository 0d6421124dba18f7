"""preceptor eval: one protocol for students, their teachers and the untrained floor."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from ...engine import launch
from ...errors import ConfigError
from ...measure import peak_memory_mb
from ..checkpoint import load_model, write_json
from ..students import build_student
from .features import LabelledRows, student_features, teacher_features
from .knn import knn_predict
from .linear import fit_linear_probe
from .table import Score, print_table

RESULT = "summary.json"

Features = tuple[str, str, str, Tensor, Tensor]
"""kind, name, readout, training features [n, K], test features [q, K]."""


def evaluate(config: DictConfig) -> dict[str, Any]:
    """Score what `config` (configs/eval.yaml) names, print the table and write `summary.json`.

    Returns:
        What the file holds: ``rows`` (see `Score`), the protocol, counts and seconds.

    Raises:
        ConfigError, DataError, StoreError: an input cannot be used.
    """
    started = time.perf_counter()
    _validate(config)
    fabric = launch(config.engine)
    train = LabelledRows.open(config.train.cache, _plain(config.train.shards))
    test = LabelledRows.open(config.test.cache, _plain(config.test.shards))
    scores = []
    for kind, name, readout, learn, judge in _features(config, fabric, train, test):
        scores.append(_score(config, kind, name, readout, learn, judge, train, test))
    protocol = {key: _plain(config[key]) for key in ("train", "test", "knn", "linear", "seed")}
    result = {
        "rows": [score.as_json() for score in scores],
        "images": {"train": len(train.rows), "test": len(test.rows)},
        "protocol": protocol,
        "seconds": time.perf_counter() - started,
        "peak_memory_mb": peak_memory_mb(),
    }
    if fabric.global_rank == 0:
        write_json(Path(config.out) / RESULT, result)
        print_table(
            scores, f"{len(test.rows):,} test images, probes learnt from {len(train.rows):,}"
        )
        print(f"{Path(config.out) / RESULT}: {len(scores)} rows in {result['seconds']:.0f} s")
    return result


def _features(
    config: DictConfig, fabric: Any, train: LabelledRows, test: LabelledRows
) -> Iterator[Features]:
    if config.with_teachers:
        learn, judge = dict(teacher_features(train)), dict(teacher_features(test))
        for label in learn:
            if label not in judge:
                raise ConfigError(
                    f"{config.test.cache} lacks the teacher space {label} of {config.train.cache}: "
                    "extract the same teachers for both, or say with_teachers=false"
                )
            yield "teacher", label, "store", learn[label], judge[label]

    floors: set[str] = set()
    for folder in config.students:
        student, alignment, model = load_model(Path(folder))
        name, label = Path(folder).name, model["student"]["name"]
        options = {
            "batch_size": config.batch_size,
            "workers": config.workers,
            "max_pixels": config.max_pixels,
            "interpolation": model["interpolation"],
        }
        readouts = list(alignment.readouts)
        if config.readouts != "all":
            readouts = [kind for kind in config.readouts if kind in alignment.readouts]
            if not readouts:
                raise ConfigError(
                    f"readouts={list(config.readouts)}: {folder} has none of them; it has "
                    f"{', '.join(alignment.readouts)}"
                )
        sides = [
            student_features(
                fabric, student, alignment, readouts, images, **options, title=f"{name}, {side}"
            )
            for side, images in (("train", train), ("test", test))
        ]
        for readout in readouts:
            yield "student", name, readout, sides[0][readout], sides[1][readout]

        floor = f"{label}-s{model['seed']}"
        if config.with_floor and floor not in floors:
            floors.add(floor)
            untrained = build_student(model["student"], model["seed"])
            sides = [
                student_features(
                    fabric,
                    untrained,
                    alignment,
                    ["pooled"],
                    images,
                    **options,
                    title=f"{floor} untrained, {side}",
                )
                for side, images in (("train", train), ("test", test))
            ]
            yield "untrained", floor, "pooled", sides[0]["pooled"], sides[1]["pooled"]


def _score(
    config: DictConfig,
    kind: str,
    name: str,
    readout: str,
    learn: Tensor,
    judge: Tensor,
    train: LabelledRows,
    test: LabelledRows,
) -> Score:
    labels, truth = torch.from_numpy(train.labels), torch.from_numpy(test.labels)
    nearest = knn_predict(learn, labels, judge, k=config.knn.k, temperature=config.knn.temperature)
    probe = fit_linear_probe(learn.numpy(), train.labels, **_plain(config.linear), seed=config.seed)
    return Score(
        kind=kind,
        name=name,
        readout=readout,
        dim=learn.shape[1],
        knn=float((nearest == truth).double().mean()),
        linear=float((probe.predict(judge.numpy()) == test.labels).mean()),
        strength=probe.strength,
        validation=probe.validation,
    )


def _validate(config: DictConfig) -> None:
    for side in ("train", "test"):
        for key in ("cache", "shards"):
            if OmegaConf.is_missing(config[side], key):
                raise ConfigError(f"{side}.{key} is required: say {side}.{key}=...")
    if isinstance(config.students, str):
        raise ConfigError(f"students={config.students}: write a list, students=[{config.students}]")
    if not config.students and not config.with_teachers:
        raise ConfigError("nothing to score: students is empty and with_teachers is false")
    if isinstance(config.readouts, str) and config.readouts != "all":
        raise ConfigError(
            f"readouts={config.readouts}: write all, or a list, readouts=[{config.readouts}]"
        )
    if config.knn.k < 1 or config.knn.temperature <= 0:
        raise ConfigError("knn.k and knn.temperature must be positive")


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
