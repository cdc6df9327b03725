"""Writes the tables of names in docs/migration.md, from the table that error messages ask (`logitless.peers`).

python docs/generate_names.py
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from logitless.peers import ADVICE, REDUCTIONS, RENAMED

PAGE = Path(__file__).with_name("migration.md")
TABLES = re.compile(r"(?<=<!-- tables: docs/generate_names.py -->\n).*(?=<!-- end of tables -->)", re.DOTALL)


def grouped(names: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Other libraries' names that have one meaning, and that meaning."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name, meaning in names.items():
        groups[meaning].append(f"`{name}`")
    yield from ((", ".join(group), meaning) for meaning, group in groups.items())


def table(names: Mapping[str, str], *, code: bool) -> Iterator[str]:
    yield "| elsewhere | here |"
    yield "|---|---|"
    for others, meaning in grouped(names):
        yield f"| {others} | {f'`{meaning}`' if code else meaning} |"


def page() -> str:
    """The page with its tables as they should be."""
    parts = table(RENAMED, code=True), table(REDUCTIONS, code=True), table(ADVICE, code=False)
    headings = "The value means the same:", "Values of `reduction`:", "No name of ours, but another way to say it:"
    text = "\n".join(f"\n{heading}\n\n" + "\n".join(part) for heading, part in zip(headings, parts, strict=True))
    return TABLES.sub(lambda _: f"{text}\n\n", PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
