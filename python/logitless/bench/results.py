"""Files of results: read and checked, and written again as tables and a page."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from logitless.training.errors import InputError
from logitless.training.files import write_text

from .page import html_page
from .sections import file_markdown, side_by_side
from .targets import Json

#: The name and the version of the format (docs/bench-schema.md). A reader of another one refuses it.
FORMAT = "logitless-bench/1"


def read_results(path: Path) -> Json:
    """The results in a file that `logitless bench` wrote.

    Raises:
        InputError: it cannot be read, or it is something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected the results of logitless bench in JSON: {error}") from error
    version = found.get("format") if isinstance(found, dict) else None
    if version != FORMAT:
        raise InputError(f"{path}: expected results of the format {FORMAT!r}, got {version!r}")
    return found


def write_pages(files: Sequence[Path], output: Path) -> None:
    """Writes the page of several files, a column or a plot for each, and the tables beside it as Markdown."""
    if output.suffix != ".html":
        raise InputError(f"output: expected a name that ends with .html, got {str(output)!r}")
    results = dict(zip(_labels(files), map(read_results, files), strict=True))
    tables = side_by_side(results) if len(results) > 1 else "".join(map(file_markdown, results.values()))
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, html_page(results))
    write_text(output.with_suffix(".md"), tables)


def _labels(files: Sequence[Path]) -> list[str]:
    """A name for each file: its folder's, or all of its path where two folders have the same name."""
    names = Counter(path.resolve().parent.name for path in files)
    return [name if names[name := path.resolve().parent.name] == 1 else str(path) for path in files]
