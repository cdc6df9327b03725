"""Targets: what logitless has to reach on a part, and what became of it."""

from __future__ import annotations

import operator
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

Json = dict[str, Any]
Measure = Literal["seconds", "forward", "memory", "error", "bandwidth"]
MIB = 2**20

#: In place of a provider's name: the slowest of logitless's.
SLOWEST = "the slowest"
#: What memory may be relative to beside another provider's.
LOGITS, HALF_LOGITS = "float32 logits", "bfloat16 logits"
HEAD_GRADIENT, BUDGET = "the head's gradient in float32", "256 MiB"
#: The floors that kernels have of their own.
PRODUCT, COPY = "one GEMM as large", "a copy"

_NAMES = {
    "seconds": "time",
    "forward": "forward",
    "memory": "extra memory",
    "error": "gradient error",
    "bandwidth": "bandwidth",
}
_SIGNS: dict[str, Callable[[float, float], bool]] = {"<=": operator.le, "<": operator.lt, ">=": operator.ge}


@dataclass(frozen=True)
class Target:
    """`provider`'s time, memory, error or bandwidth, relative to another provider's (or a size above).

    `error` is the larger ratio of the two gradients' errors.
    """

    provider: str
    measure: Measure
    relative_to: str
    limit: float
    sign: Literal["<=", "<", ">="] = "<="

    def line(self, measured: Json | None) -> tuple[str, str, str, str]:
        """What is asked, what was measured, the limit, and the verdict."""
        provider, value = (self.provider, None) if measured is None else reached(self, measured)
        what = f"{provider}: {_NAMES[self.measure]} / {self.relative_to}"
        verdict = "not measured" if value is None else "met" if _SIGNS[self.sign](value, self.limit) else "missed"
        return what, "" if value is None else f"{value:.3f}", f"{self.sign} {self.limit:.3g}", verdict


def reached(target: Target, measured: Json) -> tuple[str, float | None]:
    """The provider that it is about, and the measured counterpart of `target.limit`: None where one side is missing."""
    rows = {row["provider"]: row for row in measured["rows"] if not row["failure"]}
    if target.provider == SLOWEST:
        name, value = slowest(target.relative_to, rows) or ("none", None)
        return f"{SLOWEST}, {name}", value
    row, other = rows.get(target.provider), rows.get(target.relative_to)
    return target.provider, None if row is None else _reached(target, row, other, measured)


def _reached(target: Target, row: Json, other: Json | None, measured: Json) -> float | None:
    if target.relative_to in (PRODUCT, COPY):
        value = against_floor(row)
        return 1 / value if value is not None and target.measure == "bandwidth" else value
    if target.measure == "memory":
        return divided(allocated(row), _whole(target.relative_to, other, measured))
    if target.measure == "error":
        return None if other is None else _gradient_error(row, other)
    return ratio(row, other, target.measure)


def _whole(relative_to: str, other: Json | None, measured: Json) -> float | None:
    """What memory is relative to, in bytes."""
    logits = measured["logits_bytes"]
    sizes = {LOGITS: logits, HALF_LOGITS: logits / 2, BUDGET: 256 * MIB}
    sizes[HEAD_GRADIENT] = measured.get("head_gradient_bytes")
    return sizes[relative_to] if relative_to in sizes else allocated(other)


def _gradient_error(row: Json, other: Json) -> float | None:
    if not (row["error"] and other["error"]):
        return None
    return max(row["error"][name] / other["error"][name] for name in ("d_hidden", "d_weight"))


def slowest(base: str, rows: dict[str, Json]) -> tuple[str, float] | None:
    """The provider of logitless with the largest ratio to `base`."""
    other = rows.get(base)
    ours = [row for row in rows.values() if row["role"] == "logitless" and row is not other and ratios(row, other)]
    result = [(row["provider"], statistics.median(ratios(row, other))) for row in ours]
    return max(result, key=lambda x: x[1], default=None)


def ratio(row: Json | None, other: Json | None, what: str = "seconds") -> float | None:
    """Median over the rounds that both ran in of the ratio of their times."""
    result = ratios(row, other, what)
    return statistics.median(result) if result else None


def ratios(row: Json | None, other: Json | None, what: str = "seconds") -> list[float]:
    """The ratio of each round that both ran in."""
    if row is None or other is None:
        return []
    return [a / b for a, b in zip(row.get(what, ()), other.get(what, ()), strict=False)]


def against_floor(row: Json) -> float | None:
    """A kernel's time over its floor's, within turns; where that is a copy, both for each byte."""
    if row["failure"] or not row["seconds"] or not row["floor"]:
        return None
    bytes_ = row["floor_bytes"] / row["bytes"] if row["floor_bytes"] else 1.0
    return bytes_ * statistics.median(x / y for x, y in zip(row["seconds"], row["floor"], strict=True))


def allocated(row: Json | None) -> float | None:
    """Extra memory by the allocator, in bytes."""
    return None if row is None or not row["memory"] else row["memory"]["allocated"]


def total_bytes(row: Json, measured: Json) -> int | None:
    """Everything that a step held at its peak: inputs, head, gradients and the extra memory."""
    extra = allocated(row)
    return None if extra is None else int(extra) + measured["held_bytes"]


def divided(value: float | None, unit: float | None) -> float | None:
    return None if value is None or not unit else value / unit


def median(values: Iterable[float]) -> float | None:
    result = list(values)
    return statistics.median(result) if result else None
