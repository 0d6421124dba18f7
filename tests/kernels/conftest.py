"""Problems and a float64 reference that every test of the kernels shares."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))  # for chip


@dataclass
class Problem:
    query: Tensor
    tokens: Tensor
    scale: Tensor | None
    mask: Tensor | None
    grad_output: Tensor
    grad_lse: Tensor


def attention_reference(query, tokens, scale=None, mask=None, norm_eps=None):
    """Softmax attention in float64, one sample at a time, over the attended tokens alone."""
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
        q = rows[b].double()
        if x.shape[0] == 0:
            outputs.append(0.0 * q)
            lses.append(q.new_full((q.shape[0],), -torch.inf))
            continue
        scores = q @ x.T
        outputs.append(torch.softmax(scores, -1) @ x)
        lses.append(torch.logsumexp(scores, -1))
    return torch.stack(outputs), torch.stack(lses)


def make_problem(
    batch, rows, count, dim, dtype=torch.float32, *, masked=False, seed=0, query_dtype=None
):
    """Query rows whose scores have unit deviation; codes with scales where dtype is int8."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    floating = torch.float32 if dtype == torch.int8 else dtype
    query_dtype = query_dtype or floating
    scale = None
    if dtype == torch.int8:
        tokens = (normal(batch, count, dim) * 40).round().clamp(-127, 127).to(torch.int8)
        scale = (torch.rand(batch, count, generator=generator) + 0.5) / 40
    else:
        tokens = normal(batch, count, dim).to(dtype)
    mask = None
    if masked:
        mask = torch.rand(batch, count, generator=generator) > 0.3
        mask[-1] = False
    return Problem(
        (normal(batch, rows, dim) * dim**-0.5).to(query_dtype),
        tokens,
        scale,
        mask,
        normal(batch, rows, dim).to(query_dtype),
        normal(batch, rows).float(),
    )


def gradients(function: Callable, problem: Problem, norm_eps, dtype=None):
    """Output, lse, and the gradients of query and float tokens, of one attention function."""
    query, tokens = problem.query.detach(), problem.tokens.detach()
    if dtype is not None:
        query = query.to(dtype)
        tokens = tokens if problem.scale is not None else tokens.to(dtype)
    inputs = [query.requires_grad_()]
    if problem.scale is None:
        inputs.append(tokens.requires_grad_())
    y, lse = function(query, tokens, problem.scale, mask=problem.mask, norm_eps=norm_eps)
    finite = torch.where(lse == -torch.inf, torch.zeros_like(lse), lse)
    total = (y * problem.grad_output.to(y)).sum() + (finite * problem.grad_lse.to(lse)).sum()
    # A sample that attends nothing leaves the reference's tokens out of its graph.
    return (y.detach(), lse.detach(), *torch.autograd.grad(total, inputs, materialize_grads=True))


def relative_errors(got, wanted):
    """Relative L2 distances in float64; -inf must be in the same places."""
    errors = []
    for ours, theirs in zip(got, wanted, strict=True):
        ours, theirs = ours.double().cpu(), theirs.double().cpu()
        assert torch.equal(torch.isfinite(ours), torch.isfinite(theirs))
        kept = torch.isfinite(theirs)
        distance = torch.linalg.vector_norm(ours[kept] - theirs[kept])
        errors.append(float(distance / torch.linalg.vector_norm(theirs[kept]).clamp_min(1e-300)))
    return errors


@dataclass(frozen=True)
class Judge:
    reference: Callable
    problem: Callable
    gradients: Callable
    errors: Callable


@pytest.fixture(scope="session")
def judge() -> Judge:
    return Judge(attention_reference, make_problem, gradients, relative_errors)
