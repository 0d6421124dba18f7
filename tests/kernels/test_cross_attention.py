"""The public op on CPU against attention written out over projected keys and values."""

import pytest
import torch
from preceptor.kernels import cross_attention, merge_spaces
from torch.autograd import gradcheck


def reference(query, tokens, scale=None, mask=None, norm_eps=None):
    """Softmax attention in float64, sample by sample and row by row."""
    rows = query.expand(tokens.shape[0], -1, -1) if query.dim() == 2 else query
    outputs, lses = [], []
    for b in range(tokens.shape[0]):
        x = tokens[b].double()
        if scale is not None:
            x = x * scale[b].double()[:, None]
        if norm_eps is not None:
            centred = x - x.mean(-1, keepdim=True)
            x = centred / (centred.square().mean(-1, keepdim=True) + norm_eps).sqrt()
        if mask is not None:
            x = x[mask[b]]
        scores = rows[b].double() @ x.T
        if x.shape[0] == 0:
            outputs.append(torch.zeros_like(rows[b].double()))
            lses.append(scores.new_full((rows.shape[1],), -torch.inf))
            continue
        outputs.append(torch.softmax(scores, -1) @ x)
        lses.append(torch.logsumexp(scores, -1))
    return torch.stack(outputs), torch.stack(lses)


def problem(batch=2, rows=3, count=7, dim=5, *, codes=False, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, rows, dim, generator=generator, dtype=torch.float64).to(dtype)
    if codes:
        tokens = torch.randint(-127, 128, (batch, count, dim), generator=generator).to(torch.int8)
        scale = torch.rand(batch, count, generator=generator).to(dtype) * 0.02
        return query, tokens, scale
    tokens = torch.randn(batch, count, dim, generator=generator, dtype=torch.float64).to(dtype)
    return query, tokens, None


@pytest.mark.parametrize("implementation", ["absorbed", "standard"])
@pytest.mark.parametrize("norm_eps", [None, 1e-5])
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck_over_float_tokens(implementation, norm_eps, masked):
    query, tokens, _ = problem(batch=3)
    mask = None
    if masked:
        mask = torch.rand(3, 7, generator=torch.Generator().manual_seed(1)) > 0.4
        mask[2] = False
    query.requires_grad_(True)
    tokens.requires_grad_(True)

    def function(query, tokens):
        y, lse = cross_attention(
            query,
            tokens,
            mask=mask,
            norm_eps=norm_eps,
            return_lse=True,
            implementation=implementation,
        )
        return y, lse.masked_fill(lse == -torch.inf, 0.0)

    assert gradcheck(function, (query, tokens))


@pytest.mark.parametrize("norm_eps", [None, 1e-5])
def test_int8_codes_match_the_reference(norm_eps):
    query, codes, scale = problem(codes=True)
    mask = torch.rand(2, 7, generator=torch.Generator().manual_seed(2)) > 0.3
    y, lse = cross_attention(query, codes, scale, mask=mask, norm_eps=norm_eps, return_lse=True)
    expected, expected_lse = reference(query, codes, scale, mask, norm_eps)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-6, atol=1e-6)
    query.requires_grad_(True)
    assert gradcheck(
        lambda q: cross_attention(q, codes, scale.double(), mask=mask, norm_eps=norm_eps),
        (query,),
        atol=1e-6,
    )


def test_merge_spaces_equals_attention_over_the_union():
    query, tokens, _ = problem(count=11)
    query.requires_grad_(True)
    parts = [
        cross_attention(query, piece, return_lse=True) for piece in tokens.split([4, 6, 1], dim=1)
    ]
    merged, lse = merge_spaces([y for y, _ in parts], [lse for _, lse in parts])
    whole, whole_lse = cross_attention(query, tokens, return_lse=True)
    torch.testing.assert_close(merged, whole)
    torch.testing.assert_close(lse, whole_lse)
    (merged_grad,) = torch.autograd.grad(merged.square().sum(), query, retain_graph=True)
    (whole_grad,) = torch.autograd.grad(whole.square().sum(), query)
    torch.testing.assert_close(merged_grad, whole_grad)
