"""The reward that a fine-tuned model implies: log-odds against a reference as Q - V, and dense rewards for a text.

A model that is optimal for a reward with a KL term to a reference (weight beta) carries its soft Q-function in its
logits: up to a shift per state, with `rho_t = logprob_t - ref_logprob_t` and y_t the token taken,

    Q_t(a) = beta (logit(a) - ref_logit(a)),    V_t = beta (lse_t - ref_lse_t),    beta rho_t = Q_t(y_t) - V_t
    r_t = Q_t(y_t) - V_{t+1} = beta rho_t + V_t - V_{t+1},    V after the last token = 0,

so that the return from t on is `sum_{k >= t} r_k = beta sum_{k >= t} rho_k + V_t`. Without a reference (entropy instead
of KL) the same holds with `ref_logprob = ref_lse = 0`: the endogenous reward. The shaping by V does not change which of
two answers to one prompt is better, as V_0 is the prompt's.

A softmax does not see a shift of all logits of a state, so V means something only up to what training left there. The
values of a text serve as constants: everything here is detached.

The baseline-relative rewards of Dense-Path REINFORCE (arXiv 2510.02493) are the `log_odds` of two checkpoints of one
fine-tuning; `losses.DensePathReinforce` trains on them.

Source: log-odds as Q - V arXiv 2507.00018; the endogenous reward arXiv 2506.23235, equations 11 and 12. Unverified
source: both known through summaries and notes; the identities are derived.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...types import TokenStats
from ..sequences import Sequences, wide_dtype

__all__ = ["ImplicitReward", "centred_advantage", "dense_rewards"]


class ImplicitReward(NamedTuple):
    """Rewards and values of every token of a text, `[..., T]` each, in the unit of beta; 0 where masked."""

    log_odds: Tensor
    """`Q_t(y_t) - V_t = beta rho_t`: the token's advantage, as DPO's reward has it per token."""
    q: Tensor
    """`Q_t(y_t) = beta rho_t + V_t`."""
    value: Tensor
    """`V_t`, of the state before the token."""
    reward: Tensor
    """`r_t = Q_t(y_t) - V_{t+1}`; their sum over a text is `beta sum_t rho_t + V_0`."""
    returns: Tensor
    """`sum_{k >= t} discount^(k - t) r_k`, the return from t on."""


def dense_rewards(
    stats: TokenStats,
    ref_stats: TokenStats | None = None,
    *,
    beta: float = 1.0,
    discount: float = 1.0,
    mask: Tensor | None = None,
    sequence: Tensor | None = None,
) -> ImplicitReward:
    """Dense rewards, values and returns of texts, from the statistics of a model and of its reference.

    Args:
        stats: `logprob` and `lse` of the model whose reward is asked for, `[..., T]`, the last axis being time.
        ref_stats: the same of the reference on the same tokens (for a fine-tuned model, the model before that), or None
            for the reward that the model implies by itself: `r_t = beta (logprob_t + lse_t - lse_{t+1})`, which is
            `logit_t - lse_{t+1}` at beta 1, the endogenous reward.
        beta: weight of the KL (entropy) term, positive; it only scales everything. 1 by default, as in the endogenous
            reward's paper.
        discount: of the returns, in [0, 1]; 1, under which the identities hold.
        mask: bool `[..., T]`, the tokens of the text; others get 0, and t + 1 is the next that counts. All by default.
        sequence: int64 `[..., T]`, which text a token belongs to where several lie behind one another; a row is one by
            default.

    Returns:
        `ImplicitReward`, detached, in the statistics' dtype. A logprob of -inf makes its text's numbers -inf or NaN.

    Raises:
        ValueError: beta or discount is out of range, a statistic is missing, or shapes do not fit.
    """
    _check_range("beta", beta, 0.0 < beta < float("inf"), "a positive number")
    _check_range("discount", discount, 0.0 <= discount <= 1.0, "a number in [0, 1]")
    logprob, lse = (_statistic(stats, "stats", name, None) for name in ("logprob", "lse"))
    rho, drift = logprob, lse
    if ref_stats is not None:
        rho = logprob - _statistic(ref_stats, "ref_stats", "logprob", logprob)
        drift = lse - _statistic(ref_stats, "ref_stats", "lse", logprob)
    texts = _texts(rho, mask, sequence)
    log_odds, value = (beta * torch.where(texts.mask, x, 0.0) for x in (rho, drift))
    reward = torch.where(texts.mask, log_odds + value - texts.following(value), 0.0)
    returns = texts.discounted(reward, discount)
    assert stats.logprob is not None
    dtype = stats.logprob.dtype
    return ImplicitReward(*(x.to(dtype) for x in (log_odds, log_odds + value, value, reward, returns)))


def centred_advantage(
    logprob: Tensor, ref_logprob: Tensor | None = None, *, kl: Tensor | None = None, entropy: Tensor | None = None
) -> Tensor:
    """Advantages with mean 0 under the model at every state, in units of beta; detached, `[...]`.

    `rho_t - KL_t` with `ref_logprob` and `kl`, the full KL(model || reference) at t (`linear_divergence`, kind
    "reverse_kl"): the log-odds alone have that mean. Without a reference `logprob_t + entropy_t`, with `entropy`.

    Raises:
        ValueError: neither or both pairs of inputs are given, or shapes differ.
    """
    with_reference = ref_logprob is not None and kl is not None and entropy is None
    if not with_reference and (entropy is None or ref_logprob is not None or kl is not None):
        raise ValueError("centred_advantage: expected either ref_logprob and kl, or entropy alone")
    for name, value in (("ref_logprob", ref_logprob), ("kl", kl), ("entropy", entropy)):
        if value is not None:
            _check_shape(name, value, logprob)
    if entropy is not None:
        return (logprob + entropy).detach()
    assert ref_logprob is not None and kl is not None
    return (logprob - ref_logprob - kl).detach()


def _statistic(stats: TokenStats, where: str, field: str, like: Tensor | None) -> Tensor:
    value: Tensor | None = getattr(stats, field)
    if value is None:
        raise ValueError(f"{where}: needs {field}, got None; compute it with outputs=('logprob', 'lse')")
    if like is not None:
        _check_shape(f"{where}.{field}", value, like)
    return value.detach().to(wide_dtype(value.device))


def _texts(like: Tensor, mask: Tensor | None, sequence: Tensor | None) -> Sequences:
    if mask is not None:
        _check_shape("mask", mask, like)
    return Sequences(torch.ones_like(like, dtype=torch.bool) if mask is None else mask, sequence)


def _check_shape(name: str, value: Tensor, like: Tensor) -> None:
    if value.shape != like.shape:
        raise ValueError(f"{name}: expected shape {list(like.shape)}, got {list(value.shape)}")


def _check_range(name: str, value: object, accepted: bool, expected: str) -> None:
    if not accepted:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
