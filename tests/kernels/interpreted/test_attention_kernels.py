"""The Triton attention kernels, run by the interpreter, against float64."""

import contextlib
import os
from functools import partial

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from preceptor.kernels import autotune, cross_attention

fused = partial(cross_attention, return_lse=True, implementation="triton")

# Relative L2 errors of y, lse, dq and dx, about twice what rounding the operands gives.
BOUNDS = {
    torch.float32: (1e-6, 1e-6, 2e-6, 2e-6),
    torch.float16: (6e-4, 5e-4, 1e-3, 1e-3),
    torch.bfloat16: (5e-3, 1e-3, 7e-3, 8e-3),
    torch.int8: (6e-4, 5e-4, 1e-3),
}
# One row; N prime and R past a block; R = 2 blocks and D with an unfilled chunk and no
# packing (D % 4); several parts of N.
SHAPES = [(1, 1, 2, 5), (2, 6, 37, 48), (1, 17, 37, 66), (1, 3, 130, 32)]


def check(judge, problem, norm_eps, dtype, factor=1.0):
    got = judge.gradients(fused, problem, norm_eps)
    wanted = judge.gradients(judge.reference, problem, norm_eps, torch.float64)
    for error, bound in zip(judge.errors(got, wanted), BOUNDS[dtype], strict=True):
        assert error <= bound * factor


@pytest.fixture(params=[False, True], ids=["streamed", "whole"])
def whole(request):
    """Whether one block may hold all tokens of a sample."""
    with autotune.whole_samples() if request.param else contextlib.nullcontext():
        yield request.param


def skip_without(whole, dtype, shape):
    if whole and (dtype == torch.float32 or shape[2] > 64 or shape[3] % 4):
        pytest.skip("streamed all the same")


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("norm_eps", [None, 1e-5])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 5, 37, 40)], ids=str)
def test_output_and_gradients(judge, shape, norm_eps, dtype, whole):
    skip_without(whole, dtype, shape)
    masked = shape[2] > 40
    check(judge, judge.problem(*shape, dtype, masked=masked and shape[0] > 1), norm_eps, dtype)


# Real widths. One token; a prime number of tokens, some hidden; several row blocks;
# parts of N; an unfilled chunk and codes that cannot be packed; 1536 channels.
REAL_SHAPES = [
    ((2, 8, 1, 192), None),
    ((2, 6, 37, 384), 1e-5),
    ((1, 33, 19, 768), None),
    ((1, 3, 131, 768), 1e-5),
    ((1, 4, 33, 770), 1e-5),
    ((1, 2, 33, 1536), 1e-5),
]


sweep = pytest.mark.skipif("PRECEPTOR_SWEEP" not in os.environ, reason="minutes: PRECEPTOR_SWEEP=1")
# The other dtypes have their wide tokens in `test_every_configuration`.
USUAL = {torch.bfloat16, torch.int8}
DTYPES = [pytest.param(t, marks=() if t in USUAL else sweep) for t in BOUNDS]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "norm_eps"), REAL_SHAPES, ids=str)
def test_real_widths(judge, shape, norm_eps, dtype, whole):
    skip_without(whole, dtype, shape)
    check(judge, judge.problem(*shape, dtype, masked=shape[0] > 1 < shape[2]), norm_eps, dtype)


def configurations(dim, dtype):
    lanes = 4 if dtype == torch.int8 and dim % 4 == 0 else 1
    kernels = ("forward", "backward")
    return max(len(autotune.row_tiles(k, dim // lanes, lanes, dtype.itemsize)) for k in kernels)


@pytest.mark.parametrize(
    ("dtype", "position"),
    [(dtype, position) for dtype in BOUNDS for position in range(configurations(384, dtype))],
    ids=str,
)
def test_every_configuration(judge, dtype, position):
    with autotune.only(position):
        check(judge, judge.problem(1, 18, 35, 384, dtype), 1e-5, dtype)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_lengths_hide_the_rest_of_a_sample(judge, dtype, whole):
    skip_without(whole, dtype, (3, 6, 37, 96))
    problem = judge.problem(3, 6, 37, 96, dtype)
    lengths = torch.tensor([37, 33, 0])
    problem.mask = torch.arange(37) < lengths[:, None]
    wanted = judge.gradients(judge.reference, problem, 1e-5, torch.float64)

    def attend(query, tokens, scale, mask, norm_eps):
        return fused(query, tokens, scale, lengths=lengths, norm_eps=norm_eps)

    got = judge.gradients(attend, problem, 1e-5)
    assert all(e <= b for e, b in zip(judge.errors(got, wanted), BOUNDS[dtype], strict=True))
    assert not any(part[2].any() for part in (got[0], *got[2:]))


WIDTHS = (192, 768, 770, 1024, 1536)


@sweep
@pytest.mark.parametrize(
    ("dtype", "dim", "position"),
    [(t, dim, n) for t in BOUNDS for dim in WIDTHS for n in range(configurations(dim, t))],
    ids=str,
)
def test_sweep_of_configurations(judge, dtype, dim, position):
    with autotune.only(position):
        check(judge, judge.problem(2, 18, 35, dim, dtype, masked=True), 1e-5, dtype)


@sweep
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(
    ("shape", "norm_eps"),
    [
        ((1, 128, 67, 1536), 1e-5),
        ((1, 128, 67, 768), None),
        ((2, 33, 131, 1024), 1e-5),
        ((1, 2, 1361, 192), 1e-5),
        ((1, 48, 257, 768), 1e-5),
        ((2, 16, 1, 384), None),
        ((1, 3, 4096, 192), None),
    ],
    ids=str,
)
def test_sweep_of_shapes(judge, shape, norm_eps, dtype):
    check(judge, judge.problem(*shape, dtype, masked=shape[0] > 1 < shape[2]), norm_eps, dtype)


# Not shrunk: a failing example is small already, and each one is slow here.
@settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(
    batch=st.integers(1, 2),
    rows=st.integers(1, 20),
    count=st.integers(1, 70),
    dim=st.integers(1, 70),
    norm=st.booleans(),
    masked=st.booleans(),
    codes=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_shapes(judge, batch, rows, count, dim, norm, masked, codes, seed):
    dtype = torch.int8 if codes else torch.float32
    problem = judge.problem(batch, rows, count, dim, dtype, masked=masked, seed=seed)
    norm_eps = 1e-3 if norm else None
    got = judge.gradients(fused, problem, norm_eps)
    wanted = judge.gradients(judge.reference, problem, norm_eps, torch.float64)
    # With one token or channel a gradient is a difference of equal terms: compared by its terms.
    floor = 1e-3 if codes else 2e-6
    for ours, theirs in zip(got, wanted, strict=True):
        kept = torch.isfinite(theirs)
        assert torch.equal(kept, torch.isfinite(ours))
        scale = float(theirs[kept].abs().max()) if kept.any() else 0.0
        atol = floor * max(scale, float(problem.grad_output.abs().max()))
        torch.testing.assert_close(ours[kept].double(), theirs[kept], rtol=floor, atol=3 * atol)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("size", [1e-6, 1e4])
def test_gradients_of_any_size(judge, dtype, size, whole):
    problem = judge.problem(1, 5, 33, 48, dtype, query_dtype=torch.float32)
    problem.grad_output *= size
    problem.grad_lse *= size
    got = judge.gradients(fused, problem, None)
    wanted = judge.gradients(judge.reference, problem, None, torch.float64)
    errors = judge.errors(got[:3], wanted[:3])
    assert all(e <= b for e, b in zip(errors, BOUNDS[dtype][:3], strict=True))
    if dtype == torch.bfloat16:
        assert judge.errors(got[3:], wanted[3:])[0] <= BOUNDS[dtype][3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_common_mean_under_layer_norm(judge, dtype, whole):
    problem = judge.problem(1, 5, 33, 64, torch.float32)
    tokens = problem.tokens + 30.0
    if dtype == torch.int8:
        problem.scale = tokens.abs().amax(-1) / 127
        problem.tokens = (tokens / problem.scale[..., None]).round().to(torch.int8)
    else:
        problem.tokens = tokens.to(dtype)
        problem.query = problem.query.to(dtype)
    check(judge, problem, 1e-5, dtype, factor=1.5)


@pytest.mark.parametrize("norm_eps", [None, 1e-5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_outlier_channels(judge, dtype, norm_eps, whole):
    problem = judge.problem(1, 5, 33, 64, torch.float32)
    tokens = problem.tokens.clone()
    tokens[..., ::17] *= 50
    problem.query[..., ::17] /= 50
    if dtype == torch.int8:
        problem.scale = tokens.abs().amax(-1) / 127
        problem.tokens = (tokens / problem.scale[..., None]).round().to(torch.int8)
    else:
        problem.tokens = tokens.to(dtype)
        problem.query = problem.query.to(dtype)
    check(judge, problem, norm_eps, dtype, factor=2.0)


def test_common_mean_without_layer_norm(judge, whole):
    # The stored output is rounded at 30 deviations; the residual of ds takes that out again.
    problem = judge.problem(1, 5, 33, 64, torch.float32)
    problem.tokens = (problem.tokens + 30.0).to(torch.bfloat16)
    problem.query = problem.query.to(torch.bfloat16)
    got = judge.gradients(fused, problem, None)
    wanted = judge.gradients(judge.reference, problem, None, torch.float64)
    y, lse, dq, dx = judge.errors(got, wanted)
    assert y <= 5e-3
    assert lse <= 1e-3
    assert dq <= 0.05
    assert dx <= 0.05


@pytest.mark.parametrize("scale", [1e-7, 1e3])
def test_scales_of_any_size(judge, scale, whole):
    problem = judge.problem(1, 4, 33, 48, torch.int8)
    problem.scale = problem.scale * scale
    problem.scale[0, ::2] *= 0.01
    problem.query = problem.query / scale
    got = judge.gradients(fused, problem, None)
    wanted = judge.gradients(judge.reference, problem, None, torch.float64)
    errors = judge.errors(got, wanted)
    assert all(e <= 2 * b for e, b in zip(errors, BOUNDS[torch.int8], strict=True))


def test_scales_of_zero(judge, whole):
    problem = judge.problem(1, 4, 33, 48, torch.int8)
    problem.scale[0, ::2] = 0.0
    check(judge, problem, None, torch.int8)
    problem.scale[:] = 0.0
    y, lse, dq = judge.gradients(fused, problem, None)
    assert float(y.abs().max()) < 1e-15
    assert float(dq.abs().max()) < 1e-15
    torch.testing.assert_close(lse, torch.full_like(lse, 33.0).log())


def test_results_repeat_bit_for_bit(judge):
    problem = judge.problem(1, 3, 130, 48, torch.bfloat16)
    first = judge.gradients(fused, problem, 1e-5)
    second = judge.gradients(fused, problem, 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_strided_and_unaligned_inputs_are_read_where_they_lie(judge, whole):
    problem = judge.problem(2, 4, 33, 48, torch.int8)
    storage = torch.empty(2 * 33 * 48 + 1, dtype=torch.int8)
    storage[1:] = problem.tokens.flatten()
    padded = torch.zeros(2, 40, 48, dtype=torch.int8)
    padded[:, :33] = problem.tokens
    expected, _ = judge.reference(problem.query, problem.tokens, problem.scale)
    shared = problem.query[0]
    for tokens in (storage[1:].view(2, 33, 48), padded[:, :33]):
        y, _ = fused(problem.query, tokens, problem.scale)
        assert judge.errors([y], [expected])[0] <= 6e-4
        y, _ = fused(shared, tokens, problem.scale)
        assert judge.errors([y[0]], [expected[0]])[0] <= 6e-4


def test_codes_in_a_borrowed_buffer_that_starts_anywhere(judge, whole):
    problem = judge.problem(1, 4, 33, 48, torch.int8)
    buffer = bytearray(33 * 48 + 8)
    for start in range(4):
        whole = torch.frombuffer(buffer, dtype=torch.int8, offset=start)
        # Aligned to a word in memory, but for start 0 not in its storage.
        tokens = whole[4 - start :][: 33 * 48].view(1, 33, 48)
        tokens.copy_(problem.tokens)
        y, _ = fused(problem.query, tokens, problem.scale)
        expected, _ = judge.reference(problem.query, problem.tokens, problem.scale)
        assert judge.errors([y], [expected])[0] <= 6e-4


def test_what_the_forward_pass_kept_may_come_back_with_other_strides(judge):
    problem = judge.problem(2, 6, 37, 48)
    weight = problem.scale
    keep = torch.ops.preceptor.cross_attention(problem.query, problem.tokens, weight, 1e-5, True)
    y, lse, gain, mean, p = keep

    def spread(x):
        return torch.stack([x, x], dim=-1)[..., 0]

    grads = problem.grad_output, problem.grad_lse
    inputs = problem.query, problem.tokens
    results = [
        torch.ops.preceptor.cross_attention_backward(
            *map(way, (*grads, *inputs, gain, mean, y, lse)), p, True, True
        )
        for way in (torch.clone, spread)
    ]
    for plain, strided in zip(*results, strict=True):
        assert torch.equal(plain, strided)


def test_weights_of_any_strides(judge):
    problem = judge.problem(2, 4, 33, 48, torch.int8)
    attend = torch.ops.preceptor.cross_attention
    strided = problem.scale.T.contiguous().T
    plain, other = (
        attend(problem.query, problem.tokens, scale, 1e-5, True)
        for scale in (problem.scale, strided)
    )
    assert not strided.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


@pytest.mark.parametrize("count", [33, 130])  # in one part, and in several
def test_a_row_that_is_not_a_number_is_no_row_that_attends_nothing(judge, count, whole):
    problem = judge.problem(1, 3, count, 48)
    problem.query[0, 1, 5] = torch.nan
    y, lse = fused(problem.query, problem.tokens)
    assert y[0].isnan().all(-1).tolist() == [False, True, False]
    assert lse[0].isnan().tolist() == [False, True, False]
    assert torch.isfinite(lse[0, ::2]).all()


@pytest.mark.parametrize("scale", [torch.nan, torch.inf])
@pytest.mark.parametrize("norm_eps", [None, 1e-5])
def test_a_scale_that_is_not_a_number_hides_no_token(judge, norm_eps, scale, whole):
    problem = judge.problem(2, 3, 33, 48, torch.int8)
    problem.scale[0, 7] = scale
    y, _ = fused(problem.query, problem.tokens, problem.scale, norm_eps=norm_eps, validate=False)
    assert y.isnan().flatten(1).all(1).tolist() == [True, False]
    assert torch.isfinite(y[1]).all()


def test_no_tokens_give_zero(judge, whole):
    problem = judge.problem(2, 3, 0, 16)
    y, lse = fused(problem.query.requires_grad_(), problem.tokens)
    assert not y.any()
    assert bool((lse == -torch.inf).all())
    (gradient,) = torch.autograd.grad(y.sum(), problem.query)
    assert not gradient.any()
