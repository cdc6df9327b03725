"""The studies: what is compared in each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import engine
import task
from engine import Case, Data, Stage, Study

DEMONSTRATIONS = 512  # rows that a stage learns from


def _rows(count: int = DEMONSTRATIONS, teacher: task.Teacher = task.right) -> Data:
    return lambda model, seed: task.demonstrations(100 + seed, count, teacher)


def _pairs(model: Path, seed: int) -> list[task.Row]:
    return task.preferences(200 + seed, DEMONSTRATIONS)


def _prompts_alone(share: int) -> Data:
    """Rows of which one in `share` has its demonstration; the others are prompts."""

    def rows(model: Path, seed: int) -> list[task.Row]:
        found = task.demonstrations(100 + seed, DEMONSTRATIONS, task.mistaken)
        return [row if number % share == 0 else _without(row) for number, row in enumerate(found)]

    return rows


def _without(row: task.Row) -> task.Row:
    return {name: value for name, value in row.items() if name != "completion"}


def _rewarded(model: Path, seed: int) -> list[task.Row]:
    """The model's own right answers to as many questions, 8 samples each."""
    asked = task.demonstrations(100 + seed, DEMONSTRATIONS)
    texts = engine.answers(model, asked, engine.SAMPLES, 1.0, seed)
    return [{**row, "completion": text} for row, own in zip(asked, texts, strict=True) for text in own
            if text == row["answer"]]  # fmt: skip


def _sft(data: Data | None = None, **changes: Any) -> Stage:
    return Stage("sft.yaml", {"dataset_name": data or _rows()}, changes)


def _dpo(**changes: Any) -> Stage:
    return Stage("dpo.yaml", {"dataset_name": _pairs}, changes)


def _rl(method: str, data: Data | None = None, **changes: Any) -> Stage:
    taught = data or _rows(teacher=task.mistaken)
    return Stage("rl.yaml", {"dataset_name": taught}, {"method": method, **changes})


_RATES = (1e-4, 3e-4, 1e-3, 3e-3)
_DIVERGENCES: Mapping[str, Mapping[str, Any]] = {
    "NLL": {},
    "squared Hellinger": {"method": "f-divergence", "divergence": "squared_hellinger", "beta": 0.1},
    "Pearson chi2": {"method": "f-divergence", "divergence": "pearson_chi2", "beta": 0.1},
    "reverse KL": {"method": "f-divergence", "divergence": "reverse_kl", "beta": 0.1},
}


STUDIES = (
    Study(
        "sft-rate",
        [Case(f"SFT at {rate:g}, then DPO", [_sft(learning_rate=rate), _dpo()]) for rate in _RATES],
    ),
    Study(
        "f-divergence",
        [Case(f"{name}, then DPO", [_sft(**changes), _dpo()]) for name, changes in _DIVERGENCES.items()],
    ),
    Study(
        "joint",
        [
            Case("SFT", [_sft()]),
            Case("SFT, then DPO", [_sft(), _dpo()]),
            Case("SFT and DPO together", [Stage("joint.yaml", {"sft": _rows(), "dpo": _pairs})]),
            Case("DPO with the chosen NLL", [_dpo(method="rpo", learning_rate=1e-3, max_steps=150)]),
            Case("DPO alone", [_dpo()]),
        ],
    ),
    Study(
        "dft",
        [
            Case("SFT", [_sft()]),
            Case("DFT", [_sft(method="dft")]),
            Case("ASFT", [_sft(method="asft")]),
            Case("SFT, a mistaken teacher", [_sft(_rows(teacher=task.mistaken))]),
            Case("DFT, a mistaken teacher", [_sft(_rows(teacher=task.mistaken), method="dft")]),
            Case("SFT on rewarded samples", [_sft(_rewarded)]),
            Case("DFT on rewarded samples", [_sft(_rewarded, method="dft")]),
        ],
        lengths=(task.HARD, task.HARDER),
    ),
    Study(
        "prefix-rft",
        [
            Case("SFT", [_sft(_rows(teacher=task.mistaken))]),
            Case("GRPO", [_rl("grpo")]),
            Case("SFT, then GRPO", [_sft(_rows(teacher=task.mistaken)), _rl("grpo")]),
            Case("SFT, then PPO (ReFT)", [_sft(_rows(teacher=task.mistaken)), _rl("ppo")]),
            Case("LUFFY", [_rl("luffy")]),
            Case("SRFT", [_rl("srft")]),
            Case("UFT", [_rl("uft")]),
            Case("Prefix-RFT", [_rl("prefix-rft")]),
            Case("Prefix-RFT, all prefix tokens", [_rl("prefix-rft", loss={"keep": 1.0})]),
            Case(
                "Prefix-RFT, half of each demonstration",
                [_rl("prefix-rft", demonstration_schedule={"start": 0.5, "end": 0.5, "high": 0.5})],
            ),
            Case("Prefix-RFT, the group's advantage", [_rl("prefix-rft", advantage_estimator="group")]),
            Case("Prefix-RFT, an eighth of the demonstrations", [_rl("prefix-rft", _prompts_alone(8))]),
            Case("Prefix-RFT, right demonstrations", [_rl("prefix-rft", _rows())]),
        ],
    ),
)
