"""Formulas that several families share: weighted likelihoods, bounded ratios, estimates of a KL divergence."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["kl_estimate"]

#: Ratios follow exp up to here, and its tangent beyond.
MAX_LOG_RATIO = 20.0
ESTIMATORS = ("k1", "k2", "k3")


def weighted_nll(weight: Tensor, logprob: Tensor) -> Tensor:
    """`-weight logprob`; 0 where the weight is 0, also at a logprob of -inf, as in the limit of every weight here."""
    return torch.where(weight == 0, 0.0, -weight * logprob)


def probability_power(logprob: Tensor, power: Tensor | float) -> Tensor:
    """`p^power`; 1 for power 0 at a logprob of -inf too, where 0 * -inf would be NaN."""
    return torch.exp(power * logprob.clamp(min=torch.finfo(logprob.dtype).min))


def bounded_exp(x: Tensor) -> Tensor:
    """exp(x) up to x = 20 (4.9e8), its tangent there beyond: finite in float32, and with a slope that stays.

    A clamp would take the gradient from the very tokens that have drifted furthest. exp(-inf) is 0, with slope 0.
    """
    top = MAX_LOG_RATIO
    return torch.exp(x.clamp(max=top)) + math.exp(top) * torch.relu(x - top)


def k1(kappa: Tensor) -> Tensor:
    """`-kappa`, kappa = ref_logprob - logprob: unbiased; its gradient is the score alone, 0 on average."""
    return -kappa


def k2(kappa: Tensor) -> Tensor:
    """`kappa^2 / 2`: biased; its gradient is unbiased for that of the reverse KL, on-policy."""
    return kappa.square() / 2


def k3(kappa: Tensor) -> Tensor:
    """`exp(kappa) - kappa - 1`, >= 0: unbiased with less variance; its gradient is that of the forward KL, on average.

    By its series near 0, where the difference has no digits left, and by its tangent beyond kappa = 20.
    """
    small = kappa.abs() < 1e-3
    near = torch.where(small, kappa, 0.0)
    series = near.square() / 2 * (1 + near / 3 * (1 + near / 4))
    held = kappa.clamp(max=MAX_LOG_RATIO)
    far = torch.expm1(held) - held + math.expm1(MAX_LOG_RATIO) * torch.relu(kappa - MAX_LOG_RATIO)
    return torch.where(small, series, far)


KL_ESTIMATES = {"k1": k1, "k2": k2, "k3": k3}


def kl_estimate(
    logprob: Tensor,
    ref_logprob: Tensor,
    *,
    estimator: str = "k3",
    gradient: str | None = None,
    ratio: Tensor | None = None,
) -> Tensor:
    """An estimate of KL(policy || reference) per sampled token, in nats.

    Args:
        logprob, ref_logprob: `[...]`, finite; the second a constant.
        estimator: `"k1"`, `"k2"` or `"k3"`: the value.
        gradient: the estimator whose gradient it has (straight-through); the value's own by default.
        ratio: the importance weight of samples of an older policy, which multiplies value and gradient. With the
            value's own gradient it is differentiated too: `ratio k3` then has the gradient of `sg(ratio) k2`.

    Source: J. Schulman's note on approximating KL (2020); the weight as in DeepSeek-V3.2; the separate gradient as in
    verl's `+` estimators.

    Raises:
        ValueError: an estimator of another name.
    """
    for name, choice in (("estimator", estimator), ("gradient", estimator if gradient is None else gradient)):
        if choice not in ESTIMATORS:
            raise ValueError(f"{name}: expected one of {', '.join(ESTIMATORS)}, got {choice!r}")
    kappa = ref_logprob.detach() - logprob
    value = KL_ESTIMATES[estimator](kappa)
    value = value if ratio is None else ratio * value
    if gradient is None or (gradient == estimator and ratio is None):
        return value
    slope = KL_ESTIMATES[gradient](kappa)
    slope = slope if ratio is None else ratio.detach() * slope
    return slope + (value - slope).detach()
