"""The Triton kernels on a CUDA device; skipped where there is none.

With PRECEPTOR_REHEARSAL=1 and TRITON_INTERPRET=1 the same tests run over tiny tensors on the CPU,
but for those of what only a device has: that nothing but the device can make them fail.
"""

import contextlib
import os
from functools import partial

import pytest
import torch
from preceptor.kernels import alignment_loss, cross_attention

REHEARSAL = os.environ.get("PRECEPTOR_REHEARSAL") == "1"
DEVICE = "cpu" if REHEARSAL else "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (REHEARSAL or torch.cuda.is_available()), reason="needs a CUDA device"),
]
needs_device = pytest.mark.skipif(REHEARSAL, reason="needs a CUDA device")

if REHEARSAL or torch.cuda.is_available():
    from preceptor.kernels import autotune


def scaled(*shape):
    """The shape, or what a rehearsal has time for."""
    most = (2, 5, 9, 32)[-len(shape) :]
    return tuple(map(min, shape, most)) if REHEARSAL else shape


def widths(*dims):
    return dims[:1] if REHEARSAL else dims


fused = partial(cross_attention, return_lse=True, implementation="triton")


@pytest.fixture(autouse=True)
def first_configuration(request):
    """Timing all configurations of every shape would take minutes; one test does it."""
    if "tuned" in request.node.name:
        yield
    else:
        with autotune.only(0):
            yield


# Relative L2 errors of y, lse, dq and dx against float64.
BOUNDS = {
    torch.float32: (5e-6, 5e-6, 1e-5, 1e-5),
    torch.float16: (6e-4, 5e-4, 1e-3, 1e-3),
    torch.bfloat16: (5e-3, 1e-3, 7e-3, 8e-3),
    torch.int8: (6e-4, 5e-4, 1e-3),
}
SHAPES = [
    scaled(2, 8, 1, 192),
    scaled(2, 6, 197, 384),
    # As many samples as keep their tokens together.
    scaled(272, 48, 197, 384),
    scaled(272, 12, 64, 1536),
    *(
        []
        if REHEARSAL
        else [
            (4, 48, 256, 768),
            (1, 16, 1369, 1024),
            (3, 96, 49, 1024),
            (2, 128, 131, 1536),
            (1, 3, 4096, 200),
        ]
    ),
]


@pytest.fixture(params=[False, True], ids=["streamed", "whole"])
def whole(request):
    """Whether one block may hold all tokens of a sample."""
    with autotune.whole_samples() if request.param else contextlib.nullcontext():
        yield request.param


def skip_without(whole, dtype, shape):
    """Skip where the tokens are streamed whatever is allowed: a small batch is split, too."""
    most = 64 if shape[0] < 128 else autotune.MOST_WHOLE
    if whole and (dtype == torch.float32 or shape[2] > most):
        pytest.skip("streamed all the same")


def on_gpu(problem):
    for name, value in vars(problem).items():
        if value is not None:
            setattr(problem, name, value.to(DEVICE))
    return problem


def check(judge, problem, norm_eps, dtype, factor=1.0):
    got = judge.gradients(fused, problem, norm_eps)
    wanted = judge.gradients(judge.reference, problem, norm_eps, torch.float64)
    assert all(torch.isfinite(g).all() for g in got if g.dim() == 3)
    for error, bound in zip(judge.errors(got, wanted), BOUNDS[dtype], strict=True):
        assert error <= bound * factor


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("norm_eps", [None, 1e-5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients(judge, shape, norm_eps, dtype, whole):
    skip_without(whole, dtype, shape)
    if shape[2] == 1 and norm_eps:
        pytest.skip("the LayerNorm of one token leaves a gradient of rounding alone")
    if shape[2] == 1 and dtype != torch.int8:
        pytest.skip("one token has no gradient through its scores")
    check(
        judge, on_gpu(judge.problem(*shape, dtype, masked=shape[0] > 1 < shape[2])), norm_eps, dtype
    )


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("dim", widths(384, 768, 1536))
@pytest.mark.parametrize("position", range(6))
def test_every_configuration(judge, dtype, dim, position, whole):
    shape = scaled(2, 35, 50 if whole else 130, dim)
    skip_without(whole, dtype, shape)
    lanes = 4 if dtype == torch.int8 else 1
    most = max(
        len(autotune.row_tiles(kernel, dim // lanes, lanes, dtype.itemsize))
        for kernel in ("forward", "backward")
    )
    # Of blocks that hold a sample there are three, and they come first.
    if position >= (3 if whole else most):
        pytest.skip(f"this width has {3 if whole else most} configurations")
    problem = on_gpu(judge.problem(*shape, dtype))
    with autotune.only(position):
        check(judge, problem, 1e-5, dtype)


def test_tuned(judge):
    check(
        judge, on_gpu(judge.problem(*scaled(8, 12, 197, 384), torch.bfloat16)), None, torch.bfloat16
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("size", [1e-6, 1e4])
def test_gradients_of_any_size(judge, dtype, size, whole):
    problem = judge.problem(
        *scaled(2, 12, 64 if whole else 197, 384), dtype, query_dtype=torch.float32
    )
    problem.grad_output *= size
    problem.grad_lse *= size
    problem = on_gpu(problem)
    got = judge.gradients(fused, problem, None)
    wanted = judge.gradients(judge.reference, problem, None, torch.float64)
    kept = 3 if dtype == torch.float16 else 4
    for error, bound in zip(judge.errors(got[:kept], wanted[:kept]), BOUNDS[dtype], strict=False):
        assert error <= bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_common_mean_and_outlier_channels(judge, dtype, whole):
    for outliers in (False, True):
        problem = judge.problem(*scaled(2, 12, 64 if whole else 197, 384), torch.float32)
        tokens = problem.tokens.clone()
        if outliers:
            tokens[..., ::17] *= 50
            problem.query[..., ::17] /= 50
        else:
            tokens += 30
        if dtype == torch.int8:
            problem.scale = tokens.abs().amax(-1) / 127
            problem.tokens = (tokens / problem.scale[..., None]).round().to(torch.int8)
        else:
            problem.tokens, problem.query = tokens.to(dtype), problem.query.to(dtype)
        check(judge, on_gpu(problem), 1e-5, dtype, factor=2.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_results_repeat_bit_for_bit(judge, dtype, whole):
    shape = scaled(272, 48, 256, 768) if whole else scaled(2, 48, 1369, 768)
    problem = on_gpu(judge.problem(*shape, dtype))
    first = judge.gradients(fused, problem, 1e-5)
    for _ in range(3):
        again = judge.gradients(fused, problem, 1e-5)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@needs_device
@pytest.mark.parametrize("kind", ["int8", "cached", "student"])
def test_peak_memory_is_inputs_outputs_and_gradients(kind):
    shape = (64, 256, 768)
    query = torch.randn(64, 48, 768, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    scale = None
    if kind == "int8":
        tokens = torch.randint(-127, 128, shape, device="cuda", dtype=torch.int8)
        scale = torch.rand(shape[:2], device="cuda") * 0.02
    else:
        tokens = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        tokens.requires_grad_(kind == "student")
    wanted = [query, *([tokens] if tokens.requires_grad else [])]

    def work():
        y = cross_attention(query, tokens, scale, implementation="triton", validate=False)
        return y, torch.autograd.grad(y, wanted, torch.ones_like(y))

    work()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y, grads = work()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    inputs = sum(t.nbytes for t in (query, tokens, scale) if t is not None)
    # The upstream gradient is the caller's; it is counted with the outputs.
    results = 2 * y.nbytes + sum(g.nbytes for g in grads)
    assert inputs + peak <= 1.1 * (inputs + results)


def test_compiles_without_a_graph_break(judge):
    problem = on_gpu(judge.problem(*scaled(2, 6, 49, 384), torch.int8))

    def function(query, tokens, scale):
        y, lse = fused(query * 2, tokens, scale, norm_eps=1e-5)
        return y.square().sum() + lse.sum()

    compiled = torch.compile(
        function, fullgraph=True, backend="aot_eager" if REHEARSAL else "inductor"
    )
    results = []
    for candidate in (function, compiled):
        query = problem.query.detach().requires_grad_()
        loss = candidate(query, problem.tokens, problem.scale)
        results.append((loss.detach(), *torch.autograd.grad(loss, query)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_opcheck(judge):
    problem = on_gpu(judge.problem(*scaled(2, 6, 49, 384), torch.bfloat16))
    torch.library.opcheck(
        torch.ops.preceptor.cross_attention.default,
        (problem.query.requires_grad_(), problem.tokens.requires_grad_(), None, 1e-5, True),
    )


@needs_device
def test_a_captured_graph_repeats_the_eager_result(judge):
    problem = on_gpu(judge.problem(2, 6, 197, 384, torch.int8))
    query = problem.query.detach().requires_grad_()

    def work():
        y = cross_attention(query, problem.tokens, problem.scale, implementation="triton")
        cosine, smooth = alignment_loss(y, codes, scale, implementation="triton")
        return y, *torch.autograd.grad(y.sum() + cosine + smooth, query)

    codes = torch.randint(-127, 128, query.shape, device="cuda").to(torch.int8)
    scale = torch.full(query.shape[:2], 0.02, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = [x.clone() for x in work()]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    graph.replay()
    for ours, theirs in zip(captured, expected, strict=True):
        assert torch.equal(ours, theirs)


@needs_device
def test_capture_before_anything_was_timed(judge):
    # The autotuner cannot measure inside a capture; the first configuration is taken.
    problem = on_gpu(judge.problem(2, 7, 41, 64, torch.int8))

    def work():
        return cross_attention(problem.query, problem.tokens, problem.scale, validate=False)

    with autotune.only(0):
        expected = work()
    graph = torch.cuda.CUDAGraph()
    forced, autotune._FORCED[:] = list(autotune._FORCED), []
    try:
        with torch.cuda.graph(graph):
            captured = work()
    finally:
        autotune._FORCED[:] = forced
    graph.replay()
    assert torch.equal(captured, expected)


@needs_device
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_of_another_device_than_the_current_one(judge):
    problem = judge.problem(2, 6, 49, 384, torch.int8)
    for name, value in vars(problem).items():
        if value is not None:
            setattr(problem, name, value.to("cuda:1"))
    check(judge, problem, 1e-5, torch.int8)


@needs_device
def test_work_waits_for_its_stream(judge):
    problem = on_gpu(judge.problem(4, 48, 256, 768, torch.bfloat16))
    expected, _ = fused(problem.query, problem.tokens)
    late = torch.zeros_like(problem.tokens)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        late.copy_(problem.tokens)
        y, _ = fused(problem.query, late)
    torch.cuda.synchronize()
    assert torch.equal(y, expected)


FAR = scaled(700, 4096, 768)
"""2.2e9 elements: the last sample lies beyond a 32-bit offset."""


def far_and_near(last):
    """A tensor of all samples, zeros but for the last one, and that one by itself."""
    far = torch.zeros(FAR, device=DEVICE, dtype=last.dtype)
    far[-1] = last
    return far, last.unsqueeze(0)


def relative_errors_of_the_last(far, near):
    return [float((f[-1] - n[-1]).norm() / n[-1].norm()) for f, n in zip(far, near, strict=True)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_offsets_past_two_to_the_31(judge, dtype):
    problem = on_gpu(judge.problem(1, 6, *FAR[1:], dtype))
    results = []
    for tokens in far_and_near(problem.tokens[0]):
        samples, floating = len(tokens), tokens.is_floating_point()
        query = problem.query.repeat(samples, 1, 1).requires_grad_()
        inputs = [query, tokens.requires_grad_()] if floating else [query]
        scale = None if floating else problem.scale.repeat(samples, 1)
        y, _ = fused(query, tokens, scale, norm_eps=1e-5)
        gradients = torch.autograd.grad(y[-1], inputs, problem.grad_output[0])
        results.append([x[-1:].double() for x in (y.detach(), *gradients)])
    assert max(relative_errors_of_the_last(*results)) < 2e-2


def test_losses_of_offsets_past_two_to_the_31():
    generator = torch.Generator(DEVICE).manual_seed(0)
    codes = torch.randint(-127, 128, FAR[1:], device=DEVICE, generator=generator).to(torch.int8)
    predicted = torch.randn(FAR[1:], device=DEVICE, generator=generator).bfloat16()
    results = []
    for tokens, p in zip(far_and_near(codes), far_and_near(predicted), strict=True):
        scale = torch.full(p.shape[:2], 0.02, device=DEVICE)
        p.requires_grad_()
        losses = alignment_loss(p, tokens, scale, reduction="none", implementation="triton")
        (gradient,) = torch.autograd.grad(sum(loss[-1].sum() for loss in losses), p)
        results.append([x[-1:].detach().double() for x in (*losses, gradient)])
    assert max(relative_errors_of_the_last(*results)) < 1e-5


def test_module_against_its_standard_form():
    from preceptor.train.attention import CrossAttention

    torch.manual_seed(0)
    samples, count, dim = scaled(4, 197, 384)
    module = CrossAttention(dim, dim, 2 if REHEARSAL else 6, norm=True).to(DEVICE)
    tokens = torch.randn(samples, count, dim, device=DEVICE)
    model_tokens = torch.randn(samples, 4, dim, device=DEVICE)
    module.implementation = "triton"
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        ours = module(model_tokens, tokens)
    expected = module.double()
    expected.implementation = "standard"
    theirs = expected(model_tokens.double(), tokens.double())
    with torch.no_grad():
        assert float((ours.double() - theirs).norm() / theirs.norm()) < 2e-2


@pytest.mark.parametrize("dim", widths(192, 384, 768, 1000, 1536))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gained", [False, True])
def test_alignment_loss(dim, dtype, gained):
    generator = torch.Generator(DEVICE).manual_seed(0)
    shape = scaled(4, 197, dim)
    prediction = torch.randn(shape, device=DEVICE, generator=generator).to(dtype)
    codes = torch.randint(-127, 128, shape, device=DEVICE, generator=generator).to(torch.int8)
    scale = torch.rand(shape[:2], device=DEVICE, generator=generator) * 0.02
    gain = None
    if gained:
        gain = torch.rand(shape[-1], device=DEVICE, generator=generator) * 2 + 0.1
    results = []
    for implementation, p in (("triton", prediction), ("torch", prediction.double())):
        p = p.detach().requires_grad_()
        cosine, smooth = alignment_loss(p, codes, scale, gain=gain, implementation=implementation)
        results.append((cosine, smooth, *torch.autograd.grad(cosine + 2 * smooth, p)))
    for ours, theirs, bound in zip(*results, (1e-5, 1e-5, 5e-3), strict=True):
        assert float((ours.double() - theirs).norm() / theirs.norm()) <= bound
