"""Preference losses on pairs without a reference: SimPO, AlphaPO, CPO, ORPO, and the NLL of the chosen completion.

They score a completion by its own log-probability, most by its average over the tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..catalogue import register
from ..checks import check_flag, check_number, check_one_of, constant
from ..whole_sequence import PairLoss, PreferenceResult
from .dpo import MAX_EXPONENT, check_pair, hinge, power_score, preference_result, smoothed_logistic, squared


class _ReferenceFree(PairLoss):
    inputs: ClassVar[tuple[str, ...]] = ()


class _OfAverages(_ReferenceFree):
    average_logprob: ClassVar[bool] = True


@register
@dataclass(frozen=True)
class ChosenNLL(_ReferenceFree):
    """Negative log-likelihood of the chosen completion, a term for `WeightedSum`.

    `-logprob(chosen)`, averaged over the completion's tokens, or summed. The mean over pairs weights every completion
    alike, whatever its length; TRL's and Liger's term of that name is one mean over all chosen tokens of a micro-batch,
    which is this one where all have one length. (Summed, with `reduction="sum"` and the number of chosen tokens as
    `normalizer`, it is theirs.) A logprob of -inf gives inf with gradient -1; an empty completion gives 0.

    Detached: the metrics; the rewards are the log-probabilities.

    When to use: as a term beside a preference loss that may lower the likelihood of the chosen completion.

    Args:
        average: True, the default, divides by the number of tokens, as RPO's paper does; False sums, as CPO's does
            (both unverified sources).

    Left open: the prompt, which some implementations count, does not count here unless its tokens do.

    Source: the sum in CPO, arXiv 2401.08417; the average in RPO, arXiv 2404.19733; unverified sources.
    """

    average: bool = True
    name: ClassVar[str] = "chosen_nll"

    def __post_init__(self) -> None:
        check_flag(self, "average")

    @property
    def average_logprob(self) -> bool:
        return self.average

    def __call__(self, chosen: Tensor, rejected: Tensor) -> PreferenceResult:
        """Per-pair loss and metrics, all `[B]`; ValueError where the shapes differ."""
        check_pair(self, chosen, rejected)
        return preference_result(-chosen, chosen, rejected, chosen, rejected)


@register
@dataclass(frozen=True)
class SimPO(_OfAverages):
    """Simple preference optimisation: `u = beta (a_chosen - a_rejected) - gamma`, a = logprob averaged over tokens.

    The loss is `-(1 - eps) logsigmoid(u) - eps logsigmoid(-u)`, eps = `label_smoothing`. Averages keep a long
    completion from winning by its length, and gamma asks for a margin. A logprob of -inf gives a finite gradient, and
    the loss inf where it is the chosen one's; of both, NaN. An empty completion has average 0.

    Detached: the metrics. The rewards are `beta a`, without gamma.

    When to use: preference pairs and no memory for a reference. Nothing but the step size holds the model.

    Args:
        beta: positive; 2.0 as in the authors' code. (TRL's CPO trainer and Liger default to 0.1, far below it.)
        gamma: target margin in the unit of u, not negative; 0.5: the authors' code gives `gamma / beta`, 0.25.
        label_smoothing: in [0, 0.5); 0 by default.

    Left open: an NLL term, which the authors' code has with weight 0: `WeightedSum(["simpo", "chosen_nll"])`. TRL's
    trainer adds one with weight 1 unless told otherwise.

    Source: arXiv 2405.14734, equation 6; the equation was taken over from implementations (TRL's, Liger's).
    """

    beta: float = 2.0
    gamma: float = 0.5
    label_smoothing: float = 0.0
    name: ClassVar[str] = "simpo"

    def __post_init__(self) -> None:
        check_number(self, "beta", low=0.0, low_open=True)
        check_number(self, "gamma", low=0.0)
        check_number(self, "label_smoothing", low=0.0, high=0.5, high_open=True)

    def __call__(self, chosen: Tensor, rejected: Tensor) -> PreferenceResult:
        """Per-pair loss and metrics from averaged log-probabilities, `[B]`; ValueError where the shapes differ."""
        check_pair(self, chosen, rejected)
        loss = smoothed_logistic(self.beta * (chosen - rejected) - self.gamma, self.label_smoothing)
        return preference_result(loss, self.beta * chosen, self.beta * rejected, chosen, rejected)


@register
@dataclass(frozen=True)
class AlphaPO(_OfAverages):
    """SimPO with the reward `s(a) = (1 - exp(-alpha a)) / alpha` of the averaged log-probability a.

    `-logsigmoid(beta (s(a_chosen) - s(a_rejected)) - gamma)`; alpha = 0, the limit, is SimPO. alpha > 0 pulls harder
    at completions that have become unlikely, alpha < 0 less so. Beyond the exponent 10 (for alpha = 0.25, an average of
    -40 nats per token) s continues linearly with the slope e^10 it has there, so that any finite a gives a finite loss
    and gradient; so does -inf, with the loss inf where it is the chosen one's. exp followed by a power would underflow
    in float32 at a = -104.

    Detached: the metrics. The rewards are `beta s(a)`.

    When to use: where SimPO lowers the likelihood of the chosen completions too much, or too little.

    Args:
        beta: positive; 2.0 as in `SimPO` (the paper tunes it per model).
        alpha: any number; 0.25, within the range that the paper found good (unverified source).
        gamma: target margin in the unit of u, not negative; 0.5 as in `SimPO`.

    Left open: nothing beyond the three numbers.

    Source: arXiv 2501.03884; the equation was taken over from implementations (TRL's), the continuation is derived.
    """

    beta: float = 2.0
    alpha: float = 0.25
    gamma: float = 0.5
    name: ClassVar[str] = "alphapo"

    def __post_init__(self) -> None:
        check_number(self, "beta", low=0.0, low_open=True)
        check_number(self, "alpha")
        check_number(self, "gamma", low=0.0)

    def __call__(self, chosen: Tensor, rejected: Tensor) -> PreferenceResult:
        """Per-pair loss and metrics from averaged log-probabilities, `[B]`; ValueError where the shapes differ."""
        check_pair(self, chosen, rejected)
        # Rounding may leave an average above 0, where a negative alpha has no bound on its exponent.
        c, r = (self.beta * power_score(a.clamp(max=0.0), self.alpha) for a in (chosen, rejected))
        return preference_result(smoothed_logistic(c - r - self.gamma, 0.0), c, r, chosen, rejected)


@register
@dataclass(frozen=True)
class CPO(_ReferenceFree):
    """Contrastive preference optimisation: DPO with a uniform reference, and the NLL of the chosen completion.

    With `u = beta (chosen - rejected)` of summed log-probabilities, plus `nll_weight` times `-chosen / |chosen|`:

    - `sigmoid`: `-(1 - eps) logsigmoid(u) - eps logsigmoid(-u)`, eps = `label_smoothing`;
    - `hinge`: `max(0, 1 - u)`;
    - `ipo`: `(chosen - rejected - 1 / (2 beta))^2` of averaged log-probabilities.

    A logprob of -inf gives a finite gradient (but for `ipo`), and the loss inf where it is the chosen one's; of both,
    NaN. An empty completion has log-probability 0, and NLL 0.

    Detached: the metrics. The rewards are `beta logprob`.

    When to use: preference pairs and no memory for a reference; the NLL keeps the chosen completions likely.

    Args:
        beta: positive; 0.1 as in TRL.
        loss_type: `sigmoid`, the paper's, `hinge` or `ipo`.
        label_smoothing: in [0, 0.5), for `sigmoid`; refused with the others.
        nll_weight: not negative; 1.0 as in TRL (`cpo_alpha`).

    Left open: the NLL's normaliser. Here it is each completion's length; the paper's is a sum (unverified source), and
    TRL's and Liger's one mean over all chosen tokens of a micro-batch, the same where all have one length.

    Source: arXiv 2401.08417; the equations were taken over from implementations (TRL's).
    """

    beta: float = 0.1
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    nll_weight: float = 1.0
    name: ClassVar[str] = "cpo"

    def __post_init__(self) -> None:
        check_number(self, "beta", low=0.0, low_open=True)
        check_one_of(self, "loss_type", ("sigmoid", "hinge", "ipo"))
        check_number(self, "label_smoothing", low=0.0, high=0.5, high_open=True)
        check_number(self, "nll_weight", low=0.0)
        if self.label_smoothing > 0 and self.loss_type != "sigmoid":
            raise ValueError(f"CPO: label_smoothing belongs to loss_type='sigmoid', got {self.loss_type!r}")

    @property
    def average_logprob(self) -> bool:
        return self.loss_type == "ipo"

    @property
    def extras(self) -> tuple[str, ...]:
        return ("length",) if self.nll_weight > 0 and not self.average_logprob else ()

    def __call__(
        self,
        chosen: Tensor,
        rejected: Tensor,
        *,
        chosen_length: Tensor | None = None,
        rejected_length: Tensor | None = None,
    ) -> PreferenceResult:
        """Per-pair loss and metrics from summed log-probabilities (averages for `ipo`), all `[B]`.

        Args:
            chosen, rejected: log-probabilities.
            chosen_length: counted tokens, where `extras` names them. rejected_length: not read.

        Raises:
            ValueError: the shapes differ, or the length is missing.
        """
        check_pair(self, chosen, rejected)
        c, r = self.beta * chosen, self.beta * rejected
        if self.loss_type == "sigmoid":
            loss = smoothed_logistic(c - r, self.label_smoothing)
        else:
            loss = hinge(c - r) if self.loss_type == "hinge" else squared(c - r, self.beta)
        if self.nll_weight > 0:
            loss = loss - self.nll_weight * (chosen if self.average_logprob else self._mean(chosen, chosen_length))
        return preference_result(loss, c, r, chosen, rejected)

    def _mean(self, chosen: Tensor, length: Tensor | None) -> Tensor:
        return chosen / constant(self, "chosen_length", length, chosen).clamp(min=1.0)


@register
@dataclass(frozen=True)
class ORPO(_OfAverages):
    """Odds-ratio preference optimisation: NLL of the chosen completion, and a pull on the odds of the two.

    `-nll_weight a_chosen - beta logsigmoid(log_odds(a_chosen) - log_odds(a_rejected))` with the log-probabilities a
    averaged over tokens and `log_odds(a) = a - log(1 - exp(a))`.

    The slope of the log-odds, `1 / (1 - exp(a))`, is infinite at a = 0: they continue linearly from where it is e^10
    (a = -4.5e-5, a probability of 0.99995 per token), so that a certain completion gives a finite loss and gradient.
    An empty completion has average 0 and counts as certain, with log-odds 11. A logprob of -inf gives a finite
    gradient, and the loss inf where it is the chosen one's; of both, NaN.

    Detached: the metrics. The rewards are `beta a`, as in TRL and Liger.

    When to use: preference pairs on a base model, in one stage with supervised fine-tuning.

    Args:
        beta: lambda of the paper, weight of the odds ratio, positive; 0.1 as in TRL.
        nll_weight: not negative; 1.0, the paper's. 0 leaves the odds ratio alone, beside an NLL that is averaged over
            other tokens (`linear_cross_entropy`).

    Left open: the NLL's tokens and normaliser. Here they are each chosen completion's own; TRL counts the prompt too,
    and takes one mean over a micro-batch's tokens.

    Source: arXiv 2403.07691, equations 4, 6 and 7, taken over from implementations (TRL's); the continuation is
    derived.
    """

    beta: float = 0.1
    nll_weight: float = 1.0
    name: ClassVar[str] = "orpo"

    def __post_init__(self) -> None:
        check_number(self, "beta", low=0.0, low_open=True)
        check_number(self, "nll_weight", low=0.0)

    def __call__(self, chosen: Tensor, rejected: Tensor) -> PreferenceResult:
        """Per-pair loss and metrics from averaged log-probabilities, `[B]`; ValueError where the shapes differ."""
        check_pair(self, chosen, rejected)
        ratio = smoothed_logistic(_log_odds(chosen) - _log_odds(rejected), 0.0)
        loss = self.beta * ratio
        if self.nll_weight > 0:  # 0 * -inf would be NaN
            loss = loss - self.nll_weight * chosen
        return preference_result(loss, self.beta * chosen, self.beta * rejected, chosen, rejected)


#: The average at which the log-odds have the slope exp(MAX_EXPONENT).
_HIGHEST = math.log1p(-math.exp(-MAX_EXPONENT))


def _log_odds(a: Tensor) -> Tensor:
    """`a - log(1 - exp(a))`, linear above `_HIGHEST`."""
    below = a.clamp(max=_HIGHEST)
    return below - torch.log(-torch.expm1(below)) + math.exp(MAX_EXPONENT) * torch.relu(a - _HIGHEST)
