"""README's table: the time of a step on every kind of machine."""

from __future__ import annotations

from logitless.bench.providers import floors, materialised, own

from ..tail import times as tail_times
from .side_by_side import Row, Table, times


def _dpo(label: str, part: str, problem: str) -> Row:
    return Row(label, "cpu", part, problem, own.DPO.name, (materialised.DPO.name, floors.GEMMS.name))


def _approximate(strategy: str) -> Row:
    others = (materialised.NLL.name, tail_times.FLOOR)
    label = f"NLL, {strategy}, on SmolLM2's own states"
    return Row(label, "tail", "times / as released.* / docstrings", "", f"{strategy} 2^-12", others)


TABLE = Table(
    "time /",
    ("materialised", "GEMMs"),
    times,
    (
        Row("NLL, 4096 tokens", "cpu", "nll", "N 4096 "),
        Row("NLL, 4096 tokens, frozen head", "cpu", "frozen", "N 4096 "),
        Row("NLL, 4096 tokens, bfloat16", "cpu", "bf16", "N 4096 "),
        Row("NLL, 64 tokens, bfloat16", "cpu", "bf16", "N 64 "),
        _dpo("DPO, 32 pairs of 2 x 64 tokens", "dpo", "N 4096 "),
        _dpo("DPO, 2 pairs of 2 x 512 tokens, more than a chunk", "dpo-long", "N 2048 "),
        _approximate("tail-corrected"),
        _approximate("screened"),
    ),
)
