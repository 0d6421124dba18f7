"""Compile-only gate: what the Triton compiler makes of the kernels, without a GPU.

Registers, spilled bytes and shared memory of each kernel are held against resources.json beside
this file, which ``python tests/kernels/test_compiled.py --write`` renews for the Triton at hand.
Some of its lines are compiled in every run of the tests, all of them with PRECEPTOR_SWEEP=1.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

import torch  # noqa: E402
from chip import SHARED_LIMIT, Launch, chip  # noqa: E402
from preceptor.kernels import autotune, triton_launch, triton_loss  # noqa: E402

BLOCKS = ("BM", "BN", "DC", "NC", "RELOAD", "WHOLE")
TABLE = Path(__file__).with_name("resources.json")
VERSION = ".".join(triton.__version__.split(".")[:2])
FUNCTIONS = {
    "forward": "attend_forward",
    "backward": "attend_backward_query",
    "backward_tokens": "attend_backward_tokens",
    "merge": "merge_parts",
    "loss_forward": "loss_forward",
    "loss_backward": "loss_backward",
}


@dataclass(frozen=True)
class Case:
    kernel: str
    dtype: torch.dtype
    dim: int
    norm: bool = False
    emit: bool = False
    gain: bool = False
    count: int = 37

    @property
    def name(self) -> str:
        flags = " norm" * self.norm + " emit" * self.emit + " gain" * self.gain
        return f"{self.kernel} {str(self.dtype).removeprefix('torch.')} D{self.dim}{flags}"

    @property
    def rows(self) -> int:
        return 64 if self.count > 64 else 6

    @property
    def lanes(self) -> int:
        return 4 if self.dtype == torch.int8 and self.dim % 4 == 0 else 1

    def tiles(self, arch: int) -> list[autotune.Tile]:
        """The configurations that `triton_launch` chooses from on a chip, if there is a choice."""
        if self.kernel in ("forward", "backward"):
            found = triton_launch.fitting_tiles(
                self.kernel, self.dim // self.lanes, self.lanes, self.dtype.itemsize,
                SHARED_LIMIT[arch],
            )  # fmt: skip
            return [dict(tile) for tile in found]
        if self.kernel == "backward_tokens":
            return autotune.token_tiles(self.dtype.itemsize)
        return [{}]

    def launch(self) -> None:
        """A call of the kernel; what the tensors hold is of no account."""
        samples, rows, count = (
            (2, 6, 197) if self.kernel == "merge" else (32, self.rows, self.count)
        )
        floating = torch.bfloat16 if self.dtype == torch.int8 else self.dtype
        query = torch.zeros(samples, rows, self.dim, dtype=floating)
        tokens = torch.zeros(samples, count, self.dim, dtype=self.dtype)
        one_each = torch.zeros(samples, count)
        weight = one_each if self.dtype == torch.int8 else None
        each_dim = torch.ones(self.dim) if self.gain else None
        if self.kernel == "loss_forward":
            triton_loss.forward(tokens.to(floating), tokens, weight, each_dim, 1.0)
        elif self.kernel == "loss_backward":
            triton_loss.backward(
                tokens.to(floating), tokens, weight, each_dim, torch.zeros(3, samples, count),
                torch.zeros(2, samples, count), 1.0,
            )  # fmt: skip
        elif self.kernel in ("forward", "merge"):
            triton_launch.forward(query, tokens, weight, 1e-5 if self.norm else None)
        else:
            lse, mean = torch.zeros(samples, rows), one_each if self.norm else None
            gain = one_each if self.norm else weight
            emit = self.emit or self.kernel == "backward_tokens"
            triton_launch.backward(query, lse, query, tokens, gain, mean, query, lse, emit)


def compiled(case: Case, position: int, arch: int) -> Launch:
    name = FUNCTIONS[case.kernel]
    with chip(arch, {name}) as launches, autotune.only(position):
        case.launch()
    (found,) = launches
    return found


def resources(kernel: Any) -> dict[str, int]:
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
        # Loads of one or two bytes a thread, which waste most of a transaction.
        "narrow": len(re.findall(r"\bld\.global(?:\.\w+(?:::\w+)*)*\.[bsu](?:8|16)\b", ptx)),
    }


def most_spilled(case: Case, tile: autotune.Tile) -> int:
    """Bytes a thread that a committed configuration may spill: 16 of 255 registers.

    More where no smaller block is left: float32 products are three on the tensor cores and take
    the operands' space threefold; codes that are not packed are widened one by one. And where a
    configuration is shared: float16 rescales what bfloat16 only adds, and the autotuner decides.
    And where a device was faster with it all the same.
    """
    if case.kernel == "backward" and tile["BN"] == 32 and tile["num_warps"] == 4:
        return 320
    if case.dtype == torch.float32 and case.dim > 768:
        return 168
    if case.dtype == torch.float16:
        return 160
    return 88 if case.dtype == torch.int8 and case.lanes == 1 else 64


def label(case: Case, tile: autotune.Tile, arch: int) -> str:
    told = {k: v for k, v in tile.items() if k not in ("NC", "WHOLE")}
    settings = "".join(f" {k.removeprefix('num_')}{v}" for k, v in told.items())
    return f"{case.name} sm_{arch}{settings}"


ATTENTION = [
    Case(kernel, dtype, dim, norm, emit)
    for kernel in ("forward", "backward")
    for dtype, dims in (
        (torch.bfloat16, (384, 768, 1024, 1536)),
        (torch.int8, (384, 768, 1024, 1536, 770)),
        (torch.float32, (384, 768, 1024, 1536)),
        (torch.float16, (768,)),
    )
    for dim in dims
    for norm in (False, True)
    for emit in (False, True)
    if emit == (norm and kernel == "backward" and dtype != torch.int8)
]
OTHERS = [
    *(
        Case("backward_tokens", dtype, 768, True)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    ),
    *(Case("merge", torch.bfloat16, dim) for dim in (768, 1536)),
    *(
        Case(kernel, dtype, dim)
        for kernel in ("loss_forward", "loss_backward")
        for dtype in (torch.int8, torch.bfloat16, torch.float32)
        for dim in (384, 768, 1024, 1536)
    ),
    # Floats come to the loss with their gain multiplied in.
    *(
        Case(kernel, torch.int8, dim, gain=True)
        for kernel in ("loss_forward", "loss_backward")
        for dim in (384, 768, 1024, 1536)
    ),
]
# Compiled in every run of the tests, with their first configuration.
QUICK = [
    (Case("forward", torch.bfloat16, 768), 90),
    *((Case("forward", torch.int8, 768, norm=True), arch) for arch in SHARED_LIMIT),
    (Case("backward", torch.int8, 768), 90),
    *((Case("backward", torch.bfloat16, 768, norm=True, emit=True), arch) for arch in SHARED_LIMIT),
    (Case("backward_tokens", torch.bfloat16, 768, norm=True), 90),
    (Case("merge", torch.bfloat16, 768), 90),
    *((Case("loss_forward", torch.int8, 768), arch) for arch in SHARED_LIMIT),
    *((Case("loss_backward", torch.int8, 768), arch) for arch in SHARED_LIMIT),
    (Case("loss_forward", torch.int8, 768, gain=True), 90),
    (Case("loss_backward", torch.int8, 768, gain=True), 90),
]


def jobs() -> Iterator[tuple[Case, int, autotune.Tile, int]]:
    """All configurations of all cases on all chips."""
    for arch in SHARED_LIMIT:
        for case in (*ATTENTION, *OTHERS):
            for position, tile in enumerate(case.tiles(arch)):
                yield case, position, tile, arch


def check(case: Case, tile: autotune.Tile, arch: int, found: dict[str, int]) -> None:
    if case in ATTENTION:
        assert found["mma"] > 0
        # With RELOAD the copies are the compiler's choice, which some code bytes cannot have.
        if tile["num_stages"] > 1 and not tile["RELOAD"] and case.dim % 4 == 0:
            assert found["async"] > 0
    if case.kernel.startswith("loss"):
        assert found["narrow"] == 0
    table = json.loads(TABLE.read_text()).get(VERSION)
    if table is None:
        pytest.skip(f"resources.json has no entry for Triton {VERSION}")
    known = table[label(case, tile, arch)]
    assert found["spilled"] <= known["spilled"]
    assert found["shared"] <= known["shared"]


@pytest.mark.parametrize(("case", "arch"), QUICK, ids=lambda x: getattr(x, "name", f"sm_{x}"))
def test_first_configuration(case, arch):
    check(case, case.tiles(arch)[0], arch, resources(compiled(case, 0, arch).compiled))


@pytest.mark.skipif(
    "PRECEPTOR_SWEEP" not in os.environ, reason="minutes; PRECEPTOR_SWEEP=1 runs it"
)
@pytest.mark.parametrize("job", list(jobs()), ids=lambda job: label(job[0], job[2], job[3]))
def test_every_configuration(job):
    case, position, tile, arch = job
    check(case, tile, arch, resources(compiled(case, position, arch).compiled))


WHOLE = [
    Case(kernel, dtype, 768, norm, emit, count=256)
    for kernel in ("forward", "backward")
    for dtype in (torch.bfloat16, torch.float16, torch.int8)
    for norm in (False, True)
    for emit in (False, True)
    if not (emit and (kernel == "forward" or dtype == torch.int8))
]


QUICK_WHOLE = ("forward bfloat16 D768", "backward bfloat16 D768 emit", "backward int8 D768 norm")


@pytest.mark.parametrize("case", WHOLE, ids=lambda case: case.name)
def test_a_block_that_holds_a_sample_fits_the_chip(case):
    """All that hold 256 tokens on sm_90: they come first, and spill nothing to speak of."""
    if case.name not in QUICK_WHOLE and "PRECEPTOR_SWEEP" not in os.environ:
        pytest.skip("minutes; PRECEPTOR_SWEEP=1 runs it")
    with autotune.whole_samples():
        for position in range(3):
            launch = compiled(case, position, 90)
            if not launch.settings["WHOLE"]:
                break
            found = resources(launch.compiled)
            assert found["spilled"] <= 48
            assert found["async"] > 0
            assert found["narrow"] == 0
            tile = {name: launch.settings[name] for name in (*BLOCKS, "num_stages")}
            needed = autotune.shared_bytes(case.kernel, tile, case.lanes, case.dtype.itemsize)
            assert found["shared"] <= needed <= SHARED_LIMIT[90]
            # 64 rows are what the tensor cores of sm_90 take at a time.
            wide = "wgmma.mma_async" in launch.compiled.asm["ptx"]
            assert wide == (launch.settings["BM"] == 64)
    assert position > 0
    assert launch.settings["BN"] == 256 or not launch.settings["WHOLE"]


def test_table_lists_the_committed_configurations():
    names = {label(case, tile, arch) for case, _, tile, arch in jobs()}
    for version, table in json.loads(TABLE.read_text()).items():
        assert set(table) == names, version


def test_no_committed_configuration_outgrows_its_chip():
    for version, table in json.loads(TABLE.read_text()).items():
        for case, _, tile, arch in jobs():
            name = label(case, tile, arch)
            entry = table[name]
            assert entry["spilled"] <= most_spilled(case, tile), (version, name)
            assert entry["shared"] <= SHARED_LIMIT[arch], (version, name)
            if case in ATTENTION:
                # What a launch prunes by must not be less than what the kernel takes.
                needed = autotune.shared_bytes(case.kernel, tile, case.lanes, case.dtype.itemsize)
                assert entry["shared"] <= needed, (version, name)


def write() -> None:
    entries = {}
    for case, position, tile, arch in jobs():
        name = label(case, tile, arch)
        entries[name] = resources(compiled(case, position, arch).compiled)
        print(name, entries[name], flush=True)
    # Read again: another Triton may have written its table meanwhile.
    tables = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    tables[VERSION] = entries
    versions = []
    for version, table in sorted(tables.items()):
        lines = (f'  "{name}": {json.dumps(entry)}' for name, entry in sorted(table.items()))
        versions.append(f' "{version}": {{\n' + ",\n".join(lines) + "\n }")
    TABLE.write_text("{\n" + ",\n".join(versions) + "\n}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", required=True, help="renew resources.json")
    parser.parse_args()
    write()
