"""Files of rows that commands write, .jsonl or .parquet: there when they are whole, and read as any data."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from logitless.training import files
from logitless.training.errors import InputError

PlainRows = Sequence[Mapping[str, Any]]


def require_file(name: str, option: str, *endings: str) -> Path:
    """The path of a file that will be written, whose folder it makes.

    Args:
        name: of the file.
        option: that names it, for the messages.
        endings: allowed ones; by default those of files of rows.

    Raises:
        InputError: another ending, or a folder in which nothing can be written.
    """
    path, known = Path(name).expanduser(), endings or tuple(_WRITE)
    if path.suffix.lower() not in known:
        raise InputError(f"{option}: expected a name that ends in {' or '.join(known)}, got {name!r}")
    try:
        files.require_writable(path.parent)
    except OSError as error:
        raise InputError(f"{option}: nothing can be written into {path.parent}: {error}") from error
    return path


def write_rows(path: Path, rows: PlainRows) -> None:
    """Writes the rows in the form that the path's ending says.

    Raises:
        InputError: rows that the form cannot hold.
    """
    with files.new_file(path) as unfinished:
        _WRITE[path.suffix.lower()](unfinished, rows)


def json_line(row: Mapping[str, Any]) -> str:
    """The row on a line of JSONL.

    Raises:
        InputError: a value that JSON has not.
    """
    try:
        return json.dumps(row, ensure_ascii=False) + "\n"
    except TypeError as error:
        raise InputError(f"a row has a value that JSONL cannot hold: {error}; write .parquet") from error


def _write_lines(path: Path, rows: PlainRows) -> None:
    path.write_text("".join(map(json_line, rows)), encoding="utf-8")


def _write_table(path: Path, rows: PlainRows) -> None:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"{path}: writing Parquet needs pyarrow (pip install pyarrow)") from error
    names = dict.fromkeys(name for row in rows for name in row)
    try:
        table = pyarrow.table({name: [row.get(name) for row in rows] for name in names})
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, OverflowError) as error:
        raise InputError(f"the rows' columns do not fit into Parquet: {error}; write .jsonl") from error
    parquet.write_table(table, path)


_WRITE: dict[str, Callable[[Path, PlainRows], None]] = {".jsonl": _write_lines, ".parquet": _write_table}
