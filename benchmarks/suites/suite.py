"""A suite: parts that one command measures, its options, and how it is run on the processor."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from logitless.bench import memory
from logitless.bench.environment import describe, machine_kind
from logitless.bench.machine import this_machine
from logitless.bench.measure import Part, silent
from logitless.bench.report import Report, heading, load, markdown, section, targets_table
from logitless.bench.targets import Json

from ..internals import write_text
from ..places import RESULTS


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
