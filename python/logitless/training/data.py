"""Rows of training data from files, saved datasets and the hub, each with the place it came from.

A row is a plain dict; `render.py` says what its columns mean. The place ("data.jsonl, line 12") travels with
it, so that whatever is wrong with a row can be reported where its author will look for it.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from logitless.training.errors import InputError
from logitless.training.formats import READERS, ArrowRow

#: Levels of lists and objects that a row may have. What reads rows calls itself for each, and Python limits that.
DEPTH = 100


class Row(NamedTuple):
    """One row of data and where it stands."""

    values: Mapping[str, Any]
    origin: str


def read_rows(name: str, *, split: str = "train", config: str | None = None) -> list[Row]:
    """All rows of a data file, of a folder written by `datasets`' `save_to_disk`, or of a hub dataset.

    Args:
        name: path ending in .jsonl, .ndjson, .json, .csv, .tsv or .parquet, which .gz, .bz2, .xz or .zst may follow;
            a folder; or the hub's `owner/name`.
        split: split of a folder or hub dataset; files have none.
        config: configuration of a hub dataset.
    Raises:
        InputError: nothing there, nothing in it, or a line that cannot be read (with its number).
    """
    rows = _from_file(name) if _is_file(name) else list(_from_datasets(name, split, config))
    if not rows:
        raise InputError(f"{name}: no rows")
    return rows


def has_split(name: str, split: str, config: str | None = None) -> bool:
    """Whether `name` is a folder or hub dataset (not a file) that has this split.

    Raises:
        InputError: no such file, folder or dataset, or one whose splits the hub does not tell.
    """
    if _is_file(name):
        return False
    path = Path(name)
    if path.is_dir():
        return (path / "dataset_dict.json").is_file() and (path / split).is_dir()
    import datasets

    try:
        return split in datasets.get_dataset_split_names(name, config)
    except Exception as error:  # of the hub, the network, or a dataset's own files
        raise InputError(f"dataset {name!r}: its splits cannot be listed: {error}") from error


def require_text(row: Row) -> None:
    """Raises where a text of the row is no Unicode text, or where the row is nested deeper than `DEPTH` levels.

    A lone surrogate, half of a character, comes from text that was cut between two `\\u` escapes. No tokenizer takes
    it, and another character in its place would not be the row's text.
    """
    if isinstance(row.values, ArrowRow):
        return  # Arrow's texts are UTF-8 or cannot be read, and its depth is the schema's
    level: list[Any] = [row.values]
    for _ in range(DEPTH):
        for text in level:
            if isinstance(text, str) and not text.isascii():
                _require_characters(text, row)
        level = [item for value in level for item in _inside(value)]
        if not level:
            return
    raise InputError(f"{row.origin}: lists or objects are nested more than {DEPTH} levels deep")


def _require_characters(text: str, row: Row) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        begin = text[max(0, error.start - 20) : error.start]
        raise InputError(
            f"{row.origin}: text with half of a character (the lone surrogate {text[error.start]!a} behind "
            f"{begin!a}); was it cut in the middle of an emoji?"
        ) from error


def _inside(value: Any) -> Iterator[Any]:
    """What an object or a list holds, but not the numbers of a list that has nothing else."""
    if isinstance(value, Mapping):
        yield from value
        yield from value.values()
    elif isinstance(value, (list, tuple)) and not set(map(type, value)) <= {int, float, bool}:
        yield from value


# ---------------------------------------------------------------------------------------------------------------------
# Files


def _zstandard(path: Path) -> IO[bytes]:
    try:
        import pyarrow
    except ImportError as error:
        raise InputError(f"{path}: reading Zstandard needs pyarrow (pip install pyarrow)") from error
    stream: IO[bytes] = pyarrow.input_stream(str(path), compression="zstd")
    return stream


_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _zstandard,
}
#: What the readers of compressed data raise where it is damaged; pyarrow raises OSErrors.
_DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)


def _is_file(name: str) -> bool:
    """Whether the name is a file's with an ending that is read; False for a folder and for what the hub may have."""
    if not isinstance(name, (str, os.PathLike)):
        raise InputError(f"expected the name of one file, folder or dataset, got {name!r}")
    try:
        found = stat.S_IFMT(os.stat(name).st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        _require_hub_name(os.fspath(name))
        return False
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror}") from error
    if found not in (stat.S_IFREG, stat.S_IFDIR):
        raise InputError(f"{name}: neither a file nor a folder")
    if found == stat.S_IFREG and _form(Path(name)) is None:
        raise InputError(f"{name}: the name of a data file ends in {_endings()}")
    return found == stat.S_IFREG


def _require_hub_name(name: str) -> None:
    """Raises where a name that nothing here has can be no dataset of the hub either."""
    if os.path.islink(name):
        raise InputError(f"data file not found: {name} is a link to {os.readlink(name)}, which is not there")
    if re.search(r"[*?\[\],]", name):
        raise InputError(
            f"data file not found: {name} (one name is expected, no pattern and no list; join the files into one, or "
            "give each a component of a mixture)"
        )
    if _form(Path(name)) is not None or re.match(r"[/.~]|.*/.*/|.*[\\:\0]|[^/]*\.[A-Za-z]+$", name):
        raise InputError(f"data file not found: {name}")


def _form(path: Path) -> tuple[str, str | None] | None:
    """The ending of a file's format, and of its compression if it has one; None where no format is known by it."""
    endings = [ending.lower() for ending in path.suffixes]
    packed = endings.pop() if endings and endings[-1] in _OPENERS else None
    return (endings[-1], packed) if endings and endings[-1] in READERS else None


def _endings() -> str:
    return f"{', '.join(READERS)}, or in one of these with {', '.join(_OPENERS)} behind it"


def _from_file(name: str) -> list[Row]:
    path = Path(name)
    form = _form(path)
    assert form is not None
    ending, packed = form
    try:
        with path.open("rb") if packed is None else _OPENERS[packed](path) as stream:
            return [Row(*found) for found in READERS[ending](stream, name)]
    except InputError:
        raise
    except _DAMAGED as error:
        expected = ending if packed is None else f"{ending} in {packed}"
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{name}: cannot be read as {expected}: {reason}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Datasets


def _from_datasets(name: str, split: str, config: str | None) -> Iterator[Row]:
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{name}: reading this needs the datasets library (pip install datasets)") from error
    try:
        table = _saved(Path(name), split) if Path(name).is_dir() else None
        table = table if table is not None else datasets.load_dataset(name, config, split=split)
    except InputError:
        raise
    except Exception as error:  # of the hub, the network, Arrow, or what a folder holds
        expected = "no such data file, save_to_disk folder or hub dataset"
        if Path(name).is_dir():
            expected = "cannot be read as a save_to_disk folder or a folder of data files"
        raise InputError(f"dataset {name!r} (split {split!r}): {expected}: {error.__cause__ or error}") from error
    number = 0
    try:
        for number, values in enumerate(table, 1):
            yield Row(values, f"{name}[{split}], row {number}")
    except Exception as error:  # of Arrow, or of a feature that cannot be decoded
        raise InputError(f"{name}[{split}], row {number + 1}: cannot be read: {error}") from error


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
