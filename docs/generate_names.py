"""Writes the tables of names in docs/migration.md, from the table that error messages ask (`logitless.peers`).

python docs/generate_names.py
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from logitless.peers import ADVICE, RENAMED, VALUES

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
    values = {f"{argument}={theirs!r}": ours for argument, words in VALUES.items() for theirs, ours in words.items()}
    parts = {
        "Arguments whose value means the same:": table(RENAMED, code=True),
        "Arguments for which there is another way to say it:": table(ADVICE, code=False),
        "Values:": table(values, code=True),
    }
    text = "\n".join(f"\n{heading}\n\n" + "\n".join(part) + "\n" for heading, part in parts.items())
    return TABLES.sub(lambda _: f"{text}\n", PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
