"""Constants that multiply a policy loss's own term (`policy_weight`): corrections and masks, as pure functions.

They leave the normaliser alone: a token that is masked here still counts in the mean, as the papers have it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..formulas import KL_ESTIMATES, MAX_LOG_RATIO
from ..sequences import Sequences, wide_dtype

__all__ = ["off_policy_mask", "own_means", "rejection_mask", "sampler_correction", "top_entropy_mask"]

CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
SPANS = ("token", "sum", "mean", "max")


def sampler_correction(
    old_logprob: Tensor,
    sampling_logprob: Tensor,
    *,
    mode: str = "sequence_mask",
    low: float | None = None,
    high: float = 3.0,
    mask: Tensor | None = None,
    sequence: Tensor | None = None,
) -> Tensor:
    """The importance weight of tokens whose sampler (an inference engine) computes other log-probs than the trainer.

    `rho = exp(old_logprob - sampling_logprob)` per token, or `exp(sum over the sequence)` for every token of it.
    Truncated (TIS): held within [low, high]; masked (MIS, IcePop): 0 outside.

    Args:
        old_logprob: `[B, T]`, the trainer's own forward pass on the policy that sampled. Detached.
        sampling_logprob: the same shape, as the sampler reported them; NaN where it did not, which counts as equal.
        mode: `"token_truncate"`, `"token_mask"`, `"sequence_truncate"` or `"sequence_mask"` (default, as TRL's).
        low, high: bounds of rho; `high` 3 is TRL's, the TIS authors use about 2. None: no lower bound.
        mask: bool, the tokens that count. All by default.
        sequence: int64, as `Sequences` has it.

    Returns:
        `[B, T]`, detached, 0 where a token does not count.

    Raises:
        ValueError: a shape, a bound or the mode does not fit.

    Source: truncated importance sampling and its masked form as in TRL's and verl's correction of rollouts.
    """
    if mode not in CORRECTIONS:
        raise ValueError(f"mode: expected one of {', '.join(CORRECTIONS)}, got {mode!r}")
    if not (0 < high < math.inf and (low is None or 0 <= low <= high)):
        raise ValueError(f"low, high: expected 0 <= low <= high, finite, got {low} and {high}")
    difference, sequences = _difference(old_logprob, sampling_logprob, mask, sequence)
    if mode.startswith("sequence"):
        difference = sequences.sum(difference)
    rho = torch.exp(difference)  # inf is above any bound
    bounded = rho.clamp(min=low, max=high)
    if mode.endswith("mask"):
        bounded = torch.where(bounded == rho, rho, 0.0)
    return torch.where(sequences.mask, bounded, 0.0)


def rejection_mask(
    old_logprob: Tensor,
    sampling_logprob: Tensor,
    *,
    over: str,
    estimator: str,
    high: float,
    low: float | None = None,
    mask: Tensor | None = None,
    sequence: Tensor | None = None,
) -> Tensor:
    """Bool: keeps what the trainer and the sampler agree on, by an estimate of their divergence within [low, high].

    With `d = old_logprob - sampling_logprob`, held within 20, the estimate of a token is `-d` (k1), `d^2 / 2` (k2) or
    `exp(d) - d - 1` (k3). It is compared token by token, or for whole sequences by its sum, mean or maximum.

    | elsewhere | here |
    |---|---|
    | verl's `token_k2`, `seq_sum_k3`, `seq_max_k2`, ..., threshold h | `over`, `estimator` of that name, `high=h` |
    | verl's `seq_mean_k1`, ..., threshold `l_h` | `estimator="k1"`, `low=log(l)`, `high=log(h)` |
    | NeMo-RL's and OpenRLHF's `seq-mask-tis` of [l, h] | `over="mean"`, k1, `low=-log(h)`, `high=-log(l)` |

    The last bounds the geometric mean of the ratio `exp(d)`; verl's bounds of k1 are those of its inverse. The product
    of several masks keeps what all of them keep.

    As `policy_weight`, times `sampler_correction(mode="token_truncate")` or alone, it leaves the normaliser as it is.
    verl takes rejected tokens out of the mask: ignore their targets for that, and KL and entropy leave them out too.

    Args:
        old_logprob, sampling_logprob, mask, sequence: as `sampler_correction`; both log-probs finite or NaN.
        over: `"token"`, `"sum"`, `"mean"` or `"max"`.
        estimator: `"k1"`, `"k2"` or `"k3"`.
        high, low: in nats; `low` None for no lower bound, which the estimates k2 and k3, never negative, do not need.

    Returns:
        Of the shape of `old_logprob`, False where a token does not count.

    Raises:
        ValueError: a shape, a bound or a name does not fit.

    Source: verl's correction of rollouts; seq-mask-tis as in NeMo-RL and OpenRLHF.
    """
    if over not in SPANS or estimator not in KL_ESTIMATES:
        got = f"{over!r} and {estimator!r}"
        raise ValueError(f"over, estimator: expected {', '.join(SPANS)}, and {', '.join(KL_ESTIMATES)}, got {got}")
    if not (math.isfinite(high) and (low is None or -math.inf < low <= high)):
        raise ValueError(f"low, high: expected finite numbers, low at most high, got {low} and {high}")
    difference, sequences = _difference(old_logprob, sampling_logprob, mask, sequence)
    estimate = KL_ESTIMATES[estimator](difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
    if over != "token":
        estimate = getattr(sequences, over)(estimate)
    kept = estimate <= high
    return sequences.mask & (kept if low is None else kept & (estimate >= low))


def _difference(
    old_logprob: Tensor, sampling_logprob: Tensor, mask: Tensor | None, sequence: Tensor | None
) -> tuple[Tensor, Sequences]:
    """`old_logprob - sampling_logprob`, detached, 0 where the sampler reported nothing; and the sequences."""
    if sampling_logprob.shape != old_logprob.shape:
        shapes = f"{list(old_logprob.shape)} like old_logprob, got {list(sampling_logprob.shape)}"
        raise ValueError(f"sampling_logprob: expected shape {shapes}")
    sequences = Sequences(torch.ones_like(old_logprob, dtype=torch.bool) if mask is None else mask, sequence)
    return (old_logprob.detach() - sampling_logprob.detach()).nan_to_num(nan=0.0), sequences


def top_entropy_mask(entropy: Tensor, share: float, mask: Tensor | None = None) -> Tensor:
    """Bool, of entropy's shape: the tokens whose entropy is at or above the quantile `1 - share` of those that count.

    The quantile is interpolated linearly, as `torch.quantile`'s is, of any number of tokens and without waiting for
    the device. It is one of the whole batch: under accumulation or data parallelism gather the entropies first.

    Raises:
        ValueError: share is not in (0, 1].

    Source: arXiv 2506.01939 (share 0.2).
    """
    if not 0 < share <= 1:
        raise ValueError(f"share: expected a number in (0, 1], got {share!r}")
    mask = torch.ones_like(entropy, dtype=torch.bool) if mask is None else mask
    if not entropy.numel():
        return mask
    entropy = entropy.detach()
    ordered = torch.where(mask, entropy, torch.inf).reshape(-1).sort().values
    last = (mask.sum().reshape(1) - 1).to(wide_dtype(entropy.device))
    place = (last * (1 - share)).clamp(min=0)
    below, above = (ordered.gather(0, x.long()) for x in (place.floor(), place.ceil()))
    threshold = torch.lerp(below, above, place.frac().to(ordered.dtype))
    return mask & (entropy >= threshold)


def off_policy_mask(
    advantages: Tensor,
    logprob: Tensor,
    sampling_logprob: Tensor,
    *,
    threshold: float,
    mask: Tensor | None = None,
    sequence: Tensor | None = None,
) -> Tensor:
    """Bool: keeps a token with `A >= 0`, or whose sequence has `mean_t(sampling_logprob - logprob) <= threshold`.

    A sequence that should become less likely and that the policy has left behind already is dropped. A NaN in
    `sampling_logprob` counts as no drift. All shapes equal; everything detached.

    Source: the off-policy sequence mask of DeepSeek-V3.2, as in TRL.
    """
    sequences = Sequences(torch.ones_like(logprob, dtype=torch.bool) if mask is None else mask, sequence)
    return still_on_policy(advantages, logprob, sampling_logprob, threshold, sequences)


def still_on_policy(
    advantages: Tensor, logprob: Tensor, sampling_logprob: Tensor, threshold: float, sequences: Sequences
) -> Tensor:
    """`off_policy_mask` of sequences that are known already."""
    drift = sequences.mean((sampling_logprob.detach() - logprob.detach()).nan_to_num(nan=0.0))
    return sequences.mask & ((advantages >= 0) | (drift <= threshold))


def own_means(demonstration: Tensor, *, rollout_tokens: Tensor | float, demonstration_tokens: Tensor | float) -> Tensor:
    """Token weights `n / n_part` with which a mean over all n tokens is the sum of two means, each part's own.

    Args:
        demonstration: bool `[...]`, the tokens of demonstrations.
        rollout_tokens, demonstration_tokens: how many tokens count of either kind, over the whole (global) batch.

    Give the result as `token_weight`, and `normalizer=rollout_tokens + demonstration_tokens`. A part without any
    token weighs nothing. CHORD and UFT average demonstrations and rollouts apart.
    """
    parts = [torch.as_tensor(n, dtype=torch.float32) for n in (demonstration_tokens, rollout_tokens)]
    total = parts[0] + parts[1]
    of_demonstration, of_rollout = (total / n.clamp(min=1.0) for n in parts)
    return torch.where(demonstration, of_demonstration.to(demonstration.device), of_rollout.to(demonstration.device))
