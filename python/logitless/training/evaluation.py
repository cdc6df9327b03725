"""Loss and metrics on held-out data, from per-token statistics: one pass gives all of them, and no logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from logitless.losses import Loss
from logitless.training.batching import Batch, consecutive
from logitless.training.feeding import Feeder
from logitless.training.objective import Engine, objective_of_stats
from logitless.training.parallel import World

# A preference loss's metrics: TRL's names, and the fields of `PreferenceResult` that they average over pairs.
PREFERENCE_METRICS = {
    "rewards/chosen": "chosen_reward",
    "rewards/rejected": "rejected_reward",
    "rewards/margins": "margin",
    "rewards/accuracies": "accuracy",
    "logps/chosen": "chosen_logprob",
    "logps/rejected": "rejected_logprob",
}


@torch.no_grad()
def evaluate(
    model: Any,
    loss: Loss,
    engine: Engine,
    feeder: Feeder,
    complete: Callable[[Batch], Batch],
    batch_size: int,
    world: World,
) -> dict[str, float]:
    """Means over all tokens that count, or over all pairs: `loss`, and

    - for token losses `nll`, the mean negative log-likelihood (comparable between losses), and `mean_token_accuracy`;
    - for preference losses the `PREFERENCE_METRICS`.

    `complete` moves a batch to the device and adds the reference's values. Processes share the batches out.
    """
    was_training = model.training
    model.eval()
    sums = _sums_of_pairs if loss.level == "pair" else _sums_of_tokens
    totals = dict.fromkeys(("count", "loss", *(PREFERENCE_METRICS if loss.level == "pair" else TOKEN_METRICS)), 0.0)
    for units in consecutive(len(feeder.units), batch_size)[world.rank :: world.size]:
        for name, value in sums(model, loss, engine, complete(feeder.batch(units)), len(units)).items():
            totals[name] += value
    model.train(was_training)
    totals = {name: world.sum(value) for name, value in totals.items()}
    count = totals.pop("count")
    return {name: value / count for name, value in totals.items()}


TOKEN_METRICS = ("nll", "mean_token_accuracy")


def _sums_of_tokens(model: Any, loss: Loss, engine: Engine, batch: Batch, _: int) -> dict[str, float]:
    stats = engine.stats(model, batch, tuple(sorted({*loss.outputs, "logprob", "correct"})))
    assert stats.logprob is not None and stats.correct is not None
    return {
        "count": batch.counted,
        "loss": float(objective_of_stats(loss, stats, batch).loss),
        "nll": -float(stats.logprob.double().sum()),
        "mean_token_accuracy": float(stats.correct.double().sum()),
    }


def _sums_of_pairs(model: Any, loss: Loss, engine: Engine, batch: Batch, pairs: int) -> dict[str, float]:
    objective = objective_of_stats(loss, engine.stats(model, batch, ("logprob",)), batch)
    metrics = {name: float(getattr(objective.preference, part).sum()) for name, part in PREFERENCE_METRICS.items()}
    return {"count": pairs, "loss": float(objective.loss)} | metrics
