"""Losses of supervised fine-tuning that look at a whole answer, or at several answers to one prompt.

All are sequence losses: they return one number per token, and the sum over an answer's tokens (the mean for `iw_sft`
and `ift`, as their `reduction` says) is the answer's loss. A token that does not count gets exactly 0 and no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ...types import LossReduction, TokenStats
from ..catalogue import register
from ..checks import check_flag, check_number, check_one_of, constant, statistic
from ..formulas import weighted_nll
from ..loss import SequenceLoss
from ..sequences import Sequences, sequences_of


class _Answers(SequenceLoss):
    """A sequence loss whose value is an answer's own, an equal share of it on each of its tokens."""

    inputs: ClassVar[tuple[str, ...]] = ("ref_logprob",)
    reduction: ClassVar[LossReduction] = "sequence_mean"

    def __call__(
        self, stats: TokenStats, ref_logprob: Tensor, *, mask: Tensor | None = None, sequence: Tensor | None = None
    ) -> Tensor:
        """An equal share of the answer's loss on each of its tokens, `[...]` like `stats.logprob` and `ref_logprob`.

        Args:
            stats: `logprob`. The last axis is time.
            ref_logprob: constants, as the class says.
            mask: bool, the tokens that count; all by default.
            sequence: int64, the tokens' answers where several lie behind one another; a row is one by default.
        """
        logprob = statistic(self, stats, "logprob")
        rho = logprob - constant(self, "ref_logprob", ref_logprob, logprob)
        tokens = sequences_of(self, rho, mask, sequence)
        return torch.where(tokens.mask, self._answer(rho, tokens) / tokens.count(rho.dtype), 0.0)

    def _answer(self, rho: Tensor, tokens: Sequences) -> Tensor:
        """The loss of every token's answer from the tokens' log-ratios."""
        raise NotImplementedError


@register
@dataclass(frozen=True)
class MinorSFT(_Answers):
    """MinorSFT: `-2 / (beta T) log sigmoid(beta R)` of an answer of T tokens, `R = sum_t (logprob_t - ref_logprob_t)`;
    w = 2 sigmoid(-beta R) / T, in [0, 2 / T].

    An answer that has become much likelier than under the reference stops pulling. At the reference the gradient is
    that of NLL averaged over the answer's tokens and then over answers. A logprob of -inf gives inf with a gradient of
    -2 / T.

    torchrl's `minor_sft` is another loss: `-log sigmoid(beta R / T)` by default, whose sigmoid sees an average, and
    `-log sigmoid(beta R)` without its normalisation by length. Its gradients are beta / 2 and beta T / 2 times as large
    at the reference.

    Detached: the reference.

    When to use: SFT that should not run far from its starting point, answer by answer: DPO's loss without a rejected
    answer.

    Args:
        beta: positive; 0.1, torchrl's. It sets how soon an answer stops pulling, and not the scale of the gradient.

    Left open: beta, whose value in the paper was not seen.

    Source: arXiv 2408.10642: the gradient, as a summary quotes it; the loss is derived from it. Unverified source: the
    paper itself was not seen.
    """

    beta: float = 0.1
    name: ClassVar[str] = "minor_sft"

    def __post_init__(self) -> None:
        check_number(self, "beta", low=0.0, low_open=True)

    def _answer(self, rho: Tensor, tokens: Sequences) -> Tensor:
        return 2 / self.beta * softplus(-self.beta * tokens.sum(rho)) / tokens.count(rho.dtype)


@register
@dataclass(frozen=True)
class PoFT(_Answers):
    """Preference-oriented fine-tuning: `-log sigmoid(r_0 - mean_j r_j)`, `r_0 = mean_t logprob_t` of an answer.

    r_j is the answer's mean log-probability per token under the aligned model j, by its own tokenizer. Give
    `ref_logprob` as `mean_j r_j`, one number per answer; or, with one aligned model of the same tokenizer, as its
    log-probs per token, whose mean is taken here. w = sigmoid(mean_j r_j - r_0) / T for an answer of T tokens: answers
    that the aligned models find unlikely pull less. A logprob of -inf gives inf with a gradient of -1 / T.

    Detached: the aligned models.

    When to use: noisy demonstrations, with better models at hand that can score them.

    Left open: nothing in the loss; the paper scores with zephyr-7b-sft-full, Llama-3-8B-Instruct and Yi-6B-Chat.

    Source: arXiv 2412.12865, equations 7 and 8 for w.
    """

    name: ClassVar[str] = "poft"

    def _answer(self, rho: Tensor, tokens: Sequences) -> Tensor:
        return softplus(-tokens.mean(rho))


@register
@dataclass(frozen=True)
class IWSFT(SequenceLoss):
    """Importance-weighted SFT (iw-SFT): `-sg(weight) logprob`; w = weight.

    - `per="sequence"`: `weight = clamp(exp(temperature mean_t rho_t), low, high)`, one for every token of an answer,
      rho = logprob - ref_logprob. The mean in the exponent stands for the exact ratio of the answers' probabilities,
      the exponential of the sum.
    - `per="token"`: `weight_t = clamp(exp(rho_t), low, high)`.

    The optional input `quality` (per token or per answer, not negative) multiplies the weight: with it the loss is
    SFT(Q). SFT(Q) without importance weights is `nll` with `token_weight=quality`.

    Detached: the weight, with the model's own logprob in it. The reference is the model before training.

    When to use: filtered demonstrations (rejection sampling), where SFT is a loose lower bound of the reward that the
    weight tightens.

    Args:
        per: `sequence`, the authors' default for language models, or `token`.
        temperature: of `per="sequence"` alone; 1 as their trainer passes it (their function's default is 2).
        low, high: bounds of the weight. None, the default, stands for theirs: 0 and 16 per sequence, 0.2 and 1.8 per
            token.

    Left open: how qualities are scaled.

    Source: arXiv 2507.12856, from its authors' code. Unverified source: SFT(Q) is by memory.
    """

    per: str = "sequence"
    temperature: float = 1.0
    low: float | None = None
    high: float | None = None
    name: ClassVar[str] = "iw_sft"
    inputs: ClassVar[tuple[str, ...]] = ("ref_logprob",)
    optional_inputs: ClassVar[tuple[str, ...]] = ("quality",)

    def __post_init__(self) -> None:
        check_one_of(self, "per", ("sequence", "token"))
        check_number(self, "temperature", low=0.0)
        for field in ("low", "high"):
            if getattr(self, field) is not None:
                check_number(self, field, low=0.0)
        if self.bounds[0] > self.bounds[1]:
            raise ValueError(f"IWSFT: low must not exceed high, got {self.bounds[0]} and {self.bounds[1]}")
        if self.per == "token" and self.temperature != 1.0:
            raise ValueError(f"IWSFT: temperature belongs to per='sequence', got {self.temperature} with 'token'")

    @property
    def bounds(self) -> tuple[float, float]:
        """The bounds of the weight, the authors' where none are given."""
        low, high = (0.0, 16.0) if self.per == "sequence" else (0.2, 1.8)
        return low if self.low is None else self.low, high if self.high is None else self.high

    @property
    def of_sequences(self) -> bool:
        return self.per == "sequence"

    def __call__(
        self,
        stats: TokenStats,
        ref_logprob: Tensor,
        *,
        quality: Tensor | None = None,
        mask: Tensor | None = None,
        sequence: Tensor | None = None,
    ) -> Tensor:
        """Per-token loss `[...]`, >= 0, from `stats.logprob` and constants `[...]`; with `per="sequence"` the last axis
        is time, `mask` (bool) the tokens that count and `sequence` (int64) the answer that each belongs to."""
        logprob = statistic(self, stats, "logprob")
        exponent = logprob.detach() - constant(self, "ref_logprob", ref_logprob, logprob)
        if self.per == "sequence":
            tokens = sequences_of(self, logprob, mask, sequence)
            logprob = torch.where(tokens.mask, logprob, 0.0)
            exponent = self.temperature * tokens.mean(exponent).clamp(min=torch.finfo(exponent.dtype).min)
        weight = exponent.exp().clamp(*self.bounds)
        if quality is not None:
            weight = weight * constant(self, "quality", quality, logprob)
        return weighted_nll(weight, logprob)


@register
@dataclass(frozen=True)
class DiscriminativeSFT(SequenceLoss):
    """Discriminative fine-tuning (the authors' DFT and DFT2): an answer against answers sampled from the base model.

    For a prompt with the demonstrated answer's log-probability s+ and B sampled ones s_j:
    `-s+ + mean_j sg(exp(d_j - u)) s_j`, `d_j = s_j / temperature - r_j`, r_j the base model's log-probability of its
    own sample. u is the prompt's running normaliser, `u = log((1 - decay) exp(u_old) + decay mean_j exp(d_j))`, which
    bounds `exp(d_j - u)` by B / decay. The gradient is that of `-s+ / temperature + log E_base[exp(s / temperature) /
    p_base]`, times the temperature.

    With `ref_free` (DFT2) all s are means over tokens and `d_j = s_j / temperature`.

    The inputs `group` (which prompt, whole numbers), `negative` (1 for a sampled answer, 0 for the demonstrated one)
    and `log_normalizer` (u_old, 0 at first) are given per answer; `updated_normalizer` returns the new u to be kept.
    All answers to a prompt must be in one batch. Tokens sum up to the answers' terms, and the mean is over prompts, as
    in the authors' code: the divisor counts the demonstrated answers. A `normalizer` from outside has to be that
    number, the prompts of the global batch.

    Detached: u and the weights exp(d_j - u).

    When to use: instead of preference data, where the model's own samples are cheap.

    Args:
        temperature: tau, positive. None, the default, stands for the released recipes: 1 for DFT, 0.3 for DFT2.
        decay: gamma of the moving average, in (0, 1]. None: the recipes' 0.85 for DFT, 0.9 for DFT2 (the 0.95 of their
            configuration class is used by neither).
        ref_free: False, DFT, by default.

    Left open: the schedule of `decay`.

    Source: arXiv 2502.18679, from its authors' code (PenGuln/DFT).
    """

    temperature: float | None = None
    decay: float | None = None
    ref_free: bool = False
    name: ClassVar[str] = "discriminative_sft"
    batch_wide: ClassVar[bool] = True
    reduction: ClassVar[LossReduction] = "sequence_mean"

    def __post_init__(self) -> None:
        if self.temperature is not None:
            check_number(self, "temperature", low=0.0, low_open=True)
        if self.decay is not None:
            check_number(self, "decay", low=0.0, low_open=True, high=1.0)
        check_flag(self, "ref_free")

    @property
    def recipe(self) -> tuple[float, float]:
        """Temperature and decay, the authors' where none are given."""
        temperature, decay = (0.3, 0.9) if self.ref_free else (1.0, 0.85)
        given = self.temperature, self.decay
        return temperature if given[0] is None else given[0], decay if given[1] is None else given[1]

    @property
    def divided_by(self) -> Callable[[TokenStats | None, Mapping[str, Tensor]], Tensor]:
        return _of_demonstrations

    @property
    def inputs(self) -> tuple[str, ...]:
        return (*(() if self.ref_free else ("ref_logprob",)), "group", "negative", "log_normalizer")

    def __call__(
        self,
        stats: TokenStats,
        *,
        group: Tensor,
        negative: Tensor,
        log_normalizer: Tensor,
        ref_logprob: Tensor | None = None,
        mask: Tensor | None = None,
        sequence: Tensor | None = None,
    ) -> Tensor:
        """Per-token terms `[...]` from `stats.logprob` and constants `[...]`, equal over an answer's tokens but for
        `ref_logprob`; `mask` bool, the tokens that count, `sequence` int64, the answer that each belongs to."""
        logprob = statistic(self, stats, "logprob")
        tokens = sequences_of(self, logprob, mask, sequence)
        sampled = constant(self, "negative", negative, logprob) != 0
        score, normalizer, size = self._scores(logprob, tokens, ref_logprob, group, sampled, log_normalizer)
        weight = torch.where(sampled & tokens.mask, -(score - normalizer).exp() / size, 1.0)
        loss = weighted_nll(weight, torch.where(tokens.mask, logprob, 0.0))
        return loss / tokens.count(loss.dtype) if self.ref_free else loss

    def updated_normalizer(
        self,
        stats: TokenStats,
        *,
        group: Tensor,
        negative: Tensor,
        log_normalizer: Tensor,
        ref_logprob: Tensor | None = None,
        mask: Tensor | None = None,
        sequence: Tensor | None = None,
    ) -> Tensor:
        """The prompts' new `log_normalizer` on each of their tokens, detached; the arguments are the loss's."""
        logprob = statistic(self, stats, "logprob")
        tokens = sequences_of(self, logprob, mask, sequence)
        sampled = constant(self, "negative", negative, logprob) != 0
        return self._scores(logprob, tokens, ref_logprob, group, sampled, log_normalizer)[1]

    def _scores(
        self,
        logprob: Tensor,
        tokens: Sequences,
        ref_logprob: Tensor | None,
        group: Tensor,
        sampled: Tensor,
        log_normalizer: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """On every token: its answer's d, its prompt's new u, and how many answers were sampled for its prompt."""
        temperature, decay = self.recipe
        total = tokens.mean(logprob.detach()) if self.ref_free else tokens.sum(logprob.detach())
        score = total / temperature
        if not self.ref_free:
            score = score - tokens.sum(constant(self, "ref_logprob", ref_logprob, logprob))
        constant(self, "group", group, logprob)  # its check; as a float, large numbers would fall together
        prompt = group.flatten().unique(return_inverse=True)[1]
        heads = (tokens.first() & sampled).flatten()  # one token for each sampled answer
        peak, size = (logprob.new_zeros(logprob.numel()) for _ in range(2))
        peak = peak.scatter_reduce(0, prompt[heads], score.flatten()[heads], "amax", include_self=False)
        lowest = torch.finfo(peak.dtype).min  # of an answer that the model excludes: -inf - -inf would be NaN
        peak = peak.clamp(min=lowest)
        size = size.index_add(0, prompt[heads], torch.ones_like(score.flatten()[heads])).clamp(min=1.0)
        above = (score.flatten() - peak[prompt])[heads].exp()
        mean = torch.zeros_like(size).index_add(0, prompt[heads], above) / size
        log_mean, sizes = (x[prompt].reshape(logprob.shape) for x in (peak + mean.log(), size))
        kept = constant(self, "log_normalizer", log_normalizer, logprob)
        if decay < 1:
            log_mean = torch.logaddexp(kept + math.log1p(-decay), log_mean + math.log(decay))
        return score, log_mean.clamp(min=lowest), sizes


def _of_demonstrations(stats: TokenStats | None, inputs: Mapping[str, Tensor]) -> Tensor:
    """The tokens of demonstrated answers, of which every prompt has one."""
    return inputs["negative"] == 0


@register
@dataclass(frozen=True)
class IFT(SequenceLoss):
    """Intuitive fine-tuning's weights: `-logprob_t C_t`, `C_t = T G_t / sum_k G_k`, `G_t = sum_{k >= t} discount^(k -
    t) (-logprob_k)` over an answer's T tokens; w = C_t, with mean 1.

    A token weighs as much as the discounted losses from it on: errors early in an answer, which spoil what follows,
    count more. Losses above 1e6 count as 1e6 in the weights, so that a logprob of -inf gives inf for its own token
    alone; an answer without any loss has weights 1.

    The method's other half is outside of a loss: the log-probs come from a second forward pass whose input embeddings
    are mixed with those of the model's own greedy predictions (0.2 of them). `logitless train` makes no such pass: it
    trains with the weights alone.

    Detached: the weights by default. The authors' code lets the gradient flow through them (`detach=False`).

    When to use: to train a model on its own continuations' terms without sampling any.

    Args:
        discount: in [0, 1]; 0.95, the authors' default. 0 turns the weights off, as their code does.
        detach: True by default, the safer choice; False is the code's form.

    Left open: the code's other weights (past losses, other norms) are not built.

    Source: arXiv 2405.11870, from its authors' code. The detached default is a deviation.
    """

    discount: float = 0.95
    detach: bool = True
    name: ClassVar[str] = "ift"
    reduction: ClassVar[LossReduction] = "mean_of_means"

    def __post_init__(self) -> None:
        check_number(self, "discount", low=0.0, high=1.0)
        check_flag(self, "detach")

    def __call__(self, stats: TokenStats, *, mask: Tensor | None = None, sequence: Tensor | None = None) -> Tensor:
        """Per-token loss `[...]`, >= 0, from `stats.logprob`, whose last axis is time; `mask` bool, the tokens that
        count, `sequence` int64, the answer that each belongs to."""
        logprob = statistic(self, stats, "logprob")
        tokens = sequences_of(self, logprob, mask, sequence)
        nll = torch.where(tokens.mask, -logprob, 0.0)
        bounded = nll.clamp(max=1e6)
        if self.discount == 0:
            return nll
        future = tokens.discounted(bounded.detach() if self.detach else bounded, self.discount)
        mean = tokens.mean(future)
        weight = torch.where(mean > 0, future / mean.clamp(min=torch.finfo(mean.dtype).tiny), 1.0)
        return weight * nll if self.detach else weight * bounded
