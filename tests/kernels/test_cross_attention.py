"""The public op on CPU against attention written out in float64."""

import subprocess
import sys
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from preceptor.kernels import cross_attention, merge_spaces
from torch.autograd import gradcheck

full = partial(cross_attention, return_lse=True)


@pytest.mark.parametrize("implementation", ["absorbed", "standard"])
@pytest.mark.parametrize("norm_eps", [None, 1e-5])
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck_over_float_tokens(judge, implementation, norm_eps, masked):
    problem = judge.problem(3, 3, 7, 5, torch.float64, masked=masked)

    def function(query, tokens):
        y, lse = full(
            query, tokens, mask=problem.mask, norm_eps=norm_eps, implementation=implementation
        )
        return y, lse.masked_fill(lse == -torch.inf, 0.0)

    assert gradcheck(function, (problem.query.requires_grad_(), problem.tokens.requires_grad_()))


@pytest.mark.parametrize("implementation", ["absorbed", "standard"])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 4),
    rows=st.integers(1, 20),
    count=st.integers(1, 40),
    dim=st.integers(2, 40),
    norm=st.booleans(),
    masked=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int8]),
    seed=st.integers(0, 2**16),
)
def test_output_and_gradients(
    judge, implementation, batch, rows, count, dim, norm, masked, dtype, seed
):
    half = dtype == torch.bfloat16
    problem = judge.problem(batch, rows, count, dim, dtype, masked=masked, seed=seed)
    norm_eps = 1e-3 if norm else None
    got = judge.gradients(partial(full, implementation=implementation), problem, norm_eps)
    wanted = judge.gradients(judge.reference, problem, norm_eps, torch.float64)
    tolerance = 1e-9 if dtype == torch.float64 else 3e-2 if half else 1e-4
    if half and implementation == "standard":
        return  # PyTorch's own bfloat16 attention; its accuracy is not this project's.
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("norm_eps", [None, 1e-5])
def test_gradcheck_over_int8_codes(judge, norm_eps):
    problem = judge.problem(2, 3, 7, 5, torch.int8, masked=True, query_dtype=torch.float64)
    scale = problem.scale.double()

    def function(query):
        return cross_attention(query, problem.tokens, scale, mask=problem.mask, norm_eps=norm_eps)

    assert gradcheck(function, (problem.query.requires_grad_(),), atol=1e-6)


def test_statistics_of_the_store_are_folded_in(judge):
    problem = judge.problem(2, 3, 7, 6, torch.int8, masked=True)
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(6, generator=generator)
    std = torch.rand(6, generator=generator) + 0.5
    decoded = (problem.tokens.double() * problem.scale.double()[..., None]) * std + mean
    y, lse = full(
        problem.query, problem.tokens, problem.scale, mean=mean, std=std, mask=problem.mask
    )
    expected, expected_lse = judge.reference(problem.query, decoded, mask=problem.mask)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    mean, std = mean.requires_grad_(), std.requires_grad_()
    assert not cross_attention(
        problem.query, problem.tokens, problem.scale, mean=mean, std=std
    ).requires_grad


def test_a_mean_costs_the_logsumexp_of_half_precision_rows_nothing(judge):
    problem = judge.problem(2, 3, 7, 256, torch.int8, masked=True, query_dtype=torch.bfloat16)
    mean = torch.randn(256, generator=torch.Generator().manual_seed(1)) * 5
    decoded = problem.tokens.double() * problem.scale.double()[..., None] + mean
    _, lse = full(problem.query, problem.tokens, problem.scale, mean=mean, mask=problem.mask)
    _, expected = judge.reference(problem.query, decoded, mask=problem.mask)
    torch.testing.assert_close(lse.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["absorbed", "standard"])
@pytest.mark.parametrize("mean", [None, torch.ones(5)], ids=["plain", "mean"])
def test_what_a_logsumexp_over_nothing_makes_no_number_stays_there(judge, implementation, mean):
    problem = judge.problem(3, 3, 7, 5, masked=True)
    query, tokens = problem.query[0].requires_grad_(), problem.tokens.requires_grad_()
    results = []
    for kept in (slice(None), slice(2)):  # the last sample attends nothing
        options = {"mask": problem.mask[kept], "mean": mean, "implementation": implementation}
        y, lse = full(query, tokens[kept], **options)
        total = y.sum() + lse.logsumexp(1).sum()
        results.append(torch.autograd.grad(total, (query, tokens)))
    torch.testing.assert_close(*results)


def test_lengths_and_a_shared_query(judge):
    problem = judge.problem(3, 4, 7, 6)
    lengths = torch.tensor([7, 3, 0])
    mask = torch.arange(7) < lengths[:, None]
    y, lse = full(problem.query[0], problem.tokens, lengths=lengths)
    expected, expected_lse = judge.reference(problem.query[0], problem.tokens, mask=mask)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-6)
    assert not y[2].any()
    both = cross_attention(problem.query[0], problem.tokens, lengths=lengths, mask=mask.flip(1))
    expected, _ = judge.reference(problem.query[0], problem.tokens, mask=mask & mask.flip(1))
    torch.testing.assert_close(both.double(), expected, rtol=1e-5, atol=1e-6)


def test_merge_spaces_equals_attention_over_the_union(judge):
    problem = judge.problem(2, 3, 11, 5, torch.float64)
    query = problem.query.requires_grad_()
    # The last part is hidden from one sample, the second from both.
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[:, 4:7] = False
    mask[1, 7:] = False
    pieces = zip(problem.tokens.split([4, 3, 4], dim=1), mask.split([4, 3, 4], dim=1), strict=True)
    parts = [full(query, tokens, mask=part) for tokens, part in pieces]
    merged, lse = merge_spaces([y for y, _ in parts], [lse for _, lse in parts])
    whole, whole_lse = full(query, problem.tokens, mask=mask)
    torch.testing.assert_close(merged, whole)
    torch.testing.assert_close(lse, whole_lse)
    (merged_grad,) = torch.autograd.grad(
        (merged * problem.grad_output).sum() + lse.sum(), query, retain_graph=True
    )
    (whole_grad,) = torch.autograd.grad(
        (whole * problem.grad_output).sum() + whole_lse.sum(), query
    )
    torch.testing.assert_close(merged_grad, whole_grad)


def test_merge_spaces_of_nothing_is_zero_with_finite_gradients():
    y = torch.zeros(2, 3, 4, requires_grad=True)
    lse = torch.full((2, 3), -torch.inf, requires_grad=True)
    merged, total = merge_spaces([y, y], [lse, lse])
    assert not merged.any()
    assert bool((total == -torch.inf).all())
    merged.sum().backward()
    assert torch.isfinite(y.grad).all()
    assert torch.isfinite(lse.grad).all()


@pytest.mark.parametrize(
    ("outputs", "lses", "words"),
    [
        (0, 0, "at least one"),
        (2, 1, "one lse for each"),
    ],
)
def test_merge_spaces_refuses_unpaired_parts(outputs, lses, words):
    with pytest.raises(ValueError, match=words):
        merge_spaces([torch.zeros(1, 2, 3)] * outputs, [torch.zeros(1, 2)] * lses)


def test_merge_spaces_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"outputs\[1\]"):
        merge_spaces([torch.zeros(1, 2, 3), torch.zeros(1, 2, 4)], [torch.zeros(1, 2)] * 2)


@pytest.mark.parametrize("norm_eps", [None, 1e-5])
@pytest.mark.parametrize("size", [1e-6, 1e4])
@pytest.mark.parametrize("kind", ["common mean", "outlier channels"])
def test_extreme_inputs(judge, kind, size, norm_eps):
    problem = judge.problem(2, 3, 33, 48, torch.float32)
    if kind == "common mean":
        problem.tokens = problem.tokens + 30.0
    else:
        problem.tokens[..., ::17] *= 50
        problem.query[..., ::17] /= 50
    problem.grad_output *= size
    problem.grad_lse *= size
    got = judge.gradients(full, problem, norm_eps)
    wanted = judge.gradients(judge.reference, problem, norm_eps, torch.float64)
    assert max(judge.errors(got, wanted)) < 2e-4


def test_results_repeat_bit_for_bit(judge):
    problem = judge.problem(4, 5, 61, 48, torch.int8, masked=True)
    first = judge.gradients(full, problem, 1e-5)
    second = judge.gradients(full, problem, 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_tokens_and_no_samples():
    y, lse = full(torch.ones(3, 4), torch.ones(2, 0, 4))
    assert y.shape == (2, 3, 4)
    assert not y.any()
    assert bool((lse == -torch.inf).all())
    assert cross_attention(torch.ones(3, 4), torch.ones(0, 5, 4)).shape == (0, 3, 4)


def test_autocast_casts_query_and_tokens_but_not_scales(judge):
    problem = judge.problem(2, 3, 9, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, lse = full(problem.query, problem.tokens)
    assert y.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    expected, _ = judge.reference(problem.query.bfloat16(), problem.tokens.bfloat16())
    assert judge.errors([y], [expected])[0] < 4e-3
    codes = judge.problem(2, 3, 9, 16, torch.int8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = cross_attention(codes.query, codes.tokens, codes.scale)
    expected, _ = judge.reference(codes.query.bfloat16(), codes.tokens, codes.scale)
    assert judge.errors([y], [expected])[0] < 4e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("norm_eps", [None, 1e-5])
def test_a_backward_pass_inside_autocast_is_the_one_outside(judge, norm_eps, dtype):
    problem = judge.problem(2, 3, 9, 16, dtype)
    inputs = [problem.query.requires_grad_()]
    if dtype == torch.float32:
        inputs.append(problem.tokens.requires_grad_())
    y, lse = full(problem.query, problem.tokens, problem.scale, norm_eps=norm_eps)
    gradients = problem.grad_output, problem.grad_lse
    outside = torch.autograd.grad((y, lse), inputs, gradients, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = torch.autograd.grad((y, lse), inputs, gradients)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def test_vmap_over_any_argument(judge):
    problem = judge.problem(3, 4, 6, 5)
    queries = torch.stack([problem.query, 2 * problem.query], dim=1)
    mapped = torch.vmap(lambda q: cross_attention(q, problem.tokens), in_dims=1, out_dims=1)(
        queries
    )
    expected = [cross_attention(q, problem.tokens) for q in queries.unbind(1)]
    torch.testing.assert_close(mapped, torch.stack(expected, dim=1))
    tokens = torch.stack([problem.tokens, -problem.tokens])
    mapped = torch.vmap(lambda x: cross_attention(problem.query, x, norm_eps=1e-5))(tokens)
    expected = [cross_attention(problem.query, x, norm_eps=1e-5) for x in tokens]
    torch.testing.assert_close(mapped, torch.stack(expected))


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("norm_eps", [None, 1e-5])
def test_opcheck(judge, codes, norm_eps):
    problem = judge.problem(2, 3, 7, 8, torch.int8 if codes else torch.float32)
    query = problem.query.requires_grad_()
    tokens = problem.tokens if codes else problem.tokens.requires_grad_()
    torch.library.opcheck(
        torch.ops.preceptor.cross_attention.default,
        (query, tokens, problem.scale, norm_eps, False),
    )


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_without_a_graph_break(judge, dynamic):
    problem = judge.problem(2, 3, 7, 8, torch.int8, masked=True)

    def function(query, tokens, scale, mask, norm_eps):
        y, lse = full(query * 2, tokens, scale, mask=mask, norm_eps=norm_eps)
        return (y.square().sum() + lse.masked_fill(~mask.any(1, True), 0).sum()) * 3

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    arguments = (problem.tokens, problem.scale, problem.mask, 1e-5)
    results = []
    for candidate in (function, compiled):
        query = problem.query.detach().requires_grad_()
        loss = candidate(query, *arguments)
        results.append((loss.detach(), *torch.autograd.grad(loss, query)))
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs)


Q, X, CODES = torch.ones(2, 3, 4), torch.ones(2, 5, 4), torch.ones(2, 5, 4, dtype=torch.int8)
SCALE = torch.ones(2, 5)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((Q, X[0]), {}, ValueError, r"tokens must have the shape \[B, N, D\]"),
        ((Q[0, 0], X), {}, ValueError, r"query must have the shape \[R, D\]"),
        ((Q[:1], X), {}, ValueError, "query must have the shape"),
        ((Q[..., :3], X), {}, ValueError, "query must have the shape"),
        ((Q[:, :0], X), {}, ValueError, "at least one row"),
        ((Q.int(), X), {}, TypeError, "query must be float16"),
        ((Q, X.int()), {}, TypeError, "tokens must be int8 codes"),
        ((Q, CODES), {}, ValueError, "scale .* must be given with int8 tokens"),
        ((Q, X, SCALE), {}, ValueError, "scale is for int8 tokens"),
        ((Q, CODES, SCALE[:, :4]), {}, ValueError, "scale must have the shape"),
        ((Q, CODES, SCALE.int()), {}, TypeError, "scale must have a float dtype"),
        ((Q, CODES, SCALE * torch.nan), {}, ValueError, r"scale .*finite.* nan at \(0, 0\)"),
        ((Q, CODES, -SCALE), {}, ValueError, "scale .*not negative"),
        ((Q, X), {"mask": SCALE}, TypeError, "mask must have the bool dtype"),
        ((Q, X), {"mask": SCALE[0] > 0}, ValueError, "mask must have the shape"),
        ((Q, X), {"lengths": SCALE[:, 0]}, TypeError, "lengths must have an integer dtype"),
        ((Q, X), {"mean": torch.ones(3)}, ValueError, "mean must have the shape"),
        ((Q, X), {"std": torch.ones(4), "norm_eps": 1e-5}, ValueError, "cannot be combined"),
        ((Q, X), {"norm_eps": 0.0}, ValueError, "norm_eps must be positive"),
        ((Q, X), {"implementation": "fast"}, ValueError, "implementation must be one of"),
        ((Q, X), {"implementation": "triton"}, ValueError, "needs"),
        ((Q.to("meta"), X), {}, ValueError, "query must be on the device of tokens"),
        ((Q, X), {"mask": (SCALE > 0).to("meta")}, ValueError, "mask must be on the device"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(arguments, options, error, words):
    with pytest.raises(error, match=words) as caught:
        cross_attention(*arguments, **options)
    assert "\n" not in str(caught.value)


def test_derivatives_in_forward_mode_are_refused_and_not_zero():
    for attend, at in (
        (lambda q: cross_attention(q, X), Q),
        (lambda x: cross_attention(Q, x), X),
    ):
        with pytest.raises(ValueError, match="no derivatives in forward mode"):
            torch.func.jvp(attend, (at,), (at,))


def test_a_scale_that_is_not_attended_may_be_anything(judge):
    problem = judge.problem(2, 3, 7, 8, torch.int8)
    hidden = problem.scale.clone()
    hidden[:, 5:] = torch.nan
    y = cross_attention(problem.query, problem.tokens, hidden, lengths=torch.tensor([5, 5]))
    expected = cross_attention(problem.query, problem.tokens[:, :5], problem.scale[:, :5])
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("implementation", ["absorbed", "standard"])
@pytest.mark.parametrize("norm_eps", [None, 1e-5])
def test_a_scale_that_is_not_a_number_hides_no_token(judge, norm_eps, implementation):
    problem = judge.problem(2, 3, 7, 8, torch.int8)
    problem.scale[0, 5] = torch.nan
    options = {"norm_eps": norm_eps, "implementation": implementation, "validate": False}
    for result in full(problem.query, problem.tokens, problem.scale, **options):
        assert result.isnan().flatten(1).all(1).tolist() == [True, False]
        assert torch.isfinite(result[1]).all()


def test_works_without_triton():
    program = """
import sys
sys.modules["triton"] = None
import torch
from preceptor.kernels import cross_attention
print(round(cross_attention(torch.ones(1, 4), torch.ones(1, 3, 4)).sum().item(), 4))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "4.0"
