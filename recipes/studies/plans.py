"""The studies: what is compared, what the paper says, and what came out."""

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
        "The learning rate of SFT before DPO",
        "DPO ends higher if the SFT before it had a lower learning rate than is usual (Implicit Reward as the Bridge).",
        [Case(f"SFT at {rate:g}, then DPO", [_sft(learning_rate=rate), _dpo()]) for rate in _RATES],
        "Disagrees. The higher the rate of SFT, the higher both end, up to the highest that was tried. This base model "
        "hardly knows the task, so that SFT has to teach it; the paper's models know theirs, and SFT can spoil that. "
        "DPO adds a little behind the two higher rates, and takes a little behind the lower ones.",
    ),
    Study(
        "f-divergence",
        "f-divergence SFT before DPO",
        "SFT under an f-divergence keeps the KL term to the start, and DPO ends higher (Implicit Reward as the Bridge; "
        "a review of it found these results weaker than those of the learning rate).",
        [Case(f"{name}, then DPO", [_sft(**changes), _dpo()]) for name, changes in _DIVERGENCES.items()],
        "No divergence ends above NLL. Pearson chi2 and reverse KL come near it, squared Hellinger stays behind. All "
        "of them hold the model to a start that is not worth keeping here. DPO makes sampled answers better behind "
        "each, by less than the seeds differ.",
    ),
    Study(
        "joint",
        "SFT and DPO in one run",
        "Optimising both losses together failed (Implicit Reward as the Bridge, its appendix D as a review has it).",
        [
            Case("SFT", [_sft()]),
            Case("SFT, then DPO", [_sft(), _dpo()]),
            Case("SFT and DPO together", [Stage("joint.yaml", {"sft": _rows(), "dpo": _pairs})]),
            Case("DPO with the chosen NLL", [_dpo(method="rpo", learning_rate=1e-3, max_steps=150)]),
            Case("DPO alone", [_dpo()]),
        ],
        "Agrees. Both losses together end below SFT alone, and further below one after the other, after as many "
        "updates. DPO with the chosen answers' NLL is lower still. DPO alone leaves the model where it was.",
    ),
    Study(
        "dft",
        "DFT and SFT",
        "Weighting each token by its own probability generalises better than SFT, also on the model's own rewarded "
        "samples (Dynamic Fine-Tuning); anchoring it with a KL is steadier (ASFT).",
        [
            Case("SFT", [_sft()]),
            Case("DFT", [_sft(method="dft")]),
            Case("ASFT", [_sft(method="asft")]),
            Case("SFT, a mistaken teacher", [_sft(_rows(teacher=task.mistaken))]),
            Case("DFT, a mistaken teacher", [_sft(_rows(teacher=task.mistaken), method="dft")]),
            Case("SFT on rewarded samples", [_sft(_rewarded)]),
            Case("DFT on rewarded samples", [_sft(_rewarded, method="dft")]),
        ],
        "Disagrees. DFT ends below SFT on every kind of rows, and ASFT between the two. DFT gives little weight to "
        "what the model finds unlikely, which is what this model has to learn. Its strength shows in one place: the "
        "teacher's rare mistakes, which cost SFT nearly a third of its accuracy, cost DFT nothing. Nothing that was "
        "tried reaches questions of another length.",
        lengths=(task.HARD, task.HARDER),
    ),
    Study(
        "prefix-rft",
        "Demonstrations in reinforcement fine-tuning",
        "Prefix-RFT beats SFT, RFT and one after the other, and other ways to mix them (Prefix-RFT). The "
        "demonstrations here are of the teacher that makes a mistake, in a fifth of them.",
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
        "Disagrees, as far as 200 updates at one rate tell. SFT with RFT behind it is far ahead, by GRPO as by PPO: in "
        "150 updates more than the others have, it "
        "takes from the demonstrations what they have, and the reward mends the teacher's mistake. All that begins "
        "from the base model, Prefix-RFT too, ends near GRPO and below SFT: a completion in eight that is shown "
        "something, at a tenth of SFT's rate, teaches little in that time. The parts of Prefix-RFT differ by less than "
        "their seeds do. Where the reward is never found by chance and the demonstrations do not tell the result, "
        "Prefix-RFT does what neither does alone: a test has such a task (tests/test_training_prefix_rft.py), which "
        "Prefix-RFT solves with every seed, SFT one time in five, and GRPO never.",
    ),
)
