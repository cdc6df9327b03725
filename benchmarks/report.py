"""From measured rows to tables: medians, ratios, and what became of the targets."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from .parts import LOGITS, PARTS, Bound, Part, Target

MIB = 2**20
DOES_NOT_RUN = "does not run"
COLUMNS = ("", "seconds", "/ materialised", "/ GEMMs", "extra MiB", "of logits", "resident", "d_hidden", "d_weight")
Json = dict[str, Any]


def markdown(results: Json) -> str:
    """The whole report; parts in the order of the table, those not measured left out."""
    found = [(part, results["parts"][part.name]) for part in PARTS if part.name in results["parts"]]
    sections = ["# Measured on a CPU", _HOW_TO_READ, "## Targets", targets_table(found)]
    for part, measured in found:
        sections += [f"## {part.name}", _provenance(measured), part_table(measured, part.bound)]
    return "\n\n".join(sections) + "\n"


_HOW_TO_READ = (
    "Forward and backward of one step. Ratios are medians over rounds of the ratio within a round; `x n` is the number "
    "of rounds. Extra memory is beyond the inputs and one copy of the gradients (below float32, and of their float32 "
    "accumulators): by PyTorch's allocator, as a share of the float32 logits, and by the resident set. Errors are "
    "relative, against float64 on few tokens. benchmarks/README.md says how each is measured."
)


def _provenance(measured: Json) -> str:
    e = measured["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in e["versions"].items() if version)
    units = "with" if e["bf16_units"] else "without"
    return (
        f"{measured['problem']}. {e['date']}, commit {e['commit'] or 'unknown'}, {e['cpu']} ({e['capability']}, "
        f"{units} bf16 units), {e['threads']} threads, load {e['load']} at the start. {versions}."
    )


def part_table(measured: Json, bound: Bound | None = None) -> str:
    """One row a provider; under a bound, with what it is relative to and what was counted in place of memory."""
    rows: list[Json] = measured["rows"]
    if bound is not None:
        return _bounded_table(rows, bound)
    base, floor = (_first(rows, role) for role in ("materialised", "floor"))
    lines = []
    for row in rows:
        if row["failure"]:
            lines.append((row["provider"], f"{DOES_NOT_RUN}: {row['failure']}", *[""] * 7))
            continue
        memory, error = row["memory"] or {}, row["error"] or {}
        lines.append(
            (
                row["provider"],
                _seconds(row),
                number(ratio(row, base), ".2f"),
                number(ratio(row, floor), ".2f"),
                number(scaled(memory.get("allocated"), MIB), ".1f"),
                number(scaled(memory.get("allocated"), measured["logits_bytes"]), ".1%"),
                number(scaled(memory.get("resident"), MIB), ".1f"),
                number(error.get("d_hidden"), ".0e"),
                number(error.get("d_weight"), ".0e"),
            )
        )
    return table(COLUMNS, lines)


def _bounded_table(rows: list[Json], bound: Bound) -> str:
    base, floor = next((row for row in rows if row["provider"] == bound.relative_to), None), _first(rows, "floor")
    lines = []
    for row in rows:
        error, work = row["error"] or {}, row["work"] or {}
        lines.append(
            (
                row["provider"],
                _seconds(row),
                number(ratio(row, base), ".3f"),
                _spread(row, base),
                number(ratio(row, floor), ".2f"),
                number(work.get("products"), ".1f"),
                number(work.get("passes"), ".1f"),
                number(error.get("d_hidden"), ".0e"),
                number(error.get("d_weight"), ".0e"),
            )
        )
    counted = "/ GEMMs", "products", "passes", "d_hidden", "d_weight"
    return table(("", "seconds", f"/ {bound.relative_to}", "spread", *counted), lines)


def _spread(row: Json, base: Json | None) -> str:
    """The smallest and the largest ratio of a round."""
    found = ratios(row, base)
    return f"{min(found):.2f}-{max(found):.2f}" if found else ""


def slowest(bound: Bound, measured: Json) -> tuple[str, float] | None:
    """Of logitless's providers the one with the largest ratio to what the bound names."""
    rows = measured["rows"]
    base = next((row for row in rows if row["provider"] == bound.relative_to), None)
    ours = [row for row in rows if row["role"] == "logitless" and row is not base and ratios(row, base)]
    found = [(row["provider"], statistics.median(ratios(row, base))) for row in ours]
    return max(found, key=lambda x: x[1], default=None)


def targets_table(found: Sequence[tuple[Part, Json]]) -> str:
    """Each target, what was measured, and whether it is met."""
    lines = []
    for part, measured in found:
        if part.bound is not None:
            lines.append((part.name, *_of_bound(part.bound, measured)))
        for target in part.targets:
            value = reached(target, measured)
            what = "time" if target.measure == "seconds" else "extra memory"
            name = f"{target.provider.name}: {what} / {target.relative_to}"
            lines.append((part.name, name, number(value, ".3f"), f"{target.limit:.3g}", _verdict(value, target.limit)))
    return table(("part", "", "measured", "at most", ""), lines)


def _of_bound(bound: Bound, measured: Json) -> tuple[str, ...]:
    name, value = slowest(bound, measured) or ("none", None)
    what = f"the slowest, {name}: time / {bound.relative_to}"
    return what, number(value, ".3f"), f"{bound.limit:.3g}", _verdict(value, bound.limit)


def _verdict(value: float | None, limit: float) -> str:
    return "not measured" if value is None else "met" if value <= limit else "missed"


def reached(target: Target, measured: Json) -> float | None:
    """The measured counterpart of `target.limit`; None where one side is missing."""
    by_name = {row["provider"]: row for row in measured["rows"]}
    row, other = by_name.get(target.provider.name), by_name.get(target.relative_to)
    if target.measure == "seconds":
        return ratio(row, other)
    ours = _allocated(row)
    theirs = measured["logits_bytes"] if target.relative_to == LOGITS else _allocated(other)
    return None if ours is None or not theirs else ours / theirs


def ratio(row: Json | None, other: Json | None) -> float | None:
    """Median over the rounds that both ran in of the ratio of their times."""
    found = ratios(row, other)
    return statistics.median(found) if found else None


def ratios(row: Json | None, other: Json | None) -> list[float]:
    """Of each round that both ran in."""
    if row is None or other is None:
        return []
    return [a / b for a, b in zip(row["seconds"], other["seconds"], strict=False)]


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Markdown, its columns aligned so that it reads as well in a terminal."""
    cells = [header, *lines]
    # The reason why something does not run may be long: it widens no column.
    width = [max(3, *(len(x) for x in column if not x.startswith(DOES_NOT_RUN))) for column in zip(*cells, strict=True)]
    rule = ["-" * width[0], *("-" * (w - 1) + ":" for w in width[1:])]
    rows = [[line[0].ljust(width[0]), *map(str.rjust, line[1:], width[1:])] for line in cells]
    return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:]))


def _first(rows: Sequence[Json], role: str) -> Json | None:
    return next((row for row in rows if row["role"] == role), None)


def _allocated(row: Json | None) -> int | None:
    return None if row is None or row["memory"] is None else row["memory"]["allocated"]


def _seconds(row: Json) -> str:
    seconds = row["seconds"]
    return f"{statistics.median(seconds):.3f} x {len(seconds)}" if seconds else ""


def scaled(value: float | None, unit: int) -> float | None:
    return None if value is None else value / unit


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
