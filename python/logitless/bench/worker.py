"""A process of its own, which a kernel may hang or take down without taking the report with it.

The parent sends a function and its arguments; the child answers with what it is about to do and what it has so far, and
at last with the result. A child that stays silent is ended, one that died is replaced, and the provider that it was
busy with becomes a line in the table with that reason.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from .machine import this_machine
from .measure import DeviceLost, Part, Tell, explain, silent
from .providers.materialised import forget_constants
from .targets import Json

#: Seconds without a word after which a child counts as hung: several times a compiled provider's first call. A peer may
#: compile and try many kernels in its first call, and has so many times as long.
PATIENCE, OF_PEERS = 75.0, 2
#: Times that a part is begun again after its process ended.
RESTARTS = 3
_Result = tuple[str, Json, str | None]


class Worker:
    """A child process, started when it is needed.

    Args:
        plain: the child has one thread and compiles nothing, for tiny runs.
        peers: names of the providers that have more patience.
        variables: of the child's environment, beside this process's own.
        heard: told of every message of the child: what it is about to do, and what it has so far.
        log: file that what the child prints is added to; None: it prints where this process does.
    """

    def __init__(
        self,
        *,
        plain: bool = False,
        peers: frozenset[str] = frozenset(),
        patience: float = PATIENCE,
        variables: Mapping[str, str] | None = None,
        heard: Tell = silent,
        log: Path | None = None,
    ) -> None:
        self.plain, self.peers, self.patience, self.variables = plain, peers, patience, variables or {}
        self.heard, self.log = heard, log
        self.fatal: dict[str, str] = {}  # providers that ended a process, with the reason; not called again
        self._process: BaseProcess | None = None
        self._connection: Connection

    def measure(
        self, part: Part, deadline: float, end: float, *, gpu: bool, skip: Mapping[str, str] | None = None
    ) -> Json:
        """The part, complete or as far as it came: no round begins after `deadline`, and at `end` all is over.

        `skip` has the reason for each provider that is left out. A peer that hangs has more patience only as far as
        that is no more than half of the time.
        """
        result: Json = {"rows": [], "complete": False}
        for _ in range(RESTARTS + 1):
            left_out = {**self.fatal, **(skip or {})}
            half = max(self.patience, (deadline - time.monotonic()) / 2)
            doing, result, reason = self.call(_measure, part, deadline, left_out, gpu, end=end, most=half)
            result = result or {"rows": [], "complete": False}
            if reason is None or time.monotonic() >= end:
                break
            if doing not in [row["provider"] for row in result["rows"]]:
                return {**result, "failure": reason}
            self.fatal[doing] = f"{reason}, in {part.name}"
            for row in result["rows"]:
                row["failure"] = row["failure"] or self.fatal.get(row["provider"])
        return result

    def call(self, function: Callable[..., Json], *arguments: Any, end: float, most: float = math.inf) -> _Result:
        """Calls `function(*arguments, tell)` in the child, which may be silent for `most` seconds.

        Returns:
            What was being done last, the result (as far as it came), and why it ended early, if it did.
        """
        if self._process is None:
            self._start()
        doing, done = "the start", False
        result: Json = {}
        try:
            self._connection.send((function, arguments))
            while not done:
                patience = self.patience * (OF_PEERS if doing in self.peers else 1)
                patience = max(0.0, min(patience, most, end - time.monotonic()))
                if not self._connection.poll(patience):
                    self.stop()
                    return doing, result, f"no answer for {patience:.0f} s"
                message = self._connection.recv()
                if isinstance(message, str):
                    self.stop()
                    return doing, result, message
                doing, result, done = message
                self.heard(doing, result)
        except (EOFError, OSError):
            return doing, result, f"its process ended with status {self.stop()}"
        return doing, result, None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self.plain, self.log))
        with _environment(self.variables):
            self._process.start()
        theirs.close()

    def stop(self) -> int | None:
        """Ends the child, if there is one, and returns its status."""
        if self._process is None:
            return None
        self._connection.close()  # one that waits for its next order ends by itself
        self._process.join(2.0)
        self._process.kill()
        self._process.join()
        code, self._process = self._process.exitcode, None
        return code


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """A child reads some of its variables before any of its code runs, so they are set here."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _serve(connection: Connection, plain: bool, log: Path | None) -> None:
    if log is not None:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interruption is the parent's, which ends this process
    if plain:
        torch.set_num_threads(1)
        torch._dynamo.config.disable = True

    def tell(doing: str, result: Json) -> None:
        connection.send((doing, result, False))

    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            result = function(*arguments, tell)
        except Exception as reason:  # the device is lost, or the part's own tensors do not fit
            connection.send(str(reason) if isinstance(reason, DeviceLost) else explain(reason))
            return
        connection.send(("the end", result, True))


def _measure(part: Part, deadline: float, skip: dict[str, str], gpu: bool, tell: Tell) -> Json:
    """The part; other processes then find the memory free that it took."""
    machine = this_machine(gpu=gpu)
    result = part.measure(machine, deadline, skip, tell)
    forget_constants()
    machine.recover()
    return result
