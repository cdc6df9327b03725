"""Losses of preference optimisation on pairs, against a reference: DPO with all its forms, DPOP, R-DPO.

Log-ratios `v = logprob - ref_logprob` of a chosen and a rejected sequence; a score s(v) of each; their difference h; a
loss of `u = beta h`, written so that no exponential can overflow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..catalogue import register
from ..checks import check_flag, check_number, check_one_of, constant, shared_constant
from ..loss import Loss
from ..whole_sequence import PairLoss, PreferenceResult


def preference_result(
    loss: Tensor, chosen_reward: Tensor, rejected_reward: Tensor, chosen: Tensor, rejected: Tensor
) -> PreferenceResult:
    """The loss with the metrics that follow from the two rewards, detached."""
    reward, other = chosen_reward.detach(), rejected_reward.detach()
    accuracy = (reward > other).to(loss.dtype)
    return PreferenceResult(loss, reward, other, reward - other, accuracy, chosen.detach(), rejected.detach())


def check_pair(loss: Loss, chosen: Tensor, rejected: Tensor) -> None:
    """Raises ValueError unless chosen and rejected have one shape."""
    if rejected.shape != chosen.shape:
        shapes = f"{tuple(chosen.shape)}, got {tuple(rejected.shape)}"
        raise ValueError(f"{loss.name}: rejected must have the shape of chosen, {shapes}")


def log_ratios(
    loss: Loss, chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor
) -> tuple[Tensor, Tensor]:
    """`logprob - ref_logprob` of both, the reference detached; raises ValueError where the four shapes differ."""
    check_pair(loss, chosen, rejected)
    v_chosen = chosen - constant(loss, "ref_chosen", ref_chosen, chosen)
    return v_chosen, rejected - constant(loss, "ref_rejected", ref_rejected, rejected)


# ---------------------------------------------------------------------------------------------------------------------
# Losses of a margin u = beta h


def smoothed_logistic(u: Tensor, eps: float) -> Tensor:
    """`-(1 - eps) logsigmoid(u) - eps logsigmoid(-u)`; its minimum is at `u = log((1 - eps) / eps)`."""
    loss = -(1 - eps) * logsigmoid(u)
    return loss if eps == 0 else loss - eps * logsigmoid(-u)


def hinge(u: Tensor) -> Tensor:
    """`max(0, 1 - u)`, with gradient 0 at the kink."""
    return torch.relu(1 - u)


def squared(u: Tensor, beta: float) -> Tensor:
    """`(u / beta - 1 / (2 beta))^2`: IPO's regression of h on 1 / (2 beta)."""
    return ((u - 0.5) / beta).square()


def told_apart(c: Tensor, r: Tensor) -> Tensor:
    """`-logsigmoid(c) - logsigmoid(-r)`: a classifier that tells the chosen from the rejected, each by itself."""
    return -logsigmoid(c) - logsigmoid(-r)


def _exo(u: Tensor, eps: float) -> Tensor:
    """KL((sigmoid(u), sigmoid(-u)) || (1 - eps, eps)); flat beyond |u| = 100, where it is so to rounding."""
    u = u.clamp(-100, 100)  # sigmoid(u) * logsigmoid(u) would be 0 * inf at -inf
    win, lose = logsigmoid(u) - math.log1p(-eps), logsigmoid(-u) - math.log(eps)
    return torch.sigmoid(u) * win + torch.sigmoid(-u) * lose


def _discopop(u: Tensor, tau: float) -> Tensor:
    """`(1 - w) (-logsigmoid(u)) + w exp(-u)`, w = sigmoid(u / tau), with the product as one exponential.

    Beyond |u| = 50 the weight is a constant to rounding (tau <= 1), and the exponential part nothing.
    """
    near = u.clamp(-50, 50)
    return torch.sigmoid(-near / tau) * -logsigmoid(u) + torch.exp(logsigmoid(near / tau) - near)


#: exp of this is the greatest slope of a score; times beta it is finite in fp16 and far beyond any gradient clip.
MAX_EXPONENT = 10.0


def power_score(v: Tensor, alpha: float) -> Tensor:
    """`(1 - exp(-alpha v)) / alpha`, linear beyond the exponent `MAX_EXPONENT`; v in the limit alpha = 0.

    For alpha < 0 it is meant for v <= 0, where no exponent is positive.
    """
    if abs(alpha) < 1e-12:
        return v
    if alpha < 0:
        return -torch.expm1(-alpha * v) / alpha
    low = -MAX_EXPONENT / alpha
    return -torch.expm1(-alpha * v.clamp(min=low)) / alpha - math.exp(MAX_EXPONENT) * torch.relu(low - v)


# ---------------------------------------------------------------------------------------------------------------------
# DPO

#: Loss types of the difference of two scores: a function of u = beta h and of the loss, for its hyper-parameters.
_OF_DIFFERENCE: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "sigmoid": lambda u, loss: smoothed_logistic(u, loss.label_smoothing),
    "hinge": lambda u, _: hinge(u),
    "ipo": lambda u, loss: squared(u, loss.beta),
    "exo_pair": lambda u, loss: _exo(u, loss.label_smoothing),
    # The smoothing that takes back what flipped labels add: (1 - eps, -eps) / (1 - 2 eps).
    "robust": lambda u, loss: smoothed_logistic(u, -loss.label_smoothing / (1 - 2 * loss.label_smoothing)),
    "discopop": lambda u, loss: _discopop(u, loss.discopop_tau),
    "sigmoid_norm": lambda u, loss: smoothed_logistic(u, loss.label_smoothing),
    "aot": lambda u, loss: smoothed_logistic(u, loss.label_smoothing),
    "aot_unpaired": lambda u, loss: smoothed_logistic(u, loss.label_smoothing),
}
#: Loss types of each side's own reward, c = beta v_chosen and r = beta v_rejected, and of beta.
_OF_REWARDS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "nca_pair": lambda c, r, _: -logsigmoid(c) - 0.5 * (logsigmoid(-c) + logsigmoid(-r)),
    "bco_pair": lambda c, r, _: told_apart(c, r),
    "sppo_hard": lambda c, r, beta: ((c - 0.5) / beta).square() + ((r + 0.5) / beta).square(),
    "apo_zero": lambda c, r, _: torch.sigmoid(-c) + torch.sigmoid(r),
    "apo_down": lambda c, r, _: torch.sigmoid(c) + torch.sigmoid(r - c),
}
LOSS_TYPES = (*_OF_DIFFERENCE, *_OF_REWARDS)
SCORE_DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")

_SMOOTHED = ("sigmoid", "sigmoid_norm", "robust", "exo_pair", "aot", "aot_unpaired")
_AVERAGED = ("ipo", "sigmoid_norm")
_BATCH_WIDE = ("aot", "aot_unpaired")
#: Where a divergence's constants, and log Z, cancel: plain differences of one prompt's two scores.
_ANY_DIVERGENCE = ("sigmoid", "hinge", "exo_pair", "robust", "discopop")


@register
@dataclass(frozen=True)
class DPO(PairLoss):
    """Direct preference optimisation, in the forms that its successors gave it.

    With the log-ratios `v = logprob - ref_logprob` of a chosen and a rejected sequence, their scores s(v),
    `h = s(v_chosen) - s(v_rejected)`, `u = beta h`, and the rewards `c = beta v_chosen`, `r = beta v_rejected`:

    - `sigmoid`: `-(1 - eps) logsigmoid(u) - eps logsigmoid(-u)`; eps = `label_smoothing` is the chance that a pair is
      labelled the wrong way round (cDPO). eps = 0 is DPO itself; the minimum for eps > 0 is at
      `u = log((1 - eps) / eps)`.
    - `sigmoid_norm`: the same of log-probabilities averaged over tokens.
    - `robust`: `(-(1 - eps) logsigmoid(u) + eps logsigmoid(-u)) / (1 - 2 eps)`, unbiased under flipped labels, and
      unbounded below: for eps > 0 it has no minimum.
    - `hinge`: `max(0, 1 - u)` (SLiC).
    - `ipo`: `(h - 1 / (2 beta))^2` with log-probabilities averaged over tokens, as its authors advise: with
      beta = 0.1 the target margin is 5 nats per token.
    - `exo_pair`: KL from the policy's choice `(sigmoid(u), sigmoid(-u))` to `(1 - eps, eps)`; needs eps > 0.
    - `nca_pair`: `-logsigmoid(c) - logsigmoid(-c) / 2 - logsigmoid(-r) / 2`.
    - `bco_pair`: `-logsigmoid(c) - logsigmoid(-r)` (`BCOPair` with the shift 0).
    - `sppo_hard`: `(v_chosen - 1 / (2 beta))^2 + (v_rejected + 1 / (2 beta))^2`.
    - `aot`, `aot_unpaired`: the loss of `sigmoid` at `u = beta (sort(chosen - rejected) - sort(ref_chosen -
      ref_rejected))`, or `beta (sort(v_chosen) - sort(v_rejected))`, sorted over the whole batch, of which the B
      values are those of the ranks and not of the pairs. With one pair both are `sigmoid`.
    - `apo_zero`: `sigmoid(-c) + sigmoid(r)`. `apo_down`: `sigmoid(c) + sigmoid(r - c)`.
    - `discopop`: `(1 - w) (-logsigmoid(u)) + w exp(-u)`, `w = sigmoid(u / discopop_tau)`; not monotone in u.

    The score is f'(p), p = exp(v), of the divergence `sum ref f(model / ref)` that holds the model near the
    reference, up to a constant, which cancels in h:

    - `reverse_kl`, KL(model || ref), DPO's own: `s = v`;
    - `forward_kl`, KL(ref || model): `s = 1 - exp(-v)`;
    - `js`: `s = log(2 p / (1 + p))`;
    - `alpha`: `s = (1 - exp(-alpha v)) / alpha`; alpha = 1 is forward KL and 0, the limit, reverse KL.

    `tail_weight` < 1 is LD-DPO: in every sum, the reference's too, tokens beyond the pair's shorter length count with
    that factor. (As in TRL 1.16; LLaMA-Factory and TRL 0.23 scale the policy's sums alone.) `use_weighting` is WPO:
    the loss times `min(w(chosen) w(rejected), weight_cap)`, `w = exp(mean_t (logprob_t - log sum_j p_tj^2))`, which
    weights a pair by how likely the policy is to produce it.

    Extreme values: `exp(-v)` of a sequence overflows soon, so s continues linearly below `alpha v = -10` (alpha = 1
    for `forward_kl`), with the slope e^10 it has there. Any finite log-probabilities give a finite loss and gradient
    (`ipo` and `sppo_hard`: as far as their squares go). A logprob of -inf gives a finite gradient too, the quadratic
    ones excepted, and, for the chosen sequence, mostly the loss inf; -inf of both sequences, or of the reference, has
    no defined difference and gives NaN. An empty completion has log-probability 0, in sum and average, and weight 1.
    A pair of weight 0 has loss 0.

    Detached: the reference, the weights of `use_weighting`, and the metrics, whose rewards are those of reverse KL
    always.

    When to use: preference pairs and a reference model. `sigmoid` first; `label_smoothing` or `robust` for noisy
    labels, `ipo` or `sigmoid_norm` where lengths differ much, `apo_zero` where the chosen completions are better than
    the model's own and `apo_down` where they are worse.

    Args:
        beta: strength of the pull to the reference, positive; 0.1 as in TRL. IPO calls it tau. `sigmoid_norm` wants a
            far larger one than losses of sums.
        loss_type: one of the list above; `sigmoid`, the paper's, by default.
        label_smoothing: in [0, 0.5), for `sigmoid`, `sigmoid_norm`, `robust`, `exo_pair` (which needs it: 1e-3 in its
            paper), `aot` and `aot_unpaired`; 0 by default. Refused with the others, which have no such form.
        divergence: as above, `reverse_kl` by default. Others go with the differences of one pair's scores: `sigmoid`,
            `hinge`, `exo_pair`, `robust`, `discopop`. Averaged over different lengths, sorted, or on one side alone,
            the constants and the normaliser do not cancel.
        alpha: of `divergence="alpha"` alone, not negative (f-DPO needs f' to be unbounded at 0). It is oriented as
            everywhere in this library, which is f-DPO's own orientation too (by memory, and by TRL 0.23); TRL's
            `f_alpha_divergence_coef` from release 1 on is 1 - alpha. 0.5 as in TRL.
        discopop_tau: of `discopop` alone, in (0, 1]; 0.05 as in TRL.
        tail_weight: in [0, 1]; 1, the default, is off, and 0 drops the tail. TRL's `ld_alpha`. Refused with the losses
            of averages, which have no length to desensitise.
        use_weighting: False by default. Refused with `aot` and `aot_unpaired`, whose values are not of pairs.
        weight_cap: of `use_weighting` alone, positive: 1, the authors' code's, by default (a pair of greedy completions
            would weigh more). None: no cap, as in TRL 1.16.

    Left open: whether `robust` is to be stopped before it runs away; over which batch AOT sorts (here the one given, so
    that its size matters).

    Source: DPO arXiv 2305.18290, equation 7; cDPO, E. Mitchell's note on noisy preferences (2023); robust 2403.00409;
    IPO 2310.12036, equation 17; hinge SLiC-HF 2305.10425, with RSO's normalisation, 2309.06657; EXO 2402.00856,
    equation 16; NCA 2402.05369; BCO 2404.04656; SPPO 2405.00675, equation 4.7; AOT 2406.05882; APO 2408.06266,
    equations 7 and 8; DiscoPOP 2406.08414, equation 5; f-DPO 2309.16240; LD-DPO 2409.06411; WPO 2406.11827,
    equation 2, its cap from its authors' code (wzhouad/WPO). The equations were taken over from implementations
    (TRL's); the stable forms are derived.
    """

    beta: float = 0.1
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    divergence: str = "reverse_kl"
    alpha: float = 0.5
    discopop_tau: float = 0.05
    tail_weight: float = 1.0
    use_weighting: bool = False
    weight_cap: float | None = 1.0
    name: ClassVar[str] = "dpo"

    def __post_init__(self) -> None:
        check_number(self, "beta", low=0.0, low_open=True)
        check_one_of(self, "loss_type", LOSS_TYPES)
        check_number(self, "label_smoothing", low=0.0, high=0.5, high_open=True)
        check_one_of(self, "divergence", SCORE_DIVERGENCES)
        check_number(self, "alpha", low=0.0)
        check_number(self, "discopop_tau", low=0.0, high=1.0, low_open=True)
        check_number(self, "tail_weight", low=0.0, high=1.0)
        check_flag(self, "use_weighting")
        if self.weight_cap is not None:
            check_number(self, "weight_cap", low=0.0, low_open=True)
        self._check_meaning()

    def _check_meaning(self) -> None:
        """Raises ValueError if one setting would be ignored, or would mean nothing, beside another."""
        kind = self.loss_type
        if self.label_smoothing > 0 and kind not in _SMOOTHED:
            raise ValueError(f"DPO: label_smoothing belongs to loss_type {', '.join(_SMOOTHED)}; got {kind!r}")
        if kind == "exo_pair" and self.label_smoothing == 0:
            raise ValueError("DPO: loss_type='exo_pair' needs label_smoothing > 0 (1e-3 in its paper), got 0")
        if self.divergence != "reverse_kl" and kind not in _ANY_DIVERGENCE:
            raise ValueError(f"DPO: loss_type={kind!r} takes divergence='reverse_kl' alone, got {self.divergence!r}")
        if self.alpha != 0.5 and self.divergence != "alpha":
            raise ValueError(f"DPO: alpha belongs to divergence='alpha', got {self.divergence!r}")
        if self.discopop_tau != 0.05 and kind != "discopop":
            raise ValueError(f"DPO: discopop_tau belongs to loss_type='discopop', got {kind!r}")
        if self.tail_weight != 1 and kind in _AVERAGED:
            raise ValueError(f"DPO: tail_weight belongs to losses of sums; loss_type={kind!r} averages over tokens")
        if self.use_weighting and kind in _BATCH_WIDE:
            raise ValueError(f"DPO: use_weighting weights pairs; the values of loss_type={kind!r} are not of pairs")
        if self.weight_cap != 1 and not self.use_weighting:
            raise ValueError(f"DPO: weight_cap belongs to use_weighting=True, got {self.weight_cap} without it")

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("logprob", "log_sum_sq") if self.use_weighting else ("logprob",)

    @property
    def extras(self) -> tuple[str, ...]:
        return ("weight",) if self.use_weighting else ()

    @property
    def average_logprob(self) -> bool:
        return self.loss_type in _AVERAGED

    @property
    def batch_wide(self) -> bool:
        return self.loss_type in _BATCH_WIDE

    def __call__(
        self,
        chosen: Tensor,
        rejected: Tensor,
        ref_chosen: Tensor,
        ref_rejected: Tensor,
        *,
        chosen_weight: Tensor | None = None,
        rejected_weight: Tensor | None = None,
    ) -> PreferenceResult:
        """Per-pair loss and metrics from the sequences' log-probabilities, all `[B]`, float32 or float64.

        Sums over tokens, or averages where `average_logprob` says so (`sequence_logprob` makes either). float32,
        because bf16 has no digits left for a sum in the hundreds.

        Args:
            chosen, rejected: the model's. ref_chosen, ref_rejected: the reference's, constants.
            chosen_weight, rejected_weight: with `use_weighting` alone, constants: WPO's w.

        Raises:
            ValueError: the shapes differ; a weight is missing, or not asked for.
        """
        v_chosen, v_rejected = log_ratios(self, chosen, rejected, ref_chosen, ref_rejected)
        c, r = self.beta * v_chosen, self.beta * v_rejected
        if self.loss_type in _OF_REWARDS:
            loss = _OF_REWARDS[self.loss_type](c, r, self.beta)
        elif self.loss_type == "aot":
            ours, theirs = chosen - rejected, (ref_chosen - ref_rejected).detach().to(chosen.dtype)
            loss = self._of_difference(_sorted(ours) - _sorted(theirs))
        elif self.loss_type == "aot_unpaired":
            loss = self._of_difference(_sorted(v_chosen) - _sorted(v_rejected))
        else:
            loss = self._of_difference(self._score(v_chosen) - self._score(v_rejected))
        loss = self._weighted(loss, chosen_weight, rejected_weight)
        return preference_result(loss, c, r, chosen, rejected)

    def _of_difference(self, h: Tensor) -> Tensor:
        return _OF_DIFFERENCE[self.loss_type](self.beta * h, self)

    def _score(self, v: Tensor) -> Tensor:
        if self.divergence == "js":
            return logsigmoid(v)
        if self.divergence == "reverse_kl":
            return v
        return power_score(v, 1.0 if self.divergence == "forward_kl" else self.alpha)

    def _weighted(self, loss: Tensor, chosen_weight: Tensor | None, rejected_weight: Tensor | None) -> Tensor:
        if not self.use_weighting:
            if chosen_weight is not None or rejected_weight is not None:
                raise ValueError("dpo: chosen_weight and rejected_weight belong to use_weighting=True; it is False")
            return loss
        weight = constant(self, "chosen_weight", chosen_weight, loss)
        weight = weight * constant(self, "rejected_weight", rejected_weight, loss)
        weight = weight.clamp(max=self.weight_cap) if self.weight_cap is not None else weight
        return torch.where(weight == 0, 0.0, weight * loss)  # 0 * inf would be NaN


def _sorted(x: Tensor) -> Tensor:
    return x.sort(dim=-1, stable=True).values


# ---------------------------------------------------------------------------------------------------------------------
# Relatives of DPO


@register
@dataclass(frozen=True)
class DPOP(PairLoss):
    """DPO-positive: DPO with a penalty where the chosen sequence falls below the reference.

    `-logsigmoid(beta (v_chosen - v_rejected - penalty max(0, -v_chosen)))`, v = logprob - ref_logprob. While the
    chosen sequence is less likely than under the reference its gradient is 1 + penalty times DPO's, so that the margin
    cannot be won by making both less likely. A logprob of -inf gives a finite gradient, and the loss inf where it is
    the chosen one's; of both, NaN.

    Detached: the reference and the metrics, whose rewards are DPO's.

    When to use: pairs that differ in few tokens, such as reasoning steps, where DPO lowers both likelihoods.

    Args:
        beta: positive; 0.3 as in the authors' experiments (unverified source).
        penalty: lambda of the paper, not negative; 50 as in its experiments (unverified source). 0 is DPO.

    Left open: the scale of the penalty for long completions: it multiplies a sum over tokens.

    Source: unverified source (by memory): arXiv 2402.13228, equation 3.
    """

    beta: float = 0.3
    penalty: float = 50.0
    name: ClassVar[str] = "dpop"

    def __post_init__(self) -> None:
        check_number(self, "beta", low=0.0, low_open=True)
        check_number(self, "penalty", low=0.0)

    def __call__(self, chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> PreferenceResult:
        """Per-pair loss and metrics from summed log-probabilities, all `[B]`; ValueError where shapes differ."""
        v_chosen, v_rejected = log_ratios(self, chosen, rejected, ref_chosen, ref_rejected)
        h = v_chosen - v_rejected
        if self.penalty > 0:  # 0 * inf would be NaN
            h = h - self.penalty * torch.relu(-v_chosen)
        loss = smoothed_logistic(self.beta * h, 0.0)
        return preference_result(loss, self.beta * v_chosen, self.beta * v_rejected, chosen, rejected)


@register
@dataclass(frozen=True)
class RDPO(PairLoss):
    """Length-regularised DPO: the reward pays `alpha` per token of the completion.

    `-logsigmoid(beta (v_chosen - v_rejected) + alpha (|chosen| - |rejected|))`, v = logprob - ref_logprob and |.| the
    number of counted tokens. It is DPO for the reward minus `alpha |y|`: a margin that the length explains need not be
    learnt, so a longer chosen completion pulls less. With alpha < 0 it would pull more; implementations exist that
    subtract the term with a positive alpha, which is that.

    Detached: the reference, the lengths and the metrics, whose rewards are DPO's (without the length term).

    When to use: pairs whose chosen completions are longer, where DPO makes the model verbose.

    Args:
        beta: positive; 0.1 as in DPO.
        alpha: nats per token, any number; 0 is DPO. 0.01 by default, of the order of the paper's (unverified source).

    Left open: nothing beyond alpha.

    Source: unverified source: arXiv 2403.19159, by memory; the sign of the length term derived from its objective.
    """

    beta: float = 0.1
    alpha: float = 0.01
    name: ClassVar[str] = "r_dpo"
    extras: ClassVar[tuple[str, ...]] = ("length",)

    def __post_init__(self) -> None:
        check_number(self, "beta", low=0.0, low_open=True)
        check_number(self, "alpha")

    def __call__(
        self,
        chosen: Tensor,
        rejected: Tensor,
        ref_chosen: Tensor,
        ref_rejected: Tensor,
        *,
        chosen_length: Tensor,
        rejected_length: Tensor,
    ) -> PreferenceResult:
        """Per-pair loss and metrics from summed log-probabilities and token counts, all `[B]`.

        Raises:
            ValueError: the shapes differ.
        """
        v_chosen, v_rejected = log_ratios(self, chosen, rejected, ref_chosen, ref_rejected)
        longer = constant(self, "chosen_length", chosen_length, chosen)
        longer = longer - constant(self, "rejected_length", rejected_length, chosen)
        c, r = self.beta * v_chosen, self.beta * v_rejected
        return preference_result(smoothed_logistic(c - r + self.alpha * longer, 0.0), c, r, chosen, rejected)


@register
@dataclass(frozen=True)
class BCOPair(PairLoss):
    """BCO on pairs: each completion is classified by its reward against a shift, the mean reward.

    `-logsigmoid(c - delta) - logsigmoid(-(r - delta))` with the rewards `c = beta v_chosen`, `r = beta v_rejected`,
    v = logprob - ref_logprob, and the shift delta. Without the shift, DPO's loss type `bco_pair`, a policy that has
    become less likely on all completions counts every chosen one as bad. A logprob of -inf gives a finite gradient, and
    the loss inf where it is the chosen one's.

    Detached: the reference, delta and the metrics, whose rewards are DPO's (without the shift).

    When to use: as the quality term beside DPO, which compares the two completions of a pair alone. With
    `WeightedSum(["dpo", "bco_pair", "chosen_nll"], [0.8, 0.2, 1.0])` it is MPO with its shift, and LLaMA-Factory's
    `pref_bco_weight` w is `WeightedSum(["dpo", "bco_pair"], [1 / (1 + w), w / (1 + w)])`.

    Args:
        beta: positive; 0.1 as in TRL.

    Left open: when delta moves. `bco_reward_shift` gives the mean of all rewards so far, chosen and rejected; the
    implementations below put the batch into it before they use it, and count batches alike, whatever their sizes.

    Source: BCO arXiv 2404.04656 and, for the sum, MPO arXiv 2411.10442; taken over from implementations (ms-swift,
    LLaMA-Factory); InternVL has the same running mean.
    """

    beta: float = 0.1
    name: ClassVar[str] = "bco_pair"
    sequence_inputs: ClassVar[tuple[str, ...]] = ("reward_shift",)

    def __post_init__(self) -> None:
        check_number(self, "beta", low=0.0, low_open=True)

    def __call__(
        self,
        chosen: Tensor,
        rejected: Tensor,
        ref_chosen: Tensor,
        ref_rejected: Tensor,
        *,
        chosen_reward_shift: Tensor,
        rejected_reward_shift: Tensor,
    ) -> PreferenceResult:
        """Per-pair loss and metrics from summed log-probabilities, `[B]`, and delta twice, `[]` or `[B]`.

        Raises:
            ValueError: the shapes differ.
        """
        c, r = (self.beta * v for v in log_ratios(self, chosen, rejected, ref_chosen, ref_rejected))
        shift = shared_constant(self, "chosen_reward_shift", chosen_reward_shift, c)
        other = shared_constant(self, "rejected_reward_shift", rejected_reward_shift, r)
        return preference_result(told_apart(c - shift, r - other), c, r, chosen, rejected)
