"""Curves: time and memory of every competitor along one size, doubled until nothing fits or the time is over."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .measure import OUT_OF_MEMORY, Method, Part
from .problem import Problem
from .provider import ROLES, Provider
from .targets import Json, median, total_bytes
from .worker import Worker

#: Any failure is a line. Two rounds after a whole step that warms up: the curve's shape is the question, not the
#: last percent.
METHOD = Method(rounds=2, may_fail=ROLES, whole=True)
#: From where to where a size is doubled.
RANGES = {"tokens": (128, 2**20), "vocabulary": (4096, 2**18), "hidden": (128, 2**13)}
#: Steps in a first call: on few tokens, then a whole one.
FIRST_CALLS = 1.5
#: What the first point may take of the time, judged by the step, which is larger.
FIRST_SHARE = 0.5
#: Seconds after the end in which a step that has begun may end.
GRACE = 20.0
#: Why a provider ends before the memory does.
NO_TIME = "left out: no time for a larger one"


class Known(NamedTuple):
    """Rows of a step of some problem."""

    problem: Problem
    rows: Sequence[Json]


@dataclass(frozen=True)
class Curve:
    """One size's curve.

    Args:
        axis: a key of `RANGES`.
        loss: the name that the report has for what is computed.
        problem: the problem of a value of that size.
        memory: bytes that a step may take.
    """

    axis: str
    loss: str
    problem: Callable[[int], Problem]
    providers: Sequence[Provider]
    memory: int

    def values(self) -> Iterator[int]:
        value, last = RANGES[self.axis]
        while value <= last:
            yield value
            value *= 2

    def measure(self, worker: Worker, end: float, *, gpu: bool, known: Known, keep: Callable[[Json], None]) -> Json:
        """The points as far as memory and time allow; `keep` is told after each.

        No point begins that would not end in time, judged by the one before; the slowest are left out first. `known`
        is what the same providers' step told: who failed there is left out, and who would take most of the time.
        """
        result: Json = {"kind": "curve", "axis": self.axis, "loss": self.loss, "points": []}
        result |= {"complete": False, "ended_by": "range"}
        left_out = {row["provider"]: row["failure"] for row in known.rows if row["failure"]}
        running = [row for row in known.rows if not row["failure"]]
        smaller = _work(self.problem(next(self.values()))) / _work(known.problem)
        left_out |= too_slow(running, smaller, FIRST_SHARE * (end - time.monotonic()))
        for value in self.values():
            part = Part(f"{self.axis} {value}", self.problem(value), tuple(self.providers), method=METHOD)
            point = worker.measure(part, end, end + GRACE, gpu=gpu, skip=left_out)
            if not point["complete"]:
                result["ended_by"] = _ended_by(point.get("failure"))
                break
            result["points"].append({"value": value, **point})
            keep(result)
            left_out |= self._outgrown(point, self.problem(2 * value))
            fitting = [row for row in point["rows"] if row["provider"] not in left_out]
            left_out |= too_slow(fitting, 2.0, end - time.monotonic())
            if all(provider.name in left_out for provider in self.providers if provider.role != "floor"):
                result["ended_by"] = "time" if NO_TIME in left_out.values() else "memory"
                break
        return result | {"complete": len(result["points"]) > 0}

    def _outgrown(self, point: Json, following: Problem) -> dict[str, str]:
        """Who would take more than the memory at the next point, judged by this one's, and who failed here."""
        growth = following.logits_bytes / point["logits_bytes"]
        result = {row["provider"]: row["failure"] for row in point["rows"] if row["failure"]}
        for row in point["rows"]:
            taken = total_bytes(row, point)
            if taken is not None and growth * taken > self.memory:
                result[row["provider"]] = f"left out: would take more than {self.memory / 2**30:.3g} GiB"
        return result


def _ended_by(failure: str | None) -> str:
    """Why a point is not complete: the time was over, its inputs did not fit, or something failed for all of it."""
    if failure is None:
        return "time"
    return "memory" if failure == OUT_OF_MEMORY else "failure"


def too_slow(rows: Sequence[Json], growth: float, seconds: float) -> dict[str, str]:
    """Who must be left out so that the others end their next point in time, other libraries first.

    The next point's step takes `growth` times as long as a row's; what the first call took beyond it, which is
    compilation, it takes again.
    """
    needs = {row["provider"]: _needs(row, growth) for row in rows}
    result: dict[str, str] = {}
    for row in sorted(rows, key=lambda row: (row["role"] != "peer", -needs[row["provider"]])):
        if row["role"] != "floor" and (sum(needs.values()) > seconds or needs[row["provider"]] > seconds / 2):
            del needs[row["provider"]]
            result[row["provider"]] = NO_TIME
    return result


def _needs(row: Json, growth: float) -> float:
    """Seconds of a point: compilation, a whole step that warms up, and the rounds."""
    step = median(row["seconds"]) or 0.0
    compilation = max(0.0, (row["first_call_seconds"] or 0.0) - FIRST_CALLS * step)
    return compilation + growth * (1 + METHOD.rounds) * step


def _work(problem: Problem) -> int:
    """What a step's products are proportional to."""
    return problem.tokens * problem.hidden * problem.vocabulary
