"""Times, memory and gradient errors of every provider on every problem; writes JSON and a Markdown table beside it.

python -m benchmarks.cpu_report                     everything: benchmarks/results/cpu.json, cpu.md
python -m benchmarks.cpu_report --only dpo nll      these parts; the others in the file stay as they are
python -m benchmarks.cpu_report --only losses       every registered loss, and TRL's and Liger's of the same name
python -m benchmarks.cpu_report --only              none: the peers' memory where it is missing, and the tables again
python -m benchmarks.cpu_report --tiny              the same structure in seconds, to see that it runs; not saved
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from . import environment, measure, memory, parts, report
from .parts import Part
from .report import Json

RESULTS = Path(__file__).resolve().parent / "results" / "cpu.json"


def measure_part(part: Part, *, rounds: int, deadline: float, tiny: bool = False) -> Json:
    """Times and errors of all, memory of logitless and the materialised loss; ready for JSON."""
    about = environment.describe()
    rows = measure.first_calls(part.providers, part.problem.brief().inputs())
    measure.time_in_turns(part.providers, rows, part.problem.inputs(), rounds, deadline)
    found = {
        "problem": str(part.problem),
        "logits_bytes": part.problem.logits_bytes,
        "environment": about,
        "rows": [row.as_json() for row in rows],
    }
    for row in _without_memory(part, found, ("logitless", "materialised")):
        row["memory"] = memory.in_subprocess(part, part.provider(row["provider"]), tiny=tiny)
    return found


def _without_memory(part: Part, found: Json, roles: Sequence[str]) -> list[Json]:
    """The rows of these roles that ran, and whose memory is to be measured still."""
    return [x for x in found["rows"] if part.memory and x["role"] in roles and not x["failure"] and not x["memory"]]


def save(results: Json, path: Path, tables: Callable[[Json], str] = report.markdown) -> None:
    """JSON, and the tables as Markdown beside it; a file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = {path: json.dumps(results, indent=1) + "\n", path.with_suffix(".md"): tables(results)}
    for target, text in texts.items():
        partial = target.with_suffix(target.suffix + ".partial")
        partial.write_text(text)
        os.replace(partial, target)


class Report:
    """The file of results, brought up to date part by part. `deadline` is on `time.monotonic`'s clock."""

    def __init__(self, output: Path | None, *, deadline: float, tiny: bool) -> None:
        self.output, self.deadline, self.tiny = output, deadline, tiny
        self.results: Json = {"parts": {}}
        if output is not None and output.exists():
            self.results = json.loads(output.read_text())

    def measure(self, chosen: Sequence[Part], rounds: int) -> None:
        """Everything but the peers' memory. What there is no time for is named on standard error."""
        for i, part in enumerate(chosen):
            if i and self.out_of_time():
                print(f"out of time; go on with: --only {' '.join(x.name for x in chosen[i:])}", file=sys.stderr)
                return
            print(f"{part.name}: {part.problem}", file=sys.stderr)
            found = measure_part(part, rounds=rounds, deadline=self.deadline, tiny=self.tiny)
            self.results["parts"][part.name] = found
            self.save()

    def measure_peers_memory(self) -> None:
        """Of every part in the file: last of all, because no target is about it."""
        for name, found in self.results["parts"].items():
            for row in _without_memory(parts.get(name), found, ("peer",)):
                if self.out_of_time():
                    print("out of time; --only (nothing) measures the peers' memory", file=sys.stderr)
                    return
                self._measure_memory(parts.get(name), row)

    def _measure_memory(self, part: Part, row: Json) -> None:
        try:
            row["memory"] = memory.in_subprocess(part, part.provider(row["provider"]), tiny=self.tiny)
        except RuntimeError as reason:
            print(f"{part.name}, {row['provider']}: memory not measured: {reason}", file=sys.stderr)
        self.save()

    def out_of_time(self) -> bool:
        return time.monotonic() > self.deadline

    def save(self) -> None:
        if self.output is not None:
            save(self.results, self.output)


def main(arguments: Sequence[str] | None = None) -> None:
    names = [*parts.GROUPS, *(part.name for part in parts.PARTS)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = [part.name for part in parts.PARTS]
    parser.add_argument("--only", nargs="*", choices=names, default=everything, metavar="PART", help=", ".join(names))
    parser.add_argument("--rounds", type=int, default=3, help="rounds in turns; slow peers get one (default 3)")
    parser.add_argument("--minutes", type=float, default=20, help="begin nothing new after this long (default 20)")
    parser.add_argument("--output", type=Path, help="JSON file to update (default benchmarks/results/cpu.json)")
    parser.add_argument("--tiny", action="store_true", help="milliseconds a step: to see that everything runs")
    given = parser.parse_args(arguments)
    wanted = [name for group in given.only for name in parts.GROUPS.get(group, (group,))]
    chosen = [parts.get(name).tiny() if given.tiny else parts.get(name) for name in wanted]
    output = given.output or (None if given.tiny else RESULTS)
    made = Report(output, deadline=time.monotonic() + 60 * given.minutes, tiny=given.tiny)
    made.measure(chosen, given.rounds)
    made.measure_peers_memory()
    made.save()
    print(report.markdown(made.results))


if __name__ == "__main__":
    main()
