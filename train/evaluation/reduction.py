"""Readouts of equal width: one label-free reduction for everyone."""

from __future__ import annotations

from dataclasses import replace

from ...errors import ConfigError
from .base import Array, Features, OnDemand


def reduce_width(features: Features, width: int) -> Features:
    """Features on their `width` leading principal components.

    The components are those of the training features (of all their tokens, where they lie on a
    grid), which are centred; neither labels nor test images are looked at, and nothing is whitened.
    Features that are no wider than `width`, or than there are training images, keep as many
    components as they have: they are centred and rotated like the others.

    Raises:
        ConfigError: the width is not positive.
    """
    from sklearn.decomposition import PCA

    if width < 1:
        raise ConfigError(f"width={width}: expected a positive number")
    learn = features.train.reshape(-1, features.width)
    count = min(width, *learn.shape)
    solver = "covariance_eigh" if len(learn) >= features.width else "full"
    pca = PCA(count, svd_solver=solver).fit(learn)

    def reduced(part: Array) -> Array:
        found: Array = pca.transform(part.reshape(-1, features.width)).astype("float32")
        return found.reshape(*part.shape[:-1], count)

    return replace(
        features,
        train=reduced(features.train),
        test=reduced(features.test),
        corrupted=OnDemand(features.corrupted, lambda key: reduced(features.corrupted[key])),
    )
