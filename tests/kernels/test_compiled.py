"""Compile-only gate: what the Triton compiler makes of the kernels, without a GPU.

Registers, spilled bytes and shared memory of each kernel are held against resources.json beside
this file, which ``python tests/kernels/test_compiled.py --write`` renews for the Triton at hand.
"""

import argparse
import json
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

import torch  # noqa: E402
import triton.language as tl  # noqa: E402
from preceptor.kernels import autotune, triton_backward, triton_forward  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

TABLE = Path(__file__).with_name("resources.json")
VERSION = ".".join(triton.__version__.split(".")[:2])
# Bytes of shared memory that one block may have.
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int8: "*i32",
}
OPERANDS = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.int8: tl.float16,
}
KERNELS = {
    "forward": triton_forward.attend_forward,
    "backward": triton_backward.attend_backward_query,
    "backward_tokens": triton_backward.attend_backward_tokens,
}


@dataclass(frozen=True)
class Case:
    kernel: str
    dtype: torch.dtype
    dim: int
    norm: bool = False
    emit: bool = False

    @property
    def name(self) -> str:
        flags = " norm" * self.norm + " emit" * self.emit
        return f"{self.kernel} {str(self.dtype).removeprefix('torch.')} D{self.dim}{flags}"

    @property
    def lanes(self) -> int:
        return 4 if self.dtype == torch.int8 else 1

    def tiles(self):
        if self.kernel == "backward_tokens":
            return autotune.token_tiles(self.dtype.itemsize)
        width = self.dim // self.lanes
        tiles = autotune.row_tiles(self.kernel, width, self.lanes, self.dtype.itemsize)
        return autotune.fitting(
            tiles,
            lambda tile: autotune.shared_bytes(self.kernel, tile, self.lanes, self.dtype.itemsize),
            SHARED_LIMIT[90],
        )


def compiled(case, tile, arch):
    """The kernel of a case as `triton_launch` would specialise it, for one compute capability."""
    kernel = KERNELS[case.kernel]
    weighted = case.norm or case.dtype == torch.int8
    pointers = {
        **dict.fromkeys(("query", "output", "grad_output", "grad_query"), "*bf16"),
        **dict.fromkeys(("tokens", "grad_tokens"), POINTERS[case.dtype]),
        **dict.fromkeys(
            ("lse", "grad_lse", "gain_kept", "sum_kept", "along_kept", "residual_kept", "residual"),
            "*fp32",
        ),
        **dict.fromkeys(
            ("coefficient_key", "coefficient_value"),
            "*bf16" if case.dtype == torch.bfloat16 else "*fp32",
        ),
    }
    single = case.dtype == torch.float32
    constants = {
        "NORM": case.norm, "EMIT": case.emit, "LANES": case.lanes, "SLOTS": 3, "SPLITS": 1,
        "HAS_WEIGHT": weighted, "HAS_GAIN": weighted, "OPERAND": OPERANDS[case.dtype],
        "PRECISION": "tf32x3" if single else "ieee", "EMULATE": False, **tile,
    }  # fmt: skip
    warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
    # An argument that is None becomes a constant.
    needed = {"weight": weighted, "gain": weighted, "mean_kept": case.norm}
    for name, used in needed.items():
        if used or (name, case.kernel) == ("mean_kept", "forward"):
            pointers[name] = "*fp32"
        else:
            constants[name] = None
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in pointers:
            signature[name] = pointers[name]
        else:
            signature[name] = "fp32" if name == "norm_eps" else "i32"
        aligned = name in pointers or name in ("dim", "width") or name.endswith("_stride")
        if name not in constants and aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    constants = {name: value for name, value in constants.items() if name in signature}
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": warps, "num_stages": stages},
    )


def resources(kernel):
    """Registers, spilled bytes and shared memory, and which instructions the kernel has."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        report = subprocess.run(
            [tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
        ).stdout
    registers, spilled = re.search(r"REG:(\d+) STACK:(\d+)", report).groups()
    ptx = kernel.asm["ptx"]
    return {
        "registers": int(registers),
        "spilled": int(spilled),
        "shared": kernel.metadata.shared,
        "mma": len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", ptx)),
        "async": len(re.findall(r"\bcp\.async\.c[ag]\b", ptx)),
    }


def label(case, tile, arch):
    settings = " ".join(f"{k.removeprefix('num_')}{v}" for k, v in tile.items() if k != "NC")
    return f"{case.name} sm_{arch} {settings}"


QUICK = [
    Case("forward", torch.bfloat16, 768),
    Case("forward", torch.int8, 768, norm=True),
    Case("backward", torch.int8, 768),
    Case("backward", torch.bfloat16, 768, norm=True, emit=True),
    Case("backward_tokens", torch.bfloat16, 768, norm=True),
]
ALL = [
    Case(kernel, dtype, dim, norm, emit)
    for kernel in ("forward", "backward")
    for dtype in (torch.bfloat16, torch.int8, torch.float32)
    for dim in (384, 768, 1024, 1536)
    for norm in (False, True)
    for emit in (False, True)
    if emit == (norm and kernel == "backward" and dtype != torch.int8)
] + [Case("backward_tokens", dtype, 768, True) for dtype in (torch.bfloat16, torch.float32)]


def check(case, tile, arch, found):
    assert found["shared"] <= SHARED_LIMIT[arch]
    assert found["mma"] > 0
    # With RELOAD the copies are the compiler's choice; the dx kernel has too few rows to pipeline.
    if tile["num_stages"] > 1 and not tile.get("RELOAD") and case.kernel != "backward_tokens":
        assert found["async"] > 0
    known = json.loads(TABLE.read_text()).get(VERSION)
    if known is None:
        pytest.skip(f"resources.json has no entry for Triton {VERSION}")
    expected = known[label(case, tile, arch)]
    assert found["spilled"] <= expected["spilled"]
    assert found["shared"] <= expected["shared"]


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_first_configuration(case, arch):
    if arch != 90 and case not in (QUICK[1], QUICK[3]):
        pytest.skip("compiled for sm_90; the two largest kernels stand for the other chips")
    tile = case.tiles()[0]
    check(case, tile, arch, resources(compiled(case, tile, arch)))


def test_table_holds_no_configuration_that_cannot_run():
    for table in json.loads(TABLE.read_text()).values():
        for name, entry in table.items():
            arch = int(re.search(r"sm_(\d+)", name)[1])
            assert entry["shared"] <= SHARED_LIMIT[arch], name
            assert entry["mma"] > 0, name


def jobs():
    found = [(case, tile, 90) for case in ALL for tile in case.tiles()]
    return found + [(case, case.tiles()[0], arch) for case in QUICK for arch in SHARED_LIMIT]


def test_table_lists_the_committed_configurations():
    names = {label(*job) for job in jobs()}
    for version, table in json.loads(TABLE.read_text()).items():
        assert set(table) == names, version


def write():
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    entries = {}
    for case, tile, arch in jobs():
        name = label(case, tile, arch)
        if name not in entries:
            entries[name] = resources(compiled(case, tile, arch))
            print(name, entries[name], flush=True)
    table[VERSION] = dict(sorted(entries.items()))
    TABLE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", required=True, help="renew resources.json")
    parser.parse_args()
    write()
