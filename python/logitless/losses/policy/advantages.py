"""Advantages of sampled sequences and tokens, as pure functions of rewards: constants that policy losses are given.

An advantage of one number a sequence, `[S]`, goes to a loss as it is: each of the sequence's tokens gets it. PPO with a
value function takes `token_rewards`, `generalized_advantages` and `whiten` in turn; `value_loss` learns the returns.

Everything here is computed in float64 where the device has it and returned in the rewards' dtype (float32 at least),
detached. A group is the set of samples of one prompt.

Groups of one and groups of equal rewards have advantage exactly 0 in all of them: there is nothing to compare with.
(verl gives a group of one its bare reward; `prefix_rft_advantages` alone does so, as its paper has it.) Where tokens
are whitened afterwards, 0 moves with the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..sequences import Sequences, wide_dtype

__all__ = [
    "best_of_group_advantages",
    "discounted_sum",
    "gdpo_advantages",
    "generalized_advantages",
    "gpg_advantages",
    "group_advantages",
    "length_adaptive_lambda",
    "opo_advantages",
    "pass_at_k_advantages",
    "prefix_rft_advantages",
    "reinforce_plus_plus_advantages",
    "reinforce_plus_plus_baseline_advantages",
    "remax_advantages",
    "rloo_advantages",
    "token_rewards",
    "whiten",
]

SCALES = ("group", "batch", "none")


def group_advantages(rewards: Tensor, group: Tensor | int, *, scale: str = "group", epsilon: float = 1e-4) -> Tensor:
    """GRPO's advantages: `(R_i - mean of the group) / (deviation + epsilon)`.

    Args:
        rewards: `[S]`, finite.
        group: `[S]` int64, which prompt a sample belongs to, in any order; or the size of groups that lie behind one
            another.
        scale: the deviation, unbiased (n - 1), of the `"group"`'s rewards (GRPO, the default) or of the whole
            `"batch"`'s; `"none"` does not divide (Dr. GRPO: dividing favours prompts that are nearly solved, or
            hopeless).
        epsilon: added to the deviation; 1e-4 is TRL's, verl has 1e-6.

    Returns:
        `[S]`; 0 for a group of one, or of equal rewards.

    Raises:
        ValueError, TypeError: shapes, dtypes or the scale do not fit.

    Source: GRPO arXiv 2402.03300; Dr. GRPO arXiv 2503.20783; the batch's deviation as in TRL's `scale_rewards`.
    """
    if scale not in SCALES:
        raise ValueError(f"scale: expected one of {', '.join(SCALES)}, got {scale!r}")
    values, index = _grouped(rewards, group)
    centred = _centred(values, index)
    if scale == "group":
        centred = centred / (_deviation(centred, index) + epsilon)
    elif scale == "batch":
        # Shifted first: the deviation of equal numbers is then exactly 0.
        spread = (values - values.amin()).std() if len(values) > 1 else 0.0
        centred = centred / (spread + epsilon)
    return _result(centred, rewards)


def rloo_advantages(rewards: Tensor, group: Tensor | int) -> Tensor:
    """Leave-one-out: `R_i - mean of the group's other rewards` = `n / (n - 1) (R_i - mean)`.

    Arguments, result and errors as `group_advantages`. Source: arXiv 2402.14740.
    """
    values, index = _grouped(rewards, group)
    size = _group_size(values, index)
    return _result(_centred(values, index) * size / (size - 1).clamp(min=1.0), rewards)


def opo_advantages(rewards: Tensor, group: Tensor | int, lengths: Tensor) -> Tensor:
    """OPO's advantages: `R_i - sum_j l_j R_j / sum_j l_j` over the group, l the answers' lengths.

    The baseline of least variance if a sequence's squared gradient grows with its length.

    Args:
        rewards, group: as `group_advantages`.
        lengths: `[S]`, how many tokens of each answer count.

    Result and errors as `group_advantages`. Source: arXiv 2505.23585, from verl's code.
    """
    values, index = _grouped(rewards, group)
    _check_same("lengths", lengths, rewards)
    return _result(_centred(values, index, _wide(lengths)), rewards)


def gpg_advantages(rewards: Tensor, group: Tensor | int) -> Tensor:
    """GPG's advantages: `alpha (R_i - mean of the group)`, alpha = samples / (samples of groups whose rewards differ).

    alpha makes up for the groups that carry no signal and still count in the mean; 1 where all of them do. It is one
    of the whole batch. The loss is `reinforce`.

    Arguments, result and errors as `group_advantages`. verl's alpha counts samples of reward other than 0 instead,
    which is another number.

    Source: arXiv 2504.02546, from its authors' code (`adjust_gd`).
    """
    values, index = _grouped(rewards, group)
    centred = _centred(values, index)
    informative = (_group_sum(centred.abs(), index) > 0).to(centred.dtype).sum().clamp(min=1.0)
    return _result(centred * (len(values) / informative), rewards)


def remax_advantages(rewards: Tensor, greedy_rewards: Tensor) -> Tensor:
    """ReMax's advantages: `R_i - R_greedy`, the reward of the greedy answer to the same prompt.

    Args:
        rewards: of the samples; of any shape, such as `[S]`, or returns per token.
        greedy_rewards: of the same shape.

    Source: arXiv 2310.10505, as in verl. `reinforce` is its loss.
    """
    _check_same("greedy_rewards", greedy_rewards, rewards)
    return _result(_wide(rewards) - _wide(greedy_rewards), rewards)


def gdpo_advantages(
    rewards: Tensor, group: Tensor | int, *, weights: Sequence[float] | None = None, epsilon: float = 1e-4
) -> Tensor:
    """GDPO's advantages of several rewards: each normalised in its group, then summed, then normalised in the batch.

    `a = sum_k w_k group_advantages(rewards[:, k])` and `A = (a - mean(a)) / (deviation(a) + epsilon)`. A reward of
    small spread is not drowned by one of large spread, as it is in the sum of both.

    Args:
        rewards: `[S, K]`, finite, K kinds of reward.
        group: as `group_advantages`.
        weights: K numbers, 1 by default.
        epsilon: added to both deviations, which are unbiased; 1e-4 is TRL's, NeMo-RL has 1e-6 in the group.

    Returns:
        `[S]`.

    Raises:
        ValueError, TypeError: as `group_advantages`; `weights` has not one number a reward.

    Source: arXiv 2601.05242, as in TRL (`normalize_then_sum`); the batch's deviation is one of the whole batch.
    """
    if not isinstance(rewards, Tensor) or rewards.dim() != 2:
        got = list(rewards.shape) if isinstance(rewards, Tensor) else type(rewards).__name__
        raise ValueError(f"rewards: expected a tensor [S, K], got {got}")
    scale = [1.0] * rewards.shape[1] if weights is None else list(weights)
    if len(scale) != rewards.shape[1]:
        raise ValueError(f"weights: expected {rewards.shape[1]} numbers, one a reward, got {len(scale)}")
    total = _wide(rewards.new_zeros(len(rewards)))
    for weight, kind in zip(scale, _wide(rewards).unbind(1), strict=True):
        total = total + weight * group_advantages(kind, group, epsilon=epsilon)
    spread = total.std() if len(total) > 1 else 0.0
    return _result((total - total.mean()) / (spread + epsilon), rewards)


def pass_at_k_advantages(rewards: Tensor, group: Tensor | int, k: int, *, epsilon: float = 1e-6) -> Tensor:
    """Pass@k training's advantages: an answer's mean reward in teams of k from its group, normalised over all teams.

    A team's reward is 1 if one of its k answers is right. With n answers, m of them wrong, all teams count:

        f = C(m, k) / C(n, k)                                the share of teams that fail
        A = f / (sqrt(f (1 - f)) + epsilon)                                        of a right answer
        A = (f - C(m - 1, k - 1) / C(n - 1, k - 1)) / (sqrt(f (1 - f)) + epsilon)  of a wrong answer

    k = 1 is GRPO with the biased deviation. Advantages of a group add up to 0, and are exactly 0 where every team
    succeeds, or none does.

    Args:
        rewards: `[S]`, each 0 or 1.
        group: as `group_advantages`; every group has k answers at least.
        k: size of the teams, positive.
        epsilon: 1e-6, its code's.

    Raises:
        ValueError, TypeError: as `group_advantages`; a reward that is neither 0 nor 1; a group of less than k.

    Source: arXiv 2508.10751, from its authors' code (analytical derivation).
    """
    values, index = _grouped(rewards, group)
    if not ((values == 0) | (values == 1)).all():
        raise ValueError("rewards: pass@k expects 0 or 1, got other numbers")
    size, wrong = _group_size(values, index), _group_sum(1 - values, index)
    if isinstance(k, bool) or not isinstance(k, int) or k < 1 or (size < k).any():
        raise ValueError(f"k: expected a positive int, at most the size of every group, got {k!r}")
    fails = _all_wrong(wrong, size, k)
    given_wrong = _all_wrong(wrong - 1, size - 1, k - 1)
    advantage = torch.where(values == 1, fails, fails - given_wrong)
    return _result(advantage / ((fails * (1 - fails)).sqrt() + epsilon), rewards)


def best_of_group_advantages(
    rewards: Tensor, group: Tensor | int, *, scale: str = "group", epsilon: float = 1e-6
) -> Tensor:
    """Advantages of the group's best alone: `R_best - R_second` (`/ (deviation + epsilon)`), 0 for all others.

    What the group's greatest reward would lose without that answer: verl's `grpo_passk`. 0 where two are best.

    Args:
        rewards, group: as `group_advantages`.
        scale: `"group"` divides by the unbiased deviation (default, verl's) or `"none"`. epsilon: 1e-6, verl's.

    Source: arXiv 2503.19595, from verl's code.
    """
    if scale not in ("none", "group"):
        raise ValueError(f"scale: expected one of none, group, got {scale!r}")
    values, index = _grouped(rewards, group)
    best = values == _group_extreme(values, index, "amax")
    second = _group_extreme(torch.where(best, -torch.inf, values), index, "amax")
    alone = best & (_group_sum(best.to(values.dtype), index) == 1) & second.isfinite()
    advantage = torch.where(alone, values - second, 0.0)
    if scale == "group":
        advantage = advantage / (_deviation(_centred(values, index), index) + epsilon)
    return _result(advantage, rewards)


# Tokens


def token_rewards(
    rewards: Tensor,
    mask: Tensor,
    *,
    kl: Tensor | None = None,
    beta: float = 0.0,
    sequence: Tensor | None = None,
) -> Tensor:
    """Rewards per token: a sequence's on its last token that counts, less `beta kl` on every token.

    Args:
        rewards: `[S]`, one a sequence.
        mask: bool `[S, T]`, the tokens that count; with `sequence` `[N]`.
        kl: of the mask's shape, such as `kl_estimate(old_logprob, ref_logprob, estimator="k1")`; needed by `beta`.
        beta: the KL's weight, 0 by default: no KL in the reward. (`PolicyLoss.beta` has it in the loss.)
        sequence: `[N]` int64 in [0, S), which sequence a flat token belongs to, each in one piece.

    Returns:
        Of the mask's shape, detached, 0 where it is False: what `generalized_advantages`, `discounted_sum` and
        `reinforce_plus_plus_advantages` take. A sequence without a token that counts loses its reward.

    Raises:
        ValueError: a shape or a dtype does not fit; `kl` and `beta` do not come together.

    Source: as in NeMo-RL, verl and TRL.
    """
    if (kl is None) != (beta == 0):
        raise ValueError(f"kl, beta: expected both or neither, got kl {'absent' if kl is None else 'given'}, {beta=}")
    sequences = Sequences(mask, sequence)
    last = mask & (sequences.discounted(mask.to(wide_dtype(mask.device)), 1.0) == 1)
    result = torch.where(last, _spread(rewards, mask, sequence), 0.0)
    if kl is not None:
        _check_same("kl", kl, mask)
        result = result - torch.where(mask, beta * _wide(kl), 0.0)
    return _result(result, rewards)


def _spread(rewards: Tensor, mask: Tensor, sequence: Tensor | None) -> Tensor:
    """One number a sequence, on each of its tokens."""
    rows = mask.shape[:1] if sequence is None else rewards.shape[:1]
    if rewards.dim() != 1 or rewards.shape != rows or (sequence is None and mask.dim() != 2):
        expected = "[S] with a mask [S, T], or [S] with a flat mask and sequence"
        raise ValueError(f"rewards: expected {expected}, got {list(rewards.shape)} and mask {list(mask.shape)}")
    return _wide(rewards)[:, None].expand(mask.shape) if sequence is None else _wide(rewards)[sequence]


class TokenAdvantages(NamedTuple):
    """Advantages of tokens, and the returns that a value function learns, `advantages + values`; 0 where masked."""

    advantages: Tensor
    returns: Tensor


def generalized_advantages(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float = 1.0,
    lam: float | Tensor = 0.95,
    mask: Tensor | None = None,
    sequence: Tensor | None = None,
) -> TokenAdvantages:
    """GAE: `A_t = delta_t + gamma lam A_{t+1}`, `delta_t = r_t + gamma V_{t+1} - V_t`, V and A 0 after the last token.

    Args:
        rewards, values: `[B, T]` (`[N]` with `sequence`) per token; a sequence's reward stands on its last token
            (`token_rewards`).
        gamma, lam: discount, and how far a reward reaches beyond what the values say; 1 and 0.95 are usual for text.
            `lam` may be a tensor per token (`length_adaptive_lambda`).
        mask: bool, the tokens that count; t + 1 is the next that does. All by default.
        sequence: int64, as `Sequences` has it.

    Not whitened: `whiten(advantages, mask)` does that. VAPO's decoupled GAE is two calls: advantages from one, returns
    from another with `lam=1`. Source: arXiv 1506.02438, equation 16; VAPO arXiv 2504.05118.
    """
    _check_same("values", values, rewards)
    if isinstance(lam, Tensor):
        _check_same("lam", lam, rewards)
        lam = _wide(lam)
    sequences = Sequences(torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask, sequence)
    r, v = (_wide(x) for x in (rewards, values))
    delta = r + gamma * sequences.following(v) - v
    advantages = sequences.discounted(delta, gamma * lam)
    returns = torch.where(sequences.mask, advantages + v, 0.0)
    return TokenAdvantages(_result(advantages, rewards), _result(returns, rewards))


def length_adaptive_lambda(mask: Tensor, *, alpha: float = 0.05, sequence: Tensor | None = None) -> Tensor:
    """VAPO's lambda of GAE, `1 - 1 / (alpha l)` for a sequence of l counted tokens, on each of its tokens.

    0 where `alpha l` is below 1. A long answer's reward reaches further back. `alpha` is the paper's 0.05, positive.

    Source: arXiv 2504.05118, as in NeMo-RL.
    """
    if not 0 < alpha < float("inf"):
        raise ValueError(f"alpha: expected a positive number, got {alpha!r}")
    length = Sequences(mask, sequence).count(wide_dtype(mask.device))
    return (1 - 1 / (alpha * length).clamp(min=1.0)).float()


def reinforce_plus_plus_advantages(
    rewards: Tensor, *, gamma: float = 1.0, mask: Tensor | None = None, sequence: Tensor | None = None
) -> Tensor:
    """REINFORCE++: the return of every token, whitened over all tokens that count; no group is needed.

    Args:
        rewards: per token, `[B, T]` (`[N]` with `sequence`), as `token_rewards` makes them; its paper has k1 in them.
        gamma: discount, 1.
        mask: bool, the tokens that count. All by default.
        sequence: int64, as `Sequences` has it.

    Mean and deviation are the whole batch's: gather the rewards first. Source: arXiv 2501.03262, as in verl.
    """
    return whiten(discounted_sum(rewards, gamma, mask=mask, sequence=sequence), mask)


def reinforce_plus_plus_baseline_advantages(
    rewards: Tensor, group: Tensor | int, mask: Tensor, *, sequence: Tensor | None = None
) -> Tensor:
    """REINFORCE++ with a baseline: `R_i - mean of the group`, then whitened over all tokens that count.

    Args:
        rewards, group: as `group_advantages`.
        mask, sequence: as `token_rewards`.

    Returns:
        Per token, of the mask's shape. Source: arXiv 2501.03262, as in verl and NeMo-RL (whose variance is biased).
    """
    centred = _spread(group_advantages(rewards, group, scale="none"), mask, sequence)
    return _result(whiten(centred, mask), rewards)


def discounted_sum(
    values: Tensor, factor: float = 1.0, *, mask: Tensor | None = None, sequence: Tensor | None = None
) -> Tensor:
    """`y_t = values_t + factor y_{t+1}` over a sequence's counted tokens: the return of per-token rewards.

    `[B, T]`, or any shape with `sequence` (int64, each sequence in one piece); 0 where `mask` is False.
    """
    sequences = Sequences(torch.ones_like(values, dtype=torch.bool) if mask is None else mask, sequence)
    return _result(sequences.discounted(_wide(values), factor), values)


def whiten(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """`(x - mean) / sqrt(variance + 1e-8)` over the tokens that count (variance unbiased); 0 elsewhere."""
    x = _wide(values)
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    count = mask.sum()
    centred = torch.where(mask, x - torch.where(mask, x, 0.0).sum() / count.clamp(min=1), 0.0)
    variance = centred.square().sum() / (count - 1).clamp(min=1)
    return _result(centred / (variance + 1e-8).sqrt(), values)


class PrefixAdvantages(NamedTuple):
    """Advantages of a sample's continuation and of its prefix (0 without one), `[S]` each."""

    continuation: Tensor
    prefix: Tensor


def prefix_rft_advantages(
    rewards: Tensor, prompt: Tensor | int, prefix: Tensor, *, scale: str = "none", epsilon: float = 1e-6
) -> PrefixAdvantages:
    """Prefix-RFT's advantages of a batch in which some samples continue a demonstration's prefix.

    Samples are grouped by prompt and prefix, all of a prompt's samples without a prefix together:
    `a_i = R_i - mean` (`/ (deviation + epsilon)` with `scale="group"`). A group of one keeps its bare reward, so that
    a single prefixed sample is not silenced. The prefix gets
    `(a_i - mean reward of the prompt's samples without a prefix) / (number of samples with that prefix)`.

    Args:
        rewards: `[S]`.
        prompt: `[S]` int64, or the size of groups that lie behind one another.
        prefix: `[S]` int64, the number of the prefix that a sample continues; -1 for none.
        scale: `"none"` (Dr. GRPO's, which the paper uses) or `"group"`. epsilon: of the deviation.

    Left open: with `scale="group"` the prefix's baseline stays the bare mean of rewards, as in the authors' code.

    Source: arXiv 2507.01679 and its code.
    """
    if scale not in ("none", "group"):
        raise ValueError(f"scale: expected one of none, group, got {scale!r}")
    values, index = _grouped(rewards, prompt)
    _check_ids("prefix", prefix, rewards)
    free = prefix < 0
    pair = torch.stack([index, prefix.clamp(min=-1)], dim=-1)
    cell = torch.unique(pair, dim=0, return_inverse=True)[1].reshape(-1) if len(index) else index
    size = _group_size(values, cell)
    own = _centred(values, cell)
    if scale == "group":
        own = own / (_deviation(own, cell) + epsilon)
    own = torch.where(size == 1, values, own)
    baseline = _group_sum(values * free, index) / _group_sum(free.to(values.dtype), index).clamp(min=1.0)
    of_prefix = torch.where(free, 0.0, (own - baseline) / size)
    return PrefixAdvantages(_result(own, rewards), _result(of_prefix, rewards))


# Groups


def _grouped(rewards: Tensor, group: Tensor | int) -> tuple[Tensor, Tensor]:
    """The rewards, wide and detached, and each one's group as a number below the number of groups."""
    if not isinstance(rewards, Tensor) or not rewards.is_floating_point() or rewards.dim() != 1:
        got = f"{rewards.dtype} {list(rewards.shape)}" if isinstance(rewards, Tensor) else type(rewards).__name__
        raise ValueError(f"rewards: expected a floating-point tensor [S], got {got}")
    if isinstance(group, int) and not isinstance(group, bool):
        if group < 1 or len(rewards) % group:
            raise ValueError(f"group: expected a size that divides the {len(rewards)} rewards, got {group}")
        return _wide(rewards), torch.arange(len(rewards), device=rewards.device) // group
    _check_ids("group", group, rewards)
    return _wide(rewards), torch.unique(group, return_inverse=True)[1]


def _check_ids(name: str, value: object, rewards: Tensor) -> None:
    if not isinstance(value, Tensor) or value.dtype != torch.int64 or value.shape != rewards.shape:
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else f"{value!r}"
        raise ValueError(f"{name}: expected int64 of shape {list(rewards.shape)}, got {got}")


def _check_same(name: str, value: Tensor, like: Tensor) -> None:
    if value.shape != like.shape:
        raise ValueError(f"{name}: expected shape {list(like.shape)}, got {list(value.shape)}")


def _group_sum(values: Tensor, index: Tensor) -> Tensor:
    """Every element gets its group's sum."""
    return torch.zeros_like(values).index_add(0, index, values)[index]


def _group_size(values: Tensor, index: Tensor) -> Tensor:
    """Every element gets the number of its group's elements."""
    return _group_sum(torch.ones_like(values), index)


def _group_extreme(values: Tensor, index: Tensor, which: str) -> Tensor:
    """Every element gets its group's least ("amin") or greatest ("amax")."""
    return torch.zeros_like(values).scatter_reduce(0, index, values, which, include_self=False)[index]


def _centred(values: Tensor, index: Tensor, weight: Tensor | None = None) -> Tensor:
    """The distance to the group's (weighted) mean, through that to its least: exactly 0 where all are equal."""
    above = values - _group_extreme(values, index, "amin")
    weight = torch.ones_like(values) if weight is None else weight
    return above - _group_sum(weight * above, index) / _group_sum(weight, index).clamp(min=1.0)


def _deviation(centred: Tensor, index: Tensor) -> Tensor:
    """Every element gets its group's unbiased standard deviation; 0 for a group of one."""
    degrees = (_group_size(centred, index) - 1).clamp(min=1.0)
    return (_group_sum(centred.square(), index) / degrees).sqrt()


def _all_wrong(wrong: Tensor, size: Tensor, k: int) -> Tensor:
    """`C(wrong, k) / C(size, k)`, the chance that k draws without return are all wrong."""
    drawn = torch.arange(k, device=wrong.device)
    return ((wrong[:, None] - drawn).clamp(min=0) / (size[:, None] - drawn)).prod(-1)


def _wide(values: Tensor) -> Tensor:
    return values.detach().to(wide_dtype(values.device))


def _result(values: Tensor, like: Tensor) -> Tensor:
    return values.to(torch.promote_types(like.dtype, torch.float32))
