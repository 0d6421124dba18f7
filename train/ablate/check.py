"""What of an ablation would be refused run by run: found out before the first run trains."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig

from ...cache import Cache
from ...errors import ConfigError
from ...options import plain
from ..crops import random_crop
from ..data import epoch_of
from ..distiller import Distiller, alignment_of
from ..optimizer import build_optimizer, parts_of_a_step
from ..photometric import ColorJitter
from ..settings import check_settings
from ..students import Student, build_student

_SHOWN = 5


class Rehearsal:
    """Makes of a run all that needs neither images nor tokens: its student, alignment, optimiser.

    Students and stores that several runs share are made and opened once. What a run trains on is
    not looked at, nor are the device that it will have and a hub's weights.
    """

    def __init__(self) -> None:
        self._students: dict[str, Student] = {}
        self._stores: dict[str, Cache] = {}

    def try_out(self, training: DictConfig, store: str | Path) -> None:
        """Refuse what `train` would refuse.

        Args:
            training: a composed configuration of ``preceptor train``.
            store: whose spaces and views the run's store has; it may not be made yet.

        Raises:
            ConfigError, DataError, StoreError: as `train` says.
        """
        check_settings(training)
        recipe = training.recipe
        if str(store) not in self._stores:
            self._stores[str(store)] = Cache.open(store)
        cache = self._stores[str(store)]
        # The steps of more ranks than one are no smaller.
        rows, _ = parts_of_a_step(recipe, 1)
        epoch_of(cache, rows, seed=training.seed, first_views=training.get("views"))
        ColorJitter(**plain(recipe.color_jitter))
        crop = random_crop(plain(recipe)["crop"] if "crop" in recipe else None, training.seed)
        student = self._student(training)
        alignment = alignment_of(training, student, cache, crop, fitted=False)
        build_optimizer(Distiller(student, alignment), recipe)

    def _student(self, training: DictConfig) -> Student:
        config = {**plain(training.student), "pretrained": False}
        key = json.dumps(config, sort_keys=True, default=str)
        if key not in self._students:
            self._students[key] = build_student(config, training.seed)
        return self._students[key]


def refuse(reasons: Mapping[str, str], of: int) -> None:
    """Tell of all that is refused at once.

    Args:
        reasons: by variant.
        of: how many variants there are.

    Raises:
        ConfigError: there are reasons.
    """
    if not reasons:
        return
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name)
    parts = []
    for reason, names in list(by_reason.items())[:_SHOWN]:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        whose = f"the options of {' and '.join(names[:_SHOWN])}{more}"
        parts.append(f"{'these options' if len(names) == of else whose}: {reason}")
    if len(by_reason) > _SHOWN:
        parts.append(f"{len(by_reason) - _SHOWN} others")
    raise ConfigError(f"preceptor train would not take {'; nor '.join(parts)}")
