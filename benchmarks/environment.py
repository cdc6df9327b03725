"""What a measurement depends on beside the code under test."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch

from .parts import BF16_UNITS

PACKAGES = (
    *("torch", "logitless", "trl", "liger-kernel", "cut-cross-entropy", "transformers", "triton"),
    *("quack-kernels", "flash-attn"),
)
ROOT = Path(__file__).resolve().parent.parent


def describe() -> dict[str, object]:
    """JSON-ready. `load` is the number of processes that wanted a core when the measurement began."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": _cpu(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bf16_units": BF16_UNITS,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str | None:
    """The commit, with a + where tracked files differ from it; None outside a checkout."""
    try:
        commit, changes = (
            subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changes else "")
