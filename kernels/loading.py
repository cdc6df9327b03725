"""Where a library of compiled kernels is."""

from __future__ import annotations

import os
from pathlib import Path


def location(variable: str, beside: Path) -> Path | None:
    """The file that the variable of the environment names, else `beside`; None where neither is."""
    named = os.environ.get(variable)
    if named:
        return Path(named)
    return beside if beside.is_file() else None
