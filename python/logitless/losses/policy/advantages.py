"""Advantages of sampled sequences and tokens, as pure functions of rewards: constants that policy losses are given.

Everything here is computed in float64 where the device has it and returned in the rewards' dtype (float32 at least),
detached. A group is the set of samples of one prompt.

Groups of one and groups of equal rewards have advantage exactly 0 in all of them: there is nothing to compare with.
(verl gives a group of one its bare reward; `prefix_rft_advantages` alone does so, as its paper has it.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..sequences import Sequences, wide_dtype

__all__ = [
    "discounted_sum",
    "generalized_advantages",
    "group_advantages",
    "prefix_rft_advantages",
    "rloo_advantages",
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
        degrees = (_group_sum(torch.ones_like(values), index) - 1).clamp(min=1.0)
        centred = centred / ((_group_sum(centred.square(), index) / degrees).sqrt() + epsilon)
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
    size = _group_sum(torch.ones_like(values), index)
    return _result(_centred(values, index) * size / (size - 1).clamp(min=1.0), rewards)


class TokenAdvantages(NamedTuple):
    """Advantages of tokens, and the returns that a value function learns, `advantages + values`; 0 where masked."""

    advantages: Tensor
    returns: Tensor


def generalized_advantages(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    mask: Tensor | None = None,
    sequence: Tensor | None = None,
) -> TokenAdvantages:
    """GAE: `A_t = delta_t + gamma lam A_{t+1}`, `delta_t = r_t + gamma V_{t+1} - V_t`, V and A 0 after the last token.

    Args:
        rewards, values: `[B, T]` (`[N]` with `sequence`) per token; a sequence's reward stands on its last token.
        gamma, lam: discount, and how far a reward reaches beyond what the values say; 1 and 0.95 are usual for text.
        mask: bool, the tokens that count; t + 1 is the next that does. All by default.
        sequence: int64, as `Sequences` has it.

    Not whitened: `whiten(advantages, mask)` does that. Source: arXiv 1506.02438, equation 16.
    """
    _check_same("values", values, rewards)
    sequences = Sequences(torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask, sequence)
    r, v = (_wide(x) for x in (rewards, values))
    delta = r + gamma * sequences.following(v) - v
    advantages = sequences.discounted(delta, gamma * lam)
    returns = torch.where(sequences.mask, advantages + v, 0.0)
    return TokenAdvantages(_result(advantages, rewards), _result(returns, rewards))


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
    size = _group_sum(torch.ones_like(values), cell)
    own = _centred(values, cell)
    if scale == "group":
        own = own / ((_group_sum(own.square(), cell) / (size - 1).clamp(min=1.0)).sqrt() + epsilon)
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


def _centred(values: Tensor, index: Tensor) -> Tensor:
    """The distance to the group's mean, through the distance to its least: exactly 0 where all are equal."""
    least = torch.full_like(values, torch.inf).scatter_reduce(0, index, values, "amin")[index]
    above = values - least
    return above - _group_sum(above, index) / _group_sum(torch.ones_like(values), index)


def _wide(values: Tensor) -> Tensor:
    return values.detach().to(wide_dtype(values.device))


def _result(values: Tensor, like: Tensor) -> Tensor:
    return values.to(torch.promote_types(like.dtype, torch.float32))
