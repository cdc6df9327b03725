"""Provenance: what a measurement depends on beside the code under test, and the kind of machine that it is of."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from .targets import Json

PACKAGES = (
    *("torch", "logitless", "trl", "liger-kernel", "cut-cross-entropy", "transformers", "triton"),
    *("quack-kernels", "flash-attn"),
)
HERE = Path(__file__).resolve()
#: Units of a processor that decide how fast products are, by the flag of /proc/cpuinfo that names them.
UNITS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx_vnni": "VNNI",
    "avx512_vnni": "VNNI",
    "avx512_bf16": "bf16",
    "amx_bf16": "AMX",
}
#: What PyTorch calls a processor's capability, in the words of UNITS.
CAPABILITIES = {"AVX2": ["AVX2"], "AVX512": ["AVX2", "AVX-512"]}
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
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "design": _design(),
        "units": units_of(_cpuinfo("flags")),
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


def _cpuinfo(field: str) -> str | None:
    """The field of the first core; None where the system or the processor has no such field."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in pairs if name.strip() == field), None)


def _design() -> str | None:
    """Family and model of the processor, as its vendor counts them: `25-17`; None: unknown."""
    numbers = _cpuinfo("cpu family"), _cpuinfo("model")
    return "-".join(numbers) if all(numbers) else None  # type: ignore[arg-type]


def units_of(flags: str | None) -> list[str] | None:
    """The units that flags of /proc/cpuinfo name, the oldest first; None: unknown."""
    if flags is None:
        return None
    there = set(flags.split())
    return list(dict.fromkeys(unit for flag, unit in UNITS.items() if flag in there))


def machine_kind(about: Json) -> str:
    """Name of the kind of machine, for its folder of results: `epyc-25-17-avx512-bf16`, `nvidia-h100-80gb-hbm3`.

    A virtual machine may say no more of its processor's name than `AMD EPYC`, so that the design's numbers and the
    newest units tell kinds apart. Files from before the design was written down have none in their kind's name. Where
    the units are unknown, too, PyTorch's word stands for them.
    """
    if "driver" in about:
        return _slug(about["device"])
    units = about.get("units")
    if units is None:
        units = CAPABILITIES.get(about["capability"], []) + ["bf16"] * about["bf16_units"]
    return "-".join(filter(None, (_family(about["cpu"]), about.get("design"), _generation(units))))


def _family(cpu: str) -> str:
    """The word after the vendor's name, such as `epyc`; of another vendor, the whole name."""
    plain = re.sub(r"\((R|TM)\)", "", cpu, flags=re.IGNORECASE)
    word = re.search(r"\b(?:AMD|Intel) +(\w+)", plain)
    return _slug(word.group(1) if word else plain)


def _generation(units: Sequence[str]) -> str:
    if "AMX" in units:
        return "amx"
    if "AVX-512" in units:
        return "avx512" + next((f"-{unit.lower()}" for unit in ("bf16", "VNNI") if unit in units), "")
    return "avx2" if "AVX2" in units else ""


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def checked_out() -> str | None:
    """The commit of this checkout of logitless, with a + where tracked files differ from it; None where it is none.

    An installed package may lie in somebody else's checkout, which does not track it.
    """
    commands = ("ls-files", "--error-unmatch", HERE.name), ("rev-parse", "HEAD"), ("status", "--porcelain", "-uno")
    try:
        _, commit, changes = (
            subprocess.run(["git", *each], cwd=HERE.parent, capture_output=True, text=True, check=True).stdout.strip()
            for each in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changes else "")


def provenance(about: Json) -> str:
    """The measurement's circumstances in a line of a table's heading."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    when = f"{about['date']}, commit {about['commit'] or 'unknown'}"
    if "driver" not in about:
        return f"{when}, {processor(about)}, load {about['load']} at the start. {versions}."
    device = f"{about['device']}, driver {about['driver'] or 'unknown'}, CUDA {about['cuda'] or 'none'}"
    origin = f"Cut Cross-Entropy: {about['cut_cross_entropy'] or 'not installed'}"
    return f"{when}, {device}, on {processor(about)}. {versions}. {origin}."


def processor(about: Json) -> str:
    """Name, units and threads of the processor, as far as the file has them."""
    threads = f"{about['threads']} thread{'s' * (about['threads'] != 1)}"
    design = f"{about['design']}: " if about.get("design") else ""
    return f"{about['cpu']} ({design}{_units_text(about)}), {threads}"


def _units_text(about: Json) -> str:
    """The list of units; without one, PyTorch's word, which is about the processor only where no GPU was measured."""
    if about.get("units") is not None:
        return ", ".join(about["units"]) or "no AVX2"
    if "driver" in about:
        return "units unknown"
    return f"{about['capability']}, {'with' if about['bf16_units'] else 'without'} bf16 units"
