"""Rows of JSON, CSV and Parquet from an open file, each with the place that it came from.

JSON is read value by value: one on a line, several lines for one, or all in an array. So a row that cannot be read is
reported with its line, whatever the layout of the file. Nothing is guessed: text that is not UTF-8, a name that an
object has twice, or a quotation that is not closed ends the reading.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import IO, Any

from logitless.training.arrow_json import decoded_json
from logitless.training.errors import InputError

Found = tuple[Mapping[str, Any], str]  # the values of a row, and its place
Reader = Callable[[IO[bytes], str], Iterator[Found]]

#: How a file begins that is something else than text, in Latin-1, and what it is then.
_OTHER_CONTENT = {
    "\x1f\x8b": "gzip data; its name must end in .gz",
    "\x28\xb5\x2f\xfd": "Zstandard data; its name must end in .zst",
    "BZh": "bzip2 data; its name must end in .bz2",
    "\xfd7zXZ": "xz data; its name must end in .xz",
    "PK\x03\x04": "a ZIP archive; unpack it first",
    "PAR1": "Parquet; its name must end in .parquet",
    "\xff\xfe": "UTF-16 or UTF-32 text; save it as UTF-8",
    "\xfe\xff": "UTF-16 text; save it as UTF-8",
    "version https://git-lfs": "a pointer of Git LFS, not the data; run `git lfs pull`",
}


# ---------------------------------------------------------------------------------------------------------------------
# Text


def _lines(stream: IO[bytes], name: str, newline: str | None = None) -> Iterator[str]:
    """The lines of a UTF-8 file; `newline` as in `open`."""
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline=newline)
    for number, line in enumerate(text, 1):
        if number == 1:
            _require_text(line, name)
        if "\0" in line:
            raise InputError(
                f"{name}, line {number}: a NUL byte; expected UTF-8 text (is the file damaged, or UTF-16?)"
            )
        if not line.isascii() and (wrong := re.search("[\udc80-\udcff]", line)):
            byte = ord(wrong[0]) - 0xDC00
            raise InputError(f"{name}, line {number}: not UTF-8 text: byte 0x{byte:02x} at column {wrong.start() + 1}")
        yield line


def _require_text(line: str, name: str) -> None:
    start = line[:32].encode("utf-8", "surrogateescape").decode("latin-1")
    for begin, what in _OTHER_CONTENT.items():
        if start.startswith(begin):
            raise InputError(f"{name}: the file is {what}")


# ---------------------------------------------------------------------------------------------------------------------
# JSON


def read_json(stream: IO[bytes], name: str) -> Iterator[Found]:
    """Objects, one on a line or over several; or an array of them; or one object that holds all rows.

    Raises:
        InputError: text that is no JSON in UTF-8, or a value that is no object, with its line.
    """
    values = _json_values(_lines(stream, name), name)
    first, second = next(values, None), next(values, None)
    if first is not None and second is None:
        values = _rows_of(*first)
    else:
        values = chain((found for found in (first, second) if found is not None), values)
    for value, origin in values:
        if not isinstance(value, dict):
            raise InputError(f"{origin}: expected an object with named columns, got {type(value).__name__}")
        yield value, origin


def _json_values(lines: Iterator[str], name: str) -> Iterator[tuple[Any, str]]:
    """The values of a file line by line, and of the rest together from the first line that is no value by itself."""
    begun = False
    for number, line in enumerate(lines, 1):
        start = _skip(line, 0)
        if not begun and line[start : start + 1] == "[":
            yield from _array("".join([line, *lines]), number, name)
            return
        begun = begun or start < len(line)
        try:
            found = list(_sequence(line, number, name))
        except json.JSONDecodeError as error:
            found = _over_lines("".join([line, *lines]), number, name, error)
        yield from found


def _over_lines(text: str, line: int, name: str, alone: json.JSONDecodeError) -> list[tuple[Any, str]]:
    """The values of text whose first line is no JSON by itself, for the reason `alone`."""
    try:
        return list(_sequence(text, line, name))
    except json.JSONDecodeError as error:
        message = f"{name}, line {line}: not valid JSON: {alone.msg} (column {alone.colno})"
        if error.lineno > 1:
            message += f"; read on over several lines: {error.msg} (line {line + error.lineno - 1})"
        raise InputError(message) from error


def _sequence(text: str, line: int, name: str) -> Iterator[tuple[Any, str]]:
    """Values one after another, of text that begins at this line."""
    at, counted = _skip(text, 0), 0
    while at < len(text):
        line, counted = line + text.count("\n", counted, at), at
        origin = f"{name}, line {line}"
        value, at = _decode(text, at, origin)
        yield value, origin
        at = _skip(text, at)


def _array(text: str, line: int, name: str) -> Iterator[tuple[Any, str]]:
    """The elements of one array."""
    at, counted, row = _skip(text, _skip(text, 0) + 1), 0, 0
    ended = text[at : at + 1] == "]"
    while not ended:
        line, counted, row = line + text.count("\n", counted, at), at, row + 1
        origin = f"{name}, line {line}, row {row}"
        try:
            value, at = _decode(text, at, origin)
        except json.JSONDecodeError as error:
            line += text.count("\n", counted, error.pos)
            raise InputError(f"{name}, line {line}, row {row}: not valid JSON: {error.msg}") from error
        yield value, origin
        at = _skip(text, at)
        ended = text[at : at + 1] == "]"
        if not ended and text[at : at + 1] != ",":
            raise InputError(f"{origin}: not valid JSON: expected a comma or the array's end behind this row")
        if not ended:
            at = _skip(text, at + 1)
    if (rest := _skip(text, at + 1)) < len(text):
        raise InputError(
            f"{name}, line {line + text.count(chr(10), counted, rest)}: more text behind the array of rows"
        )


def _skip(text: str, at: int) -> int:
    """The place of the first character from `at` that is no white space of JSON."""
    found = _BLANK.match(text, at)
    assert found is not None
    return found.end()


def _decode(text: str, at: int, origin: str) -> tuple[Any, int]:
    """The value that begins at `at`, and where it ends; raises JSONDecodeError where the text is not JSON."""
    try:
        return _DECODER.raw_decode(text, at)
    except json.JSONDecodeError:
        raise
    except RecursionError as error:
        raise InputError(f"{origin}: lists or objects are nested too deeply to be read") from error
    except ValueError as error:  # an integer with more digits than Python converts, or a name twice
        raise InputError(f"{origin}: a value that cannot be read: {error}") from error


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these names and values, for `json`; raises ValueError for a name that stands in it twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"the name {twice!r} stands twice in one object")
    return found


def _rows_of(value: Any, origin: str) -> Iterator[tuple[Any, str]]:
    """The rows of a file's only value: itself, those in a list named `data` or so, or one for each place of its lists.

    An object of lists without objects in them can be no row: a row's column is a string or a list of turns.
    """
    columns = list(value.values()) if isinstance(value, dict) else []
    nested = [name for name, column in value.items() if isinstance(column, (list, dict))] if columns else []
    if len(nested) == 1 and nested[0] in _HOLDERS and _are_rows(value[nested[0]]):
        yield from ((row, f"{origin}, {nested[0]}, row {n}") for n, row in enumerate(value[nested[0]], 1))
    elif columns and all(isinstance(column, list) and not _has_objects(column) for column in columns):
        lengths = {name: len(column) for name, column in value.items()}
        if len(set(lengths.values())) > 1:
            raise InputError(f"{origin}: columns of different lengths: {lengths}")
        for number, row in enumerate(zip(*columns, strict=True), 1):
            yield dict(zip(value, row, strict=True)), f"{origin}, row {number}"
    elif columns and all(isinstance(column, dict) for column in columns):
        raise InputError(
            f"{origin}: one object of objects, named {', '.join(map(repr, list(value)[:3]))}; expected a list of rows, "
            "or a row a line (pandas: orient='records', lines=True)"
        )
    else:
        yield value, origin


def _are_rows(value: Any) -> bool:
    """Whether a list can be no conversation but rows: objects that neither `role` nor `from` names a speaker of."""
    objects = isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)
    return objects and not any("role" in item or "from" in item for item in value)


def _has_objects(column: list[Any]) -> bool:
    return any(isinstance(item, dict) for item in column)


#: Names under which a file keeps its rows, beside nothing but single values; no form of row has a column of these.
_HOLDERS = ("data", "rows", "examples", "instances", "train")
_BLANK = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder(object_pairs_hook=unique_names)


# ---------------------------------------------------------------------------------------------------------------------
# CSV


def read_csv(stream: IO[bytes], name: str) -> Iterator[Found]:
    """Rows of fields between commas, under a header; an empty cell is None.

    Raises:
        InputError: a quotation that is not closed, another number of fields than the header has, or no UTF-8.
    """
    return _delimited(stream, name, ",")


def read_tsv(stream: IO[bytes], name: str) -> Iterator[Found]:
    """Rows of fields between tabs, under a header; otherwise as `read_csv` has them."""
    return _delimited(stream, name, "\t")


def _delimited(stream: IO[bytes], name: str, delimiter: str) -> Iterator[Found]:
    """Rows as mappings; an empty cell is None, as `datasets` reads it."""
    header: list[str] | None = None
    for fields, origin in _records(stream, name, delimiter):
        if header is None:
            header = fields
            _check_header(header, origin, delimiter)
        elif len(fields) != len(header):
            raise InputError(f"{origin}: expected {len(header)} fields as in the header, got {len(fields)}")
        elif fields == header:
            raise InputError(f"{origin}: the header stands here again; join files without the later ones' headers")
        else:
            yield {column: cell or None for column, cell in zip(header, fields, strict=True)}, origin


def _records(stream: IO[bytes], name: str, delimiter: str) -> Iterator[tuple[list[str], str]]:
    """The fields of every record that is no blank line, with the line where it begins."""
    record: list[str] = []  # the lines of the record that is being read

    def noted() -> Iterator[str]:
        for line in _lines(stream, name, newline=""):
            record.append(line)
            yield line

    reader, line = csv.reader(noted(), delimiter=delimiter, strict=True), 1
    limit = csv.field_size_limit(2**31 - 1)
    try:
        for fields in reader:
            if fields:
                yield fields, f"{name}, line {line}"
            line = reader.line_num + 1
            record.clear()
    except csv.Error as error:
        line += _lines_before_fault("".join(record), delimiter)
        raise InputError(
            f"{name}, line {line}: a quotation begins here that is not closed before the end of its field ({error}); "
            "inside of one, a quotation mark is written twice"
        ) from error
    finally:
        csv.field_size_limit(limit)


def _lines_before_fault(text: str, delimiter: str) -> int:
    """Line ends before the first field that is not well formed."""
    field = rf'(?:"(?:[^"]|"")*+"|[^"{delimiter}\r\n][^{delimiter}\r\n]*+|)'
    well_formed = re.match(rf"(?:{field}(?:{delimiter}|\r?\n|\r))*+", text)
    assert well_formed is not None
    return len(re.findall(r"\r?\n|\r", well_formed[0]))


def _check_header(header: Sequence[str], origin: str, delimiter: str) -> None:
    if len(twice := {name for name in header if header.count(name) > 1}):
        raise InputError(f"{origin}: the header names {', '.join(map(repr, sorted(twice)))} more than once")
    others = [other for other in ",;\t|" if other != delimiter and len(header) == 1 and other in header[0]]
    if others:
        raise InputError(
            f"{origin}: the header is one column {header[0]!r}; expected names with {delimiter!r} between them "
            "(.csv is read with commas, .tsv with tabs)"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Parquet


def read_parquet(stream: IO[bytes], name: str) -> Iterator[Found]:
    """Rows of a Parquet file, whose values stay Arrow's until they are read.

    Raises:
        InputError: pyarrow is missing, or the file is damaged, or two of its columns have one name.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"{name}: reading Parquet needs pyarrow (pip install pyarrow)") from error
    number = 0
    try:
        source = stream if isinstance(stream, io.BufferedReader) else pyarrow.BufferReader(stream.read())
        file = parquet.ParquetFile(source)
        _require_names(file.schema_arrow.names, name)
        for batch in file.iter_batches(batch_size=1024):
            for index in range(len(batch)):
                number += 1
                origin = f"{name}, row {number}"
                yield ArrowRow(batch, index, origin), origin
    except InputError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # a name that is not UTF-8 is a ValueError
        behind = f" behind row {number}" if number else ""
        raise InputError(f"{name}: not a readable Parquet file{behind}: {error}") from error


def _require_names(names: Sequence[str], name: str) -> None:
    if len(set(names)) < len(names):
        raise InputError(f"{name}: columns of one name, of {names}")


class ArrowRow(Mapping[str, Any]):
    """A row of an Arrow table, of which a value becomes Python's when it is read.

    Lists of numbers, such as a teacher's ids, take less than half of the memory that they take as Python's.
    """

    def __init__(self, batch: Any, index: int, origin: str) -> None:
        self._batch, self._index, self._origin = batch, index, origin

    def __getitem__(self, name: str) -> Any:
        column = self._batch.column(name)
        try:
            return decoded_json(column[self._index].as_py(maps_as_pydicts="strict"), column.type)
        except Exception as error:  # text that is not UTF-8, a date that Python has not, a map with a key twice, ...
            raise InputError(f"{self._origin}: the column {name} ({column.type}) cannot be read: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._batch.schema.names)

    def __len__(self) -> int:
        return int(self._batch.num_columns)


#: What reads a file, by the ending of its name.
READERS: dict[str, Reader] = {
    ".jsonl": read_json,
    ".ndjson": read_json,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
}
