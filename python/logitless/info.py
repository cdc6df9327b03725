"""A report on this machine: versions, devices, the available backends, and the one that `backend="auto"` picks."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from . import backends
from .backends import native
from .backends.exact.products import has_bfloat16_units


def info() -> dict[str, str]:
    """Versions, devices, and the backend that `"auto"` picks on each. `python -m logitless info` prints them."""
    report = {
        "logitless": version_of("logitless"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "transformers": version_of("transformers"),
        "cpu threads": str(torch.get_num_threads()),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "bfloat16 units": "yes" if has_bfloat16_units() else "no: multiplied in float32",
        "cpu kernels": native.why_not(torch.device("cpu")) or str(native.loaded().set),
    }
    devices = [torch.device("cpu")]
    if torch.accelerator.is_available():
        devices.append(torch.device(torch.accelerator.current_accelerator()))  # type: ignore[arg-type]
    for device in devices:
        report[f"backend on {device.type}"] = backends.pick("auto", torch.empty(1, 1, device=device))
        for name, backend in backends.BACKENDS.items():
            report[f"{name} on {device.type}"] = backend.supports(device, torch.float32) or "available"
    report["screened on cpu"] = backends.why_not_screened(torch.device("cpu")) or "available"
    return report


def version_of(package: str) -> str:
    """The version of an installed package; a source tree on the path is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
