"""The tables and the plot of docs/first-run.md, from the results file of recipes/first_run.sh."""

from __future__ import annotations

import runpy
from functools import cache
from pathlib import Path

from logitless.bench.targets import Json

from ..places import ROOT
from .pictures import Picture
from .results import newest, paragraph, plain_table, release

FILE = "first-run"


@cache
def _recipe() -> Json:
    """What recipes/compare.py defines: the run prints the same rows, and draws the same curves."""
    return runpy.run_path(str(ROOT / "recipes" / "compare.py"))


def text(results: Path) -> str:
    """How long it took, where, what was learnt, and what it cost."""
    measured, recipe = newest(results, FILE), _recipe()
    found = measured.found
    setup = found["seconds"]["environment"] / 60
    said = (
        f"It took {found['minutes']:.1f} minutes, {setup:.1f} of them for the environment ({measured.origin}, "
        f"transformers {release(found['environment'], 'transformers')}). {found.get('remark', '')}"
    )
    tables = (
        plain_table(recipe["LEARNT_HEADER"], recipe["learnt"](found)),
        plain_table(recipe["COSTS_HEADER"], recipe["costs"](found)),
    )
    return "\n".join([paragraph(said), *tables])


def picture(root: Path, results: Path) -> Picture:
    return Picture(root / "docs" / "first-run.png", newest(results, FILE).found, _recipe()["curves"])
