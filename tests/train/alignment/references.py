"""Formulas that alignments are compared with."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional


def loss_in_numpy(prediction: torch.Tensor, target: torch.Tensor) -> float:
    """0.9 (1 - cos) + 0.1 smooth-L1, one token at a time in float64."""
    p = prediction.detach().double().numpy().reshape(-1, prediction.shape[-1])
    t = target.double().numpy().reshape(p.shape)
    terms = []
    for a, b in zip(p, t, strict=True):
        cosine = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
        d = np.abs(a - b)
        terms.append(0.9 * (1 - cosine) + 0.1 * np.where(d < 1, 0.5 * d * d, d - 0.5).mean())
    return float(np.mean(terms))


def interpolate(tokens, source, target):
    image = tokens.transpose(1, 2).unflatten(2, source)
    image = functional.interpolate(image, target, mode="bilinear", antialias=True)
    return image.flatten(2).transpose(1, 2)
