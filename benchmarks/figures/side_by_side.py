"""Tables with columns for each kind of machine that has results."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from logitless.bench.providers import floors, materialised, own
from logitless.bench.report import load
from logitless.bench.tables import number
from logitless.bench.targets import MIB, Json, allocated, divided, ratio

from .results import origin, paragraph, plain_table

#: What a provider measured, then what the others did.
Rows = Sequence[Json | None]


class Row(NamedTuple):
    """A provider, the others that it stands beside, and where all of them were measured.

    Args:
        file: of results, without its ending.
        part: pattern of the part's name.
        problem: what the part's problem begins with; one part may have other tokens on other machines.
    """

    label: str
    file: str
    part: str
    problem: str = ""
    ours: str = own.NLL.name
    others: tuple[str, ...] = (materialised.NLL.name, floors.GEMMS.name)

    def measured(self, folder: Path) -> Json | None:
        """The part of that machine; of several that fit, the one with the most rounds."""
        path = folder / f"{self.file}.json"
        parts = load(path)["parts"] if path.exists() else {}
        fitting = [part for name, part in parts.items() if re.fullmatch(self.part, name) and self._fits(part)]
        return max(fitting, key=lambda part: len(_methods(part)[self.ours]["seconds"]), default=None)

    def _fits(self, part: Json) -> bool:
        timed = _methods(part).get(self.ours, {}).get("seconds")
        return bool(timed) and part.get("problem", "").startswith(self.problem)

    def rows(self, part: Json) -> Rows:
        methods = _methods(part)
        return [methods.get(name) for name in (self.ours, *self.others)]


def _methods(part: Json) -> Json:
    """What was timed in a part, by name."""
    return part["methods"] if "methods" in part else {row["provider"]: row for row in part["rows"]}


class Table(NamedTuple):
    """Rows, and the columns that each kind of machine has of them, all under one heading at the left."""

    heading: str
    columns: tuple[str, ...]
    cells: Callable[[Rows], Sequence[str]]
    rows: Sequence[Row]

    def text(self, results: Path) -> str:
        """The table, and what each machine is. Rows and machines without a measurement are left out."""
        measured = {folder.name: [row.measured(folder) for row in self.rows] for folder in sorted(results.iterdir())}
        kinds = {kind: parts for kind, parts in measured.items() if any(parts)}
        abouts = (origin(kind, [part["environment"] for part in parts if part]) for kind, parts in kinds.items())
        return "\n".join([self._table(kinds), *(paragraph(f"- {about}", "  ").rstrip() for about in abouts)]) + "\n"

    def _table(self, kinds: dict[str, list[Json | None]]) -> str:
        blank = ("",) * (len(self.columns) - 1)
        lines = [[self.heading, *self.columns * len(kinds)]]
        for row, *parts in zip(self.rows, *kinds.values(), strict=True):
            if any(parts):
                lines.append([row.label, *(cell for part in parts for cell in self._cells(row, part))])
        return plain_table(["", *(cell for kind in kinds for cell in (f"`{kind}`", *blank))], lines)

    def _cells(self, row: Row, part: Json | None) -> Sequence[str]:
        return ("",) * len(self.columns) if part is None else self.cells(row.rows(part))


def times(rows: Rows) -> Sequence[str]:
    """The provider's time over that of each of the others."""
    mine, *others = rows
    return [number(ratio(mine, other), ".2f") for other in others]


def memory(rows: Rows) -> Sequence[str]:
    """MiB of each beside inputs and gradients, by the allocator."""
    return [number(divided(allocated(row), MIB), ".0f") for row in rows]
