"""The f-divergences of f-divergence SFT, each as a reward transform phi (`REWARD_TRANSFORMS`, `alpha_transform`).

For `D_f = sum_v P_v f(Q_v / P_v)`, P the expert and Q the model, the dual form that imitation learning uses is
`sup_r E_P[phi(r)] - E_Q[r]` with

    phi(x) = -f*(-x),    f*(t) = sup_{u >= 0} (u t - f(u)).

Every generator is taken with f'(1) = 0, so that phi(0) = 0 and phi'(0) = 1: at `model = reference` all of them push
as hard as NLL does. Scaling a generator by c only rescales the loss's beta (phi becomes c phi(x / c)); the rows `js`
and `squared_hellinger` are twice the normalised divergences of those names, which makes their phi the usual ones.

phi is finite only above some x for several of them. There the loss continues it linearly from `low` down (the same
value and slope at `low`, still concave and increasing). A clamp would instead give no gradient at all to exactly
those tokens that have fallen furthest below the reference. `low` also bounds the weight phi' of a single token.

The rows and the continuation points are derived (the conjugates of textbook generators); the forms agree with those
that the reference implementation of IQ-Learn (arXiv 2106.12142) weights its gradient by.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RewardTransform:
    """One row: a generator and its reward transform.

    Attributes:
        generator: f(u), `u = model / expert`.
        phi: -f*(-x), valid for `x >= low`.
        slope: phi', valid there too.
        low: where the linear continuation takes over going down; None where phi is linear itself.
        low_slope: phi'(low), the greatest weight that a token can get.
        remarks: domain and behaviour.
    """

    generator: Callable[[Tensor], Tensor]
    phi: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    low: float | None
    low_slope: float
    remarks: str

    def value(self, x: Tensor) -> Tensor:
        """phi(x), continued linearly below `low`. Finite, with a finite gradient, for finite x."""
        if self.low is None:
            return self.phi(x)
        # relu has gradient 0 at 0: with a second clamp both pieces would pass the gradient at x = low.
        return self.phi(x.clamp(min=self.low)) - self.low_slope * torch.relu(self.low - x)

    def weight(self, x: Tensor) -> Tensor:
        """phi'(x), constant below `low`: the factor on NLL's gradient."""
        return self.slope(x if self.low is None else x.clamp(min=self.low))


#: A token's weight under the exponential rows never exceeds exp(5) = 148.
_MAX_LOG_SLOPE = 5.0
#: Pearson's parabola ends here: far beyond what beta times a log-ratio reaches, with a slope that -inf can have.
_PARABOLA_END = -1e4

# Every phi is written so that its value near 0 and its autograd derivative far from 0 keep their digits:
# 1 - exp(-log1p(x)) for x / (1 + x), whose derivative is otherwise a difference of nearly equal terms.
REWARD_TRANSFORMS: dict[str, RewardTransform] = {
    "total_variation": RewardTransform(
        generator=lambda u: (u - 1).abs() / 2,
        phi=lambda x: x.clone(),
        slope=torch.ones_like,
        low=None,
        low_slope=1.0,
        remarks="The strict conjugate holds for |x| <= 1/2 only; without that bound the loss is NLL plus a constant.",
    ),
    "pearson_chi2": RewardTransform(
        generator=lambda u: (u - 1).square(),
        phi=lambda x: x * (1 - x / 4),
        slope=lambda x: 1 - x / 2,
        low=_PARABOLA_END,
        low_slope=1 - _PARABOLA_END / 2,
        remarks="The parabola, as IQ-Learn uses it: the weight is negative beyond x = 2. Continued below x = -1e4.",
    ),
    "squared_hellinger": RewardTransform(
        generator=lambda u: (u.sqrt() - 1).square(),
        phi=lambda x: -torch.expm1(-torch.log1p(x)),
        slope=lambda x: (1 + x).pow(-2),
        low=-0.5,
        low_slope=4.0,
        remarks="phi = x / (1 + x), for x > -1.",
    ),
    "reverse_kl": RewardTransform(
        generator=lambda u: torch.special.xlogy(u, u) - u + 1,
        phi=lambda x: -torch.expm1(-x),
        slope=lambda x: torch.exp(-x),
        low=-_MAX_LOG_SLOPE,
        low_slope=math.exp(_MAX_LOG_SLOPE),
        remarks="KL(model || expert). phi = 1 - exp(-x), for all x; continued before it overflows.",
    ),
    "forward_kl": RewardTransform(
        generator=lambda u: u - 1 - u.log(),
        phi=torch.log1p,
        slope=lambda x: 1 / (1 + x),
        low=-0.5,
        low_slope=2.0,
        remarks="KL(expert || model). phi = log(1 + x), for x > -1.",
    ),
    "js": RewardTransform(
        generator=lambda u: torch.special.xlogy(u, u) - (u + 1) * ((u + 1) / 2).log(),
        phi=lambda x: torch.log1p(-torch.expm1(-x)),
        slope=lambda x: 1 / (2 * torch.exp(x) - 1),
        low=-0.3,
        low_slope=1 / (2 * math.exp(-0.3) - 1),
        remarks="phi = log(2 - exp(-x)), for x > -log 2.",
    ),
    "neyman_chi2": RewardTransform(
        generator=lambda u: (u - 1).square() / u,
        phi=lambda x: 2 * torch.expm1(torch.log1p(x) / 2),
        slope=lambda x: (1 + x).rsqrt(),
        low=-0.5,
        low_slope=math.sqrt(2.0),
        remarks="Pearson's chi2 with model and expert exchanged. phi = 2 (sqrt(1 + x) - 1), for x > -1.",
    ),
}

#: Pearson's chi2 with its exact conjugate over u >= 0: flat beyond x = 2.
SATURATED_PEARSON = RewardTransform(
    generator=REWARD_TRANSFORMS["pearson_chi2"].generator,
    phi=lambda x: x.clamp(max=2.0) * (1 - x.clamp(max=2.0) / 4),
    slope=lambda x: (1 - x / 2).clamp(min=0.0),
    low=_PARABOLA_END,
    low_slope=1 - _PARABOLA_END / 2,
    remarks="As pearson_chi2, with weight 0 instead of a negative one beyond x = 2.",
)


def alpha_transform(alpha: float) -> RewardTransform:
    """The alpha divergence, `(1 - sum_v P^alpha Q^(1 - alpha)) / (alpha (1 - alpha))`, P the expert and Q the model.

    `phi(x) = [1 - (1 + alpha x)^(-(1 - alpha) / alpha)] / (1 - alpha)` and `phi'(x) = (1 + alpha x)^(-1 / alpha)`,
    which is exp(-x) deformed. alpha = 1 is `forward_kl`, 0 `reverse_kl` (both as limits, reached exactly), 1/2
    `squared_hellinger` at twice the scale (phi_1/2(x) = 2 phi(x / 2)), 2 `neyman_chi2` and -1 saturated
    `pearson_chi2` at half of it. Sources that write it with the model's share as the parameter mean 1 - alpha; this
    is the one place where that is converted.

    For alpha > 0 it is continued linearly below `max(-0.5, exp(-5 alpha) - 1) / alpha`, otherwise below -5, which
    keeps the weight under exp(5). For alpha < 0 it saturates at `x = -1 / alpha`, with weight 0 beyond.
    """
    low = max(-0.5, math.expm1(-_MAX_LOG_SLOPE * alpha)) / alpha if alpha > _LIMIT else -_MAX_LOG_SLOPE
    low_slope = math.exp(-(math.log1p(alpha * low) / alpha if abs(alpha) > _LIMIT else low))

    def phi(x: Tensor) -> Tensor:
        if abs(1 - alpha) < _LIMIT:
            return _log_deformed(x, alpha)
        return -torch.expm1((alpha - 1) * _log_deformed(x, alpha)) / (1 - alpha)

    return RewardTransform(
        generator=lambda u: _alpha_generator(u, alpha),
        phi=phi,
        slope=lambda x: torch.exp(-_log_deformed(x, alpha)) * (1 + alpha * x > 0),
        low=low,
        low_slope=low_slope,
        remarks="For 1 + alpha x > 0; alpha < 0 saturates at -1 / alpha.",
    )


#: log1p(a x) / a and expm1(a x) / a are right to rounding as long as a x does not underflow: below this, the limit.
_LIMIT = 1e-12


def _log_deformed(x: Tensor, alpha: float) -> Tensor:
    """`log(1 + alpha x) / alpha`, the negative logarithm of the slope; x in the limit alpha = 0."""
    if abs(alpha) < _LIMIT:
        return x
    # A hair inside the domain's end for alpha < 0, where the logarithm is infinite and its derivative with it.
    margin = 8 * torch.finfo(x.dtype).eps
    return torch.log1p((alpha * x).clamp(min=margin - 1)) / alpha


def _alpha_generator(u: Tensor, alpha: float) -> Tensor:
    if abs(alpha) < _LIMIT:
        return REWARD_TRANSFORMS["reverse_kl"].generator(u)
    if abs(1 - alpha) < _LIMIT:
        return REWARD_TRANSFORMS["forward_kl"].generator(u)
    return (alpha + (1 - alpha) * u - u.pow(1 - alpha)) / (alpha * (1 - alpha))
