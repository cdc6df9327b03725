"""A suite's report: its file of results, brought up to date part by part, and the tables beside it."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..internals import write_text
from . import memory
from .environment import RESULTS, describe, machine_kind, provenance
from .machine import this_machine
from .measure import Part, silent
from .tables import part_table, table
from .targets import Json, Target


@dataclass(frozen=True)
class Suite:
    """Parts that are measured by one command and written to one file, `name`.json, with the tables in `name`.md."""

    name: str
    title: str
    how_to_read: str
    parts: tuple[Part, ...]

    def markdown(self, results: Json) -> str:
        """The whole report; parts that were not measured are left out."""
        parts = results["parts"]
        result = [part for part in self.parts if part.name in parts]
        sections = [section(part, parts[part.name]) for part in result]
        return markdown(heading(self.title, parts), [self.how_to_read, "## Targets", self.targets(parts), *sections])

    def targets(self, parts: Json) -> str:
        return targets_table([(part.name, part.targets) for part in self.parts], parts)


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


class ProcessorReport(Report):
    """A suite on the processor: parts in this process, and memory in one of its own for each provider."""

    def __init__(
        self, suite: Suite, folder: Path | None, about: Json, *, end: float, tiny: bool, rounds: int | None = None
    ) -> None:
        super().__init__(suite.name, folder, about, end=end, tiny=tiny, tables=suite.markdown, text=self._text)
        self.parts = {part.name: self._sized(part, rounds) for part in suite.parts}

    def _sized(self, part: Part, rounds: int | None) -> Part:
        part = part.tiny() if self.tiny else part
        return part if rounds is None else replace(part, method=replace(part.method, rounds=rounds))

    def measure_part(self, name: str) -> Json:
        """Times and errors of all; memory of logitless and the materialised loss, which targets are about."""
        part = self.parts[name]
        self.about = describe(tiny=self.tiny)
        result = part.measure(this_machine(gpu=False), self.deadline, {}, silent)
        for row in _without_memory(part, result, ("logitless", "materialised")):
            row["memory"] = memory.in_process(part, part.provider(row["provider"]))
        return result

    def measure_peers_memory(self) -> None:
        """Memory of the peers in every part from here and now: last of all, because no target is about it."""
        for part in (part for name, part in self.parts.items() if self.has(name)):
            for row in _without_memory(part, self.results["parts"][part.name], ("peer",)):
                if self.out_of_time():
                    return print("out of time; the same command goes on with the peers' memory", file=sys.stderr)
                self._measure_memory(part, row)
        return None

    def _measure_memory(self, part: Part, row: Json) -> None:
        try:
            row["memory"] = memory.in_process(part, part.provider(row["provider"]))
        except RuntimeError as reason:
            print(f"{part.name}, {row['provider']}: memory not measured: {reason}", file=sys.stderr)
        self.save()

    def _text(self, name: str, result: Json) -> str:
        return section(self.parts[name], result)


def _without_memory(part: Part, result: Json, roles: Sequence[str]) -> list[Json]:
    """The rows of these roles that ran, and whose memory is to be measured still."""
    return [x for x in result["rows"] if part.memory and x["role"] in roles and not x["failure"] and not x["memory"]]


def options(name: str, doc: str | None, parts: Sequence[str], minutes: float | None) -> argparse.ArgumentParser:
    """The options that every suite has."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=parts, metavar="PART", help=f"again: {', '.join(parts)}")
    if minutes is not None:
        add("--minutes", type=float, default=minutes, help=f"begin nothing new after this long (default {minutes:g})")
    add("--tiny", action="store_true", help="the same steps in seconds, to see that everything runs; not saved")
    default = "default: this machine's, in benchmarks/results"
    add("--output", type=Path, metavar="FOLDER", help=f"for {name}.json and {name}.md ({default})")
    add("--tables", type=Path, metavar="FILE", help="measure nothing; write the tables of this JSON beside it")
    return parser


def output(given: argparse.Namespace, about: Json) -> Path | None:
    """The folder asked for, else this machine's; a tiny run writes nothing by itself."""
    return given.output or (None if given.tiny else RESULTS / machine_kind(about))


def tables_again(path: Path, tables: Callable[[Json], str]) -> None:
    """Writes the tables of a file of results beside it."""
    write_text(path.with_suffix(".md"), tables(load(path)))


def on_processor(suite: Suite, doc: str | None, arguments: Sequence[str] | None, minutes: float) -> None:
    """The command of a suite on the processor."""
    end = time.monotonic()
    parser = options(suite.name, doc, [part.name for part in suite.parts], minutes)
    parser.add_argument("--rounds", type=int, help="in turns (default: the suite's; slow peers get one)")
    given = parser.parse_args(arguments)
    if given.tables is not None:
        return tables_again(given.tables, suite.markdown)
    end += 60 * given.minutes
    about = describe(tiny=given.tiny)
    report = ProcessorReport(suite, output(given, about), about, end=end, tiny=given.tiny, rounds=given.rounds)
    report.measure(given.only or [name for name in report.parts if not report.has(name)])
    report.measure_peers_memory()
    report.save()
    print(suite.targets(report.results["parts"]))
    return None
