"""Files and folders that are there whole or not at all.

Everything is written under a temporary name in the same folder, flushed to the disk, then renamed: a process killed at
any moment leaves the old state or the new one, and a temporary leftover that is recognised by its name.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

UNFINISHED = ".unfinished-"


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to write into, which becomes `folder` when the block ends without an exception.

    An existing `folder` is replaced (several processes may make the same one: the last wins).
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.parent / f"{UNFINISHED}{folder.name}-{os.getpid()}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        yield unfinished
        for path in sorted(unfinished.rglob("*"), reverse=True):
            _flush(path)
        _flush(unfinished)
        if folder.exists():
            replaced = folder.parent / f"{UNFINISHED}old-{folder.name}-{os.getpid()}"
            folder.rename(replaced)
            unfinished.rename(folder)
            shutil.rmtree(replaced)
        else:
            unfinished.rename(folder)
        _flush(folder.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary file name to write to, which replaces `path` when the block ends without an exception."""
    unfinished = path.parent / f"{UNFINISHED}{path.name}-{os.getpid()}"
    try:
        yield unfinished
        _flush(unfinished)
        unfinished.replace(path)
        _flush(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def require_writable(folder: Path) -> None:
    """Makes the folder; raises OSError where it is none, or no file can be written into it."""
    folder.mkdir(parents=True, exist_ok=True)
    trial = folder / f"{UNFINISHED}trial-{os.getpid()}"
    trial.touch()
    trial.unlink()


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with new_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Writes JSON atomically. Floats keep every digit."""
    write_text(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


def move_into(folder: Path, target: Path) -> None:
    """Renames every file and folder of `folder` into `target`, each replacing its namesake."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():  # of named chat templates; a folder that holds something is not replaced by a rename
            shutil.rmtree(target / path.name, ignore_errors=True)
        path.replace(target / path.name)
    _flush(target)


def clean(folder: Path) -> list[str]:
    """Deletes what killed processes left unfinished in `folder`; returns the names."""
    leftovers = sorted(folder.glob(f"{UNFINISHED}*")) if folder.is_dir() else []
    for path in leftovers:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return [path.name for path in leftovers]


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
