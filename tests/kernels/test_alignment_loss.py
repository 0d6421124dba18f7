"""The fused losses on CPU against torch.nn.functional over decoded tokens, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from preceptor.kernels import alignment_loss
from torch.autograd import gradcheck
from torch.nn import functional


def problem(batch, count, dim, dtype=torch.float32, codes=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    prediction = torch.randn(batch, count, dim, generator=generator, dtype=torch.float64).to(dtype)
    if not codes:
        return prediction, torch.randn(batch, count, dim, generator=generator).to(dtype), None
    tokens = torch.randint(-127, 128, (batch, count, dim), generator=generator).to(torch.int8)
    return prediction, tokens, torch.rand(batch, count, generator=generator) * 0.02


def some_gain(dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(dim, generator=generator) * 2 + 0.1


def reference(prediction, tokens, scale, mask=None, beta=1.0, gain=None):
    z = tokens.double() if scale is None else tokens.double() * scale.double().unsqueeze(-1)
    z = z if gain is None else z * gain.double()
    p = prediction.double()
    cosine = 1 - functional.cosine_similarity(p, z, dim=-1)
    smooth = functional.smooth_l1_loss(p, z, reduction="none", beta=beta).mean(-1)
    if mask is None:
        mask = torch.ones(p.shape[:2], dtype=torch.bool)
    return tuple((loss * mask).sum() / mask.sum().clamp_min(1) for loss in (cosine, smooth))


def values_and_gradient(function, prediction):
    prediction = prediction.detach().requires_grad_()
    cosine, smooth = function(prediction)
    (gradient,) = torch.autograd.grad(0.7 * cosine + 1.3 * smooth, prediction)
    return cosine.detach(), smooth.detach(), gradient


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    count=st.integers(1, 30),
    dim=st.integers(2, 300),
    codes=st.booleans(),
    gained=st.booleans(),
    masked=st.booleans(),
    beta=st.sampled_from([0.1, 1.0, 2.5]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 2**16),
)
def test_values_and_gradient(batch, count, dim, codes, gained, masked, beta, dtype, seed):
    prediction, tokens, scale = problem(batch, count, dim, dtype, codes, seed)
    gain = some_gain(dim, seed) if gained else None
    mask = None
    if masked:
        mask = torch.rand(batch, count, generator=torch.Generator().manual_seed(seed)) > 0.5
    got = values_and_gradient(
        lambda p: alignment_loss(p, tokens, scale, gain=gain, mask=mask, beta=beta), prediction
    )
    wanted = values_and_gradient(
        lambda p: reference(p, tokens, scale, mask, beta, gain), prediction.double()
    )
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    for ours, theirs in zip(got, wanted, strict=True):
        # A cosine's distance from 1 is no more precise than 1 is.
        size = max(float(theirs.abs().max()), 0.1 if theirs.dim() == 0 else 1e-6)
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance * size)


@pytest.mark.parametrize("gain", [None, some_gain(5)], ids=["plain", "gain"])
def test_gradcheck_of_each_token(gain):
    prediction, tokens, scale = problem(2, 3, 5, torch.float64)

    def function(prediction):
        options = {"gain": gain, "beta": 0.3, "reduction": "none"}
        return tuple(alignment_loss(prediction, tokens, scale, **options))

    assert gradcheck(function, (prediction.requires_grad_(),))


@pytest.mark.parametrize("gain", [None, some_gain(16)], ids=["plain", "gain"])
@pytest.mark.parametrize("codes", [False, True], ids=["floats", "codes"])
def test_many_chunks_equal_one(monkeypatch, codes, gain):
    from preceptor.kernels import loss

    prediction, tokens, scale = problem(3, 7, 16, codes=codes)

    def function(p):
        return alignment_loss(p, tokens, scale, gain=gain)

    whole = values_and_gradient(function, prediction)
    monkeypatch.setattr(loss, "_STEP_BYTES", 5 * 16 * 4)
    chunked = values_and_gradient(function, prediction)
    for ours, theirs in zip(chunked, whole, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_zero_prediction_and_zero_target_have_finite_gradients():
    _, tokens, scale = problem(1, 4, 8)
    scale[0, :2] = 0
    prediction = torch.zeros(1, 4, 8)
    prediction[0, 1::2] = 1e-3
    results = values_and_gradient(lambda p: alignment_loss(p, tokens, scale), prediction)
    assert all(torch.isfinite(r).all() for r in results)


@pytest.mark.parametrize("gain", [None, some_gain(8)], ids=["plain", "gain"])
def test_opcheck_and_compile(gain):
    prediction, tokens, scale = problem(2, 3, 8)
    torch.library.opcheck(
        torch.ops.preceptor.alignment_loss.default,
        (prediction.requires_grad_(), tokens, scale, gain, 1.0, False),
    )

    def function(p):
        cosine, smooth = alignment_loss(p * 1.0, tokens, scale, gain=gain, mask=scale > 0.005)
        return cosine, smooth

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(
        values_and_gradient(compiled, prediction),
        values_and_gradient(function, prediction),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("gain", [None, some_gain(24)], ids=["plain", "gain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_compiler_on_cpu_sees_operations_that_it_can_fuse(dtype, gain):
    prediction, tokens, scale = problem(2, 5, 24, dtype)
    prediction[0, 0] = 0
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.print_readable(print_output=False))
        return graph.forward

    def function(p):
        return alignment_loss(p, tokens, scale, gain=gain, beta=0.7)

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    for ours, theirs in zip(
        values_and_gradient(compiled, prediction),
        values_and_gradient(function, prediction),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    assert len(graphs) == 1
    assert "preceptor.alignment_loss" not in graphs[0]


def test_targets_are_left_as_they_are():
    prediction, tokens, _ = problem(2, 3, 8, codes=False)
    before = tokens.clone(), prediction.clone()
    for gain in (None, some_gain(8).requires_grad_()):
        alignment_loss(prediction.requires_grad_(), tokens, gain=gain).smooth_l1.backward()
        assert gain is None or gain.grad is None
    assert torch.equal(tokens, before[0])
    assert torch.equal(prediction, before[1])


P, CODES, SCALE = torch.ones(2, 3, 4), torch.ones(2, 3, 4, dtype=torch.int8), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((P.int(), CODES, SCALE), {}, TypeError, "prediction must be float16"),
        ((P, CODES.int(), SCALE), {}, TypeError, "tokens must be int8"),
        ((P, P.to(torch.float8_e4m3fn)), {}, TypeError, "tokens must be int8"),
        ((P, CODES[:1], SCALE), {}, ValueError, "one shape"),
        ((P, CODES), {}, ValueError, "scale"),
        ((P, P, SCALE), {}, ValueError, "scale"),
        ((P, CODES, SCALE[:1]), {}, ValueError, "scale must have the shape"),
        ((P, CODES, SCALE), {"mask": SCALE}, TypeError, "mask must have the bool dtype"),
        ((P, CODES, SCALE), {"gain": SCALE}, ValueError, r"gain must have the shape \(4,\)"),
        ((P, CODES, SCALE), {"gain": CODES[0, 0]}, TypeError, "gain must have a float dtype"),
        ((P, P), {"gain": torch.ones(4, device="meta")}, ValueError, "gain must be on the device"),
        ((P, CODES, SCALE), {"beta": 0.0}, ValueError, "beta must be positive"),
        ((P, CODES, SCALE), {"reduction": "sum"}, ValueError, "reduction"),
        ((P, CODES, SCALE), {"implementation": "cuda"}, ValueError, "implementation"),
        ((P, CODES, SCALE), {"implementation": "triton"}, ValueError, "needs"),
        ((P.to("meta"), CODES, SCALE), {}, ValueError, "device of tokens"),
    ],
)
def test_bad_input_is_refused(arguments, options, error, words):
    with pytest.raises(error, match=words):
        alignment_loss(*arguments, **options)


def test_a_derivative_in_forward_mode_is_refused_and_not_zero():
    with pytest.raises(ValueError, match="no derivatives in forward mode"):
        torch.func.jvp(lambda p: alignment_loss(p, CODES, SCALE).cosine, (P,), (P,))
