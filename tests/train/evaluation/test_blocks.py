"""Protocols on more images than fit a block, on small ones whose blocks are smaller still."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from preceptor.train.evaluation import (
    Classes,
    Features,
    Maps,
    Targets,
    base,
    build_suite,
    classifiers,
    grid_probe,
    linear,
    retrieval,
    search,
)
from preceptor.train.evaluation.base import CPU, split
from preceptor.train.evaluation.classifiers import LogisticPath, RidgePath
from preceptor.train.evaluation.fewshot import FewShot
from preceptor.train.evaluation.knn import knn_predict
from preceptor.train.evaluation.linear import fit_linear_probe
from preceptor.train.evaluation.retrieval import average_precision
from scored import one
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.metrics import r2_score
from sklearn.preprocessing import StandardScaler

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ),
]


def clusters(count: int, seed: int, dim: int = 12, classes: int = 4):
    centres = np.random.default_rng(0).normal(size=(classes, dim))
    random = np.random.default_rng(seed)
    labels = random.integers(classes, size=count)
    return (centres[labels] + random.normal(size=(count, dim))).astype(np.float32), labels


@pytest.fixture
def small(monkeypatch):
    """Blocks that divide nothing."""
    for module, name, size in (
        (search, "QUERIES", 7),
        (search, "GALLERY", 11),
        (retrieval, "_COMPARED", 2000),
        (retrieval, "_RANKED", 500),
        (base, "_BLOCK", 130),
        (grid_probe, "_TOKENS", 200),
    ):
        monkeypatch.setattr(module, name, size)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("k", [1, 9, 30, 500])  # fewer than a block, more, and more than there are
def test_nearest_finds_the_neighbours_of_a_whole_sort(small, k, device):
    (x, _), (queries, _) = clusters(150, 1), clusters(40, 2)
    values, places = search.nearest(
        torch.from_numpy(x), torch.from_numpy(queries), k, torch.device(device)
    )
    a, b = (
        part / np.linalg.norm(part, axis=1, keepdims=True)
        for part in (queries.astype(np.float64), x.astype(np.float64))
    )
    order = np.argsort(-(a @ b.T), axis=1)[:, :k]
    assert np.array_equal(places.cpu().numpy(), order)
    np.testing.assert_allclose(
        values.cpu().numpy(), np.take_along_axis(a @ b.T, order, 1), atol=1e-6
    )


def test_knn_votes_are_the_loops_whatever_the_blocks(small):
    (x, y), (queries, _) = clusters(150, 1), clusters(40, 2)
    found = knn_predict(
        torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(queries), k=25, temperature=0.5
    )
    for query, said in zip(queries.astype(np.float64), found, strict=True):
        cosine = x @ query / np.linalg.norm(x.astype(np.float64), axis=1) / np.linalg.norm(query)
        votes = np.zeros(4)
        for place in np.argsort(-cosine)[:25]:
            votes[y[place]] += np.exp(cosine[place] / 0.5)
        assert said == votes.argmax()


def test_knn_looks_at_no_validation_images_where_there_is_nothing_to_choose():
    (x, y), (queries, truth) = clusters(60, 1), clusters(20, 2)
    y[:30] = np.arange(4, 34) // 2  # two images a class: more classes than a fifth holds images
    features, classes = Features(x, queries), Classes("class", y, truth)
    (score,) = one("knn", features, classes, k=[5])
    assert score.validation is None
    assert score.chosen == {"k": 5, "temperature": 0.07}
    (score,) = one("knn", features, classes, k=[5, 9])
    assert score.validation is not None


@pytest.mark.parametrize("device", DEVICES)
def test_average_precision_is_the_loops_with_ties_in_the_gallerys_order(small, device):
    # Entries of +-1 in 16 dimensions: lengths and cosines are exact, and most of them are tied.
    random = np.random.default_rng(3)
    gallery, queries = (random.choice([-1.0, 1.0], size=(n, 16)) for n in (300, 50))
    labels, truth = random.integers(3, size=300), random.integers(4, size=50)
    found = average_precision(
        gallery.astype(np.float32), labels, queries.astype(np.float32), truth, torch.device(device)
    )
    for query in range(50):
        hits, precisions = 0, []
        order = np.argsort(-(gallery @ queries[query]), kind="stable")
        for rank, place in enumerate(order, start=1):
            if labels[place] == truth[query]:
                hits += 1
                precisions.append(hits / rank)
        assert found[query] == pytest.approx(np.mean(precisions) if precisions else 0.0, abs=1e-12)


def test_retrieval_asks_for_no_more_validation_images_than_it_says(monkeypatch):
    (x, y), (queries, truth) = clusters(200, 1), clusters(20, 2)
    fit, held = split(200, 0.2, 0, y)
    (whole,) = one("retrieval", Features(x, queries), Classes("class", y, truth))
    each = average_precision(x[fit], y[fit], x[held], y[held])
    assert whole.validation == pytest.approx(each.mean(), abs=1e-12)
    monkeypatch.setattr(retrieval, "ASKED", 9)
    (some,) = one("retrieval", Features(x, queries), Classes("class", y, truth))
    assert some.validation == pytest.approx(each[:9].mean(), abs=1e-12)
    assert some.value == whole.value


@pytest.mark.parametrize("classes", [2, 5])
def test_ridge_is_scikit_learns_in_float64(small, classes):
    (x, y), (queries, _) = clusters(300, 1, classes=classes), clusters(200, 2, classes=classes)
    y = 3 * y  # class numbers with gaps
    x[:, 3] = 7  # a constant dimension
    strengths = [1e-3, 0.3, 0.3, 1e3]
    judges = {}
    for strength in strengths:
        fit, held = split(300, 0.2, 0, y)
        scaler = StandardScaler().fit(x[fit].astype(np.float64))
        judge = RidgeClassifier(alpha=strength * len(fit)).fit(scaler.transform(x[fit]), y[fit])
        judges[strength] = judge.score(scaler.transform(x[held].astype(np.float64)), y[held])
    best = max(strengths, key=lambda strength: judges[strength])
    found = fit_linear_probe(x, y, strengths=strengths)
    assert (found.strength, found.validation) == (best, pytest.approx(judges[best], abs=1e-12))
    scaler = StandardScaler().fit(x.astype(np.float64))
    judge = RidgeClassifier(alpha=best * 300).fit(scaler.transform(x.astype(np.float64)), y)
    asked = queries.astype(np.float64)
    assert np.array_equal(found.predict(queries), judge.predict(scaler.transform(asked)))
    outputs = judge.decision_function(scaler.transform(asked)).reshape(200, -1)
    path = RidgePath(x, y)
    path.add(np.arange(300))
    ours = path.solve(best).map.values(queries)[:, -outputs.shape[1] :]
    np.testing.assert_allclose(ours, outputs, atol=1e-6)


@pytest.mark.parametrize("strength", [1e-6, 1e-10])
def test_ridge_with_a_weak_penalty_is_that_of_float64(strength):
    random = np.random.default_rng(0)
    # Dimensions that nearly repeat each other, as those of a narrow student do: what tells the
    # classes apart is a thousandth of their deviation.
    labels = np.arange(400) % 4
    shared = random.normal(size=(400, 1)) * np.ones(12)
    fine = np.eye(4)[labels] @ random.normal(size=(4, 12)) + random.normal(size=(400, 12))
    x = (30 + shared + 1e-3 * fine).astype(np.float32)
    exact = x.astype(np.float64)
    z = (exact - exact.mean(0)) / exact.std(0)
    outputs = np.where(labels[:, None] == np.arange(4), 1.0, -1.0)
    penalty = np.sqrt(strength * len(z)) * np.eye(12)
    weight = np.linalg.lstsq(  # no products of the features: another way to the same optimum
        np.concatenate([z, penalty]),
        np.concatenate([outputs - outputs.mean(0), np.zeros((12, 4))]),
        rcond=None,
    )[0]
    expected = (z @ weight + outputs.mean(0)).argmax(1)
    found = fit_linear_probe(x, labels, strengths=[strength])
    assert (expected == labels).mean() > 0.6
    assert np.array_equal(found.predict(x), expected)


def test_ridge_probes_copy_no_more_than_a_block_of_the_features(monkeypatch):
    monkeypatch.setattr(base, "_BLOCK", 2**16)
    x, y = clusters(20_000, 1, dim=128)
    targets = np.stack([x[:, 0], np.arange(20_000)], 1).astype(np.float64)
    tracemalloc.start()
    try:
        fit_linear_probe(x, y, strengths=[0.1])
        side = Features(x, x[:10])
        one("regression", side, Targets("t", targets, targets[:10]), strengths=[0.1])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < x.nbytes / 2


def test_a_logistic_probe_that_was_stopped_says_so_once(capsys, monkeypatch, recwarn):
    monkeypatch.setattr(linear, "_told", set())
    (x, y), _ = clusters(300, 1), clusters(200, 2)
    fit_linear_probe(x, y, probe="logistic", strengths=[1.0])
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(classifiers, "STEPS", 2)
    monkeypatch.setattr(
        LogisticPath.__init__, "__kwdefaults__", {"tolerance": 1e-4, "iterations": 2}
    )
    for large in (2e10, 0):
        linear._told.clear()
        monkeypatch.setattr(linear, "LARGE", large)
        for _ in range(2):
            probe = fit_linear_probe(x, y, probe="logistic", strengths=[1e-4])
            assert not probe.model.converged
        told = capsys.readouterr().err
        assert told.count("warning") == 1
        assert "a logistic probe of strength 0.0001 was stopped after" in told
    assert not recwarn.list


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("classes", [2, 5])
def test_logistic_probe_of_large_features_is_scikit_learns(small, monkeypatch, classes, device):
    (x, y), (queries, _) = clusters(300, 1, classes=classes), clusters(200, 2, classes=classes)
    y, x, queries = 3 * y, 50 + 4 * x, 50 + 4 * queries
    x[:, 3] = queries[:, 3] = 7
    scaler = StandardScaler().fit(x.astype(np.float64))
    z, asked = (scaler.transform(part.astype(np.float64)) for part in (x, queries))
    path = LogisticPath(x, y, torch.device(device), tolerance=1e-6)
    for strength in (1.0, 0.1, 1e-2):  # each from the last one's solution on
        judge = LogisticRegression(C=1 / (strength * 300), tol=1e-8, max_iter=5000).fit(z, y)
        outputs = judge.decision_function(asked).reshape(200, -1)
        found = path.solve(strength)
        np.testing.assert_allclose(found.map.values(queries), outputs, atol=2e-3)
        sure = np.abs(outputs).min(1) > 0.01 if classes == 2 else _margin(outputs) > 0.01
        assert sure.mean() > 0.9
        assert np.array_equal(found.predict(queries)[sure], judge.predict(asked)[sure])

    plain = fit_linear_probe(x, y, probe="logistic", strengths=[1e-2, 1.0])
    monkeypatch.setattr(linear, "LARGE", 0)
    large = fit_linear_probe(
        x, y, probe="logistic", strengths=[1e-2, 1.0], device=torch.device(device)
    )
    assert large.strength == plain.strength
    assert large.validation == pytest.approx(plain.validation, abs=0.02)
    assert (large.predict(queries) == plain.predict(queries)).mean() > 0.99


def _margin(outputs):
    ordered = np.sort(outputs, axis=1)
    return ordered[:, -1] - ordered[:, -2]


@pytest.mark.parametrize("images", [150, 25])  # more than dimensions, and fewer
def test_regression_is_scikit_learns_for_targets_far_from_zero(small, images):
    random = np.random.default_rng(4)
    x, queries = (random.normal(20, 3, size=(n, 30)).astype(np.float32) for n in (images, 70))
    weight = random.normal(size=(30, 2)) * [1e-3, 1]
    y, truth = (p @ weight + random.normal(size=(len(p), 2)) * [1e-3, 2] for p in (x, queries))
    y, truth = (part + np.array([5000, 0]) for part in (y, truth))
    strengths = [1e-3, 0.1, 10.0]
    (score,) = one("regression", Features(x, queries), Targets("t", y, truth), strengths=strengths)

    def judged(strength, rows, asked, true):
        known = x[rows].astype(np.float64)
        scaler, targets = StandardScaler().fit(known), StandardScaler().fit(y[rows])
        ridge = Ridge(alpha=strength * len(known))
        ridge.fit(scaler.transform(known), targets.transform(y[rows]))
        said = ridge.predict(scaler.transform(asked.astype(np.float64)))
        return r2_score(true, targets.inverse_transform(said))

    fit, held = split(images, 0.2, 0)
    found = {s: judged(s, fit, x[held], y[held]) for s in strengths}
    best = max(strengths, key=lambda s: found[s])
    assert score.chosen == {"strength": best}
    assert score.validation == pytest.approx(found[best], abs=1e-6)
    assert score.value == pytest.approx(judged(best, slice(None), queries, truth), abs=1e-6)


def test_few_shot_and_dense_figures_do_not_depend_on_blocks(request):
    (x, y), (queries, truth) = clusters(200, 1), clusters(60, 2)
    random = np.random.default_rng(5)
    tokens, asked = (random.normal(size=(n, 6, 4)).astype(np.float32) for n in (30, 20))
    maps, judged = (part[..., :3].argmax(-1).reshape(-1, 2, 3) for part in (tokens, asked))

    def scores():
        return [
            *one("fewshot", Features(x, queries), Classes("c", y, truth), shots=[3], repeats=2),
            *one("dense", Features(tokens, asked, grid=(2, 3)), Maps("m", maps, judged)),
        ]

    whole = scores()
    request.getfixturevalue("small")
    for before, after in zip(whole, scores(), strict=True):
        assert after.value == pytest.approx(before.value, abs=1e-12)
        assert after.validation == pytest.approx(before.validation, abs=1e-12)


def test_few_shot_draws_what_it_always_drew():
    labels = np.random.default_rng(6).integers(3, size=50) * 2
    random = np.random.default_rng([7, 4, 1])
    expected = [random.choice(np.flatnonzero(labels == k), 4, replace=False) for k in (0, 2, 4)]
    assert np.array_equal(FewShot(seed=7).draw(labels, 4, 1), expected)


def test_a_suite_moves_to_devices_that_have_float64():
    suite = build_suite(["knn", "linear"])
    assert {one.device for one in suite.protocols.values()} == {CPU}
    moved = suite.on(torch.device("cuda"))
    assert {one.device.type for one in moved.protocols.values()} == {"cuda"}
    assert suite.on(torch.device("mps")) is suite


@pytest.mark.parametrize("way", ["of all", "of one kind of device"])
def test_similarities_are_whole_float32_whatever_training_allowed(way):
    matmul = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [one.fp32_precision for one in matmul]
    try:
        if way == "of all":
            torch.set_float32_matmul_precision("medium")
        else:  # after which torch.get_float32_matmul_precision raises
            matmul[0].fp32_precision = "tf32"
        allowed = [one.fp32_precision for one in matmul]
        with search.whole_float32():
            assert [one.fp32_precision for one in matmul] == ["ieee", "ieee"]
        assert allowed == [one.fp32_precision for one in matmul] != ["ieee", "ieee"]
    finally:
        for one, precision in zip(matmul, before, strict=True):
            one.fp32_precision = precision
