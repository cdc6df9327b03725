"""From results to Markdown: every column once, by name; a part names its columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from .targets import MIB, Json, against_floor, allocated, divided, median, ratio, ratios

DOES_NOT_RUN = "does not run"
#: How the failure of a provider begins that runs, and computes something else.
WRONG = "wrong:"


class Line(NamedTuple):
    """A row beside the others of its part."""

    row: Json
    rows: Sequence[Json]
    measured: Json
    base: str

    def first(self, role: str) -> Json | None:
        """The first row of that role; a floor is of products, and has its head frozen where this row's is."""
        frozen = role == "floor" and bool(self.row.get("frozen"))
        matching = (x for x in self.rows if x["role"] == role and bool(x.get("frozen")) == frozen)
        return next((x for x in matching if role != "floor" or not x.get("bytes")), None)

    @property
    def basis(self) -> Json | None:
        return next((x for x in self.rows if x["provider"] == self.base), None)


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _seconds(line: Line) -> str:
    seconds = line.row["seconds"]
    return f"{median(seconds):.3f} x {len(seconds)}" if seconds else ""


def _milliseconds(what: str) -> Callable[[Line], str]:
    def text(line: Line) -> str:
        result = median(line.row.get(what, ()))
        return number(None if result is None else 1e3 * result, ".3f")

    return text


def _range(unit: float) -> Callable[[Line], str]:
    """The shortest and the longest round."""

    def text(line: Line) -> str:
        seconds = line.row["seconds"]
        return f"{unit * min(seconds):.3f}-{unit * max(seconds):.3f}" if seconds else ""

    return text


def _against(role: str, what: str = "seconds") -> Callable[[Line], str]:
    return lambda line: number(ratio(line.row, line.first(role), what), ".2f")


def _spread(line: Line) -> str:
    """The smallest and the largest ratio of a round."""
    result = ratios(line.row, line.basis)
    return f"{min(result):.2f}-{max(result):.2f}" if result else ""


def _entry(of: str, name: str, form: str, unit: float = 1) -> Callable[[Line], str]:
    return lambda line: number(divided((line.row.get(of) or {}).get(name), unit), form)


def _bandwidth(line: Line) -> str:
    return number(divided(line.row["bytes"], 1e9 * (median(line.row["seconds"]) or 0)), ".0f")


def _tokens_a_second(line: Line) -> str:
    return number(divided(line.measured["tokens"], median(line.row["seconds"])), ".0f")


def _right(line: Line) -> str:
    wrong = line.row["wrong"]
    return "" if wrong is None else f"NO: {', '.join(wrong)}" if wrong else "yes"


#: Every column: its text by a row, by name. "/ base" is headed by the base's name.
COLUMNS: dict[str, Callable[[Line], str]] = {
    "seconds": _seconds,
    "/ materialised": _against("materialised"),
    "/ GEMMs": _against("floor"),
    "/ base": lambda line: number(ratio(line.row, line.basis), ".3f"),
    "spread": _spread,
    "range s": _range(1),
    "range ms": _range(1e3),
    "extra MiB": _entry("memory", "allocated", ".1f", MIB),
    "of logits": lambda line: number(divided(allocated(line.row), line.measured["logits_bytes"]), ".1%"),
    "resident": _entry("memory", "resident", ".1f", MIB),
    "products": _entry("work", "products", ".1f"),
    "passes": _entry("work", "passes", ".1f"),
    "d_hidden": _entry("error", "d_hidden", ".0e"),
    "d_weight": _entry("error", "d_weight", ".0e"),
    "error of d_hidden": _entry("error", "d_hidden", ".1e"),
    "error of d_weight": _entry("error", "d_weight", ".1e"),
    "forward ms": _milliseconds("forward"),
    "forward / GEMM": _against("floor", "forward"),
    "backward ms": _milliseconds("backward"),
    "step ms": _milliseconds("seconds"),
    "loss": lambda line: number(line.row["loss"], ".5f"),
    "ms": _milliseconds("seconds"),
    "floor ms": _milliseconds("floor"),
    "/ floor": lambda line: number(against_floor(line.row), ".2f"),
    "GB/s": _bandwidth,
    "tokens/s": _tokens_a_second,
    "peak MiB": _entry("memory", "allocated", ".0f", MIB),
    "largest error": lambda line: number(max((line.row["error"] or {}).values(), default=None), ".1e"),
    "right": _right,
}


def part_table(measured: Json, columns: Sequence[str], base: str = "") -> str:
    """One row a provider (or kernel)."""
    header = ("", *(f"/ {base}" if name == "/ base" else name for name in columns))
    return table(header, part_lines(measured, columns, base))


def part_lines(measured: Json, columns: Sequence[str], base: str = "") -> list[tuple[str, ...]]:
    """The cells of each row; one that fails has its reason in place of all others."""
    lines: list[tuple[str, ...]] = []
    for row in measured["rows"]:
        if row["failure"]:
            lines.append((row["provider"], reason(row["failure"])))
        else:
            line = Line(row, measured["rows"], measured, base)
            lines.append((row["provider"], *(COLUMNS[name](line) for name in columns)))
    return lines


def reason(failure: str) -> str:
    """A failure in a table."""
    return failure if failure.startswith(WRONG) else f"{DOES_NOT_RUN}: {failure}"


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Markdown, its columns aligned so that it reads as well in a terminal. Cells that a line lacks are empty."""
    cells = [(*line, *[""] * (len(header) - len(line))) for line in (header, *lines)]
    # The reason why something fails may be long: it widens no column.
    short = [[x for x in column if not x.startswith((DOES_NOT_RUN, WRONG))] for column in zip(*cells, strict=True)]
    width = [max(3, *map(len, column)) for column in short]
    rule = ["-" * width[0], *("-" * (w - 1) + ":" for w in width[1:])]
    rows = [[line[0].ljust(width[0]), *map(str.rjust, line[1:], width[1:])] for line in cells]
    return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:]))
