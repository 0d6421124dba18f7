"""Whether the operations, and their Triton kernels, can do what is asked; imports no Triton."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_DIM = 2048
MAX_ROWS = 128
# Compute capability from which on Triton supports a GPU.
OLDEST = 8
# Elements that a 32-bit offset reaches.
MAX_REACH = 2**31 - 1

_HAS_TRITON = importlib.util.find_spec("triton") is not None
NO_TRITON = "PRECEPTOR_NO_TRITON"
"""Variable that, set to anything, has everything computed by torch's own operations."""
_SWITCHED_OFF = bool(os.environ.get(NO_TRITON))
# Triton builds what starts a kernel with the first of these, against Python's headers.
_HAS_COMPILER = bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))


def _has_headers() -> bool:
    scheme = sysconfig.get_default_scheme()
    # Debian's own, of packages under /usr/local, where no headers are.
    scheme = "posix_prefix" if scheme == "posix_local" else scheme
    return os.path.exists(os.path.join(sysconfig.get_path("include", scheme), "Python.h"))


_HAS_HEADERS = _has_headers()


def why_not_on(device: torch.device) -> str | None:
    """The end of a sentence that says why Triton cannot run on a device; None if it can."""
    if _SWITCHED_OFF:
        return f"is switched off by the variable {NO_TRITON}"
    if not _HAS_TRITON:
        return "needs the package triton, which is not installed"
    # The interpreter, a debugging aid of Triton, runs the kernels on CPU tensors.
    if device.type != "cuda":
        interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
        return None if interpreted else f"needs tensors on a CUDA device, got {device}"
    if torch.version.hip:
        # Its devices pass for CUDA's, but Triton has no tf32x3 products for them.
        return "needs a GPU of NVIDIA's, got one of AMD's"
    if not _HAS_COMPILER:
        return "needs a C compiler: gcc or clang, or one that CC names"
    if not _HAS_HEADERS:
        return "needs Python.h, which Debian has in python3-dev"
    # Of all ways to ask, the one that torch.compile can trace.
    properties: Any = torch.cuda.get_device_properties(device)
    if properties.major < OLDEST:
        return (
            f"needs a GPU of compute capability {OLDEST}.0, got "
            f"{properties.major}.{properties.minor}"
        )
    return None


def refuse_forward_mode(*tensors: Tensor) -> None:
    """torch takes a custom operation without a rule for tangents to be constant, in silence.

    Raises:
        ValueError: a tensor has a tangent.
    """
    if torch.compiler.is_compiling():
        return
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise ValueError(
            "there are no derivatives in forward mode (torch.func.jvp, jacfwd, hessian); "
            "torch.func.vjp and jacrev give those in reverse"
        )


def why_not_triton(query: Tensor, tokens: Tensor, max_dim: int = MAX_DIM) -> str | None:
    """The end of a sentence that says why Triton cannot run these tensors; None if it can."""
    if (reason := why_not_on(tokens.device)) is not None:
        return reason
    if torch.float64 in (query.dtype, tokens.dtype):
        return "has no float64; pass float32 or take another implementation"
    if tokens.shape[2] > max_dim:
        return f"takes tokens of width D up to {max_dim}, got {tokens.shape[2]}"
    if query.shape[1] > MAX_ROWS:
        return f"takes up to {MAX_ROWS} query rows, got {query.shape[1]}"
    if tokens.shape[1] * tokens.shape[2] > MAX_REACH:
        return f"takes samples of less than 2^31 elements, got N D = {tokens.shape[1:].numel()}"
    return None
