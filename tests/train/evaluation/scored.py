"""Scores of one protocol on one task."""

from __future__ import annotations

from preceptor.train.evaluation import Features, Score, build_suite
from preceptor.train.evaluation.truths import Truth


def one(name: str, features: Features, truth: Truth, **options: object) -> list[Score]:
    return build_suite([name], {name: options}).score(features, [truth])
