"""Provenance: what a measurement depends on beside the code under test."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch

from .targets import Json

PACKAGES = (
    *("torch", "logitless", "trl", "liger-kernel", "cut-cross-entropy", "transformers", "triton"),
    *("quack-kernels", "flash-attn"),
)
ROOT = Path(__file__).resolve().parents[2]
#: Where results are written and committed.
RESULTS = ROOT / "benchmarks" / "results"
BF16_UNITS: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()


def describe(*, gpu: bool = False, tiny: bool = False, commit: str | None = None) -> Json:
    """JSON-ready. `load` is the number of processes that wanted a core when the measurement began.

    Args:
        gpu: describes the current GPU as the device, else the processor.
        commit: for a copy of the tree that Git does not know.
    """
    about: Json = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit or checked_out(),
        "cpu": _cpu(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bf16_units": BF16_UNITS,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "cut_cross_entropy": _cut_cross_entropy(),
        "tiny": tiny,
    }
    return about | (_gpu() if gpu else {"device": about["cpu"]})


def _gpu() -> Json:
    result = torch.cuda.get_device_properties(0)
    return {
        "device": result.name,
        "driver": _driver(),
        "cuda": torch.version.cuda or torch.version.hip,
        "capability": f"{result.major}.{result.minor}",
        "memory_bytes": result.total_memory,
        "multiprocessors": result.multi_processor_count,
        "l2_bytes": result.L2_cache_size,
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cut_cross_entropy() -> str | None:
    """Origin of the installed Cut Cross-Entropy: PyPI's is another program than its repository's."""
    try:
        result = importlib.metadata.distribution("cut-cross-entropy")
    except importlib.metadata.PackageNotFoundError:
        return None
    origin = json.loads(result.read_text("direct_url.json") or "{}")
    commit = origin.get("vcs_info", {}).get("commit_id")
    place = f"{origin['url'].split('@')[-1]} {commit or ''}".strip() if "url" in origin else "a package index"
    return f"{result.version}, from {place}"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def checked_out() -> str | None:
    """The commit, with a + where tracked files differ from it; None outside a checkout."""
    try:
        commit, changes = (
            subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changes else "")


def provenance(about: Json) -> str:
    """The measurement's circumstances in a line of a table's heading."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    when = f"{about['date']}, commit {about['commit'] or 'unknown'}"
    if "driver" not in about:
        units = "with" if about["bf16_units"] else "without"
        processor = f"{about['cpu']} ({about['capability']}, {units} bf16 units), {about['threads']} threads"
        return f"{when}, {processor}, load {about['load']} at the start. {versions}."
    device = f"{about['device']}, driver {about['driver'] or 'unknown'}, CUDA {about['cuda'] or 'none'}"
    return f"{when}, {device}. {versions}. Cut Cross-Entropy: {about['cut_cross_entropy'] or 'not installed'}."
