"""What the pages take from the folders of results: the most recent measurement, and where and when it was made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from textwrap import fill
from typing import NamedTuple

from logitless.bench.environment import processor
from logitless.bench.report import load
from logitless.bench.targets import Json

WIDTH = 120


class Measured(NamedTuple):
    """A measurement with its `environment`, and the kind of machine that it is of."""

    kind: str
    found: Json

    @property
    def origin(self) -> str:
        return origin(self.kind, [self.found["environment"]])


def newest(results: Path, file: str, part: str | None = None) -> Measured:
    """The most recent file of that name (without its ending), or that part of one, over all kinds of machines."""
    every = list(_measured(results, file, part))
    if not every:
        what = f"{file}.json" if part is None else f"{file}.json with a part {part!r}"
        raise ValueError(f"expected a {what} of some kind of machine in {results}, found none")
    return max(every, key=lambda each: each.found["environment"]["date"])


def _measured(results: Path, file: str, part: str | None) -> Iterator[Measured]:
    for path in sorted(results.glob(f"*/{file}.json")):
        found = load(path)
        if part is None or part in found["parts"]:
            yield Measured(path.parent.name, found if part is None else found["parts"][part])


def origin(kind: str, environments: Iterable[Json]) -> str:
    """The kind of machine, its processor, the release of PyTorch, days and commits, as far as they differ."""
    every = list(environments)
    releases = (f"torch {release(about, 'torch')}" for about in every)
    facts = dict.fromkeys([*map(processor, every), *releases, *sorted(map(day, every)), commits(every)])
    return f"`{kind}`: {', '.join(facts)}"


def day(about: Json) -> str:
    return str(about["date"]).partition("T")[0]


def commits(environments: Iterable[Json]) -> str:
    """The commits that were measured, in short; a + says that the checkout differed from it."""
    names = list(dict.fromkeys(map(_commit, environments)))
    return f"commit{'s' * (len(names) > 1)} {', '.join(names)}"


def _commit(about: Json) -> str:
    commit = about["commit"]
    return "unknown" if commit is None else commit[:7] + "+" * commit.endswith("+")


def release(about: Json, package: str) -> str:
    """The package's release, without what its build adds."""
    return str(about["versions"][package]).partition("+")[0]


def paragraph(text: str, indent: str = "") -> str:
    """The text in lines of a page, the later ones indented."""
    return fill(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False) + "\n"


def plain_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown without padding, so that a changed cell changes one line."""
    head = list(header)
    return "\n".join([_line(head), "|---" * len(head) + "|", *map(_line, rows)]) + "\n"


def _line(cells: Iterable[str]) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)
