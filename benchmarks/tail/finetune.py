"""Fine-tuning with the exact and with the tail-corrected backward, for their loss curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from logitless import linear_token_loss
from logitless.bench.providers.own import negative_logprob
from logitless.bench.targets import Json

from . import data

#: Runs by the name in the results: options of the loss.
RUNS: dict[str, Json] = {"exact": {}, "tail-corrected": {"backward": "tail_corrected"}}
WARMUP = 20


class Settings(NamedTuple):
    """Settings of a run: steps, sequences of a step, their tokens, and the peak learning rate."""

    steps: int
    batch: int
    length: int
    lr: float


def finetune(folder: Path, seed: int, options: Json, settings: Settings, save: Path | None) -> list[float]:
    """Losses of AdamW on the docstrings; the seed orders the sequences."""
    torch.manual_seed(seed)
    model, tokenizer = data.load(folder)
    ids = data.sequences(tokenizer, data.docstrings(held_out=False), settings.length)
    order = torch.cat([torch.randperm(len(ids)) for _ in range(1 + settings.steps * settings.batch // len(ids))])
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.0)
    losses = []
    for step in range(settings.steps):
        batch = ids[order[step * settings.batch : (step + 1) * settings.batch]]
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * min(1.0, (step + 1) / WARMUP) * (1 - step / settings.steps)
        losses.append(_step(model, optimizer, batch, options))
        if step % 10 == 0:
            print(f"seed {seed} {options.get('backward', 'exact')} step {step} loss {losses[-1]:.4f}", flush=True)
    if save is not None:
        model.save_pretrained(save)
        tokenizer.save_pretrained(save)
    return losses


def _step(model: Any, optimizer: torch.optim.Optimizer, batch: torch.Tensor, options: Json) -> float:
    hidden = model.model(batch[:, :-1])[0]
    weight = model.get_output_embeddings().weight
    loss = linear_token_loss(hidden, weight, batch[:, 1:], negative_logprob, **options)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())
