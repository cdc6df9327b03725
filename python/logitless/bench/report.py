"""A report: a file of results, brought up to date part by part, and the tables beside it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from logitless.training.files import write_text

from .environment import machine_kind, provenance
from .measure import Part
from .tables import part_table, table
from .targets import Json, Target


def heading(title: str, parts: Json) -> str:
    """The title, unless a part is of a tiny run."""
    tiny = any(part["environment"].get("tiny") for part in parts.values())
    return "A tiny run: no figure here means anything" if tiny else title


def markdown(title: str, sections: Sequence[str]) -> str:
    return "\n\n".join([f"# {title}", *sections]) + "\n"


def section(part: Part, measured: Json) -> str:
    """One part: when and where it was measured, and its table."""
    return "\n\n".join([f"## {part.name}", about(measured), part_table(measured, part.columns, part.base)])


def about(measured: Json) -> str:
    """The problem, its circumstances, and whether all of it was measured."""
    problem = f"{measured['problem']}. " if "problem" in measured else ""
    failure = f" {measured['failure']}." if measured.get("failure") else ""
    cut = "" if measured.get("complete", True) else " NOT COMPLETE: the time ended, or the process did."
    return f"{problem}{provenance(measured['environment'])}{failure}{cut}"


def targets_table(targets: Sequence[tuple[str, Sequence[Target]]], parts: Json) -> str:
    """Every target by its part's name, what was measured, and whether it is met."""
    lines = [(name, *target.line(parts.get(name))) for name, some in targets for target in some]
    return table(("part", "", "measured", "target", ""), lines)


def load(path: Path) -> Json:
    return json.loads(path.read_text())


def save(results: Json, path: Path, tables: Callable[[Json], str]) -> None:
    """JSON, and the tables as Markdown beside it; a file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(results, indent=1) + "\n")
    write_text(path.with_suffix(".md"), tables(results))


class Report:
    """The file of results.

    Args:
        folder: where it is written; None: nowhere.
        about: the environment of what is measured now.
        end: nothing new begins after it, on `time.monotonic`'s clock.
        tables, text: the whole file's Markdown, and that of one part by its name.
        earlier: a file of results to go on with where the folder has none.
    """

    #: Seconds kept back for a last step to end in.
    RESERVE = 0.0

    def __init__(
        self,
        name: str,
        folder: Path | None,
        about: Json,
        *,
        end: float,
        tiny: bool,
        tables: Callable[[Json], str],
        text: Callable[[str, Json], str],
        earlier: Path | None = None,
    ) -> None:
        self.tables, self.text = tables, text
        self.about, self.end, self.tiny = about, end, tiny
        self.folder, self.path = folder, folder and folder / f"{name}.json"
        self.results: Json = {"parts": {}}
        files = (path for path in (self.path, earlier) if path is not None and path.exists())
        if result := next(files, None):
            self.results |= load(result)

    @property
    def deadline(self) -> float:
        return self.end - self.RESERVE

    def out_of_time(self, needs: float = 0.0) -> bool:
        return time.monotonic() + needs > self.deadline

    def has(self, name: str) -> bool:
        """Whether the part is complete, from this kind of machine, this device and this commit."""
        result = self.earlier(name)
        return result is not None and result.get("complete", True)

    def earlier(self, name: str) -> Json | None:
        """The part as far as it came, from this kind of machine, this device and this commit."""
        result = self.results["parts"].get(name)
        return result if result is not None and _origin(result["environment"]) == _origin(self.about) else None

    def measure(self, names: Sequence[str], needs: Callable[[str], float] = lambda name: 0.0) -> None:
        """The parts in order. What there is no time for is named on standard error, and a smaller part is begun."""
        left = []
        for name in names:
            if self.out_of_time(needs(name)):
                left.append(name)
                continue
            print(name, file=sys.stderr)
            self.keep(name, {**self.measure_part(name), "environment": self.about})
        if left:
            print(f"out of time; the same command goes on with: {' '.join(left)}", file=sys.stderr)

    def measure_part(self, name: str) -> Json:
        raise NotImplementedError

    def keep(self, name: str, result: Json) -> None:
        self.results["parts"][name] = result
        self.save()
        print(self.text(name, result), flush=True)

    def save(self) -> None:
        if self.path is not None:
            save(self.results, self.path, self.tables)


def _origin(about: Json) -> tuple[object, ...]:
    """What measurements must share to be parts of one report."""
    return machine_kind(about), about.get("device", about["cpu"]), about["commit"]
