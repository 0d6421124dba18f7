"""Zero-shot classification: images are given the class whose name, as text, is nearest to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from ...errors import ConfigError
from .base import Array, Features, Measurement, Protocol, correct, row_blocks
from .search import cosines, unit
from .truths import Words

TEMPLATES = ("openai", "simple")
"""Prompts that open_clip has: OpenAI's 80 for ImageNet, and 7 of them."""


@dataclass(frozen=True)
class ZeroShot(Protocol[Words]):
    """Accuracy of the class whose text embedding has the largest cosine with the image's.

    CLIP's protocol (Radford et al. 2021, arXiv:2103.00020, section 3.1.4), by which AM-RADIO
    (Ranzinger et al. 2024, arXiv:2312.06709) compares students: a class is the mean over templates
    of the unit embeddings of its name in each, scaled to unit length. It reads embeddings of a
    teacher whose text tower there is: the teacher's own from the store, and those that a student
    predicts, in that teacher's units. Nothing is learnt or chosen, and no training image is looked
    at. ``top5`` in the details is the share of images whose class is among the nearest five.

    Attributes:
        names: of the classes by number: ``imagenet``, or a text file with one a line.
        templates: ``openai``, ``simple``, or a list of texts with ``{}`` for the name.
        task: the classification task whose labels they are.
        checkpoints: local weights of the whole model by teacher, where no hub can be reached.
        kept: folder that keeps the embeddings of the names; None for that of the features.
    """

    truth: ClassVar[type[Words]] = Words
    reads: ClassVar[str] = "space"

    names: str | None = None
    templates: str | Sequence[str] = "openai"
    task: str = "class"
    checkpoints: Mapping[str, str] | None = None
    kept: str | None = None

    def __post_init__(self) -> None:
        given = self.templates
        if isinstance(given, str):
            if given not in TEMPLATES:
                raise ConfigError(
                    f"zeroshot.templates={given}: expected {', '.join(TEMPLATES)}, or a list of "
                    "texts with {} for the name"
                )
        elif not given or not all(isinstance(one, str) and one.count("{}") == 1 for one in given):
            raise ConfigError(
                f"zeroshot.templates={list(given or ())}: every text takes one {{}} for the name"
            )

    def check(self, truth: Words) -> None:
        largest = int(truth.test.max(initial=-1))
        if largest >= len(truth.names):
            raise ConfigError(
                f"zeroshot.names={self.names} has {len(truth.names)} names, and an image of task "
                f"{self.task} is of class {largest}: classes are numbered from 0"
            )

    def measure(self, features: Features, truth: Words) -> list[Measurement]:
        texts = torch.from_numpy(truth.texts[features.space]).to(self.device)
        known = truth.test >= 0
        first, among = np.zeros((2, len(known)))
        for part in row_blocks(len(known), features.width + len(texts)):
            images = unit(torch.from_numpy(features.test[part]), self.device)
            nearest = cosines(images, texts).topk(min(5, len(texts)), dim=1).indices.cpu().numpy()
            own = truth.test[part]
            first[part] = correct(nearest[:, 0], own)
            among[part] = (nearest == own[:, None]).any(1)
        top5 = ShareOf(among, known)(np.ones((1, len(known))))
        return [
            Measurement(
                metric="accuracy",
                statistic=ShareOf(first, known),
                details={"top5": float(top5[0]), "images": int(known.sum())},
            )
        ]


@dataclass(frozen=True, eq=False)
class ShareOf:
    """The weighted mean of one figure an image over the images that are known; NaN without any.

    Attributes:
        values: float64 [m].
        known: bool [m].
    """

    values: NDArray[np.float64]
    known: NDArray[np.bool_]

    def __call__(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        counted = weights * self.known
        with np.errstate(invalid="ignore"):
            found: NDArray[np.float64] = (counted @ self.values) / counted.sum(1)
        return found


def without_training(space: str, test: Array) -> Features:
    """Embeddings in a space, of test images alone."""
    return Features(np.empty((0, test.shape[1]), np.float32), test, space=space)
