"""Probes against scikit-learn and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from preceptor.errors import ConfigError
from preceptor.train.evaluation import build_suite, linear
from preceptor.train.evaluation.knn import knn_predict
from preceptor.train.evaluation.linear import fit_linear_probe
from sklearn.linear_model import RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler


def clusters(count: int, seed: int, dim: int = 12, classes: int = 4):
    random = np.random.default_rng(0)
    centres = random.normal(size=(classes, dim))
    random = np.random.default_rng(seed)
    labels = random.integers(classes, size=count)
    return (centres[labels] + random.normal(size=(count, dim))).astype(np.float32), labels


@pytest.mark.parametrize("k", [1, 7, 20, 500])
def test_knn_is_scikit_learns(k):
    (x, y), (queries, _) = clusters(300, 1), clusters(200, 2)
    judge = KNeighborsClassifier(
        n_neighbors=min(k, len(x)),
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: np.exp((1 - distance) / 0.07),
    ).fit(x.astype(np.float64), y)
    found = knn_predict(
        torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(queries), k=k, temperature=0.07
    )
    assert np.array_equal(found.numpy(), judge.predict(queries.astype(np.float64)))


def test_knn_does_not_depend_on_chunks_or_scale():
    (x, y), (queries, _) = clusters(100, 1), clusters(1500, 2)
    whole = knn_predict(torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(queries))
    tail = knn_predict(
        100 * torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(queries[1000:])
    )
    assert torch.equal(whole[1000:], tail)


@pytest.mark.parametrize("probe", ["ridge", "logistic"])
def test_linear_probe_chooses_and_refits(probe):
    (x, y), (queries, truth) = clusters(200, 1), clusters(300, 2)
    fitted = fit_linear_probe(x, y, probe=probe, strengths=[1e4, 0.1], seed=3)
    assert fitted.strength == 0.1
    assert 0.5 < fitted.validation <= 1
    assert (fitted.predict(queries) == truth).mean() > 0.6


def test_ridge_is_fitted_on_all_standardised_images():
    (x, y), (queries, _) = clusters(200, 1), clusters(300, 2)
    scaler = StandardScaler().fit(x)
    judge = RidgeClassifier(alpha=0.1 * len(x)).fit(scaler.transform(x), y)
    found = fit_linear_probe(x, y, strengths=[0.1]).predict(queries)
    assert np.array_equal(found, judge.predict(scaler.transform(queries)))


def test_mistakes_are_told():
    x, y = clusters(5, 1)
    with pytest.raises(ConfigError, match="ridge, logistic"):
        fit_linear_probe(x, y, probe="svm")
    with pytest.raises(ConfigError, match="cannot split 5 images of 5 classes"):
        fit_linear_probe(x, np.arange(5))


@pytest.mark.parametrize("probe", ["ridge", "logistic"])
def test_a_choice_at_the_end_of_the_strengths_is_told_once(probe, capsys, monkeypatch):
    monkeypatch.setattr(linear, "_told", set())
    random = np.random.default_rng(0)
    # Classes along a direction that a strong penalty drowns in others that vary with the class.
    labels = np.arange(300) % 3
    x = random.normal(size=(300, 40)).astype(np.float32)
    x[:, 0] += labels**2
    strengths = [1e-4, 1e4]
    fits = {s: fit_linear_probe(x, labels, probe=probe, strengths=[s]) for s in strengths}
    assert capsys.readouterr().err == ""  # one strength is no choice
    best, other = sorted(strengths, key=lambda s: -fits[s].validation)
    assert fits[best].validation > fits[other].validation
    for _ in range(2):
        assert fit_linear_probe(x, labels, probe=probe, strengths=strengths).strength == best
    told = capsys.readouterr().err
    end = "lowest" if best == min(strengths) else "highest"
    assert told.count("warning") == 1
    assert f"a {probe} probe chose {best}, the {end} of its strengths" in told
    assert "extend linear.strengths=[0.0001, 10000.0]" in told


@pytest.mark.parametrize(("option", "given"), [("corruptions", "jpeg"), ("severities", 3)])
def test_one_name_where_a_list_belongs_is_refused_in_whole(option, given):
    with pytest.raises(
        ConfigError, match=rf"robustness\.{option}={given}: write a list, .*\[{given}\]"
    ):
        build_suite(["robustness"], {"robustness": {option: given}})
