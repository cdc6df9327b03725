"""The base of all policy losses: ratios, the KL to a reference, the entropy bonus, the weights and masks of samples.

A loss adds its own term (`_objective`) and, if its ratio is not the token's own, that ratio (`_log_ratio`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ...types import TokenStats
from ..checks import check_flag, check_number, check_one_of, constant, statistic
from ..formulas import ESTIMATORS, bounded_exp, k3, kl_estimate
from ..loss import SequenceLoss
from ..sequences import Sequences, sequences_of
from .weights import still_on_policy, top_entropy_mask

__all__ = ["PolicyLoss", "PolicyMetrics"]

#: Log-probabilities count as at least this, far below what any logits give to a token that can be sampled.
LEAST_LOGPROB = -1e6


@dataclass(frozen=True)
class Samples:
    """The values that a policy loss reads: constants detached, 0 at a token that `sequences` does not count."""

    logprob: Tensor
    log_ratio: Tensor
    """`logprob - old_logprob`, in the graph; 0 with gradient 1 where there is no old_logprob."""
    entropy: Tensor | None
    constants: Mapping[str, Tensor]
    sequences: Sequences | None
    """Of losses of level `"sequence"`."""

    @property
    def advantages(self) -> Tensor:
        return self.constants["advantages"]


class PolicyMetrics(NamedTuple):
    """Metrics of a policy loss, per token and detached; average them with the mask."""

    ratio: Tensor
    """The ratio that the loss is built on; a sequence's on each of its tokens where the loss takes it so."""
    clipped_low: Tensor
    """1 where the ratio is below its bound, so that the token has no gradient."""
    clipped_high: Tensor
    """1 where the ratio is above its bound."""
    old_kl: Tensor
    """k3 of KL(old policy || policy)."""
    kl: Tensor | None
    """The estimate of KL(policy || reference) that the loss adds; None where it adds none."""
    entropy: Tensor | None
    """None where the loss does not read it."""


@dataclass(frozen=True)
class PolicyLoss(SequenceLoss):
    """Base of the policy losses: `policy_weight * (the loss's own term) + beta * KL - entropy_coef * entropy`.

    Inputs, all constants per token (the advantages of a sequence stand on each of its tokens):

    - `advantages`: see `logitless.losses.advantages`.
    - `old_logprob`: of the policy that sampled. Without it the samples are the policy's own, r = 1: the value
      says little then, the gradient is exact.
    - `ref_logprob`: of the reference, where `beta > 0`.
    - `policy_weight`: multiplies the loss's own term, not KL and entropy: a sampler's importance weight
      (`sampler_correction`), a mask made elsewhere, or their product. 1 by default.
    - `sampling_logprob`: of the sampler, where `off_policy_threshold` is set; `old_logprob` by default.

    A masked or weightless token has exactly no part in the term; it stays in the normaliser, as the papers have it.

    r follows the exponential up to a log-ratio of 20 and its tangent beyond, and log-probabilities count as -1e6 at
    least, with no gradient below: no log-probability, -inf among them, gives an infinite loss or gradient in float32.

    Args:
        beta: weight of the KL to the reference; 0, off, by default, as in TRL.
        kl: the estimator of its value, `"k1"`, `"k2"` or `"k3"` (the default, GRPO's).
        kl_gradient: the estimator whose gradient is taken; None is the value's own. `"k2"` is unbiased on-policy.
        kl_importance: multiply it by the loss's ratio: samples of an older policy then estimate today's KL.
        entropy_coef: weight of the entropy bonus, reduced as the loss is; 0 by default.
        top_entropy: share of the batch's counted tokens, those of highest entropy, that keep the loss's own term;
            1 by default, 0.2 in its paper. A quantile of the whole batch.
        off_policy_threshold: drops the own term of tokens with A < 0 in sequences whose mean
            `sampling_logprob - logprob` exceeds it; None, off, by default.

    An estimator's option without `beta`, where it would do nothing, is refused.

    Source: KL as in arXiv 2402.03300 and `kl_estimate`; masks arXiv 2506.01939 and DeepSeek-V3.2 (`weights`).
    """

    _: KW_ONLY
    beta: float = 0.0
    kl: str = "k3"
    kl_gradient: str | None = None
    kl_importance: bool = False
    entropy_coef: float = 0.0
    top_entropy: float = 1.0
    off_policy_threshold: float | None = None

    #: Whether the loss's own term contains the ratio.
    uses_ratio: ClassVar[bool] = True
    #: Its own inputs. (Not by `super().inputs`, which `torch.compile` cannot trace.)
    own_inputs: ClassVar[tuple[str, ...]] = ("advantages",)
    #: How the paper makes advantages of the rewards of samples, and what deviation it divides them by: names that
    #: `logitless train` reads of the class itself, since a subclass is another paper's.
    advantages_by: ClassVar[str] = "group"
    rewards_over: ClassVar[str] = "group"
    #: The input that the KL is taken to.
    anchor: ClassVar[str] = "ref_logprob"

    def __post_init__(self) -> None:
        check_number(self, "beta", low=0.0)
        check_one_of(self, "kl", ESTIMATORS)
        if self.kl_gradient is not None:
            check_one_of(self, "kl_gradient", ESTIMATORS)
        check_flag(self, "kl_importance")
        if self.beta == 0 and (self.kl, self.kl_gradient, self.kl_importance) != ("k3", None, False):
            raise ValueError(f"{type(self).__name__}: kl, kl_gradient and kl_importance need beta > 0, got beta=0")
        check_number(self, "entropy_coef", low=0.0)
        check_number(self, "top_entropy", low=0.0, low_open=True, high=1.0)
        if self.off_policy_threshold is not None:
            check_number(self, "off_policy_threshold")

    @property
    def of_sequences(self) -> bool:
        """Whether the loss's own term, or its mask, looks at whole sequences."""
        return self.off_policy_threshold is not None

    @property
    def ranks_entropy(self) -> bool:
        """Whether it looks for the batch's tokens of highest entropy."""
        return self.top_entropy < 1

    @property
    def batch_wide(self) -> bool:
        return self.ranks_entropy

    @property
    def inputs(self) -> tuple[str, ...]:
        anchored = self.beta > 0 and self.anchor not in self.own_inputs
        return (*self.own_inputs, *((self.anchor,) if anchored else ()))

    @property
    def optional_inputs(self) -> tuple[str, ...]:
        masked = self.off_policy_threshold is not None
        ratio = self.uses_ratio or self.kl_importance or masked
        return (*(("old_logprob",) if ratio else ()), "policy_weight", *(("sampling_logprob",) if masked else ()))

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("logprob", *(("entropy",) if self.entropy_coef > 0 or self.ranks_entropy else ()))

    def __call__(
        self,
        stats: TokenStats,
        *,
        mask: Tensor | None = None,
        sequence: Tensor | None = None,
        **inputs: Tensor | None,
    ) -> Tensor:
        """Per-token loss `[...]`.

        Args:
            stats: the fields that `outputs` names.
            mask: bool, the tokens that count; all by default. Others get exactly 0 and no gradient. This and
                `sequence` belong to the level `"sequence"`.
            sequence: int64, which sequence a token belongs to, each in one piece; None: a row is a sequence.
            **inputs: those that `inputs` and `optional_inputs` name, of the statistics' shape.

        Raises:
            TypeError: an input that the loss does not know. ValueError: one that is missing or of another shape.
        """
        samples = self._samples(stats, inputs, mask, sequence)
        ratio = bounded_exp(self._log_ratio(samples))
        loss = self._objective(samples, ratio)
        weight = self._weight(samples)
        if weight is not None:
            loss = weight * loss
        regulariser = self._regulariser(samples, ratio)
        return loss if regulariser is None else loss + regulariser

    @torch.no_grad()
    def metrics(
        self,
        stats: TokenStats,
        *,
        mask: Tensor | None = None,
        sequence: Tensor | None = None,
        **inputs: Tensor | None,
    ) -> PolicyMetrics:
        """Metrics from the arguments of the loss, detached; they need no further pass over the vocabulary."""
        samples = self._samples(stats, inputs, mask, sequence)
        ratio = bounded_exp(self._log_ratio(samples))
        low, high = self._clipped(samples, ratio)
        old_kl = k3(samples.log_ratio)
        kl = self._kl(samples, ratio) if self.beta > 0 else None
        entropy = None if samples.entropy is None else samples.entropy.detach()
        return PolicyMetrics(ratio, low.to(ratio.dtype), high.to(ratio.dtype), old_kl, kl, entropy)

    # A loss's own parts: its ratio, its term, and the tokens at which the term is clipped.

    def _log_ratio(self, samples: Samples) -> Tensor:
        return samples.log_ratio

    def _objective(self, samples: Samples, ratio: Tensor) -> Tensor:
        raise NotImplementedError

    def _clipped(self, samples: Samples, ratio: Tensor) -> tuple[Tensor, Tensor]:
        none = torch.zeros_like(ratio, dtype=torch.bool)
        return none, none

    # Parts that all losses share.

    def _samples(
        self,
        stats: TokenStats,
        inputs: Mapping[str, Tensor | None],
        mask: Tensor | None,
        sequence: Tensor | None,
    ) -> Samples:
        logprob = statistic(self, stats, "logprob").clamp(min=LEAST_LOGPROB)
        if self.token_wise and (mask is not None or sequence is not None):
            raise ValueError(f"{self.name}: mask and sequence belong to losses that look at sequences")
        constants = self._constants(inputs, logprob)
        entropy = statistic(self, stats, "entropy") if "entropy" in self.outputs else None
        sequences = None
        if not self.token_wise:
            sequences = sequences_of(self, logprob, mask, sequence)
            counted = sequences.mask
            # Before any exp: what stands behind an ignored token would come back as 0 * inf. From zeros every loss
            # makes 0.
            logprob = torch.where(counted, logprob, 0.0)
            entropy = entropy if entropy is None else torch.where(counted, entropy, 0.0)
            constants = {name: torch.where(counted, x, 0.0) for name, x in constants.items()}
        log_ratio = logprob - constants.get("old_logprob", logprob.detach())
        return Samples(logprob, log_ratio, entropy, constants, sequences)

    def _constants(self, inputs: Mapping[str, Tensor | None], like: Tensor) -> dict[str, Tensor]:
        known = (*self.inputs, *self.optional_inputs)
        for name in inputs:
            if name not in known:
                raise TypeError(f"{self.name} has no input {name!r}; its inputs are {', '.join(known)}")
        wanted = [name for name in known if name in self.inputs or inputs.get(name) is not None]
        constants = {name: constant(self, name, inputs.get(name), like) for name in wanted}
        return {name: x.clamp(min=LEAST_LOGPROB) if name.endswith("logprob") else x for name, x in constants.items()}

    def _weight(self, samples: Samples) -> Tensor | None:
        """The factor of the loss's own term; None for 1."""
        weight = samples.constants.get("policy_weight")
        for keep in (self._entropy_mask(samples), self._off_policy_mask(samples)):
            if keep is not None:
                weight = keep.to(samples.logprob.dtype) if weight is None else torch.where(keep, weight, 0.0)
        return weight

    def _entropy_mask(self, samples: Samples) -> Tensor | None:
        if self.top_entropy == 1:
            return None
        assert samples.entropy is not None and samples.sequences is not None
        return top_entropy_mask(samples.entropy, self.top_entropy, samples.sequences.mask)

    def _off_policy_mask(self, samples: Samples) -> Tensor | None:
        if self.off_policy_threshold is None:
            return None
        assert samples.sequences is not None
        sampling = samples.constants.get("sampling_logprob", samples.constants.get("old_logprob"))
        if sampling is None:
            raise ValueError(f"{self.name}: off_policy_threshold needs sampling_logprob or old_logprob, got neither")
        threshold = self.off_policy_threshold
        return still_on_policy(samples.advantages, samples.logprob, sampling, threshold, samples.sequences)

    def _regulariser(self, samples: Samples, ratio: Tensor) -> Tensor | None:
        total = self.beta * self._kl(samples, ratio) if self.beta > 0 else None
        if self.entropy_coef > 0:
            assert samples.entropy is not None
            bonus = -self.entropy_coef * samples.entropy
            total = bonus if total is None else total + bonus
        return total

    def _kl(self, samples: Samples, ratio: Tensor) -> Tensor:
        return kl_estimate(
            samples.logprob,
            samples.constants[self.anchor],
            estimator=self.kl,
            gradient=self.kl_gradient,
            ratio=ratio if self.kl_importance else None,
        )
