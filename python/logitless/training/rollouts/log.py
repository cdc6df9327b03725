"""What a round sampled, for its reader: a JSON line for each completion, with its rewards."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from logitless.training import files
from logitless.training.parallel import World
from logitless.training.rollouts.inputs import Values
from logitless.training.rollouts.prompts import Prompt
from logitless.training.rollouts.rewards import Scores
from logitless.training.rollouts.rollout import Rollout

FOLDER = "rollouts"


def write(
    output_dir: str,
    step: int,
    prompts: Sequence[Prompt],
    rollouts: Sequence[Rollout],
    scores: Scores | None,
    values: Sequence[Values],
    tokenizer: Any,
    world: World,
) -> None:
    """Writes `rollouts/step-<step>[.<process>].jsonl` in the output folder, whole or not at all.

    A run that goes on from a checkpoint writes the files of the steps behind it anew.
    """
    part = f".{world.rank}" if world.size > 1 else ""
    path = Path(output_dir) / FOLDER / f"step-{step + 1:06d}{part}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (prompt, rollout) in enumerate(zip(prompts, rollouts, strict=True)):
        begin, own = rollout.begin, rollout.begin + rollout.shown
        line: dict[str, Any] = {"step": step + 1, "origin": prompt.origin, "prompt": prompt.asked}
        if rollout.shown:
            line["shown"] = tokenizer.decode(rollout.ids[begin:own])
        line |= {"completion": tokenizer.decode(rollout.ids[own:]), "ended": rollout.ended, "tokens": rollout.sampled}
        if scores is not None:
            parts = {name: float(part[number]) for name, part in scores.parts.items() if part[number].isfinite()}
            total = float(scores.total[number])
            line |= {"reward": total if math.isfinite(total) else None, "rewards": parts}
        if "advantages" in values[number] and rollout.sampled:
            line["advantage"] = float(values[number]["advantages"][own - 1])  # of the first token that was sampled
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    files.write_text(path, "".join(lines))
