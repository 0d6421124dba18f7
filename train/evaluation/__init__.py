"""What frozen features are worth. A new protocol is one file here and one line in `PROTOCOLS`.

From Python:

    suite = build_suite(["knn", "linear"], {"linear": {"probe": "logistic"}}, seed=0)
    features = Features(train=x, test=x_test)               # float32 [n, K], [m, K]
    scores = suite.score(features, [Classes("class", train=y, test=y_test)])

However many images there are, a protocol holds the features (or tokens) that it was given, of
single features one copy more, and up to some 4 GiB beside them; `Suite.on` has similarities and
large logistic probes computed on a GPU. scikit-learn and scipy are imported where they are used: a
training, which looks by k-NN alone, starts a fifth sooner.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import ConfigError
from .base import Features, Measurement, Protocol
from .cka import CKA
from .dense import Dense
from .dense_regression import DenseRegression
from .fewshot import FewShot
from .intervals import Bootstrap, Interval, over_seeds
from .knn import KNN
from .linear import Linear
from .reduction import reduce_width
from .regression import Regression
from .retrieval import Retrieval
from .robustness import Robustness
from .suite import Score, Suite
from .truths import Classes, Maps, Spaces, Targets, Truth, ValueMaps, Words
from .zeroshot import ZeroShot

PROTOCOLS: dict[str, type[Protocol[Any]]] = {
    "knn": KNN,
    "linear": Linear,
    "fewshot": FewShot,
    "retrieval": Retrieval,
    "regression": Regression,
    "dense": Dense,
    "dense_regression": DenseRegression,
    "cka": CKA,
    "robustness": Robustness,
    "zeroshot": ZeroShot,
}

__all__ = [
    "PROTOCOLS",
    "Bootstrap",
    "Classes",
    "Features",
    "Interval",
    "Maps",
    "Measurement",
    "Protocol",
    "Score",
    "Spaces",
    "Suite",
    "Targets",
    "Truth",
    "ValueMaps",
    "Words",
    "ZeroShot",
    "build_suite",
    "over_seeds",
    "reduce_width",
]


def build_suite(
    protocols: Sequence[str],
    options: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    validation: float = 0.2,
    seed: int = 0,
    bootstrap: Bootstrap | None = None,
) -> Suite:
    """Protocols by name, each with its options.

    Args:
        protocols: keys of `PROTOCOLS`.
        options: by protocol; those of protocols that are not named are not looked at.
        validation: share of the training images that chooses, for every protocol.
        seed: of the validation split and of the few-shot draws.
        bootstrap: gives the intervals; 1,000 resamples of this seed where not given.

    Raises:
        ConfigError: no such protocol or option, or a value out of its range.
    """
    if not 0 < validation < 1:
        raise ConfigError(
            f"validation={validation}: expected a share above 0 and below 1 of the training "
            "images, those that every choice is made on"
        )
    found = {}
    for name in protocols:
        if name not in PROTOCOLS:
            close = difflib.get_close_matches(str(name), PROTOCOLS, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ConfigError(f"protocols names {name!r}{hint}: valid are {', '.join(PROTOCOLS)}")
        own = dict((options or {}).get(name) or {})
        known = [
            f.name for f in dataclasses.fields(PROTOCOLS[name]) if f.name not in ("seed", "device")
        ]
        for option in own:
            if option not in known:
                raise ConfigError(
                    f"{name}.{option}: {name} has no such option; it has {', '.join(known)}"
                )
        found[name] = PROTOCOLS[name](**{"validation": validation, **own, "seed": seed})
    if not found:
        raise ConfigError(f"protocols names none: valid are {', '.join(PROTOCOLS)}")
    return Suite(found, bootstrap or Bootstrap(seed=seed))
