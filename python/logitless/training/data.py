"""Rows of training data from files, saved datasets and the hub, each with the place it came from.

A row is a plain dict; `tokenize.py` says what its columns mean. The place ("data.jsonl, line 12") travels with
it, so that whatever is wrong with a row can be reported where its author will look for it.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from logitless.training.arrow_json import decoded_json
from logitless.training.errors import InputError


class Row(NamedTuple):
    """One row of data and where it stands."""

    values: Mapping[str, Any]
    origin: str


def read_rows(name: str, *, split: str = "train", config: str | None = None) -> list[Row]:
    """All rows of a data file, of a folder written by `datasets`' `save_to_disk`, or of a hub dataset.

    Args:
        name: path ending in .jsonl, .json, .parquet or .csv; a folder; or the hub's `owner/name`.
        split: split of a folder or hub dataset; files have none.
        config: configuration of a hub dataset.
    Raises:
        InputError: nothing there, nothing in it, or a line that can not be read (with its number).
    """
    path = Path(name)
    reader = _READERS.get(path.suffix.lower())
    if reader is not None and not path.is_dir():
        if not path.is_file():
            raise InputError(f"data file not found: {name}")
        rows = list(reader(path))
    else:
        rows = list(_from_datasets(name, split, config))
    if not rows:
        raise InputError(f"{name}: no rows")
    return rows


def has_split(name: str, split: str, config: str | None = None) -> bool:
    """Whether `name` is a folder or hub dataset (not a file) that has this split."""
    path = Path(name)
    if path.suffix.lower() in _READERS and not path.is_dir():
        return False
    if path.is_dir():
        return (path / "dataset_dict.json").is_file() and (path / split).is_dir()
    import datasets

    return split in datasets.get_dataset_split_names(name, config)


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(_decoded(lines, path), 1):
            if line.strip():
                origin = f"{path}, line {number}"
                yield Row(_mapping(_parse(line, origin), origin), origin)


def _decoded(lines: Iterable[str], path: Path) -> Iterator[str]:
    try:
        yield from lines
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text: {error}") from error


def _parse(text: str, origin: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{origin}: not valid JSON: {error}") from error


def _mapping(value: Any, origin: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{origin}: expected an object with named columns, got {type(value).__name__}")
    return value


def _json(path: Path) -> Iterator[Row]:
    """A JSON array of rows; a .json file that holds one object per line is read as JSONL."""
    with path.open(encoding="utf-8-sig") as file:
        if file.read(1) != "[":
            yield from _jsonl(path)
            return
        file.seek(0)
        rows = _parse("".join(_decoded(file, path)), str(path))
    for number, value in enumerate(rows, 1):
        origin = f"{path}, row {number}"
        yield Row(_mapping(value, origin), origin)


def _csv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(_decoded(file, path))
        for values in reader:
            origin = f"{path}, line {reader.line_num}"
            if None in values or None in values.values():
                raise InputError(f"{origin}: expected {len(reader.fieldnames or ())} fields as in the header")
            yield Row(values, origin)


def _parquet(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise InputError(f"{path}: reading Parquet needs pyarrow (pip install pyarrow)") from error
    try:
        batches = parquet.ParquetFile(path).iter_batches(batch_size=1024)
        values = (_ArrowRow(batch, index) for batch in batches for index in range(len(batch)))
        yield from (Row(value, f"{path}, row {number}") for number, value in enumerate(values, 1))
    except ArrowInvalid as error:
        raise InputError(f"{path}: not a readable Parquet file: {error}") from error


class _ArrowRow(Mapping[str, Any]):
    """A row of an Arrow table, of which a value becomes Python's when it is read.

    Lists of numbers, such as a teacher's ids, take less than half of the memory that they take as Python's.
    """

    def __init__(self, batch: Any, index: int) -> None:
        self._batch, self._index = batch, index

    def __getitem__(self, name: str) -> Any:
        column = self._batch.column(name)
        return decoded_json(column[self._index].as_py(), column.type)

    def __iter__(self) -> Iterator[str]:
        return iter(self._batch.schema.names)

    def __len__(self) -> int:
        return int(self._batch.num_columns)


def _from_datasets(name: str, split: str, config: str | None) -> Iterator[Row]:
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{name}: reading this needs the datasets library (pip install datasets)") from error
    try:
        table = _saved(Path(name), split) if Path(name).is_dir() else None
        table = table if table is not None else datasets.load_dataset(name, config, split=split)
    except (datasets.exceptions.DatasetsError, FileNotFoundError, ValueError, ConnectionError) as error:
        raise InputError(
            f"dataset {name!r} (split {split!r}): no such data file, save_to_disk folder or hub dataset: {error}"
        ) from error
    for number, values in enumerate(table, 1):
        yield Row(values, f"{name}[{split}], row {number}")


def _saved(folder: Path, split: str) -> Any:
    """The split of a `save_to_disk` folder, or None where the folder is not one."""
    import datasets

    if not any((folder / marker).is_file() for marker in ("dataset_dict.json", "state.json")):
        return None
    saved = datasets.load_from_disk(str(folder))
    if not isinstance(saved, datasets.DatasetDict):
        return saved
    if split not in saved:
        raise InputError(f"{folder}: no split {split!r}, it has {sorted(saved)}")
    return saved[split]


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
