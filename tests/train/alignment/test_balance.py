"""Balances against their formulas, in float64 and in loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from preceptor.train.alignment.balance import (
    Drop,
    Fixed,
    Normalised,
    PCGrad,
    build_balance,
    projected,
)


def losses(*values):
    return dict(zip("abc", torch.tensor(values, requires_grad=True).unbind(), strict=False))


def test_fixed_weighs():
    balance = Fixed(["a", "b"], {"b": 0.25})
    assert float(balance(losses(2.0, 8.0), [])) == 2 + 0.25 * 8


def test_normalised_divides_by_the_running_mean():
    balance = Normalised(["a", "b"], {"a": 2.0}, momentum=0.75)
    mean = np.zeros(2)
    for n, values in enumerate([(1.0, 4.0), (3.0, 2.0), (2.0, 2.0), (5.0, 1.0), (4.0, 9.0)], 1):
        mean += max(0.25, 1 / n) * (np.array(values) - mean)
        given = torch.tensor(values, requires_grad=True)
        found = balance(dict(zip("ab", given.unbind(), strict=True)), [])
        assert float(found) == pytest.approx(2 * values[0] / mean[0] + values[1] / mean[1])
        found.backward()
        np.testing.assert_allclose(given.grad.numpy(), [2 / mean[0], 1 / mean[1]], rtol=1e-6)
    before = balance.mean.clone()
    balance.eval()(losses(7.0, 7.0), [])
    assert torch.equal(balance.mean, before)


def test_dropping_keeps_the_highest_loss_and_the_scale():
    balance = Drop(["a", "b", "c"], p=0.5)
    torch.manual_seed(0)
    counts = {}
    for _ in range(400):
        given = torch.tensor([1.0, 3.0, 2.0], requires_grad=True)
        balance(dict(zip("abc", given.unbind(), strict=True)), []).backward()
        kept = given.grad > 0
        assert kept[1]
        assert given.grad[kept].tolist() == pytest.approx([3 / int(kept.sum())] * int(kept.sum()))
        counts[tuple(kept.tolist())] = counts.get(tuple(kept.tolist()), 0) + 1
    assert len(counts) == 4
    assert all(60 < count < 140 for count in counts.values())  # each has probability 1/4
    torch.manual_seed(3)
    first = [float(balance(losses(1.0, 3.0, 2.0), []).detach()) for _ in range(5)]
    torch.manual_seed(3)
    assert [float(balance(losses(1.0, 3.0, 2.0), []).detach()) for _ in range(5)] == first
    assert float(balance.eval()(losses(1.0, 3.0, 2.0), [])) == 6


def test_a_teacher_without_weight_is_none_that_could_be_dropped():
    balance = Drop(["a", "b", "c"], {"c": 0, "b": 2}, p=0.5)
    torch.manual_seed(0)
    found = {float(balance(losses(1.0, 3.0, 9.0), []).detach()) for _ in range(50)}
    assert found == {7.0, 12.0}  # both, or b alone, counted for two
    alone = Drop(["a", "b"], {"a": 0}, p=0.5)
    assert {float(alone(losses(5.0, 3.0), []).detach()) for _ in range(50)} == {3.0}


def test_factors_are_what_the_losses_are_multiplied_by():
    weights = {"a": 3.0, "b": 0.5}
    for kind in ("fixed", "normalised", "drop", "pcgrad"):
        balance = build_balance(kind, ["a", "b"], weights, momentum=0.9, drop=0.0)
        for values in ((2.0, 5.0), (1.0, 8.0)):
            given = torch.tensor(values, requires_grad=True)
            balance(dict(zip("ab", given.unbind(), strict=True)), []).backward()
            torch.testing.assert_close(balance.factors(), given.grad)


def surgery(gradients: np.ndarray, orders: list[list[int]]) -> np.ndarray:
    """Algorithm 1 of the paper, task by task."""
    found = gradients.copy()
    for i, order in enumerate(orders):
        for j in order:
            if j != i and found[i] @ gradients[j] < 0:
                found[i] -= found[i] @ gradients[j] / (gradients[j] @ gradients[j]) * gradients[j]
    return found


def test_projection_is_algorithm_1():
    random = np.random.default_rng(0)
    for case in range(20):
        gradients = random.normal(size=(4, 5))
        torch.manual_seed(case)
        orders = [torch.randperm(4).tolist() for _ in range(4)]
        torch.manual_seed(case)
        found = projected(torch.from_numpy(gradients)).numpy()
        np.testing.assert_allclose(found, surgery(gradients, orders), rtol=1e-9, atol=1e-12)
    still = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert torch.equal(projected(still), still)


def test_the_backbone_gets_projected_gradients_and_heads_their_own():
    torch.manual_seed(0)
    backbone = torch.nn.Linear(3, 4).double()
    heads = torch.nn.ModuleList(torch.nn.Linear(4, 2).double() for _ in range(2))
    x, goal = torch.randn(6, 3).double(), torch.randn(2, 6, 2).double()

    def terms(hidden):
        return [(heads[t](hidden) - goal[t]).square().sum() for t in range(2)]

    hidden = backbone(x)
    plain = terms(hidden)
    gradients = [torch.autograd.grad(t, hidden, retain_graph=True)[0] for t in plain]
    flat = np.stack([g.flatten().numpy() for g in gradients])
    assert flat[0] @ flat[1] < 0  # they conflict
    orders = [[0, 1], [0, 1]]
    wanted = torch.from_numpy(surgery(flat, orders).sum(0)).view_as(hidden)
    own = torch.autograd.grad(sum(plain), list(heads.parameters()), retain_graph=True)
    through = torch.autograd.grad(hidden, list(backbone.parameters()), wanted)

    hidden = backbone(x)
    loss = PCGrad(["a", "b"])(dict(zip("ab", terms(hidden), strict=True)), [hidden])
    assert float(loss.detach()) == pytest.approx(float(sum(plain).detach()))
    (1000 * loss).backward()  # as a gradient scaler has it
    for found, expected in zip(heads.parameters(), own, strict=True):
        torch.testing.assert_close(found.grad / 1000, expected)
    for found, expected in zip(backbone.parameters(), through, strict=True):
        torch.testing.assert_close(found.grad / 1000, expected)


def test_several_ends_are_one_gradient(build, run, student, targets):
    """Tokens and descriptor side by side decide what conflicts, and both are changed."""
    results = {}
    for balance in ("fixed", "pcgrad"):
        alignment = build("regression", balance=balance)
        output = run(alignment)
        torch.manual_seed(1)
        alignment(output, targets).loss.backward()
        results[balance] = (output, alignment)
    output, alignment = results["fixed"]
    found = build("regression")(output, targets)
    flat = []
    for term in found.by_teacher.values():
        parts = torch.autograd.grad(term, [output.tokens, output.pooled], retain_graph=True)
        flat.append(torch.cat([p.flatten() for p in parts]).double().numpy())
    assert flat[0] @ flat[1] != 0
    wanted = surgery(np.stack(flat), [[0, 1], [0, 1]]).sum(0)
    changed = results["pcgrad"][0]
    got = torch.cat([changed.tokens.grad.flatten(), changed.pooled.grad.flatten()])
    np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-4, atol=1e-7)
    heads = (dict(a.named_parameters()) for _, a in results.values())
    plain, surgical = heads
    for name, parameter in plain.items():
        torch.testing.assert_close(parameter.grad, surgical[name].grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_projection_in_half_precision_is_that_in_float32(build, run, given_student, targets, dtype):
    """Features in half precision under autocast and a gradient scale. The losses are so small that
    products of their gradients are 0 in float16, and then nothing would seem to conflict."""
    options = {"balance": "pcgrad", "weights": {"cnn": 1e-4, "vit": 1e-4}}
    ends = {}
    for kind, scale in ((torch.float32, 1.0), (dtype, 2.0**12)):
        alignment = build("regression", **options)
        output = run(alignment, given_student(dtype=kind))
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=dtype, enabled=kind != torch.float32):
            loss = alignment(output, targets).loss
        assert loss.dtype == torch.float32
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(loss).backward()
        ends[kind] = [end.grad.double() / scale for end in (output.tokens, output.pooled)]
        heads = torch.cat([p.grad.flatten() for p in alignment.parameters()])
        assert heads.isfinite().all()
    plain = build("regression", **{**options, "balance": "fixed"})
    output = run(plain)
    plain(output, targets).loss.backward()
    unprojected = (output.tokens.grad, output.pooled.grad)
    for found, expected, without in zip(ends[dtype], ends[torch.float32], unprojected, strict=True):
        error = (found - expected).norm() / expected.norm()
        assert error < 0.02
        assert error < 0.5 * (without - expected).norm() / expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_teachers_gradients_are_taken_outside_autocast(build, run, given_student, targets, dtype):
    """Through the absorbed attention, whose backward pass autocast would give mixed dtypes."""
    options = {"balance": "pcgrad", "width": 16, "heads": 2, "tokens": 1}
    ends = {}
    for kind in (torch.float32, dtype):
        alignment = build("model_token", **options)
        output = run(alignment, given_student(dtype=kind))
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=dtype, enabled=kind != torch.float32):
            loss = alignment(output, targets).loss
        loss.backward()
        ends[kind] = output.tokens.grad.double()
    expected = ends[torch.float32]
    assert (ends[dtype] - expected).norm() < 0.02 * expected.norm()


def test_one_teacher_or_no_gradient_is_the_plain_sum():
    balance = build_balance("pcgrad", ["a"], None, momentum=0.9, drop=0.5)
    hidden = torch.ones(2, requires_grad=True)
    assert float(balance({"a": hidden.sum()}, [hidden]).detach()) == 2
    two = PCGrad(["a", "b"])
    with torch.inference_mode():
        assert float(two({"a": torch.tensor(1.0), "b": torch.tensor(2.0)}, [torch.ones(2)])) == 3
