"""Where the checkout is, and its results."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Where results are written and committed, in a folder for each kind of machine.
RESULTS = ROOT / "benchmarks" / "results"
