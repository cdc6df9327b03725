"""Losses of preference optimisation: DPO with its link functions and f-divergences."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .base import Loss, check_choice, check_number, constant, register

LOSS_TYPES = ("sigmoid", "ipo", "hinge")
DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")


class PreferenceResult(NamedTuple):
    """What a pair loss returns: the loss, with its graph, and detached metrics, all per pair.

    The pure losses return `[B]` tensors throughout; the one-call forms reduce `loss` and leave the metrics per pair.
    """

    loss: Tensor
    """The loss to minimise."""
    chosen_reward: Tensor
    """`beta (chosen - ref_chosen)`, whatever the divergence: log-ratios of averages for IPO, of sums otherwise."""
    rejected_reward: Tensor
    margin: Tensor
    """`chosen_reward - rejected_reward`."""
    accuracy: Tensor
    """1 where the chosen reward is the greater, strictly: a tie counts as wrong."""
    chosen_logprob: Tensor
    rejected_logprob: Tensor


@register
@dataclass(frozen=True)
class DPO(Loss):
    """Direct preference optimisation.

    With the log-ratios `v = logprob - ref_logprob` of a chosen and a rejected sequence, their scores s(v) and
    `h = s(v_chosen) - s(v_rejected)`:

    - `sigmoid`: `-(1 - eps) logsigmoid(beta h) - eps logsigmoid(-beta h)`; eps = `label_smoothing` is the chance
      that a pair is labelled the wrong way round (cDPO). eps = 0 is DPO itself; the minimum for eps > 0 is at
      `beta h = log((1 - eps) / eps)`.
    - `hinge`: `max(0, 1 - beta h)`.
    - `ipo`: `(h - 1 / (2 beta))^2` with log-probabilities averaged over tokens, as its authors advise
      (`average_logprob` says so to the caller): with beta = 0.1 the target margin is 5 nats per token.

    The score is f'(u), u = exp(v), of the divergence `sum ref f(model / ref)` that holds the model near the
    reference, up to a constant, which cancels in h:

    - `reverse_kl`, KL(model || ref), DPO's own: `s = v`;
    - `forward_kl`, KL(ref || model): `s = 1 - exp(-v)`;
    - `js`: `s = log(2 u / (1 + u))`;
    - `alpha`: `s = (1 - exp(-alpha v)) / alpha`; alpha = 1 is forward KL and 0, the limit, reverse KL.

    `exp(-v)` of a sequence overflows soon: s continues linearly below `alpha v = -10` (alpha = 1 for `forward_kl`),
    with the slope e^10 it has there. It stays increasing and finite, and so does the gradient, in fp16 as well. A
    logprob of -inf gives a finite gradient too (and, for the chosen sequence, the loss inf).

    The reference is detached. The metrics are detached, and their rewards are those of reverse KL always.

    Args:
        beta: strength of the pull to the reference, positive; 0.1 is the usual default. IPO calls it tau.
        loss_type: `sigmoid`, `ipo` or `hinge`.
        label_smoothing: in [0, 0.5), for `sigmoid`; refused with the others, which have no such form.
        divergence: as above. `ipo` takes `reverse_kl` alone: averaged over different lengths the constants do not
            cancel.
        alpha: of `divergence="alpha"` alone, not negative (f-DPO needs f' to be unbounded at 0). It is oriented as
            everywhere in this library, which is f-DPO's own orientation too (by memory, and by TRL 0.23); TRL's
            `f_alpha_divergence_coef` from release 1 on is 1 - alpha.

    Source: DPO arXiv 2305.18290, equation 7; cDPO, E. Mitchell's note on noisy preferences (2023); IPO arXiv
    2310.12036; hinge SLiC-HF, arXiv 2305.10425, with RSO's normalisation, 2309.06657; f-DPO arXiv 2309.16240. The
    papers' equations were taken over from implementations (TRL's); the linear continuation is derived.
    """

    beta: float = 0.1
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    divergence: str = "reverse_kl"
    alpha: float = 0.5
    name: ClassVar[str] = "dpo"

    def __post_init__(self) -> None:
        check_number(self, "beta", low=0.0, low_open=True)
        check_choice(self, "loss_type", LOSS_TYPES)
        check_number(self, "label_smoothing", low=0.0, high=0.5, high_open=True)
        check_choice(self, "divergence", DIVERGENCES)
        check_number(self, "alpha", low=0.0)
        if self.label_smoothing > 0 and self.loss_type != "sigmoid":
            raise ValueError(f"DPO: label_smoothing belongs to loss_type='sigmoid', got {self.loss_type!r}")
        if self.loss_type == "ipo" and self.divergence != "reverse_kl":
            raise ValueError(f"DPO: loss_type='ipo' takes divergence='reverse_kl' alone, got {self.divergence!r}")
        if self.alpha != 0.5 and self.divergence != "alpha":
            raise ValueError(f"DPO: alpha belongs to divergence='alpha', got {self.divergence!r}")

    @property
    def level(self) -> str:
        return "pair"

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("ref_logprob",)

    @property
    def average_logprob(self) -> bool:
        """Whether the sequences' log-probabilities are to be averages over their tokens (IPO) instead of sums."""
        return self.loss_type == "ipo"

    def __call__(self, chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> PreferenceResult:
        """Per-pair loss and metrics from the sequences' log-probabilities, all `[B]`, float32 or float64.

        Sums over tokens, or averages where `average_logprob` says so (`sequence_logprob` makes either). float32,
        because bf16 has no digits left for a sum in the hundreds.

        Raises:
            ValueError: the four shapes differ.
        """
        if rejected.shape != chosen.shape:
            shapes = f"{tuple(chosen.shape)}, got {tuple(rejected.shape)}"
            raise ValueError(f"dpo: rejected must have the shape of chosen, {shapes}")
        v_chosen = chosen - constant(self, "ref_chosen", ref_chosen, chosen)
        v_rejected = rejected - constant(self, "ref_rejected", ref_rejected, rejected)
        loss = self._link(self._score(v_chosen) - self._score(v_rejected))
        reward, other = self.beta * v_chosen.detach(), self.beta * v_rejected.detach()
        accuracy = (reward > other).to(loss.dtype)
        return PreferenceResult(loss, reward, other, reward - other, accuracy, chosen.detach(), rejected.detach())

    def _link(self, h: Tensor) -> Tensor:
        if self.loss_type == "ipo":
            return (h - 1 / (2 * self.beta)).square()
        if self.loss_type == "hinge":
            return torch.relu(1 - self.beta * h)
        loss = -(1 - self.label_smoothing) * logsigmoid(self.beta * h)
        return loss - self.label_smoothing * logsigmoid(-self.beta * h) if self.label_smoothing > 0 else loss

    def _score(self, v: Tensor) -> Tensor:
        if self.divergence == "js":
            return logsigmoid(v)
        if self.divergence == "reverse_kl":
            return v
        return _power_score(v, 1.0 if self.divergence == "forward_kl" else self.alpha)


#: exp of this is the greatest slope of a score; times beta it is finite in fp16 and far beyond any gradient clip.
_MAX_EXPONENT = 10.0


def _power_score(v: Tensor, alpha: float) -> Tensor:
    """`(1 - exp(-alpha v)) / alpha`, linear beyond the exponent `_MAX_EXPONENT`; v in the limit alpha = 0."""
    if alpha < 1e-12:
        return v
    low = -_MAX_EXPONENT / alpha
    return -torch.expm1(-alpha * v.clamp(min=low)) / alpha - math.exp(_MAX_EXPONENT) * torch.relu(low - v)
