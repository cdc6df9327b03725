"""The CUDA library in Python: its header, its exported names, a machine without a GPU, and nvcc's build of it."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from cuda_build import ROOT, ctype, cutlass_headers, gpu_library, host_library, needs_compiler, needs_nvcc, run

from logitless.backends import cuda
from logitless.kernels.cuda import library as cuda_library
from logitless.kernels.cuda.library import DTYPE_CODES, NOT_BUILT, SIGNATURES, Library

HEADER = ROOT / "kernels" / "cuda" / "logitless.h"


# ---------------------------------------------------------------------------------------------------------------------
# The header


def declared() -> dict[str, tuple[type | None, ...]]:
    """The header's declarations by name: the type of the result, then those of the arguments."""
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    text = re.sub(r"^#.*$", "", text, flags=re.MULTILINE)
    found = {}
    for result, name, arguments in re.findall(r"LOGITLESS_API\s+([\w\s*]+?)(\w+)\(([^)]*)\)\s*;", text):
        parts = [] if arguments.strip() == "void" else arguments.split(",")
        found[name] = (ctype(result), *(ctype(re.sub(r"\w+$", "", part.strip())) for part in parts))
    return found


def test_signatures_are_those_of_the_header():
    header = declared()
    lines = re.findall(r"^LOGITLESS_API ", HEADER.read_text(), flags=re.MULTILINE)
    assert len(header) == len(lines), "a declaration that was not understood"
    assert {name: tuple(signature) for name, signature in SIGNATURES.items()} == header


def test_codes_are_those_of_the_header():
    values = dict(re.findall(r"(LOGITLESS_\w+) = (-?\d+)", HEADER.read_text()))
    for dtype, code in DTYPE_CODES.items():
        assert int(values[f"LOGITLESS_{str(dtype).removeprefix('torch.').upper()}"]) == code
    assert int(values["LOGITLESS_NOT_BUILT"]) == NOT_BUILT


@needs_compiler
def test_header_is_plain_c(tmp_path: Path):
    """C99 and C++, no other header needed before it."""
    for language, standard in (("c", "c99"), ("c++", "c++11")):
        command = ["c++" if language == "c++" else "cc", "-x", language, f"-std={standard}", "-Wall", "-Wextra"]
        run(*command, "-pedantic", "-Werror", "-fsyntax-only", HEADER)


def exported(library: Path) -> set[str]:
    """Names that the library defines for others."""
    lines = run("nm", "-D", "--defined-only", library).stdout.splitlines()
    return {line.split()[-1] for line in lines}


# ---------------------------------------------------------------------------------------------------------------------
# The twin for the CPU


@pytest.fixture(scope="module")
def host() -> Library:
    return cuda_library.load(host_library())


@needs_compiler
def test_host_exports_the_interface_alone(host):
    assert exported(host.path) == set(SIGNATURES)
    assert host.target == "host"


@needs_compiler
def test_every_code_has_a_sentence(host):
    values = [int(value) for value in re.findall(r"LOGITLESS_\w+ = (-\d+)", HEADER.read_text())]
    sentences = {host.explain(code) for code in (0, *values)}
    assert len(sentences) == len(values) + 1 and all(sentences)
    assert host.explain(-99) == "not a code of this library"


@needs_compiler
def test_gpu_only_kernels_are_not_built_for_the_cpu(host):
    assert not host.has("forward_sm90")
    assert host.configurations() == ()
    assert host.has("forward_sm80")


# ---------------------------------------------------------------------------------------------------------------------
# What the backend says where it cannot run


def test_without_the_library(monkeypatch, tmp_path):
    monkeypatch.delenv(cuda_library.VARIABLE, raising=False)
    monkeypatch.setattr(cuda_library, "__file__", str(tmp_path / "library.py"))
    assert "its library is not built" in cuda.CUDA.supports(torch.device("cpu"), torch.float32)


def test_a_library_that_cannot_be_loaded(monkeypatch, tmp_path):
    monkeypatch.setenv(cuda_library.VARIABLE, str(tmp_path / "absent.so"))
    assert "cannot be loaded" in cuda.CUDA.supports(torch.device("cpu"), torch.float32)


@needs_compiler
def test_a_library_of_another_version(monkeypatch):
    monkeypatch.setenv(cuda_library.VARIABLE, str(host_library(target="logitless_rows")))
    assert "cannot be loaded" in cuda.CUDA.supports(torch.device("cpu"), torch.float32)


@needs_compiler
def test_other_devices_and_dtypes(monkeypatch, host):
    monkeypatch.setenv(cuda_library.VARIABLE, str(host.path))
    weight = torch.zeros(3, 8)
    assert cuda.CUDA.supports(weight.device, weight.dtype) is None
    assert "takes tensors on cpu, got meta" in cuda.CUDA.supports(torch.device("meta"), weight.dtype)
    assert "got torch.complex64" in cuda.CUDA.supports(weight.device, torch.complex64)


@needs_compiler
def test_which_forward_is_fused(monkeypatch, host):
    monkeypatch.setenv(cuda_library.VARIABLE, str(host.path))
    half, weight = torch.zeros(4, 16, dtype=torch.bfloat16), torch.zeros(9, 16, dtype=torch.bfloat16)
    assert cuda.fused_kernel(half, weight) == "forward_sm80"
    for hidden, head in (
        (half.float(), weight.float()),
        (half[:, :12], weight[:, :12]),  # H is no multiple of 8
        (half[:, 1:9], weight[:, :8]),  # rows do not begin at 16 bytes
        (half.T.contiguous().T, weight),
    ):
        assert cuda.fused_kernel(hidden, head) is None


@needs_compiler
def test_which_forward_makes_a_chunk(monkeypatch, host):
    """Hopper's, and the twin's stand-in for it; on an A100 cuBLAS does, and for 16-bit chunks everywhere."""
    monkeypatch.setenv(cuda_library.VARIABLE, str(host.path))
    half, weight = torch.zeros(4, 16, dtype=torch.bfloat16), torch.zeros(9, 16, dtype=torch.bfloat16)
    assert cuda.projecting_kernel(half, weight, torch.float32) == "forward_sm80"
    assert cuda.projecting_kernel(half, weight, torch.bfloat16) is None
    assert cuda.projecting_kernel(half.float(), weight.float(), torch.float32) is None
    on_gpu = cast(torch.Tensor, SimpleNamespace(device=torch.device("cuda", 0)))
    for kernel, expected in (("forward_sm90", "forward_sm90"), ("forward_sm80", None), (None, None)):
        monkeypatch.setattr(cuda, "fused_kernel", lambda hidden, weight, kernel=kernel: kernel)
        assert cuda.projecting_kernel(on_gpu, on_gpu, torch.float32) == expected


def test_importing_loads_nothing():
    code = (
        "import sys, logitless, logitless.backends.cuda\n"
        "assert 'logitless.kernels.cuda.library' not in sys.modules\n"
        "assert not [line for line in open('/proc/self/maps') if 'liblogitless' in line]"
    )
    run(sys.executable, "-c", code)


# ---------------------------------------------------------------------------------------------------------------------
# What nvcc makes of it


#: Kernels whose speed counts; local memory in one of them is a spill, or an index that the compiler could not resolve.
HOT = ("measure_kernel", "gradient_kernel", "merge_kernel", "forward", "RowEpilogue", "sparse", "route")


@pytest.fixture(scope="module")
def built() -> Path:
    return gpu_library()


def resources(log: str) -> list[tuple[str, str, int, int]]:
    """(architecture, kernel, registers, bytes of local memory) of every kernel that ptxas reports."""
    pattern = re.compile(
        r"Compiling entry function '(\S+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        re.DOTALL,
    )
    return [
        (architecture, name, int(registers), int(stack) + int(stores) + int(loads))
        for name, architecture, stack, stores, loads, registers in pattern.findall(log)
    ]


@pytest.mark.slow
@needs_nvcc
def test_kernels_keep_to_their_registers(built):
    found = resources((built.parent / "logitless_cuda.log").read_text())
    assert {"sm_80", "sm_90a", "sm_100"} <= {architecture for architecture, *_ in found}
    names = run("c++filt", "-p", *(name for _, name, *_ in found)).stdout.splitlines()
    for (architecture, _, registers, local), name in sorted(zip(found, names, strict=True), key=lambda x: x[1]):
        print(f"{architecture:8} {registers:4} registers {local:4} bytes of local memory  {name[:100]}")
    spilled = [name for (*_, local), name in zip(found, names, strict=True) if local and any(k in name for k in HOT)]
    assert not spilled


@pytest.mark.slow
@needs_nvcc
def test_configurations_of_the_forward(built):
    """In the order of the C interface's numbers; kernels/cuda/README.md says what each costs."""
    names = cuda_library.load(built).configurations()
    if cutlass_headers() is None:
        assert names == ()
        return
    assert names[cuda.CONFIGURATION] == "cooperative_128x256x64" and len(names) == 4
    with pytest.raises(RuntimeError, match="configuration that this build"):
        absent = (*(None,) * 2, torch.bfloat16, *(0,) * 5, *(None,) * 2, *(1.0,) * 3, *(None, 2, None, None, 0, 4))
        cuda_library.load(built).launch("forward_sm90", *absent, on=torch.device("cpu"))
    table = (ROOT / "kernels" / "cuda" / "README.md").read_text()
    assert [name for name in names if f"| `{name}` |" not in table] == []


@pytest.mark.slow
@needs_nvcc
def test_library_needs_no_cuda_library_and_exports_the_interface_alone(built):
    assert exported(built) == set(SIGNATURES)
    needed = re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", built).stdout)
    assert not [name for name in needed if "cuda" in name or "torch" in name], needed


def find_cuobjdump() -> str | None:
    """CUDA's, or the one that Triton brings."""
    found = importlib.util.find_spec("triton")
    places = [os.environ["PATH"]]
    if found is not None and found.submodule_search_locations:
        places.append(f"{found.submodule_search_locations[0]}/backends/nvidia/bin")
    return shutil.which("cuobjdump", path=os.pathsep.join(places))


@pytest.mark.slow
@needs_nvcc
def test_library_holds_every_architecture(built):
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("needs cuobjdump")
    listed = run(cuobjdump, "--list-elf", "--list-ptx", built).stdout
    for name in (r"sm_80\.cubin", r"sm_90a\.cubin", r"sm_100\.cubin", r"sm_100\.ptx"):
        assert re.search(name, listed), listed


NO_DRIVER = """
import torch
from logitless import linear_logprobs
from logitless.backends import cuda
from logitless.kernels.cuda import library
loaded = library.load(library.location())
assert loaded.target == "cuda"
code = loaded.device_code(torch.device("cpu"))  # of device 0; PyTorch's guard would stop the call on its own
print(code, loaded.explain(code))
x = torch.zeros(4, 8)
print(cuda.CUDA.supports(x.device, x.dtype))
vector = torch.zeros(4)
try:
    loaded.launch("merge", vector, vector, torch.float32, 1, 5, 4, 9, *(None,) * 6, None, 0, on=torch.device("cpu"))
except RuntimeError as error:
    print(error)
"""


@pytest.mark.slow
@needs_nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")
def test_loads_without_a_driver_and_says_so(built):
    """The first call is an exception with CUDA's own words; no call before it fails."""
    done = run(sys.executable, "-c", NO_DRIVER, LOGITLESS_CUDA_LIBRARY=str(built))
    code, supports, launch = done.stdout.splitlines()
    assert re.match(r"(35|100|999) .*(driver|device)", code)
    assert "liblogitless_cuda.so takes tensors on cuda, got cpu" in supports
    assert re.match(r"logitless_merge: .*(driver|device).* \(code \d+\)", launch)


@pytest.mark.slow
@needs_nvcc
def test_other_architectures(tmp_path: Path):
    """`CMAKE_CUDA_ARCHITECTURES` and `LOGITLESS_CUDA_ARCHITECTURES` choose; configured, not built."""
    for name in ("CMAKE_CUDA_ARCHITECTURES", "LOGITLESS_CUDA_ARCHITECTURES"):
        folder = tmp_path / name
        run("cmake", "-S", ROOT, "-B", folder, "-DLOGITLESS_HOST=OFF", "-DLOGITLESS_CUDA=ON", f"-D{name}=86-real")
        flags = next(folder.glob("kernels/cuda/CMakeFiles/logitless_cuda.dir/flags.make")).read_text()
        assert "sm_86" in flags and "sm_80" not in flags


@needs_compiler
def test_cuda_that_was_asked_for_and_is_not_there(tmp_path: Path):
    """CMake says so instead of leaving it out."""
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-DLOGITLESS_HOST=OFF", "-DLOGITLESS_CUDA=ON"]
    done = subprocess.run([*command, "-DLOGITLESS_NVCC=OFF"], capture_output=True, text=True)
    assert done.returncode != 0 and "there is no nvcc" in done.stderr
