"""One protocol for everybody: readouts of one width, probes on the training part, choices on the
validation part, figures on the test part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from ...train.evaluation import PROTOCOLS, Classes, Features, Maps, Targets
from .bed import Bed, Outputs

WIDTH = 128
"""Width that every readout is reduced to; narrower ones keep theirs, centred and turned."""
DIGITS = 5
"""Decimals of a score that count: as many as files of finished runs keep."""
_STRENGTHS = {"strengths": (1e-3, 1e-2, 1e-1, 1.0, 10.0)}
"""Those of every kept result. Weaker ones as well move the mean over tasks by less than .01."""
_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "fewshot": {"shots": (5,)},
    "retrieval": {"validation": 0.25},  # of four sights in the gallery, one
    "linear": _STRENGTHS,
    "regression": _STRENGTHS,
    "dense": _STRENGTHS,
}


class Reduction:
    """The leading principal components of a readout on unlabelled images of the pool."""

    def __init__(self, look: NDArray[np.float32], width: int = WIDTH) -> None:
        flat = look.reshape(-1, look.shape[-1])
        solver = "covariance_eigh" if flat.shape[1] <= len(flat) else "full"
        self._pca = PCA(min(width, *flat.shape), svd_solver=solver).fit(flat)

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """[..., K] to [..., width]."""
        reduced = self._pca.transform(x.reshape(-1, x.shape[-1])).astype(np.float32)
        return reduced.reshape(*x.shape[:-1], -1)


def judge(bed: Bed, outputs: Mapping[str, Outputs]) -> dict[str, dict[str, dict[str, float]]]:
    """Scores of a model: task -> readout -> ``validation``, ``test``, in per cent.

    Accuracy, R2, mIoU or mAP, as the task's kind says. Dense tasks read the tokens of the model's
    map, readout ``map``; all others every vector that the model offers.

    Args:
        outputs: by ``pool`` and ``TASK/PART``.
    """
    look = outputs["pool"]
    reductions = {name: Reduction(part) for name, part in look.vectors.items()}
    of_map = Reduction(look.map)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for task, facts in bed.tasks.items():
        parts = {part: outputs[f"{task}/{part}"] for part in ("train", "validation", "test")}
        if facts["kind"] == "dense":
            tokens = {part: of_map(output.map) for part, output in parts.items()}
            found[task] = {"map": _score(bed, task, tokens, look.grid)}
            continue
        found[task] = {
            readout: _score(
                bed, task, {part: reduce(out.vectors[readout]) for part, out in parts.items()}
            )
            for readout, reduce in reductions.items()
        }
    return found


def chosen(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, str]:
    """Of every task the readout that does best on validation, of equal ones the first.

    Equal in `DIGITS` decimals: the last bits of equal figures differ, and are not kept.
    """
    return {
        task: max(readouts, key=lambda name: round(readouts[name]["validation"], DIGITS))
        for task, readouts in scores.items()
    }


def _score(
    bed: Bed,
    task: str,
    features: Mapping[str, NDArray[np.float32]],
    grid: tuple[int, int] | None = None,
) -> dict[str, float]:
    kind = bed.tasks[task]["kind"]
    protocol: Any = PROTOCOLS[kind](**_OPTIONS.get(kind, {}))
    if kind == "retrieval":
        return {
            part: _retrieval(protocol, features[part], bed.labels[f"{task}/{part}"].classes)
            for part in ("validation", "test")
        }
    judged = np.concatenate([features["validation"], features["test"]])
    own = {part: _labels(kind, bed.labels[f"{task}/{part}"]) for part in features}
    truth_of: Any = {"dense": Maps, "regression": Targets}.get(kind, Classes)
    truth = truth_of(
        task, train=own["train"], test=np.concatenate([own["validation"], own["test"]])
    )
    (measured,) = protocol.measure(Features(features["train"], judged, grid), truth)
    # The figure is a function of the images' weights, so one probe gives both parts' figures.
    weights = np.zeros((2, len(judged)))
    border = len(features["validation"])
    weights[0, :border] = weights[1, border:] = 1
    validation, test = measured.statistic(weights)
    return {"validation": 100 * float(validation), "test": 100 * float(test)}


def _retrieval(protocol: Any, x: NDArray[np.float32], classes: NDArray[np.int64]) -> float:
    """Every garment's first sight looks for its others."""
    _, first = np.unique(classes, return_index=True)
    query = np.zeros(len(classes), bool)
    query[first] = True
    features = Features(x[~query], x[query])
    (measured,) = protocol.measure(
        features, Classes("instances", train=classes[~query], test=classes[query])
    )
    return 100 * float(measured.statistic(np.ones((1, int(query.sum()))))[0])


def _labels(kind: str, labels: Any) -> NDArray[Any]:
    return {"dense": labels.masks, "regression": labels.targets}.get(kind, labels.classes)
