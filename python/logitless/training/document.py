"""An HTML file that opens from disk: it needs no network, and no script runs but its own, whose hash it names.

Texts are only ever text: they are escaped. A policy in the file's head forbids what the file does not hold itself.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple


class Table(NamedTuple):
    """A table of texts. The last cell of a row with fewer cells than columns takes the place of those that it lacks."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def document(title: str, body: str, style: str, script: str = "") -> str:
    """The file: `body` is HTML, `style` is CSS, and `script` is JavaScript that runs after the body is there."""
    allowed = f"style-src '{_hash(style)}'" + (f"; script-src '{_hash(script)}'" if script else "")
    policy = f"default-src 'none'; {allowed}; base-uri 'none'"
    head = (
        f'<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" '
        f'content="light dark">\n<title>{escape(title)}</title>\n<style>{style}</style>'
    )
    run = f"\n<script>{script}</script>" if script else ""
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}{run}\n</body>\n</html>\n'


def fact_list(facts: Mapping[str, str]) -> str:
    """Names and values, one a line."""
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return f"<dl>{items}</dl>"


def table_html(table: Table) -> str:
    """The table, its first column the names of the rows."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.columns)
    lines = "".join(f"<tr>{_line(row, len(table.columns))}</tr>" for row in table.rows)
    return f"<table><caption>{escape(table.caption)}</caption><tr>{head}</tr>{lines}</table>"


def _line(row: Sequence[str], columns: int) -> str:
    first, *rest = row
    lacking = columns - len(row)
    spans = [f' colspan="{1 + lacking}"' if lacking and place == len(rest) else "" for place in range(1, len(row))]
    cells = "".join(f"<td{span}>{escape(cell)}</td>" for span, cell in zip(spans, rest, strict=True))
    return f'<th scope="row">{escape(first)}</th>{cells}'


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
