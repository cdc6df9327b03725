"""How the package finds a library of compiled kernels and calls it through ctypes.

The modules on top, `cpu/library.py` and `cuda/library.py`, have one interface: `VARIABLE`, `SIGNATURES`, `DTYPE_CODES`,
`Library`, `location()` and `load(path)`. None of them compiles anything, and none loads a library at import.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path

#: Types of a library's functions by name: of the result, then of the arguments.
Signatures = Mapping[str, tuple[type | None, ...]]


def find(variable: str, beside: Path) -> Path | None:
    """The file that an environment variable names, or else `beside`; None if there is neither.

    A process looks once for each name: products ask before every chunk.
    """
    return _found(os.environ.get(variable), beside)


@cache
def _found(named: str | None, beside: Path) -> Path | None:
    if named:
        return Path(named)
    return beside if beside.is_file() else None


def declared(path: Path, signatures: Signatures) -> ctypes.CDLL:
    """The library at a path, its functions with their signatures.

    Raises:
        OSError: there is no such file, or the system cannot load it.
        AttributeError: the library lacks a function, so it is of another version.
    """
    library = ctypes.CDLL(str(path))
    for name, (result, *arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
