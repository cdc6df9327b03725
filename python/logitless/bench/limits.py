"""Limits: the most that each competitor can do in a given memory, found by trying, not by a formula.

A trial is one whole step, whose peak is measured. The next size comes from the line through the last two peaks, so
that few trials are needed; what counts is the largest size whose own peak was within the memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from .measure import Method, Part
from .problem import Problem
from .provider import ROLES, Provider
from .targets import Json, total_bytes
from .worker import Worker

#: A whole step, no rounds.
METHOD = Method(rounds=0, may_fail=ROLES, whole=True)
#: The search ends where what fits and what does not are this close, and grows at most so many times a trial.
CLOSE, GROWTH = 1.05, 8
#: A trial that the time allows must be so many times larger than what fitted, or the search ends there.
WORTH = 1.25
#: The share of the memory that is aimed at, so that the next trial does fit.
AIM = 0.99


class Trial(NamedTuple):
    """One size that was tried. `bytes` is the step's whole peak: inputs, head, gradients and everything between."""

    value: int
    bytes: int | None
    seconds: float | None
    fits: bool
    failure: str | None = None


@dataclass
class Search:
    """The largest value that fits, from a function that tries one.

    Args:
        attempt: tries a value.
        memory: bytes that have to suffice.
        end: no trial begins that would end later, judged by the ones before; on `time.monotonic`'s clock.
        most: no value above it is tried.
    """

    attempt: Callable[[int], Trial]
    memory: int
    end: float
    most: int
    tried: list[Trial] = field(default_factory=list)
    ended_by: str = "memory"

    def run(self, first: int) -> None:
        value: int | None = first
        while value is not None:
            self.tried.append(self.attempt(value))
            value = self._next()

    @property
    def largest(self) -> Trial | None:
        """The largest that fitted."""
        return max((trial for trial in self.tried if trial.fits), default=None)

    def _next(self) -> int | None:
        """What to try now; None where the search has ended, with `ended_by` saying why."""
        low, high = self.largest, min((t.value for t in self.tried if not t.fits), default=self.most + 1)
        if low is None:
            failure = self.tried[-1].failure
            if self.tried[-1].value > 1 and failure is None:
                return self.tried[-1].value // 2
            self.ended_by = "failure" if failure else "memory"
            return None
        if low.value >= self.most:
            self.ended_by = "cap"
            return None
        value = max(low.value + 1, min(self._aimed(low), high - 1, GROWTH * low.value))
        if value >= high or value <= CLOSE * low.value:
            return None
        affordable = self._affordable()
        if affordable < min(value, WORTH * low.value):
            self.ended_by = "time"
            return None
        return min(value, affordable)

    def _affordable(self) -> int:
        """The largest value whose trial would end in time, by the line through the last two that ended."""
        known = sorted((t.value, t.seconds) for t in self.tried if t.seconds is not None)
        left = self.end - time.monotonic()
        if len(known) < 2:
            return self.most if left > 0 else 0
        (x0, y0), (x1, y1) = known[-2:]
        slope = max(y1 - y0, 0.1 * y1) / (x1 - x0)
        return int(x1 + (left - y1) / slope) if slope else self.most

    def _aimed(self, low: Trial) -> int:
        """Where the line through the last two peaks reaches the memory; half way to what does not fit, if it is out."""
        high = min((t for t in self.tried if not t.fits), default=None)
        known = sorted((t.value, t.bytes) for t in self.tried if t.bytes is not None)
        if len(known) < 2:
            return 2 * low.value
        (x0, y0), (x1, y1) = known[-2:]
        aimed = x0 + (AIM * self.memory - y0) * (x1 - x0) / (y1 - y0) if y1 > y0 else GROWTH * low.value
        if high is not None and not low.value * 1.01 < aimed < high.value:
            return (low.value + high.value) // 2
        return int(aimed)


@dataclass(frozen=True)
class Limit:
    """The largest problem of a family that each provider can do in `memory` bytes.

    Args:
        name: of what is counted: "longest" counts the tokens of a sequence, "pairs" pairs.
        loss: the name that the report has for what is computed.
        problem: the problem of a count.
        first, most: the first count that is tried, and the last that may be.
    """

    name: str
    loss: str
    problem: Callable[[int], Problem]
    providers: tuple[Provider, ...]
    memory: int
    first: int
    most: int = 2**24

    def measure(self, worker: Worker, end: float, *, gpu: bool, skip: Json, keep: Callable[[Json], None]) -> Json:
        """One row for each provider, in turn; each has an equal share of the time that is left."""
        first = self.problem(self.first)
        unit = "pairs" if self.name == "pairs" else "tokens"
        about = {"unit": unit, "length": first.length, "problem": str(first), "memory_bytes": self.memory}
        result: Json = {"kind": "limit", "loss": self.loss, **about, "rows": [], "complete": False}
        for left, provider in zip(range(len(self.providers), 0, -1), self.providers, strict=True):
            now = time.monotonic()
            share = now + max(0.0, end - now) / left
            result["rows"].append(self._row(provider, worker, share, end, gpu, skip))
            keep(result)
        return result | {"complete": True}

    def _row(self, provider: Provider, worker: Worker, share: float, end: float, gpu: bool, skip: Json) -> Json:
        about = {"provider": provider.name, "role": provider.role}
        if reason := provider.absent or skip.get(provider.name):
            return about | {"largest": None, "bytes": None, "ended_by": "failure", "tried": [], "failure": reason}

        def attempt(value: int) -> Trial:
            return self._attempt(provider, value, worker, end, gpu)

        search = Search(attempt, self.memory, share, self.most)
        search.run(self.first)
        best = search.largest
        return about | {
            "largest": best and best.value,
            "bytes": best and best.bytes,
            "ended_by": search.ended_by,
            "tried": [trial._asdict() for trial in search.tried],
            "failure": search.tried[-1].failure if best is None else None,
        }

    def _attempt(self, provider: Provider, value: int, worker: Worker, end: float, gpu: bool) -> Trial:
        problem = self.problem(value)
        once = replace(provider, compared="")  # whether it is right is known from the step
        part, start = Part(f"{self.name} {value}", problem, (once,), method=METHOD), time.monotonic()
        result = worker.measure(part, end, end, gpu=gpu)
        [row] = result["rows"] or [{"failure": result.get("failure", "no time was left"), "memory": None}]
        taken = total_bytes(row, result)
        fits = row["failure"] is None and taken is not None and taken <= self.memory
        worker.fatal.pop(provider.name, None)  # a size that took the process down says nothing about a smaller one
        return Trial(value, taken, time.monotonic() - start, fits, row["failure"])
