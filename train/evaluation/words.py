"""Names of classes as embeddings of the text towers that belong to a store's teachers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip import zero_shot_metadata

from ...cache import Cache
from ...cache.documents import digest
from ...checkpoints import weights_sha256
from ...contrastive import SCHEME, create, tokenizer
from ...errors import ConfigError
from ...progress import ProgressLine
from .base import Array
from .feature_cache import FeatureCache
from .features import LabelledRows
from .labels import Task
from .truths import Words
from .zeroshot import ZeroShot

_CLASSES = 8  # that are embedded at once
_TEMPLATES = {
    "openai": zero_shot_metadata.OPENAI_IMAGENET_TEMPLATES,
    "simple": zero_shot_metadata.SIMPLE_IMAGENET_TEMPLATES,
}


def language_spaces(cache: Cache) -> dict[str, str]:
    """Spaces of image embeddings that are compared with text -> their teachers, one of each."""
    found: dict[str, str] = {}
    for record in cache.plan.teachers:
        if str(record.identity.get("source", "")).partition(":")[0] != SCHEME:
            continue
        taps: Mapping[str, Any] = record.identity.get("spaces", {})
        for space in record.spaces:
            if taps.get(space.name, {}).get("take") == "embedding":
                found[f"{record.name}/{space.name}"] = record.name
                break
    return found


def words_of(protocol: ZeroShot, tasks: Sequence[Task], test: LabelledRows) -> Words:
    """What the protocol is to be asked, its texts not yet embedded.

    Raises:
        ConfigError: no names, no such task, or no teacher of the store has a text tower.
    """
    if protocol.names is None:
        raise ConfigError(
            "zeroshot.names is required: imagenet, or a text file with the name of one class a "
            "line, in the order of their numbers"
        )
    if not language_spaces(test.cache):
        raise ConfigError(
            f"protocols: zeroshot needs the embeddings of a teacher with a text tower (source "
            f"open_clip:..., a space with take: embedding), and {test.cache.location} has "
            f"{', '.join(test.cache.spaces)}"
        )
    if not any(task.name == protocol.task and task.kind == "classification" for task in tasks):
        there = ", ".join(f"{task.name} ({task.kind})" for task in tasks)
        raise ConfigError(
            f"zeroshot.task={protocol.task}: there is no such classification task; there are "
            f"{there or 'none'}"
        )
    labels = test.truths[protocol.task]
    return Words(protocol.task, test=labels, names=read_names(protocol.names))


def read_names(named: str) -> list[str]:
    """The names of classes by number: ``imagenet``, or the lines of a text file.

    Raises:
        ConfigError: the file cannot be read, or a line is empty.
    """
    if named == "imagenet":
        return list(zero_shot_metadata.IMAGENET_CLASSNAMES)
    try:
        names = [line.strip() for line in Path(named).read_text("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"zeroshot.names={named}: it is not imagenet, and as a file it cannot be read: {reason}"
        ) from error
    if not names or "" in names:
        where = f"line {names.index('') + 1} is empty" if names else "it is empty"
        raise ConfigError(f"zeroshot.names={named}: {where}; every line names one class")
    return names


def embedded(
    words: Words, protocol: ZeroShot, cache: Cache, kept: FeatureCache, device: torch.device
) -> Words:
    """The same with the texts' embeddings, for every language space of a store.

    Args:
        kept: where they are looked for and left, unless the protocol names a folder.
        device: computes.

    Raises:
        ConfigError: a text tower is not the one of the store's teacher.
        TeacherError: it cannot be had.
    """
    if protocol.kept is not None:
        kept = FeatureCache(Path(protocol.kept))
    found = {}
    templates = (
        _TEMPLATES[protocol.templates]
        if isinstance(protocol.templates, str)
        else [partial(_filled, template) for template in protocol.templates]
    )
    texts = [template(name) for name in words.names for template in templates]
    for space, teacher in language_spaces(cache).items():
        described = dict(cache.plan.teacher(teacher).identity)
        identity = {
            "texts": digest({"texts": texts}),
            "source": described["source"],
            "weights": described["weights_sha256"],
            "versions": {name: version(name) for name in ("torch", "open_clip_torch")},
        }
        known = kept.get(identity, len(words.names))
        if known is None:
            tower = text_tower(protocol, cache, teacher)
            made = _embed(teacher, *tower, words.names, templates, device)
            kept.put(identity, made)
            known = kept.read(identity, len(words.names))
        found[space] = known
    return replace(words, texts=found)


def text_tower(protocol: ZeroShot, cache: Cache, teacher: str) -> tuple[Any, Any]:
    """The model of a store's teacher, text tower and all, and its tokenizer.

    Raises:
        ConfigError: it is not the one of the store's teacher.
        TeacherError: it, or its tokenizer, cannot be had.
    """
    identity = cache.plan.teacher(teacher).identity
    checkpoint = (protocol.checkpoints or {}).get(teacher)
    source = str(identity["source"])
    height, width = identity["preprocessing"]["size"]
    model = create(teacher, source, (height, width), checkpoint)
    if weights_sha256(model.visual) != identity["weights_sha256"]:
        whose = f"zeroshot.checkpoints.{teacher}={checkpoint}" if checkpoint else source
        raise ConfigError(
            f"{whose} is not the model whose image tower filled the store as {teacher}: its text "
            f"tower would be of another space; set zeroshot.checkpoints.{teacher} to the file that "
            "it was extracted with"
        )
    return model, tokenizer(teacher, source)


def _filled(template: str, name: str) -> str:
    """A text with the name in it; other braces are the text's own."""
    return template.replace("{}", name)


def _embed(
    teacher: str,
    model: Any,
    to_numbers: Any,
    names: Sequence[str],
    templates: Sequence[Any],
    device: torch.device,
) -> Array:
    """[classes, D]"""
    model.to(device).eval()
    parts = []
    with ProgressLine(f"{teacher}, names of classes", len(names), "classes") as line:
        for start in range(0, len(names), _CLASSES):
            some = names[start : start + _CLASSES]
            made = open_clip.build_zero_shot_classifier(
                model, to_numbers, some, templates, num_classes_per_batch=None, device=device
            )
            parts.append(made.T.float().cpu().numpy())
            line.advance(len(some))
    return np.ascontiguousarray(np.concatenate(parts))
