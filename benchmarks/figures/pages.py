"""Pages with generated blocks: what stands between two markers is a function's text, the rest is written by hand.

<!-- figures: NAME -->
...
<!-- end of figures -->
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

#: The text of every block, by name, from a folder of results.
Blocks = Mapping[str, Callable[[Path], str]]
OPEN, CLOSE = "<!-- figures: ", "<!-- end of figures -->\n"
BLOCK = re.compile(rf"^{OPEN}(?P<name>.+?) -->\n(?P<text>(?:(?!{OPEN}).)*?)^{CLOSE}", re.DOTALL | re.MULTILINE)


def pages(root: Path) -> Iterator[Path]:
    """The pages of a checkout that may state figures; the tables beside the results are written with them."""
    yield root / "README.md"
    for folder in ("docs", "kernels", "benchmarks"):
        yield from (path for path in sorted((root / folder).rglob("*.md")) if "results" not in path.parts)


def filled(page: str, blocks: Blocks, results: Path) -> str:
    """The page with every block written anew."""
    opened, closed = (len(re.findall(f"^{marker}", page, re.MULTILINE)) for marker in (OPEN, CLOSE))
    if not opened == closed == len(BLOCK.findall(page)):
        raise ValueError(f"a page opens {opened} blocks and closes {closed}, expected pairs of {OPEN!r} and {CLOSE!r}")

    def fresh(block: re.Match[str]) -> str:
        name = block["name"]
        if name not in blocks:
            raise ValueError(f"a page has a block {name!r}, expected one of {', '.join(blocks)}")
        return f"{OPEN}{name} -->\n{blocks[name](results)}{CLOSE}"

    return BLOCK.sub(fresh, page)


def without_blocks(page: str) -> str:
    """What was written by hand."""
    return BLOCK.sub("", page)


def block(page: str, name: str) -> str:
    """The text of one block."""
    return next(found["text"] for found in BLOCK.finditer(page) if found["name"] == name)
