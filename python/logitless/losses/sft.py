"""Losses of supervised fine-tuning: NLL, DFT and the f-divergence objectives.

For all of them `w = -d loss / d logprob` says what they do: 1 for NLL, the probability for DFT, phi'(beta rho) for an
f-divergence, with rho = logprob - ref_logprob.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..types import TokenStats
from .base import Loss, check_choice, check_flag, check_number, constant, read, register
from .divergences import DIVERGENCES, NAMES, SATURATED_PEARSON, Divergence, alpha_divergence


@register
@dataclass(frozen=True)
class NLL(Loss):
    """Negative log-likelihood with label smoothing and z-loss.

    `(1 - eps) (-logprob) + eps (lse - mean_logit) + z_loss lse^2`, eps = `label_smoothing`: label smoothing as
    `torch.nn.functional.cross_entropy` defines it (the uniform part includes the target), written with the mean
    logit, in which it is linear. Nothing is detached. With both at 0, their default, it is plain NLL and reads
    `logprob` alone.

    Where part of the vocabulary is masked (logits of -inf), the mean logit is -inf and label smoothing gives inf, as
    torch's does. A target with probability 0 gives inf, with gradient -1.

    Args:
        label_smoothing: in [0, 1].
        z_loss: weight of lse^2, which keeps logits from drifting; 1e-4 is usual in pre-training. Not negative.

    Source: label smoothing arXiv 1512.00567, section 7; z-loss arXiv 2204.02311, section 5.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    name: ClassVar[str] = "nll"

    def __post_init__(self) -> None:
        check_number(self, "label_smoothing", low=0.0, high=1.0)
        check_number(self, "z_loss", low=0.0)

    @property
    def outputs(self) -> tuple[str, ...]:
        smooth = self.label_smoothing > 0
        return ("logprob", *(("lse",) if smooth or self.z_loss > 0 else ()), *(("mean_logit",) if smooth else ()))

    def __call__(self, stats: TokenStats) -> Tensor:
        """Per-token loss `[...]` from `stats.logprob` (and `lse`, `mean_logit` where `outputs` names them)."""
        loss = -read(self, stats, "logprob")
        if self.label_smoothing > 0:
            uniform = read(self, stats, "lse") - read(self, stats, "mean_logit")
            loss = (1 - self.label_smoothing) * loss + self.label_smoothing * uniform
        if self.z_loss > 0:
            loss = loss + self.z_loss * read(self, stats, "lse").square()
        return loss


@register
@dataclass(frozen=True)
class DFT(Loss):
    """Dynamic fine-tuning: `-sg(p^power) logprob`, p = exp(logprob) and sg the stop-gradient; w = p^power.

    The weight removes the 1 / p by which NLL, read as a policy gradient, over-rewards unlikely tokens. It is
    detached: without that the gradient would change sign at p = 1/e. The gradient is that of `-p`
    (`-p^power / power` in general), so the value is no likelihood: log plain NLL beside it.

    A target with probability 0 (logprob of -inf, or so low that p underflows) gives value and gradient 0, as in the
    limit.

    Args:
        power: 1 is the paper's loss; 0 is NLL, values between weight unlikely tokens less harshly. Not negative.

    Source: arXiv 2508.05629, equation 9. The power form has the gradient of the deformed logarithm
    `(1 - p^power) / power` (derived; the authors' code has powers per kind of token).
    """

    power: float = 1.0
    name: ClassVar[str] = "dft"

    def __post_init__(self) -> None:
        check_number(self, "power", low=0.0)

    def __call__(self, stats: TokenStats) -> Tensor:
        """Per-token loss `[...]`, >= 0, from `stats.logprob`."""
        logprob = read(self, stats, "logprob")
        # The clamp is for power 0 and `where` for weight 0: 0 * -inf is NaN.
        weight = torch.exp(self.power * logprob.detach().clamp(min=torch.finfo(logprob.dtype).min))
        return torch.where(weight == 0, 0.0, -weight * logprob)


@register
@dataclass(frozen=True)
class FDivergenceSFT(Loss):
    """Imitation under an f-divergence with a KL term to the reference ("implicit reward as a bridge").

    `-phi(beta rho) / beta` with `rho = logprob - ref_logprob` and phi the divergence's reward transform
    (`divergences`): w = phi'(beta rho). Only the reference is detached. All rows have w = 1 at the reference; those
    that are not linear push a token less the more its probability has already grown beyond the reference's, so that
    the optimum lies between the reference and the expert: `pi proportional to expert * phi'(beta log(pi / ref))`.
    For `reverse_kl` that is `expert^(1/(1+beta)) ref^(beta/(1+beta))`. `total_variation` is NLL plus a constant, and
    so is every row as beta -> 0.

    `value="none"` takes the representative of the reward with value function 0, as DPO does. `value="lse"` reads the
    model as a soft Q-function instead, with the values `V_t / beta = dl_t = lse_t - ref_lse_t`:
    `x_t = beta (rho_t + dl_t - dl_{t+1})`, and a sequence's loss is `sum_t -phi(x_t) / beta + dl_0`. t + 1 is the
    next counted token of the same sequence and dl is 0 after the last; dl_0 is added to the first token's loss. For
    `total_variation` the values telescope, and the sum is that of NLL again. It is an experiment: the shift of the
    logits, which a softmax does not see, becomes a trained value function.

    Extreme values: every row but `pearson_chi2` continues phi linearly towards x -> -inf, so that any finite
    logprob and ref_logprob give a finite loss and gradient, and a logprob of -inf gives inf with the finite gradient
    of the row's `low_slope`. `pearson_chi2`, raw or saturated, stays quadratic there: its gradient is infinite
    at -inf. `ref_logprob` must be finite.

    Args:
        divergence: `total_variation`, `pearson_chi2`, `squared_hellinger`, `reverse_kl` (KL(model || expert)),
            `forward_kl` (KL(expert || model)), `js`, `neyman_chi2` or `alpha`. Default `pearson_chi2`, one of the
            two that the paper's summary recommends, read as those who follow IQ-Learn read it: phi = x - x^2 / 4.
            Read literally, the paper's chi2(expert, model) is `neyman_chi2`.
        beta: strength of the KL term, positive and in the unit of 1 / nats. 0.1 by default, as in DPO.
        value: `"none"` (a token loss) or `"lse"` (a sequence loss).
        alpha: of `divergence="alpha"` alone: 1 is `forward_kl`, 0 `reverse_kl`, as everywhere in this library. In
            terms of the parameter that multiplies the model's side, a, it is 1 - a.
        saturate: of `pearson_chi2` alone: weight 0 instead of a negative one beyond x = 2 (the exact conjugate).
            Raw, the loss is the regression `(beta / 4) (rho - 2 / beta)^2 - 1 / beta`, which pulls tokens back to
            rho = 2 / beta.

    Source: arXiv 2507.00018 for the objective `min D_f(expert, model) + beta KL(model || ref)`; its own loss
    equations could not be seen, and every equation here is derived from that objective in the manner of IQ-Learn
    (arXiv 2106.12142, whose code has the same weights, detached).
    """

    divergence: str = "pearson_chi2"
    beta: float = 0.1
    value: str = "none"
    alpha: float = 0.5
    saturate: bool = False
    name: ClassVar[str] = "f_divergence_sft"

    def __post_init__(self) -> None:
        check_choice(self, "divergence", NAMES)
        check_choice(self, "value", ("none", "lse"))
        check_number(self, "beta", low=0.0, low_open=True)
        check_number(self, "alpha")
        check_flag(self, "saturate")
        if self.saturate and self.divergence != "pearson_chi2":
            raise ValueError(f"FDivergenceSFT: saturate belongs to 'pearson_chi2', got {self.divergence!r}")
        if self.alpha != 0.5 and self.divergence != "alpha":
            raise ValueError(f"FDivergenceSFT: alpha belongs to divergence='alpha', got {self.divergence!r}")

    @property
    def level(self) -> str:
        return "token" if self.value == "none" else "sequence"

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("ref_logprob",) if self.value == "none" else ("ref_logprob", "ref_lse")

    @property
    def optional_inputs(self) -> tuple[str, ...]:
        return () if self.value == "none" else ("mask", "sequence")

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("logprob",) if self.value == "none" else ("logprob", "lse")

    @property
    def row(self) -> Divergence:
        """The generator, phi and phi' of the divergence chosen."""
        if self.divergence == "alpha":
            return alpha_divergence(self.alpha)
        return SATURATED_PEARSON if self.saturate else DIVERGENCES[self.divergence]

    def __call__(
        self,
        stats: TokenStats,
        ref_logprob: Tensor,
        ref_lse: Tensor | None = None,
        mask: Tensor | None = None,
        sequence: Tensor | None = None,
    ) -> Tensor:
        """Per-token loss of the statistics' shape; with `value="lse"` the last axis is time.

        Args:
            stats: `logprob`, and `lse` with `value="lse"`.
            ref_logprob: the same of the reference model, a constant.
            ref_lse: `lse` of the reference model, a constant. This and what follows: with `value="lse"` alone.
            mask: bool, the tokens that count; those where the model's `logprob` or `lse` is not 0 by default, since
                the ops give 0 for an ignored token in both. Other tokens get exactly 0 and no gradient.
            sequence: int64, which sequence a token belongs to where several lie behind one another on the last axis
                (each contiguous); a row is one sequence by default.
        """
        logprob = read(self, stats, "logprob")
        rho = logprob - constant(self, "ref_logprob", ref_logprob, logprob)
        if self.value == "lse":
            return self._with_values(rho, stats, ref_lse, mask, sequence)
        if ref_lse is not None or mask is not None or sequence is not None:
            raise ValueError(f"{self.name}: ref_lse, mask and sequence belong to value='lse'; value is 'none'")
        return -self.row.value(self.beta * rho) / self.beta

    def _with_values(
        self, rho: Tensor, stats: TokenStats, ref_lse: Tensor | None, mask: Tensor | None, sequence: Tensor | None
    ) -> Tensor:
        logprob, lse = read(self, stats, "logprob"), read(self, stats, "lse")
        reference = constant(self, "ref_lse", ref_lse, lse)
        mask = (logprob != 0) | (lse != 0) if mask is None else _check_like("mask", mask, lse, torch.bool)
        if sequence is not None:
            _check_like("sequence", sequence, lse, torch.int64)
        # Masked before phi: a NaN behind an ignored token would otherwise reach the gradient through 0 * NaN.
        rho, drift = (torch.where(mask, x, 0.0) for x in (rho, lse - reference))
        following, first = _following(mask, sequence)
        padded = torch.cat([drift, drift.new_zeros(*drift.shape[:-1], 1)], dim=-1)
        x = self.beta * (rho + drift - padded.gather(-1, following))
        return torch.where(mask, -self.row.value(x) / self.beta + torch.where(first, drift, 0.0), 0.0)


def _check_like(name: str, value: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    if value.shape != like.shape or value.dtype != dtype:
        got = f"{value.dtype} {tuple(value.shape)}"
        raise ValueError(f"f_divergence_sft: {name} must be {dtype} of shape {tuple(like.shape)}, got {got}")
    return value


def _following(mask: Tensor, sequence: Tensor | None) -> tuple[Tensor, Tensor]:
    """For every token, the place of its sequence's next counted one (T where there is none); whether it is first."""
    backwards = mask.flip(-1), None if sequence is None else sequence.flip(-1)
    return _next_counted(mask, sequence), mask & (_next_counted(*backwards) == mask.shape[-1]).flip(-1)


def _next_counted(mask: Tensor, sequence: Tensor | None) -> Tensor:
    length = mask.shape[-1]
    place = torch.where(mask, torch.arange(length, device=mask.device), length)
    from_here = place.flip(-1).cummin(-1).values.flip(-1)
    after = torch.cat([from_here, from_here.new_full((*mask.shape[:-1], 1), length)], dim=-1)[..., 1:]
    if sequence is None or length == 0:
        return after
    same = sequence.gather(-1, after.clamp(max=length - 1)) == sequence
    return torch.where(same, after, length)
