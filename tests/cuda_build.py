"""Builds kernels/cuda for the tests, once: folders under build/ that CMake brings up to date."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
    """The library for every architecture, warnings as errors; with Hopper's fused forward where its headers are."""
    options = ("-DLOGITLESS_CUDA=ON", "-DLOGITLESS_HOST=OFF", f"-DLOGITLESS_CUTLASS={cutlass_headers() or ''}")
    return build("cuda", *options, target="logitless_cuda")
