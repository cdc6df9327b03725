"""Triton kernels compiled for architectures that are not here, and the resources that their code takes."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Architecture:
    """A compute capability (or AMD name), and per multiprocessor: bytes of shared memory a block may have, and flops a
    clock of dense products with float32 sums, from the vendors' peak rates."""

    target: GPUTarget
    shared: int
    flops: dict[str, int]


ARCHITECTURES = {
    "ampere": Architecture(GPUTarget("cuda", 80, 32), 163 * 1024, {"half": 2048, "tf32": 1024, "ieee": 128}),
    "ada": Architecture(GPUTarget("cuda", 89, 32), 99 * 1024, {"half": 512, "tf32": 256, "ieee": 256}),
    "hopper": Architecture(GPUTarget("cuda", 90, 32), 227 * 1024, {"half": 4096, "tf32": 2048, "ieee": 256}),
    "blackwell": Architecture(GPUTarget("cuda", 100, 32), 227 * 1024, {"half": 8192, "tf32": 4096, "ieee": 256}),
    "geforce-blackwell": Architecture(GPUTarget("cuda", 120, 32), 99 * 1024, {"half": 512, "tf32": 256, "ieee": 256}),
    "amd": Architecture(GPUTarget("hip", "gfx942", 64), 64 * 1024, {"half": 2048, "ieee": 256}),
}


def tool(name: str, *arguments: str, data: bytes, folder: Path) -> str:
    path = folder / "code.cubin"
    path.write_bytes(data)
    return subprocess.run([TOOLS / name, *arguments, path], capture_output=True, text=True, check=True).stdout


def resources(code, folder: Path) -> SimpleNamespace:
    """Registers a thread, and bytes of its memory outside them (spills)."""
    if "cubin" in code.asm:
        found = tool("cuobjdump", "-res-usage", data=code.asm["cubin"], folder=folder)
        return SimpleNamespace(
            registers=int(re.search(r"REG:(\d+)", found)[1]), stack=int(re.search(r"STACK:(\d+)", found)[1])
        )
    found = code.asm["amdgcn"]
    spilt = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", found)[1])  # scalar ones spill into vector registers
    return SimpleNamespace(registers=int(re.search(r"\.vgpr_count:\s+(\d+)", found)[1]), stack=spilt)


__all__ = ["ARCHITECTURES", "ASTSource", "Architecture", "GPUTarget", "resources", "tool", "triton"]
