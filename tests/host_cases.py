"""What the tests of the hosts share: a tiny model, ragged batches, one run of a Transformers trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from patch_models import V, llama
from torch import Tensor

from logitless.testing import watch_allocations

LENGTHS = (9, 5, 12, 7, 11, 6, 8, 10)


#: A vocabulary for which the logits of two long rows, 62 MiB, are the largest tensor, and larger than a chunk.
LARGE = 65536
CHUNK = 32 * 2**20


def rows(prompt: int = 2, vocabulary: int = V, times: int = 1) -> list[dict[str, list[int]]]:
    """Examples of unequal lengths, `times` as long, whose first tokens are a prompt."""
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(3, vocabulary, (n * times,), generator=generator).tolist() for n in LENGTHS]
    return [{"input_ids": x, "labels": [-100] * prompt + x[prompt:]} for x in ids]


def collate(examples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """A padded batch."""
    width = max(len(x["input_ids"]) for x in examples)
    batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for x in examples:
        n = len(x["input_ids"])
        batch["input_ids"].append(x["input_ids"] + [0] * (width - n))
        batch["attention_mask"].append([1] * n + [0] * (width - n))
        batch["labels"].append(x["labels"] + [-100] * (width - n))
    return {name: torch.tensor(value) for name, value in batch.items()}


#: Of a run: two micro-batches of two ragged rows a step, and three steps. Plain SGD, whose weights differ by no more
#: than the gradients do; Adam would divide a gradient that is nearly 0 by itself.
TRAINING = {
    "optim": "sgd",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 3,
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "save_strategy": "no",
    "disable_tqdm": True,
    "remove_unused_columns": False,
}


class Run(NamedTuple):
    """What a run logged a step, and where the weights ended."""

    logs: list[dict[str, float]]
    weights: dict[str, Tensor]
    largest: int  # allocation of the training steps, in bytes
    peak: int


def train(trainer: Any) -> Run:
    """Runs a Transformers trainer to its end."""
    with watch_allocations() as seen:
        trainer.train()
    names = ("loss", "grad_norm", "token_acc", "eval_loss")
    logs = [{k: float(log[k]) for k in names if k in log} for log in trainer.state.log_history]
    logs = [log for log in logs if log]
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    return Run(logs, weights, seen.largest, seen.peak)


def assert_same_run(ours: Run, own: Run) -> None:
    """Equal losses, norms of gradients and weights, but for the rounding of float32 through three steps."""
    assert len(ours.logs) == len(own.logs) > 1
    for a, b in zip(ours.logs, own.logs, strict=True):
        assert a == pytest.approx(b, rel=2e-4, abs=2e-6)
    moved = {name for name, weight in own.weights.items() if not torch.equal(weight, start(name, weight))}
    assert moved, "the host's own run trained nothing"
    for name, weight in own.weights.items():
        torch.testing.assert_close(ours.weights[name], weight, rtol=1e-4, atol=1e-5)


def assert_no_logits(ours: Run, own: Run) -> None:
    """The host holds the logits of two long rows; we hold a chunk at most, and less than the host at any time."""
    assert own.largest > 1.2 * CHUNK
    assert ours.largest <= CHUNK
    assert ours.peak < own.peak


def start(name: str, like: Tensor) -> Tensor:
    """A parameter of the fresh model, or zeros where a host names it otherwise."""
    return dict(llama().named_parameters()).get(name, torch.zeros_like(like))


class Steps(NamedTuple):
    """Losses of micro-batches, the last gradients and the weights after some steps of a policy."""

    losses: list[float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def policy_steps(model: Any, scored: Callable[[Any, dict[str, Tensor]], tuple[Tensor, Tensor]]) -> Steps:
    """Three steps of SGD, of two ragged micro-batches each, on a clipped ratio and an entropy bonus."""
    optimizer, seen = torch.optim.SGD(model.parameters(), lr=0.05), []
    gradients: dict[str, Tensor] = {}
    for step in range(3):
        optimizer.zero_grad()
        for part in range(2):
            batch = collate(rows()[2 * part : 2 * part + 2])
            counts = batch["attention_mask"][:, 1:].bool()
            logprob, entropy = scored(model, batch)
            generator = torch.Generator().manual_seed(10 * step + part)
            old = logprob.detach() + 0.1 * torch.randn(logprob.shape, generator=generator)
            advantages = torch.randn(len(logprob), 1, generator=generator)
            ratio = (logprob - old).exp()
            objective = torch.minimum(ratio * advantages, ratio.clamp(0.9, 1.1) * advantages) + 0.1 * entropy
            loss = -objective[counts].mean()
            loss.backward()
            seen.append(loss.item())
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
    return Steps(seen, gradients, {name: p.detach().clone() for name, p in model.named_parameters()})


def assert_same_steps(ours: Steps, own: Steps) -> None:
    """Equal losses, gradients and weights, but for the rounding of float32."""
    assert ours.losses == pytest.approx(own.losses, rel=1e-4, abs=1e-6)
    assert ours.gradients.keys() == own.gradients.keys() and own.gradients
    for mine, theirs in ((ours.gradients, own.gradients), (ours.weights, own.weights)):
        for name, expected in theirs.items():
            torch.testing.assert_close(mine[name], expected, rtol=1e-4, atol=1e-5)
