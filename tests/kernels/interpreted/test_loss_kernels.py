"""The Triton loss kernels, run by the interpreter, against the PyTorch body in float64."""

import pytest
import torch
from preceptor.kernels import alignment_loss


@pytest.mark.parametrize("gained", [False, True])
@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [5, 33, 64])
def test_values_and_gradient(dim, dtype, codes, gained):
    generator = torch.Generator().manual_seed(dim)
    prediction = torch.randn(2, 3, dim, generator=generator).to(dtype)
    tokens, scale = torch.randn(2, 3, dim, generator=generator).to(dtype), None
    if codes:
        tokens = torch.randint(-127, 128, (2, 3, dim), generator=generator).to(torch.int8)
        scale = torch.rand(2, 3, generator=generator) * 0.02
    gain = torch.rand(dim, generator=generator) * 2 + 0.1 if gained else None
    options = {"gain": gain, "beta": 0.7}
    results = []
    for implementation, p in (("triton", prediction), ("torch", prediction.double())):
        p = p.detach().requires_grad_()
        cosine, smooth = alignment_loss(p, tokens, scale, implementation=implementation, **options)
        (gradient,) = torch.autograd.grad(0.7 * cosine + 1.3 * smooth, p)
        results.append((cosine.detach(), smooth.detach(), gradient))
    tolerances = (1e-5, 1e-5, 4e-3 if dtype == torch.bfloat16 else 1e-5)
    for ours, theirs, tolerance in zip(*results, tolerances, strict=True):
        size = float(theirs.abs().max())
        torch.testing.assert_close(
            ours.double(), theirs, rtol=tolerance, atol=tolerance * max(size, 0.1)
        )


@pytest.mark.parametrize(
    "upstream",
    [
        torch.tensor([0.7, 1.3]).view(2, 1, 1).expand(2, 5, 1),
        # Contiguous, whatever the stride of its last dimension says.
        torch.arange(1.0, 11.0).view(2, 1, 5).transpose(1, 2),
        torch.arange(1.0, 21.0).view(5, 2, 2).transpose(0, 1),
    ],
    ids=["one for all", "one token a sample", "strided"],
)
def test_upstream_gradients_of_any_strides(upstream):
    generator = torch.Generator().manual_seed(1)
    shape = (*upstream.shape[1:], 33)
    prediction, tokens = (torch.randn(shape, generator=generator) for _ in range(2))
    ops = torch.ops.preceptor
    gradients = []
    for triton in (True, False):
        _, statistics = ops.alignment_loss(prediction, tokens, None, None, 1.0, triton)
        gradients.append(
            ops.alignment_loss_backward(
                prediction, tokens, None, None, statistics, upstream, 1.0, triton
            )
        )
    torch.testing.assert_close(*gradients)
