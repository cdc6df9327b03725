"""Extra peak memory of one step, in a process of its own.

    python -m benchmarks.memory PART PROVIDER [--tiny]        (PROVIDER by its name in the table)

Extra means beyond the inputs and one copy of the gradients (below float32, and of their float32 accumulators). Two
figures, because each sees what the other does not:

    allocated  the peak of PyTorch's allocator (`testing.watch_allocations`): tensors alone, to the byte, the same on
               every run. The targets are about this one.
    resident   the peak resident set (VmHWM, reset before the step): also what libraries allocate beside tensors, such
               as a BLAS's packing buffers; pages the allocator holds back blur it by some MiB. Linux alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

from logitless.testing import watch_allocations

from . import parts
from .parts import Part
from .providers import Provider

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_SECONDS = 600

Memory = dict[str, int | None]


def in_subprocess(part: Part, provider: Provider, *, tiny: bool) -> Memory:
    """Runs this module on one row of the table.

    Raises:
        RuntimeError: the process failed or ran out of time; with the last line that it wrote.
    """
    command = [sys.executable, "-m", "benchmarks.memory", part.name, provider.name, *(["--tiny"] if tiny else [])]
    # With a fixed threshold, malloc maps every large block and gives it back: none stays resident for the next.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"no result after {TIMEOUT_SECONDS} s") from None
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def of_step(part: Part, provider: Provider) -> Memory:
    """Measures in this process, after a warm-up on few tokens."""
    brief = part.problem.brief().inputs()
    with watch_allocations():
        provider.step(brief)
    inputs = part.problem.inputs()
    gc.collect()
    resident = _resident("VmRSS") if _reset_peak() else None
    with watch_allocations() as seen:
        outcome = provider.step(inputs)
    peak = None if resident is None else _resident("VmHWM")
    del outcome  # alive until here: a step ends with its gradients
    gradients = part.problem.gradient_bytes
    return {
        "allocated": seen.peak - gradients,
        "resident": None if resident is None or peak is None else peak - resident - gradients,
    }


def _reset_peak() -> bool:
    """Sets VmHWM back to what is resident now; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return 1024 * int(line.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description="Extra peak memory of one step, as JSON.")
    parser.add_argument("part", choices=[part.name for part in parts.PARTS])
    parser.add_argument("provider")
    parser.add_argument("--tiny", action="store_true", help="the same structure in milliseconds")
    arguments = parser.parse_args()
    part = parts.get(arguments.part)
    if arguments.tiny:
        part = part.tiny()
    print(json.dumps(of_step(part, part.provider(arguments.provider))))


if __name__ == "__main__":
    main()
