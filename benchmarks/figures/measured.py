"""The tables of docs/measured.md and docs/lists.md: memory, and time beside other libraries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from logitless.bench.providers import materialised, own, peers
from logitless.bench.tables import part_table

from .results import newest, paragraph
from .side_by_side import Row, Rows, Table, memory, times


def _nll(label: str, part: str, problem: str = "N 4096 ") -> Row:
    return Row(label, "cpu", part, problem, others=(materialised.NLL.name,))


def _dpo(label: str, part: str, problem: str) -> Row:
    return Row(label, "cpu", part, problem, own.DPO.name, (materialised.DPO.name,))


MEMORY = Table(
    "MiB beside inputs and gradients",
    ("logitless", "materialised"),
    memory,
    (
        _nll("NLL, 4096 tokens", "nll"),
        _nll("NLL, 4096 tokens, frozen head", "frozen"),
        _dpo("DPO, 32 pairs of 2 x 64 tokens", "dpo", "N 4096 "),
        _dpo("DPO, 2 pairs of 2 x 512 tokens, more than a chunk", "dpo-long", "N 2048 "),
    ),
)


def _beside(rows: Rows) -> Sequence[str]:
    """Our time over another library's, and that one's memory."""
    return [*times(rows), memory(rows)[1]]


def _peers(part: str, dtype: str) -> list[Row]:
    every = (peers.TORCH, peers.TRL, peers.LIGER, peers.CCE)
    return [Row(f"{peer.name}, {dtype}", "cpu", part, "N 4096 ", own.NLL.name, (peer.name,)) for peer in every]


PEERS = Table(
    "NLL of 4096 tokens beside",
    ("time", "its MiB"),
    _beside,
    (*_peers("nll", "float32"), *_peers("bf16", "bfloat16")),
)

LOSSES = Table(
    "time /",
    ("TRL", "Liger"),
    times,
    [
        Row(name, "losses", "losses-(real|distribution)", "", name, tuple(peer.name for peer in others))
        for name, others in peers.OF_REGISTRY.items()
    ],
)


def lists(results: Path) -> str:
    """A step of top-k distillation beside NLL and the materialised loss."""
    measured = newest(results, "cpu", "lists")
    table = part_table(measured.found, ("seconds", "extra MiB"))
    about = f"{measured.found['problem']}; {measured.origin}."
    return f"{table}\n\n{paragraph(about)}"
