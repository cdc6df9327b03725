"""Loss and metrics on held-out data, from per-token statistics: one pass gives all of them, and no logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from logitless.losses import PairLoss
from logitless.training.collate import Batch, consecutive
from logitless.training.loader import Loader
from logitless.training.model import evaluating
from logitless.training.objective import loss_count, objective_of_stats

if TYPE_CHECKING:
    from logitless.training.run import Component

#: A preference loss's metrics: TRL's names, and the fields of `PreferenceResult` that they average over pairs.
PREFERENCE_METRICS = {
    "rewards/chosen": "chosen_reward",
    "rewards/rejected": "rejected_reward",
    "rewards/margins": "margin",
    "rewards/accuracies": "accuracy",
    "logps/chosen": "chosen_logprob",
    "logps/rejected": "rejected_logprob",
}


TOKEN_METRICS = ("nll", "mean_token_accuracy")


@torch.no_grad()
def evaluate_loss(component: Component, loader: Loader) -> dict[str, float]:
    """Means over all tokens that count, or over all pairs, of a loader's data.

    `loss`; `nll`, the mean negative log-likelihood, which can be compared between losses; and `mean_token_accuracy`.
    For preference losses `loss` and the `PREFERENCE_METRICS`. Processes share the batches out.
    """
    world = component.world
    names = PREFERENCE_METRICS if isinstance(component.loss, PairLoss) else TOKEN_METRICS
    totals = dict.fromkeys(("weight", "loss", "count", *names), 0.0)
    batches = consecutive(len(loader.units), component.options.per_device_eval_batch_size)
    with evaluating(component.model):
        for units, counts in world.share(batches):
            for name, value in _sums(component, component.complete_held_out(loader.batch(units))).items():
                totals[name] += counts * value
    totals = {name: world.sum(value) for name, value in totals.items()}
    weight, counted = totals.pop("weight"), totals.pop("count")
    return {name: value / (weight if name == "loss" else counted) for name, value in totals.items()}


def _sums(component: Component, batch: Batch) -> dict[str, float]:
    """The loss and what it is a mean over (`weight`), the metrics and what they are means over (`count`)."""
    model, loss, engine = component.model, component.loss, component.engine
    of_labels = not (loss.compares_distributions or loss.lists or loss.stats_temperature != 1.0)
    wanted = (*(loss.outputs if of_labels else ()), "logprob", *(() if isinstance(loss, PairLoss) else ("correct",)))
    stats = engine.stats(model, batch, tuple(dict.fromkeys(wanted)))
    if of_labels:
        objective = objective_of_stats(loss, stats, batch, max_length=component.options.max_length)
    else:  # not a function of these statistics
        objective = engine.objective(model, batch, 1.0)
    weight = loss_count(loss, batch, lambda: stats)
    sums = {"weight": weight, "loss": float(objective.loss)}
    if isinstance(loss, PairLoss):
        pairs = {name: float(getattr(objective.result, part).sum()) for name, part in PREFERENCE_METRICS.items()}
        return {**sums, "count": weight, **pairs}
    assert stats.logprob is not None and stats.correct is not None
    return {
        **sums,
        "count": batch.counted,
        "nll": -float(stats.logprob.double().sum()),
        "mean_token_accuracy": float(stats.correct.double().sum()),
    }
