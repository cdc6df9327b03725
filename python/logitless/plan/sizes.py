"""Sizes of memory as people write them: `80GB`, `79GiB`, `24000MB`."""

from __future__ import annotations

import re

#: Bytes of each unit. GB counts in thousands, as sellers do, and GiB in powers of two, as tools do.
UNITS = {"B": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("KMGT", 1)
    for suffix, base in (("B", 1000), ("iB", 1024))
}


def read_bytes(text: str) -> int:
    """The bytes that a text such as `80GB` or `79.5 GiB` says.

    Raises:
        ValueError: it is not a positive number and a unit.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]+)\s*", text)
    by_name = {unit.lower(): size for unit, size in UNITS.items()}
    size = found and by_name.get(found[2].lower())
    if not found or not size or float(found[1]) <= 0:
        raise ValueError(f"memory: expected a positive number and one of {', '.join(UNITS)}, got {text!r}")
    return int(float(found[1]) * size)


def show_bytes(count: int) -> str:
    """A number of bytes in the largest binary unit that leaves at least 1, to three digits or more."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(value) >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" or abs(value) >= 100 else f"{value:.3g} {units[0]}"
