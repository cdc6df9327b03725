"""The CUDA library for one GPU, through CMake."""

from __future__ import annotations

import importlib.util
import os
import time
from pathlib import Path

import torch

from logitless.bench.targets import Json

from ..places import ROOT
from .commands import find, run

FOLDER = ROOT / "build" / "gpu"
NAME = "liblogitless_cuda.so"
#: Where `kernels/cuda/library.py` looks for the library.
VARIABLE = "LOGITLESS_CUDA_LIBRARY"


def build(seconds: float, headers: Path | None = None) -> Json:
    """Builds liblogitless_cuda for the GPU here (without one for Hopper), and names it to the library's loader; says
    what is missing. `headers`: CUTLASS's folder `include`; None: that of an installed nvidia-cutlass."""
    start = time.monotonic()
    nvcc = find("nvcc")
    missing = [name for name, path in (("cmake", find("cmake")), ("nvcc", nvcc)) if path is None]
    result: Json = {"library": None, "missing": missing, "notes": [], "failure": None}
    if missing:
        result["failure"] = f"not built: no {' and no '.join(missing)} in PATH"
        return result
    jobs = str(os.cpu_count() or 1)
    configure = ["cmake", "-S", str(ROOT), "-B", str(FOLDER), *_options(str(nvcc), headers or _installed_headers())]
    compile_ = ["cmake", "--build", str(FOLDER), "--target", "logitless_cuda", "--parallel", jobs]
    for command in (configure, compile_):
        code, output = run(command, start + seconds - time.monotonic())
        result["notes"] += [line.strip() for line in output.splitlines() if "logitless: " in line]
        if code:
            result["failure"] = f"{' '.join(command[:2])} ended with {code}: {output[-2000:]}"
            return result
    os.environ[VARIABLE] = str(FOLDER / NAME)
    return {**result, "library": NAME, "seconds": time.monotonic() - start}


def _installed_headers() -> Path | None:
    cutlass = importlib.util.find_spec("cutlass_library")
    places = cutlass.submodule_search_locations if cutlass is not None else None
    return Path(places[0]) / "source" / "include" if places else None


def _options(nvcc: str, headers: Path | None) -> list[str]:
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    architecture = f"{major}{minor}{'a' if major == 9 else ''}-real"
    options = [f"-DCMAKE_CUDA_COMPILER={nvcc}", "-DLOGITLESS_CUDA=ON", "-DLOGITLESS_HOST=OFF", "-DLOGITLESS_CPU=OFF"]
    options.append("-DLOGITLESS_FORWARD_CONFIGURATIONS=ON")  # to time them
    if headers is not None:
        options.append(f"-DLOGITLESS_CUTLASS={headers}")
    return [*options, f"-DLOGITLESS_CUDA_ARCHITECTURES={architecture}"]
