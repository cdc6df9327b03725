"""Before anything is measured: the CUDA library, through CMake, and the test-suite on the device, through pytest."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch

from .environment import ROOT
from .report import Json

FOLDER = ROOT / "build" / "gpu_report"
#: Where `kernels/cuda/library.py` looks for the library.
VARIABLE = "LOGITLESS_CUDA_LIBRARY"
#: What runs on a device: the CUDA kernels one by one, the ops over every backend, their bits, and the Triton kernels.
SUITES = (
    *(f"tests/test_cuda_{name}.py" for name in ("forward", "chunk", "sparse", "tail")),
    "tests/device_suite.py",
    *(f"tests/test_{name}.py" for name in ("triton", "triton_tail", "triton_divergence")),
)
#: Failures that the report repeats.
SHOWN = 10


def build(seconds: float) -> Json:
    """Builds liblogitless_cuda for this GPU alone, and names it to the library's loader; says what is missing."""
    start = time.monotonic()
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    missing = [name for name, path in (("cmake", shutil.which("cmake")), ("nvcc", nvcc)) if path is None]
    found: Json = {"library": None, "missing": missing, "notes": [], "failure": None}
    if missing:
        found["failure"] = f"not built: no {' and no '.join(missing)} in PATH"
        return found
    jobs = str(os.cpu_count() or 1)
    configure = ["cmake", "-S", str(ROOT), "-B", str(FOLDER), *_options(str(nvcc))]
    compile_ = ["cmake", "--build", str(FOLDER), "--target", "logitless_cuda", "--parallel", jobs]
    for command in (configure, compile_):
        code, output = _run(command, start + seconds - time.monotonic())
        found["notes"] += [line.strip() for line in output.splitlines() if "logitless: " in line]
        if code:
            found["failure"] = f"{' '.join(command[:2])} ended with {code}: {output[-2000:]}"
            return found
    library = FOLDER / "liblogitless_cuda.so"
    os.environ[VARIABLE] = str(library)
    return {**found, "library": library.name, "seconds": time.monotonic() - start}


def _options(nvcc: str) -> list[str]:
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    architecture = f"{major}{minor}{'a' if major == 9 else ''}-real"
    options = [f"-DCMAKE_CUDA_COMPILER={nvcc}", "-DLOGITLESS_CUDA=ON", "-DLOGITLESS_HOST=OFF"]
    cutlass = importlib.util.find_spec("cutlass_library")
    if cutlass is not None and cutlass.submodule_search_locations:
        options.append(f"-DLOGITLESS_CUTLASS={cutlass.submodule_search_locations[0]}/source/include")
    return [*options, f"-DLOGITLESS_CUDA_ARCHITECTURES={architecture}"]


def _run(command: list[str], seconds: float, environment: dict[str, str] | None = None) -> tuple[int | str, str]:
    """Status and output. After its time a command is asked to end, as by Ctrl-C, and a little later made to."""
    log = subprocess.PIPE
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    for end, patience in ((signal.SIGINT, max(1.0, seconds)), (signal.SIGKILL, 20.0)):
        try:
            output, _ = process.communicate(timeout=patience)
            late = end == signal.SIGKILL
            return f"the end of its {seconds:.0f} s" if late else process.returncode, output
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, end)
    output, _ = process.communicate()
    return f"the end of its {seconds:.0f} s", output


def run_tests(device: str, seconds: float, folder: Path, *, select: str = "") -> Json:
    """The suites on the device. JUnit's numbers, and the first failures, ready for JSON; `complete` if all were run."""
    folder.mkdir(parents=True, exist_ok=True)
    report = folder / "junit.xml"
    report.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--junitxml={report}",
        *_plugins(device),
    ]
    command += [*SUITES, *(["-k", select] if select else [])]
    # Without the second, PyTorch refuses cuBLAS in deterministic mode.
    environment = {**os.environ, "LOGITLESS_TEST_DEVICE": device, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    start = time.monotonic()
    status, output = _run(command, seconds, environment)
    found: Json = {
        "device": device,
        "status": status,
        "seconds": time.monotonic() - start,
        "complete": status in (0, 1),
    }
    if not report.exists():
        return {**found, "failure": f"pytest wrote no report: {output[-2000:]}"}
    return {**found, **_junit(report)}


def _plugins(device: str) -> list[str]:
    """Where these plugins are installed: processes for Triton's compiler, and an end for a kernel that hangs."""
    options = []
    if device != "cpu" and importlib.util.find_spec("xdist"):
        options += ["-n", str(min(8, os.cpu_count() or 1))]
    if importlib.util.find_spec("pytest_timeout"):
        options += ["--timeout", "90", "--timeout-method", "thread"]
    return options


def _junit(report: Path) -> Json:
    root = ElementTree.parse(report).getroot()
    totals = {name: sum(int(suite.get(name, 0)) for suite in root.iter("testsuite")) for name in _COUNTS}
    failed = [
        case for case in root.iter("testcase") if case.find("failure") is not None or case.find("error") is not None
    ]
    return {**totals, "failed": [_failure(case) for case in failed[:SHOWN]]}


_COUNTS = ("tests", "failures", "errors", "skipped")


def _failure(case: ElementTree.Element) -> str:
    reason = next(x for x in (case.find("failure"), case.find("error")) if x is not None)
    message = (reason.get("message") or "").strip().splitlines()
    return f"{case.get('name')}: {message[0][:300] if message else ''}"
