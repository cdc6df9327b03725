"""README stays short and true, and every link of the documents leads somewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmarks.figures import pages

from logitless import losses

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES += [page for folder in ("docs", "kernels", "benchmarks") for page in sorted((ROOT / folder).rglob("*.md"))]
LINK = re.compile(r"\]\((?!https?://)([^)#\s]*)(?:#([^)\s]+))?\)")
#: A screen and a half, beside the table that grows with the kinds of machines.
MOST_LINES, WIDEST = 130, 120


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(page: Path) -> Iterator[str]:
    for file, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        target = (page.parent / file).resolve() if file else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            yield f"{file}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    assert list(dead_links(page)) == []


@pytest.mark.parametrize("folder", ["triton", "cuda", "cpu"])
def test_a_manual_names_every_file_of_its_kernels(folder: str) -> None:
    here = ROOT / "kernels" / folder
    manual = (here / "README.md").read_text(encoding="utf-8")
    files = [path.name for path in here.iterdir() if path.is_file() and path.suffix not in (".md", ".so")]
    assert [name for name in files if f"`{name}`" not in manual] == []


def test_readme_is_a_screen_and_a_half() -> None:
    table, lines = pages.block(README, "machines"), README.splitlines()
    assert len(lines) - len(table.splitlines()) <= MOST_LINES
    assert [line for line in lines if len(line) > WIDEST] == []


def test_readme_names_losses_of_the_registry() -> None:
    section = README[README.index("\n## Losses\n") : README.index("\n## Backends and strategies\n")]
    linked = dict(re.findall(r"\[`(\w+)`\]\(docs/losses\.md#(\w+)\)", section))
    assert len(linked) >= 12
    assert all(name == anchor and name in losses.names() for name, anchor in linked.items()), linked
    assert f"has all {len(losses.names())}:" in section
