"""Machines: a device, its clock and its memory. A GPU's time is its own: an event before, one after."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch

from logitless.testing import watch_allocations

#: Writes of twice the last cache before a measurement. One empties it. All of them take an H200 about a millisecond, in
#: which a host launches a kernel through Python: otherwise the device waits for that, and it counts as kernel time.
FLUSHES = 32


class Machine(Protocol):
    """A device and its clock. A mark is a point on the device's own time line."""

    device: torch.device

    def mark(self) -> Any: ...

    def seconds(self, start: Any, stop: Any) -> float: ...

    def flush(self) -> None:
        """Empties the last cache, and leaves the device busy so long that the host has queued the next work by then."""

    def peak(self, function: Callable[[], object]) -> int:
        """The most bytes held at one time during the call beyond what was held before."""

    def recover(self) -> None:
        """After a failure or a part: gives cached memory back. Raises where the device itself is lost."""


class Gpu:
    """The current CUDA (or ROCm) device."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        self._scratch = torch.empty(max(2 * cache, 64 * 2**20), dtype=torch.uint8, device=self.device)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, stop: torch.cuda.Event) -> float:
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3

    def flush(self) -> None:
        for _ in range(FLUSHES):
            self._scratch.zero_()

    def peak(self, function: Callable[[], object]) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def recover(self) -> None:
        gc.collect()  # a failed step may leave tensors in cycles of references
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


class Cpu:
    """The processor; also a GPU's stand-in where everything is tiny."""

    device = torch.device("cpu")

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, stop: float) -> float:
        return stop - start

    def flush(self) -> None:
        pass

    def peak(self, function: Callable[[], object]) -> int:
        with watch_allocations() as seen:
            function()
        return seen.peak

    def recover(self) -> None:
        pass


def available_memory(*, gpu: bool) -> int:
    """Bytes that are free now, of the GPU or of the machine."""
    if gpu:
        return torch.cuda.mem_get_info()[0]
    try:
        line = next(x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return 1024 * int(line.split()[1])


@cache
def this_machine(*, gpu: bool) -> Machine:
    """The GPU here or the processor, one object a process."""
    return Gpu() if gpu else Cpu()


def resident_growth(function: Callable[[], object]) -> int | None:
    """Growth of the peak resident set during the call (VmHWM, reset before); None where the system is not Linux."""
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        function()
        return None
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return 1024 * int(line.split()[1])
