"""Preference losses on single completions that are marked desirable or not: KTO and BCO.

Both are functions of a log-ratio `v = logprob - ref_logprob` and of a number that the batch, or the run, supplies: a
constant here, computed by `unpaired_statistics`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..catalogue import register
from ..checks import check_flag, check_number, check_one_of, constant, shared_constant
from ..loss import Loss
from ..whole_sequence import UnpairedLoss, UnpairedResult


@register
@dataclass(frozen=True)
class KTO(UnpairedLoss):
    """Kahneman-Tversky optimisation: the value of a gain, or of an avoided loss, against a reference point.

    With `v = logprob - ref_logprob` of a completion and the reference point z0:

    - `kto`: `desirable_weight sigmoid(-beta (v - z0))` of a desirable completion, `undesirable_weight sigmoid(beta (v -
      z0))` of an undesirable one;
    - `apo_zero_unpaired`: the same with z0 = 0.

    It is bounded, and its gradient vanishes on both sides: completions that are far from the reference point are left
    alone. A logprob of -inf, or any finite one, gives a finite loss and gradient; an empty completion has v = 0.

    Detached: the reference, z0 and the metrics.

    When to use: feedback on single completions, with unequal numbers of good and bad ones.

    Args:
        beta: positive; 0.1 as in TRL.
        loss_type: `kto` by default.
        desirable_weight, undesirable_weight: not negative, 1.0 as in TRL. The paper advises to choose them so that
            the numbers of completions times their weights stand between 1 : 1 and 4 : 3 (unverified source).

    Left open: z0 is an estimate of KL(model || ref) from mismatched completions of the batch (`kto_reference_point`);
    its size depends on the batch, and here on what the caller passes.

    Source: arXiv 2402.01306, equations 7 and 8; APO arXiv 2408.06266, equation 7; taken over from implementations
    (TRL's, Liger's).
    """

    beta: float = 0.1
    loss_type: str = "kto"
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    name: ClassVar[str] = "kto"

    def __post_init__(self) -> None:
        check_number(self, "beta", low=0.0, low_open=True)
        check_one_of(self, "loss_type", ("kto", "apo_zero_unpaired"))
        check_number(self, "desirable_weight", low=0.0)
        check_number(self, "undesirable_weight", low=0.0)

    @property
    def sequence_inputs(self) -> tuple[str, ...]:
        return ("desirable", "reference_point") if self.loss_type == "kto" else ("desirable",)

    def __call__(
        self, logprob: Tensor, ref_logprob: Tensor, *, desirable: Tensor, reference_point: Tensor | None = None
    ) -> UnpairedResult:
        """Loss and metrics per completion from summed log-probabilities, all `[S]`, float32 or float64.

        Args:
            logprob: the model's. ref_logprob: the reference's, constants.
            desirable: `[S]` bool.
            reference_point: z0 of `kto`, `[]` or `[S]`, in nats, a constant; of `kto` alone.

        Raises:
            ValueError: a shape does not fit; the reference point is missing, or not asked for.
            TypeError: `desirable` is not bool.
        """
        v = logprob - constant(self, "ref_logprob", ref_logprob, logprob)
        gain = self.beta * (v - self._origin(reference_point, v))
        sign, weight = _by_mark(self, desirable, v, self.desirable_weight, self.undesirable_weight)
        return UnpairedResult(weight * torch.sigmoid(-sign * gain), self.beta * v.detach(), logprob.detach())

    def _origin(self, reference_point: Tensor | None, v: Tensor) -> Tensor | float:
        if self.loss_type == "kto":
            return shared_constant(self, "reference_point", reference_point, v)
        if reference_point is not None:
            raise ValueError(f"kto: reference_point belongs to loss_type='kto', got {self.loss_type!r}")
        return 0.0


@register
@dataclass(frozen=True)
class BCO(UnpairedLoss):
    """Binary classifier optimisation: logistic regression of the mark on the reward, with a shift.

    With `r = beta (logprob - ref_logprob)` and the shift delta, the running mean of r over the run:
    `-logsigmoid(r - delta)` of a desirable completion, `-w logsigmoid(-(r - delta))` of an undesirable one; w is the
    density ratio of `distribution_matching`, else 1. A logprob of -inf gives a finite gradient, and the loss inf where
    the completion is desirable; an empty completion has r = 0.

    Detached: the reference, delta, w and the metrics.

    When to use: feedback on single completions; with `distribution_matching` where good and bad ones answer different
    prompts.

    Args:
        beta: positive; 0.1 as in TRL.
        distribution_matching: False by default; True weights undesirable completions by `density_ratio`, how much more
            often their prompt occurs among the desirable ones (`bco_density_ratio` of a classifier's probability).

    Left open: whether delta knows the batch it is applied to. TRL updated it with the batch before using it;
    `bco_reward_shift` leaves the order to the caller.

    Source: arXiv 2404.04656; taken over from an implementation (TRL 0.23's).
    """

    beta: float = 0.1
    distribution_matching: bool = False
    name: ClassVar[str] = "bco"

    def __post_init__(self) -> None:
        check_number(self, "beta", low=0.0, low_open=True)
        check_flag(self, "distribution_matching")

    @property
    def sequence_inputs(self) -> tuple[str, ...]:
        return ("desirable", "reward_shift", *(("density_ratio",) if self.distribution_matching else ()))

    def __call__(
        self,
        logprob: Tensor,
        ref_logprob: Tensor,
        *,
        desirable: Tensor,
        reward_shift: Tensor,
        density_ratio: Tensor | None = None,
    ) -> UnpairedResult:
        """Loss and metrics per completion from summed log-probabilities, all `[S]`, float32 or float64.

        Args:
            logprob: the model's. ref_logprob: the reference's, constants.
            desirable: `[S]` bool.
            reward_shift: delta, `[]` or `[S]`, in the unit of the reward, a constant.
            density_ratio: w, `[S]`, constants, of which those of undesirable completions are read; with
                `distribution_matching` alone.

        Raises:
            ValueError: a shape does not fit; the density ratio is missing, or not asked for.
            TypeError: `desirable` is not bool.
        """
        reward = self.beta * (logprob - constant(self, "ref_logprob", ref_logprob, logprob))
        shifted = reward - shared_constant(self, "reward_shift", reward_shift, reward)
        sign, weight = _by_mark(self, desirable, reward, 1.0, self._ratio(density_ratio, reward))
        return UnpairedResult(-weight * logsigmoid(sign * shifted), reward.detach(), logprob.detach())

    def _ratio(self, density_ratio: Tensor | None, like: Tensor) -> Tensor | float:
        if self.distribution_matching:
            return constant(self, "density_ratio", density_ratio, like)
        if density_ratio is not None:
            raise ValueError("bco: density_ratio belongs to distribution_matching=True; it is False")
        return 1.0


def _by_mark(
    loss: Loss, desirable: Tensor, like: Tensor, of_desirable: float, of_undesirable: Tensor | float
) -> tuple[Tensor, Tensor]:
    """The sign, 1 of a desirable completion and -1 of another, and the weight of each."""
    if desirable.dtype != torch.bool:
        raise TypeError(f"{loss.name}: desirable must be bool, got {desirable.dtype}")
    if desirable.shape != like.shape:
        raise ValueError(f"{loss.name}: desirable must have shape {tuple(like.shape)}, got {tuple(desirable.shape)}")
    one = torch.ones_like(like)
    return torch.where(desirable, one, -one), torch.where(desirable, of_desirable * one, of_undesirable * one)
