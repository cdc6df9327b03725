"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

#: Columns of a table where there is no terminal to fit it to.
TABLE_WIDTH = 120


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints cells of text under a header; the first column is on the left, the others are numbers."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=TABLE_WIDTH)
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table, markup=False, highlight=False)
