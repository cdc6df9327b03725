"""Loss and metrics on held-out data, from per-token statistics: one pass gives all of them, and no logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from logitless.losses import Loss, PairLoss
from logitless.training.batching import Batch, consecutive
from logitless.training.feeding import Feeder
from logitless.training.objective import Engine, count, objective_of_stats
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

    - `nll`, the mean negative log-likelihood (comparable between losses), and `mean_token_accuracy`;
    - for preference losses the `PREFERENCE_METRICS`.

    `complete` moves a batch to the device and adds the reference's values. Processes share the batches out.
    """
    was_training = model.training
    model.eval()
    names = PREFERENCE_METRICS if isinstance(loss, PairLoss) else TOKEN_METRICS
    totals = dict.fromkeys(("weight", "loss", "count", *names), 0.0)
    for units in consecutive(len(feeder.units), batch_size)[world.rank :: world.size]:
        for name, value in _sums(model, loss, engine, complete(feeder.batch(units))).items():
            totals[name] += value
    model.train(was_training)
    totals = {name: world.sum(value) for name, value in totals.items()}
    weight, counted = totals.pop("weight"), totals.pop("count")
    return {name: value / (weight if name == "loss" else counted) for name, value in totals.items()}


TOKEN_METRICS = ("nll", "mean_token_accuracy")


def _sums(model: Any, loss: Loss, engine: Engine, batch: Batch) -> dict[str, float]:
    """The loss and what it is a mean over (`weight`), the metrics and what they are means over (`count`)."""
    wanted = loss.outputs if isinstance(loss, PairLoss) else (*loss.outputs, "logprob", "correct")
    stats = engine.stats(model, batch, tuple(dict.fromkeys(wanted)))
    if loss.compares_distributions or loss.stats_temperature != 1.0:  # not a function of these statistics
        objective = engine.objective(model, batch, 1.0)
    else:
        objective = objective_of_stats(loss, stats, batch)
    weight = count(loss, batch)
    found = {"weight": weight, "loss": float(objective.loss)}
    if isinstance(loss, PairLoss):
        sums = {name: float(getattr(objective.result, part).sum()) for name, part in PREFERENCE_METRICS.items()}
        return {**found, "count": weight, **sums}
    assert stats.logprob is not None and stats.correct is not None
    return {
        **found,
        "count": batch.counted,
        "nll": -float(stats.logprob.double().sum()),
        "mean_token_accuracy": float(stats.correct.double().sum()),
    }
