"""Weighted k-nearest-neighbour classification of frozen features."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_CHUNK = 1024


def knn_predict(
    train: Tensor,
    labels: Tensor,
    queries: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> Tensor:
    """The class of each query by its k most similar training features.

    Similarity is the cosine c; each neighbour votes for its class with weight exp(c / temperature).
    This is the protocol of Wu et al. 2018 (arXiv:1805.01978) that DINO and its successors report
    with k = 20 and temperature 0.07. Equal votes go to the smaller class number.

    Args:
        train: [n, D] float.
        labels: [n] int64, from 0.
        queries: [q, D] float.
        k: neighbours; all n where there are fewer.

    Returns:
        int64 [q].
    """
    train = functional.normalize(train.float(), dim=1)
    k = min(k, len(train))
    classes = int(labels.max()) + 1
    predicted = []
    for chunk in functional.normalize(queries.float(), dim=1).split(_CHUNK):
        similarity, nearest = (chunk @ train.t()).topk(k, dim=1)
        # Relative to the best neighbour: the same votes up to a factor, and no overflow.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = weights.new_zeros(len(chunk), classes)
        votes.scatter_add_(1, labels[nearest], weights)
        predicted.append(votes.argmax(1))
    return torch.cat(predicted)
