"""Measures in a process of its own, which a kernel may hang or take down without taking the report with it.

The parent sends the name of a part; the child answers with what it is about to do and what it has found so far, and at
last with all of it. A child that stays silent is ended, one that died is replaced, and the way that it was busy with
becomes a line in the table with that reason.
"""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import NamedTuple

import torch

from . import gpu_kernels, gpu_measure
from .gpu_cells import CELLS, MAIN, Cell
from .gpu_ways import WAYS, Way
from .report import Json

#: Seconds without a word after which a child counts as hung: several times a compiled way's first call. A peer may
#: compile and try many kernels in its first call, and has so many times as long.
PATIENCE, OF_PEERS = 75.0, 2
#: Times that a part is begun again after its process ended.
RESTARTS = 3


class Order(NamedTuple):
    """`deadline`: on `time.monotonic`'s clock, which all processes share; begin no round after it."""

    part: str
    deadline: float
    skip: dict[str, str]


class Worker:
    """A child process, started when it is needed. `ways` are those of every cell."""

    def __init__(self, *, dry: bool, ways: tuple[Way, ...] = WAYS, patience: float = PATIENCE) -> None:
        self.dry, self.ways, self.patience = dry, ways, patience
        self.fatal: dict[str, str] = {}  # ways that ended a process, with the reason; not called again
        self._peers = {way.name for way in ways if way.role == "peer"}
        self._process: BaseProcess | None = None
        self._connection: Connection

    def measure(self, part: str, deadline: float, end: float) -> Json:
        """The part, complete or as far as it came: no round begins after `deadline`, and at `end` all is over."""
        found: Json = {"rows": [], "complete": False}
        for _ in range(RESTARTS + 1):
            doing, found, reason = self._measure(Order(part, deadline, dict(self.fatal)), end)
            if reason is None or time.monotonic() >= end:
                break
            if doing not in [row["provider"] for row in found["rows"]]:
                return {**found, "failure": reason}
            self.fatal[doing] = f"{reason}, in {part}"
            for row in found["rows"]:
                row["failure"] = row["failure"] or self.fatal.get(row["provider"])
        return found

    def _measure(self, order: Order, end: float) -> tuple[str, Json, str | None]:
        """What was being done last, what was found, and why it ended early, if it did."""
        if self._process is None:
            self._start()
        doing, found = "the start", {"rows": [], "complete": False}
        try:
            self._connection.send(order)
            while not found["complete"]:
                patience = self.patience * (OF_PEERS if doing in self._peers else 1)
                if not self._connection.poll(max(0.0, min(patience, end - time.monotonic()))):
                    self.stop()
                    return doing, found, f"no answer for {patience:.0f} s"
                message = self._connection.recv()
                if isinstance(message, str):
                    self.stop()
                    return doing, found, message
                doing, found = message
        except (EOFError, OSError):
            return doing, found, f"its process ended with status {self.stop()}"
        return doing, found, None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self.dry, self.ways))
        self._process.start()
        theirs.close()

    def stop(self) -> int | None:
        """Ends the child, if there is one, and returns its status."""
        if self._process is None:
            return None
        self._process.join(0.1)
        self._process.kill()
        self._process.join()
        self._connection.close()
        code, self._process = self._process.exitcode, None
        return code


def _serve(connection: Connection, dry: bool, ways: tuple[Way, ...]) -> None:
    if dry:
        torch.set_num_threads(1)
        torch._dynamo.config.disable = True
    machine: gpu_measure.Machine = gpu_measure.Cpu() if dry else gpu_measure.Gpu()

    def tell(doing: str, found: Json) -> None:
        connection.send((doing, found))

    while True:
        try:
            order: Order = connection.recv()
        except EOFError:
            return
        try:
            found = _measure(order, machine, ways, dry, tell)
        except Exception as reason:  # the device is lost, or the part's own tensors do not fit
            connection.send(str(reason) if isinstance(reason, gpu_measure.DeviceLost) else gpu_measure.explain(reason))
            return
        connection.send(("the end", found))


def _measure(
    order: Order, machine: gpu_measure.Machine, ways: tuple[Way, ...], dry: bool, tell: gpu_measure.Tell
) -> Json:
    if order.part in gpu_kernels.PARTS:
        main = _sized(MAIN, dry)
        return gpu_kernels.measure_kernels(order.part, main, machine, order.deadline, order.skip, tell)
    cell = next(cell for cell in CELLS if cell.name == order.part)
    return gpu_measure.measure_cell(_sized(cell, dry), ways, machine, order.deadline, order.skip, tell)


def _sized(cell: Cell, dry: bool) -> Cell:
    return cell.tiny() if dry else cell
