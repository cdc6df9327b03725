"""Times, memory and errors of one part, on a GPU or (tiny, to see that everything runs) on a CPU.

Time is that of the device: an event before and one after, the L2 cache overwritten first. The ways of a cell take
turns, one step each a round in alternating order, so that a warm chip or a slow minute is everybody's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch

from logitless.testing import watch_allocations

from . import measure
from .definitions import materialised_nll
from .gpu_cells import Cell
from .gpu_ways import Way
from .problems import Inputs
from .providers import Outcome, differentiate
from .report import Json

#: Rounds of a cell, where its time allows so many.
ROUNDS = 20
#: Seconds that the rounds of a cell may take; a round that has begun is finished.
SECONDS = 12.0
#: Why a way was not called before the rounds had to begin. The cell is not complete then.
NO_TIME = "no time was left for its first call"

#: Writes of twice the last cache before a measurement. One empties it. All of them take an H200 about a millisecond, in
#: which a host launches a kernel through Python: otherwise the device waits for that, and it counts as kernel time.
FLUSHES = 32

#: Told what is being done and what has been found so far, before anything that may never return.
Tell = Callable[[str, Json], None]


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
        """After a failure: gives cached memory back. Raises where the device itself is lost."""


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
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


class Cpu:
    """For the tiny mode."""

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


@dataclass
class Row:
    """What was found of one way (of one kernel). Seconds are in round order."""

    provider: str
    role: str
    frozen: bool = False
    forward: list[float] = field(default_factory=list)  # without gradients
    backward: list[float] = field(default_factory=list)  # of a step: `backward()` alone
    both: list[float] = field(default_factory=list)  # a step: forward with gradients, and backward; a kernel's call
    floor: list[float] = field(default_factory=list)  # of a kernel: what it is set against, in the same turns
    forward_peak_bytes: int | None = None  # beyond the inputs
    peak_bytes: int | None = None  # of a step, gradients in it
    loss: float | None = None
    error: dict[str, float] | None = None  # relative, of loss, d_hidden and d_weight, against float64 on few tokens
    first_call_seconds: float | None = None
    wrong: list[str] | None = None  # of a kernel: the errors that are larger than what is right; None: not checked
    bytes: int | None = None  # of a kernel's traffic, read and written
    floor_bytes: int | None = None  # of its floor's, where that is a copy of another size
    failure: str | None = None

    @property
    def runs(self) -> bool:
        return self.failure is None


class DeviceLost(Exception):
    """No kernel runs in this process any more."""


def attempt(row: Row, function: Callable[[], None], machine: Machine) -> None:
    """A failure is a line in the table.

    Raises:
        DeviceLost: the device went with it.
    """
    try:
        function()
        return
    except Exception as reason:
        row.failure = explain(reason)
    try:
        machine.recover()
    except Exception:
        raise DeviceLost(row.failure) from None


def explain(reason: Exception) -> str:
    """In a line."""
    if isinstance(reason, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(reason).strip().splitlines()
    return f"{type(reason).__name__}: {lines[0] if lines else ''}"


# ---------------------------------------------------------------------------------------------------------------------
# Cells


def measure_cell(cell: Cell, ways: Sequence[Way], machine: Machine, deadline: float, skip: Json, tell: Tell) -> Json:
    """Errors, memory and times of every way, ready for JSON. `skip` has the reason for each way that is left out."""
    torch.compiler.reset()
    rows = [Row(way.name, way.role, way.frozen, failure=skip.get(way.name) or way.missing()) for way in ways]
    pairs = list(zip(ways, rows, strict=True))
    inputs = cell.inputs(machine.device)

    def found(complete: bool = False) -> Json:
        return {**_sizes(cell), "rows": [asdict(row) for row in rows], "complete": complete}

    def each(function: Callable[[Way, Row], None], order: int = 1, until: float = math.inf) -> None:
        for way, row in pairs[::order]:
            if row.runs and time.monotonic() > until:
                row.failure = NO_TIME
            elif row.runs:
                tell(way.name, found())
                attempt(row, partial(function, way, row), machine)

    few = _few(inputs)
    reference = _reference(few)
    if reference is not None:
        each(partial(_check, few=few, reference=reference), until=deadline - 2 * SECONDS)
    del reference  # as large as four heads in bfloat16
    each(partial(_first_calls, inputs=inputs, machine=machine), until=deadline - SECONDS)
    for turn in turns(min(deadline, time.monotonic() + SECONDS)):
        each(partial(_time, inputs=inputs, machine=machine), -1 if turn % 2 else 1)
    return found(complete=all(row.failure != NO_TIME for row in rows))


def _sizes(cell: Cell) -> Json:
    """What memory is compared with, in bytes."""
    problem = cell.problem
    return {
        "problem": f"{problem}, {cell.data}",
        "logits_bytes": problem.tokens * problem.vocabulary * problem.dtype.itemsize,
        "head_gradient_bytes": 4 * problem.vocabulary * problem.hidden,
        "gradient_bytes": problem.gradient_bytes,
        "frozen_gradient_bytes": replace(problem, frozen_head=True).gradient_bytes,
    }


def turns(stop: float) -> Iterator[int]:
    """At least one."""
    for turn in range(ROUNDS):
        if turn and time.monotonic() > stop:
            return
        yield turn


def _few(inputs: Inputs) -> Inputs:
    """The same head with few tokens."""
    few = inputs.problem.brief()
    hidden, targets, ref_logprob = (x[: few.tokens] for x in (inputs.hidden, inputs.targets, inputs.ref_logprob))
    return Inputs(hidden, inputs.weight, targets, ref_logprob, few)


def _reference(few: Inputs) -> Outcome | None:
    """None where float64 copies of the head do not fit."""
    with suppress(torch.OutOfMemoryError):
        return differentiate(materialised_nll, few.to(torch.float64))
    return None


def _check(way: Way, row: Row, *, few: Inputs, reference: Outcome) -> None:
    """Errors on few tokens, against float64."""
    if way.checked:
        row.error = measure.errors(differentiate(way.loss, way.of(few)), reference)


def _first_calls(way: Way, row: Row, *, inputs: Inputs, machine: Machine) -> None:
    """Memory of a whole forward and of a whole step, which warm up."""
    start, whole = time.perf_counter(), way.of(inputs)
    row.forward_peak_bytes = machine.peak(lambda: _forward(way, whole))
    row.peak_bytes = machine.peak(lambda: _keep_loss(row, differentiate(way.loss, whole)))
    row.first_call_seconds = time.perf_counter() - start


def _forward(way: Way, inputs: Inputs) -> None:
    with torch.no_grad():
        way.loss(inputs.hidden, inputs.weight, inputs)


def _keep_loss(row: Row, outcome: Outcome) -> None:
    if row.role != "floor" and outcome.loss is not None:
        row.loss = float(outcome.loss)


def _time(way: Way, row: Row, *, inputs: Inputs, machine: Machine) -> None:
    whole = way.of(inputs)
    machine.flush()
    start = machine.mark()
    _forward(way, whole)
    row.forward.append(machine.seconds(start, machine.mark()))
    machine.flush()
    marks = [machine.mark()]
    differentiate(way.loss, whole, between=lambda: marks.append(machine.mark()))
    marks.append(machine.mark())
    row.both.append(machine.seconds(marks[0], marks[2]))
    row.backward.append(machine.seconds(marks[1], marks[2]))
