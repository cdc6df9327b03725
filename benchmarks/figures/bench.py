"""docs/measured.md: what `logitless bench` found on this project's machines, from the most recent run of each part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from logitless.bench import fits
from logitless.bench.sections import largest_text
from logitless.bench.tables import COLUMNS, Line
from logitless.bench.targets import Json

from .results import Measured, newest, paragraph, plain_table

FILE, AXES = "bench", ("tokens", "vocabulary", "hidden")
#: The losses of the model's step.
LOSSES = ("nll", "dft", "dpo", "grpo")


def growth(results: Path) -> str:
    """Exponents along the three sizes, a line for each provider that has any."""
    curves = [newest(results, FILE, axis) for axis in AXES]
    names = dict.fromkeys(name for curve in curves for name in fits.providers(curve.found))
    header = ["", *(f"{what}, {axis}" for axis in AXES for what in ("time", "memory"))]
    lines = [[name, *_exponents(curves, name)] for name in names]
    return _block(header, (line for line in lines if any(line[1:])), curves)


def _exponents(curves: Sequence[Measured], name: str) -> Iterator[str]:
    for curve in curves:
        for series in (fits.times, fits.memories):
            yield str(fits.fit(series(curve.found, name)) or "")


def limits(results: Path) -> str:
    """The longest sequence and the most pairs, a line for each provider that ran in either."""
    parts = [newest(results, FILE, name) for name in ("longest", "pairs")]
    rows = [{_plain(row): row for row in part.found["rows"] if not row["failure"]} for part in parts]
    lines = [[name, *(_largest(some.get(name)) for some in rows)] for name in dict.fromkeys([*rows[0], *rows[1]])]
    mib = parts[0].found["memory_bytes"] / 2**20
    length, loss = parts[1].found["length"], parts[0].found["loss"]
    header = [f"in {mib:.0f} MiB", f"tokens of a sequence, {loss}", f"pairs of 2 x {length} tokens, DPO"]
    return _block(header, lines, parts)


def _plain(row: Json) -> str:
    """The provider's name, without the loss's where that is DPO on logits."""
    return str(row["provider"]).removesuffix(" DPO")


def _largest(row: Json | None) -> str:
    return "" if row is None else largest_text(row)


def model(results: Path) -> str:
    """The whole step of a model with each loss: one line for each way to it."""
    parts = [newest(results, FILE, f"model: {loss}") for loss in LOSSES]
    lines = [
        [part.found["loss"], row["provider"], *_cells(row, part.found)]
        for part in parts
        for row in part.found["rows"]
        if not row["failure"]
    ]
    first = parts[0].found
    shape = f"{first['model']}, {first['sequences']} sequences of {first['length']} tokens"
    return _block([shape, "", "tokens/s", "/ materialised", "peak MiB"], lines, parts)


def _cells(row: Json, part: Json) -> list[str]:
    line = Line(row, part["rows"], part, "")
    return [COLUMNS[name](line) for name in ("tokens/s", "/ materialised", "peak MiB")]


def _block(header: Sequence[str], lines: Iterable[Sequence[str]], parts: Sequence[Measured]) -> str:
    origins = dict.fromkeys(part.origin for part in parts)
    return (
        "\n".join([plain_table(header, lines), *(paragraph(f"- {origin}", "  ").rstrip() for origin in origins)]) + "\n"
    )
