"""The constants that KTO and BCO compare with: numbers of a batch or of the whole run."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..sequences import wide_dtype

__all__ = ["RunningMean", "bco_density_ratio", "bco_reward_shift", "kto_reference_point"]


def kto_reference_point(logprob: Tensor, ref_logprob: Tensor) -> Tensor:
    """KTO's reference point, `max(0, mean_i (logprob_i - ref_logprob_i))`: an estimate of KL(model || ref).

    Args:
        logprob, ref_logprob: `[S]`, summed over the tokens of completions that do not belong to their prompts (each
            prompt with the completion of the row before it, say), of the whole batch: gather the ranks' before.

    Returns:
        `[]`, detached; 0 for no completions. One alone has no mismatched partner: take batches of two at least.
    """
    if not logprob.numel():
        return logprob.new_zeros(())
    return (logprob - ref_logprob).detach().mean().clamp(min=0.0)


class RunningMean(NamedTuple):
    """A mean and the number of values seen; both `[]`, float64, to be saved with a checkpoint."""

    mean: Tensor
    seen: Tensor


def bco_reward_shift(rewards: Tensor, before: RunningMean | None = None) -> RunningMean:
    """BCO's shift delta: the mean of all rewards so far, `.mean`, every reward counting alike.

    Args:
        rewards: `[S]`, `beta (logprob - ref_logprob)` of the batch, of all ranks.
        before: what this function returned for the batches before; None at the start.

    Returns:
        The mean with this batch in it, detached.
    """
    rewards = rewards.detach().to(wide_dtype(rewards.device))
    if before is None:
        before = RunningMean(rewards.new_zeros(()), rewards.new_zeros(()))
    seen = before.seen + rewards.numel()
    step = (rewards - before.mean).sum() / seen.clamp(min=1.0)
    return RunningMean(before.mean + step, seen)


def bco_density_ratio(probability: Tensor, *, low: float = 0.5, high: float = 10.0) -> Tensor:
    """BCO's weight of an undesirable completion, `p / (1 - p)` between `low` and `high`, detached.

    Args:
        probability: `[S]`, p: a classifier's probability that the prompt is one of the desirable completions'.
        low, high: the bounds; 0.5 and 10 as in TRL 0.23.
    """
    probability = probability.detach()
    return (probability / (1 - probability)).clamp(low, high)
