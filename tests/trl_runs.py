"""What the tests of TRL's trainers share: options of a short run, and two runs compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

STEPS = 3
#: Metrics that are no function of the model: times and rates.
CLOCKS = ("runtime", "per_second", "step_time", "total_flos")


def slowly(cases: Any, *fast: str) -> list[Any]:
    """All cases as parameters, all but the fast ones of the slow tier."""
    return [case if case in fast else pytest.param(case, marks=pytest.mark.slow) for case in cases]


def settings(path: Path, **more: Any) -> dict[str, Any]:
    """Options of a run of `STEPS` steps, of two micro-batches of two rows each."""
    fixed = {"output_dir": str(path), "max_steps": STEPS, "report_to": "none", "use_cpu": True, "bf16": False}
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 1}
    # AdamW would make steps of one size of gradients that are nothing but rounding.
    rest = {
        "optim": "sgd",
        "learning_rate": 0.1,
        "disable_tqdm": True,
        "save_strategy": "no",
        "gradient_checkpointing": False,
    }
    return {**fixed, **sizes, **rest, **more}


def lengths(completions: list[str], **_: Any) -> list[float]:
    """A reward: how many characters a completion has, each counted once."""
    return [float(len(set(text))) for text in completions]


def assert_same_run(expected: Any, found: Any) -> None:
    """Both trainers ended at the same weights, and logged the same metrics: losses and gradient norms among them."""
    named = zip(expected.model.named_parameters(), found.model.named_parameters(), strict=True)
    for (name, x), (_, y) in named:
        torch.testing.assert_close(x, y, rtol=1e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")
    history = [trainer.state.log_history for trainer in (expected, found)]
    assert len(history[0]) == len(history[1]) > STEPS
    assert max(entry.get("grad_norm", 0.0) for entry in history[0]) > 1e-3
    for a, b in zip(*history, strict=True):
        assert a.keys() == b.keys()
        undecided = abs(a.get("rewards/margins", 1.0)) < 1e-5  # rounding alone says which of two equal rewards is more
        for name, value in a.items():
            if not any(word in name for word in CLOCKS) and not (undecided and name == "rewards/accuracies"):
                assert b[name] == pytest.approx(value, rel=2e-4, abs=2e-5, nan_ok=True), name
