"""Cosine similarities of many features with many others, in blocks on any device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

QUERIES = 1024
"""Queries that are compared at once."""
GALLERY = 65_536
"""Features that they are compared with at once: 256 MiB of similarities, and twice K / 4 MiB of
features of K dimensions."""


def nearest(train: Tensor, queries: Tensor, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Each query's k most similar training features, best first: cosines and positions.

    On the device lie a block of `GALLERY` features, its similarities, and what is returned: 12 q k
    bytes.

    Args:
        train: [n, K] float, on any device.
        queries: [q, K] float.
        k: all n where there are fewer.
        device: computes.

    Returns:
        float32 [q, k] and int64 [q, k], on `device`.
    """
    k = min(k, len(train))
    best: list[tuple[Tensor, Tensor]] = []
    for start, block in unit_blocks(train, device):
        for number, chunk in enumerate(queries.split(QUERIES)):
            similarity = cosines(unit(chunk, device), block)
            values, places = similarity.topk(min(k, len(block)), dim=1)
            places += start
            if not start:
                best.append((values, places))
                continue
            values, places = (
                torch.cat(parts, 1) for parts in zip(best[number], (values, places), strict=True)
            )
            values, order = values.topk(min(k, values.shape[1]), dim=1)
            best[number] = values, places.gather(1, order)
    values, places = (torch.cat(parts) for parts in zip(*best, strict=True))
    return values, places


def unit_blocks(x: Tensor, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """Where each block of `GALLERY` features starts, and its features scaled to unit length."""
    for start in range(0, len(x), GALLERY):
        yield start, unit(x[start : start + GALLERY], device)


def unit(x: Tensor, device: torch.device) -> Tensor:
    """Features [b, K] scaled to unit length, float32 on the device."""
    return functional.normalize(x.to(device).float(), dim=1)


def cosines(queries: Tensor, gallery: Tensor) -> Tensor:
    """[q, K] and [b, K] of unit length to [q, b], in whole float32 whatever has been set."""
    with whole_float32():
        return queries @ gallery.t()


@contextmanager
def whole_float32() -> Iterator[None]:
    """Products of float32 are not rounded to fewer bits for speed, as training may allow.

    `torch.set_float32_matmul_precision` sets these attributes too, and its getter raises where they
    were set otherwise.
    """
    cpu: Any = torch.backends.mkldnn  # its types do not know the attribute
    settings: list[Any] = [torch.backends.cuda.matmul, cpu.matmul]
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision
