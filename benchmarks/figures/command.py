"""Writes every measured figure of README, of the pages and of the pictures from the committed results.

python -m benchmarks figures            says which files changed; measures nothing
python -m benchmarks figures --check    writes nothing, says which would change, and fails if any would

A page has its figures between `<!-- figures: NAME -->` and `<!-- end of figures -->`; the rest is written by hand. A
picture carries a digest of its numbers and is drawn again where that is another; delete it to draw it anyway. All of it
needs `logitless[train]`, and drawing matplotlib (`logitless[recipes]`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..internals import write_text
from ..places import RESULTS, ROOT
from . import bench, first_run, machines, measured, memory, studies, tail
from .pages import Blocks, filled, pages
from .pictures import Picture

BLOCKS: Blocks = {
    "memory": memory.text,
    "machines": machines.TABLE.text,
    "memory by loss": measured.MEMORY.text,
    "libraries": measured.PEERS.text,
    "losses of libraries": measured.LOSSES.text,
    "lists": measured.lists,
    "growth": bench.growth,
    "limits": bench.limits,
    "model": bench.model,
    "first run": first_run.text,
    "tail tolerances": tail.tolerances,
    "tail times": tail.times,
    "tail fine-tuning": tail.finetune,
    "tail texts": tail.texts,
    "tail orders": tail.orders,
    **studies.blocks(),
}


def stale_pages(root: Path = ROOT, results: Path = RESULTS) -> Iterator[tuple[Path, str]]:
    """Pages whose figures are not those of the results, and what they should be."""
    for path in pages(root):
        page = path.read_text(encoding="utf-8")
        if (fresh := filled(page, BLOCKS, results)) != page:
            yield path, fresh


def stale_pictures(root: Path = ROOT, results: Path = RESULTS) -> list[Picture]:
    """Pictures that were not drawn from the results."""
    beside = tail.pictures(results)
    every = (memory.picture(root, results), first_run.picture(root, results), *studies.pictures(root, results), *beside)
    return [picture for picture in every if not picture.is_fresh()]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks figures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where something would change")
    check = parser.parse_args(arguments).check
    texts, pictures = list(stale_pages(ROOT, RESULTS)), stale_pictures(ROOT, RESULTS)
    for path in (*(path for path, _ in texts), *(picture.path for picture in pictures)):
        print(path.relative_to(ROOT))
    if check:
        sys.exit(1 if texts or pictures else 0)
    for path, text in texts:
        write_text(path, text)
    for picture in pictures:
        picture.write()
