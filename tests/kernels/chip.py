"""A CUDA chip that is not there: launches compile for it, exactly as on a device, and do not run.

`chip(arch)` stands in for Triton's driver, so that the launching code of the kernels runs whole
over CPU tensors: its arguments, their specialisation (aligned pointers, numbers that are 1 or
multiples of 16), the grids, the autotuner. What was compiled is recorded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from preceptor.kernels import triton_launch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

# Bytes of shared memory that one block may have.
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}


@dataclass(frozen=True)
class Launch:
    """One launch that would have been: which kernel, its grid, and what the compiler made."""

    kernel: str
    grid: tuple[int, ...]
    compiled: Any
    settings: dict[str, Any]


class Driver(DriverBase):
    """As much of a driver as compiling and tuning ask for; a device's number is its chip's."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_benchmarker(self) -> Any:
        """Times by launching once: the first configuration wins, whatever it is."""
        clock = iter(range(1, 1 << 30))

        def bench(work: Any, quantiles: Any = None, **unused: Any) -> list[float]:
            work()
            return [float(next(clock))] * 3

        return bench


@contextlib.contextmanager
def chip(arch: int, kernels: Collection[str] | None = None) -> Iterator[list[Launch]]:
    """Within this context `triton_launch` and `triton_loss` compile for ``sm_<arch>``.

    Args:
        kernels: names of the only kernels to be compiled, None for all.
    """
    launches: list[Launch] = []
    run = JITFunction.run
    limit_of = triton_launch.shared_limit
    active = triton.runtime.driver._active

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **settings: Any) -> Any:
        if kernels is not None and self.fn.__name__ not in kernels:
            return None
        compiled = run(self, *arguments, grid=grid, warmup=True, **settings)
        bound = dict(zip(self.arg_names, arguments, strict=False)) | settings
        blocks = tuple(grid(bound) if callable(grid) else grid)
        launches.append(Launch(self.fn.__name__, blocks, compiled, bound))
        return compiled

    triton.runtime.driver.set_active(Driver(arch))
    JITFunction.run = compile_only
    triton_launch.shared_limit = lambda device: SHARED_LIMIT[arch]
    try:
        yield launches
    finally:
        JITFunction.run = run
        triton_launch.shared_limit = limit_of
        triton.runtime.driver._active = active
