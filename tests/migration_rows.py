"""The tables of docs/migration.md, and what it means that a row is right: both cells are evaluated and compared.

The page's own Python block makes the tensors. A section's peer adds its names (`migration_peers`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

PAGE = Path(__file__).resolve().parents[1] / "docs" / "migration.md"
HEADER = "| theirs | ours | what differs |"
NONE = "none"
#: A note of a row whose values alone are the same.
NO_GRADIENT = "no gradient of its own"
Peer = Callable[[Mapping[str, Any]], dict[str, Any]]
#: The tensors that a gradient is compared for.
LEAVES = ("hidden", "weight", "bias")


class Row(NamedTuple):
    section: str
    line: int
    theirs: str
    ours: str
    note: str

    def __str__(self) -> str:
        return f"{self.section}:{self.line}"


def read_rows(text: str | None = None) -> list[Row]:
    """The rows under every header of three columns, with the heading that they stand below."""
    section, inside, rows = "", False, []
    lines = (PAGE.read_text(encoding="utf-8") if text is None else text).splitlines()
    for number, line in enumerate(lines, 1):
        if line.startswith("## "):
            section = line[3:].strip()
        inside = line == HEADER or (inside and line.startswith("|"))
        if inside and line != HEADER and not re.fullmatch(r"\|(-+\|)+", line):
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            assert len(cells) == 3, f"{PAGE.name}:{number}: expected three cells, got {len(cells)}"
            rows.append(Row(section, number, *cells))
    return rows


def rows_of(*sections: str) -> list[Row]:
    return [row for row in read_rows() if row.section in sections]


def names_of_page() -> dict[str, Any]:
    """What the page's first block leaves behind, in PyTorch's default dtype."""
    block = re.search(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert block is not None
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(compile(block[1], str(PAGE), "exec"), names)
    return names


def code_of(cell: str) -> str:
    match = re.fullmatch(r"`([^`]+)`", cell)
    assert match is not None, f"expected one piece of code in backticks, got {cell!r}"
    return match[1]


def evaluate(cell: str, names: Mapping[str, Any]) -> Tensor:
    """A cell's tensor: a result's loss, or the loss of a model on the page's labels."""
    found = eval(code_of(cell), dict(names))
    if isinstance(found, nn.Module):
        found = found(input_ids=names["ids"], labels=names["labels"])
    found = getattr(found, "loss", found)
    assert isinstance(found, Tensor), f"{cell}: expected a tensor, got {type(found).__name__}"
    return found


def gradients(value: Tensor, names: Mapping[str, Any]) -> list[Tensor]:
    """For the page's leaves and a model's, of a random upstream gradient; zeros where the value does not reach one."""
    leaves = [names[name] for name in LEAVES]
    if "model" in names:
        leaves += names["model"].parameters()
    if not value.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    upstream = torch.randn(value.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scale = upstream.to(value.dtype)
    return list(torch.autograd.grad(value, leaves, scale, allow_unused=True, materialize_grads=True))


def check_row(row: Row, peer: Peer, dtype: torch.dtype) -> None:
    """Raises unless both cells agree in shape, value and gradient; a row without a counterpart has to say why."""
    torch.set_default_dtype(dtype)
    theirs_names, names = names_of_page(), names_of_page()
    torch.manual_seed(0)
    theirs_names |= peer(theirs_names)
    theirs = evaluate(row.theirs, theirs_names)
    if row.ours == NONE:
        assert row.note, "a row without a counterpart says why"
        return
    torch.manual_seed(0)
    names |= {name: x for name, x in peer(names).items() if name == "model"}
    ours = evaluate(row.ours, names)
    assert ours.shape == theirs.shape
    if not theirs.is_floating_point():
        assert torch.equal(theirs, ours.to(theirs.dtype))
        return
    exact = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-6}
    torch.testing.assert_close(ours, theirs, check_dtype=False, **exact)
    if theirs.requires_grad and NO_GRADIENT not in row.note:
        for one, two in zip(gradients(ours, names), gradients(theirs, theirs_names), strict=True):
            torch.testing.assert_close(one, two, **exact)
