"""Extra peak memory of one step, in a process of its own.

Extra means beyond the inputs and one copy of the gradients (below float32, and of their float32 accumulators). Two
figures, because each sees what the other does not:

    allocated  the peak of PyTorch's allocator (`testing.watch_allocations`): tensors alone, to the byte, the same on
               every run. The targets are about this one.
    resident   the peak resident set (VmHWM, reset before the step): also what libraries allocate beside tensors, such
               as a BLAS's packing buffers; pages the allocator holds back blur it by some MiB. Linux alone.
"""

from __future__ import annotations

import time
from pathlib import Path

from .machine import Cpu, resident_growth
from .measure import Part, Tell, silent
from .provider import Outcome, Provider
from .worker import Worker

TIMEOUT_SECONDS = 600.0
#: With a fixed threshold, malloc maps every large block and gives it back: none stays resident for the next. A model's
#: step has hundreds below a MiB, which would leave more than 100 MiB behind.
VARIABLES = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}

Memory = dict[str, int | None]


def in_process(part: Part, provider: Provider, log: Path | None = None) -> Memory:
    """Measures one provider of a part in a new process, which prints into the file `log` if there is one.

    Raises:
        RuntimeError: the process failed or ran out of time, with the reason.
    """
    worker = Worker(patience=TIMEOUT_SECONDS, variables=VARIABLES, log=log)
    try:
        _, result, reason = worker.call(of_step, part, provider, end=time.monotonic() + TIMEOUT_SECONDS)
    finally:
        worker.stop()
    if reason is not None:
        raise RuntimeError(reason)
    return result


def of_step(part: Part, provider: Provider, tell: Tell = silent) -> Memory:
    """Measures in this process, after a warm-up on few tokens."""
    machine, outcomes, seen = Cpu(), list[Outcome](), list[int]()
    inputs = part.inputs()
    machine.peak(lambda: provider.step(inputs.brief()))

    def step() -> None:
        seen.append(machine.peak(lambda: outcomes.append(provider.step(inputs))))  # a step ends with its gradients

    resident, gradients = resident_growth(step), provider.of(inputs).gradient_bytes
    return {"allocated": seen[0] - gradients, "resident": None if resident is None else resident - gradients}
