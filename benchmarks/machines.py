"""Kinds of machines side by side: README's table, from the results of every kind.

python -m benchmarks machines
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import fill
from typing import NamedTuple

from logitless.bench.environment import processor
from logitless.bench.providers import floors, materialised, own
from logitless.bench.report import load
from logitless.bench.tables import number
from logitless.bench.targets import Json, ratio

from .places import RESULTS, ROOT
from .tail import times

PAGE = ROOT / "README.md"
TABLE = re.compile(r"(?<=<!-- table: python -m benchmarks machines -->\n).*(?=<!-- end of table -->)", re.DOTALL)
WIDTH = 120


class Row(NamedTuple):
    """One way to a loss, and the two that its time is compared with in the same part.

    Args:
        file: of results, without its ending.
        part: pattern of the part's name.
        problem: what the part's problem begins with; one part may have other tokens on other machines.
    """

    label: str
    file: str
    part: str
    problem: str = ""
    ours: str = own.NLL.name
    materialised: str = materialised.NLL.name
    floor: str = floors.GEMMS.name

    def measured(self, folder: Path) -> Json | None:
        """The part of that machine; of several that fit, the one with the most rounds."""
        path = folder / f"{self.file}.json"
        parts = load(path)["parts"] if path.exists() else {}
        fitting = [part for name, part in parts.items() if re.fullmatch(self.part, name) and self._fits(part)]
        return max(fitting, key=lambda part: len(_methods(part)[self.ours]["seconds"]), default=None)

    def _fits(self, part: Json) -> bool:
        timed = _methods(part).get(self.ours, {}).get("seconds")
        return bool(timed) and part.get("problem", "").startswith(self.problem)

    def cells(self, part: Json | None) -> tuple[str, str]:
        """Time over that of materialised logits, and over that of the products alone."""
        methods = _methods(part) if part is not None else {}
        mine, others = methods.get(self.ours), (methods.get(self.materialised), methods.get(self.floor))
        first, second = (number(ratio(mine, other), ".2f") for other in others)
        return first, second


def _methods(part: Json) -> Json:
    """What was timed in a part, by name."""
    return part["methods"] if "methods" in part else {row["provider"]: row for row in part["rows"]}


def _dpo(label: str, part: str, problem: str) -> Row:
    return Row(label, "cpu", part, problem, own.DPO.name, materialised.DPO.name)


def _approximate(strategy: str) -> Row:
    label = f"NLL, {strategy}, on SmolLM2's own states"
    return Row(label, "tail", "times / as released.* / docstrings", ours=f"{strategy} 2^-12", floor=times.FLOOR)


ROWS = (
    Row("NLL, 4096 tokens", "cpu", "nll", "N 4096 "),
    Row("NLL, 4096 tokens, frozen head", "cpu", "frozen", "N 4096 "),
    Row("NLL, 4096 tokens, bfloat16", "cpu", "bf16", "N 4096 "),
    Row("NLL, 64 tokens, bfloat16", "cpu", "bf16", "N 64 "),
    _dpo("DPO, 32 pairs of 2 x 64 tokens", "dpo", "N 4096 "),
    _dpo("DPO, 2 pairs of 2 x 512 tokens, more than a chunk", "dpo-long", "N 2048 "),
    _approximate("tail-corrected"),
    _approximate("screened"),
)


def side_by_side(results: Path = RESULTS) -> str:
    """The table, and what each machine is. Rows and machines without a measurement are left out."""
    measured = {folder.name: [row.measured(folder) for row in ROWS] for folder in sorted(results.iterdir())}
    kinds = {kind: parts for kind, parts in measured.items() if any(parts)}
    lines = [*_table(kinds), "", *(_about(kind, parts) for kind, parts in kinds.items())]
    return "\n".join(lines) + "\n"


def _table(kinds: dict[str, list[Json | None]]) -> Iterator[str]:
    yield _line("", *(cell for kind in kinds for cell in (f"`{kind}`", "")))
    yield "|---" * (1 + 2 * len(kinds)) + "|"
    yield _line("time /", *("materialised", "GEMMs") * len(kinds))
    for row, *parts in zip(ROWS, *kinds.values(), strict=True):
        if any(parts):
            yield _line(row.label, *(cell for part in parts for cell in row.cells(part)))


def _line(*cells: str) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)


def _about(kind: str, parts: Sequence[Json | None]) -> str:
    """The processor, the release of PyTorch and the days, as far as parts differ in them."""
    environments = [part["environment"] for part in parts if part is not None]
    releases = (f"torch {about['versions']['torch'].partition('+')[0]}" for about in environments)
    days = sorted(about["date"].partition("T")[0] for about in environments)
    facts = dict.fromkeys([*map(processor, environments), *releases, *days])
    return fill(f"- `{kind}`: {', '.join(facts)}", WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def page() -> str:
    """README with a fresh table."""
    return TABLE.sub(lambda _: side_by_side(), PAGE.read_text(encoding="utf-8"))


def main(arguments: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(
        prog="python -m benchmarks machines", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(arguments)
    PAGE.write_text(page(), encoding="utf-8")
    print(side_by_side(), end="")
