"""Pictures that carry a digest of the numbers that they show.

The bytes of a PNG change with the release of matplotlib, so that no test can compare them. The digest does not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from logitless.bench.targets import Json
from logitless.training.files import new_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: A text of the PNG: this name, a zero byte, the digest.
KEY = "Data"


class Picture(NamedTuple):
    """A file, the numbers that it shows, and what draws them."""

    path: Path
    data: Json
    draw: Callable[[Json], Figure]

    def is_fresh(self) -> bool:
        """Whether the file was drawn from these numbers; with which code, it does not say."""
        return self.path.exists() and f"{KEY}\0{digest(self.data)}".encode() in self.path.read_bytes()

    def write(self) -> None:
        """Draws the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        figure = self.draw(self.data)
        with new_file(self.path) as unfinished:
            figure.savefig(unfinished, format="png", metadata={KEY: digest(self.data)})


def digest(data: Json) -> str:
    """A hash of the numbers, in whatever order their names stand."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
