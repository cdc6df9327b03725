"""Builds kernels/cuda for the tests, once: folders under build/ that CMake brings up to date."""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from logitless.kernels.cuda.library import VARIABLE, Library

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "tests"

needs_compiler = pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which("c++") is None, reason="needs cmake and a C++ compiler"
)
needs_nvcc = pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which("nvcc") is None, reason="needs cmake and nvcc"
)


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command that must succeed."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    return done


def build(name: str, *options: str, target: str) -> Path:
    """The file of a target, built as CMakeLists.txt says in the folder `build/tests/<name>`, and the compiler's words
    beside it in `<target>.log`. Two processes take turns."""
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run("cmake", "-S", ROOT, "-B", folder, *options)
        done = run("cmake", "--build", folder, "--target", target, "--parallel", str(os.cpu_count() or 1))
        if "Building" in done.stdout:
            (folder / f"{target}.log").write_text(done.stdout + done.stderr)
    return next(path for path in (folder / f"lib{target}.so", folder / target) if path.is_file())


def host_library(sanitize: str = "", target: str = "logitless_host") -> Path:
    """The twin for the CPU, or another target of the same folder."""
    return build(f"host{sanitize}", "-DLOGITLESS_CUDA=OFF", f"-DLOGITLESS_SANITIZE={sanitize}", target=target)


def cutlass_headers() -> Path | None:
    """The headers that setup.py's release of CUTLASS brings, fetched once; None where pip cannot."""
    folder = FOLDER / "cutlass"
    headers = folder / "cutlass_library" / "source" / "include"
    if not headers.is_dir():
        release = re.search(r"nvidia-cutlass==[\d.]+", (ROOT / "setup.py").read_text())
        assert release is not None
        pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), release.group())
        subprocess.run(pip, capture_output=True)
    return headers if headers.is_dir() else None


def gpu_library() -> Path:
    """The library for every architecture, warnings as errors; with all of Hopper's fused forwards where their headers
    are."""
    headers = f"-DLOGITLESS_CUTLASS={cutlass_headers() or ''}"
    strict = ("-DLOGITLESS_STRICT=ON", "-DLOGITLESS_FORWARD_CONFIGURATIONS=ON")
    options = ("-DLOGITLESS_CUDA=ON", "-DLOGITLESS_HOST=OFF", *strict, headers)
    return build("cuda", *options, target="logitless_cuda")


def library_here() -> Path:
    """On a GPU the library that `LOGITLESS_CUDA_LIBRARY` names, else one for every architecture; elsewhere the twin."""
    if not torch.cuda.is_available():
        return host_library()
    named = os.environ.get(VARIABLE)
    return Path(named) if named else gpu_library()


class Remote(Library):
    """For tests with their tensors on the CPU: memory goes to the device before a launch and comes back after it, byte
    for byte, what lies around a tensor too."""

    def __init__(self, path: Path, device: torch.device) -> None:
        super().__init__(path)
        self.device = device

    def launch(self, name: str, *arguments: Tensor | torch.dtype | float | None, on: torch.device) -> None:
        memory: dict[int, tuple[Tensor, Tensor]] = {}  # address -> bytes here, bytes there

        def there(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in memory:
                here = torch.empty(0, dtype=torch.uint8).set_(storage)
                memory[storage.data_ptr()] = here, here.to(self.device, copy=True)
            copy, empty = memory[storage.data_ptr()][1], torch.empty(0, dtype=x.dtype, device=self.device)
            return empty.set_(copy.untyped_storage(), x.storage_offset(), x.size(), x.stride())

        sent = [there(x) if isinstance(x, Tensor) else x for x in arguments]
        super().launch(name, *sent, on=self.device)
        for here, copy in memory.values():
            here.copy_(copy)


def library_of_cpu_tensors() -> Library:
    """`library_here` for tests that have their tensors on the CPU."""
    path = library_here()
    return Remote(path, torch.device("cuda", 0)) if torch.cuda.is_available() else Library(path)


NUMBERS = {
    "void": None,
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}


def ctype(declaration: str) -> type | None:
    """`const void *` -> c_void_p, of a declaration without the name."""
    plain = declaration.replace("const", "").strip()
    if plain.endswith("*"):
        return ctypes.c_char_p if plain[:-1].strip() == "char" else ctypes.c_void_p
    return NUMBERS[plain]
