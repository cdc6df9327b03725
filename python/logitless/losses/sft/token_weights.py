"""Losses of supervised fine-tuning that look at one token's own distribution: its probability p, its entropy H.

For all of them `w = -d loss / d logprob`, the factor on NLL's gradient, says what they do. DFT's is p, so that tokens
the model finds unlikely hardly pull; focal loss does the opposite; the others lie between, or gate by entropy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...types import TokenStats
from ..catalogue import register
from ..checks import check_flag, check_number, check_one_of, constant, statistic
from ..formulas import probability_power, weighted_nll
from ..loss import SequenceLoss, TokenLoss
from ..sequences import sequences_of


@register
@dataclass(frozen=True)
class DFT(TokenLoss):
    """Dynamic fine-tuning: `-sg(p^power) logprob`, p = exp(logprob) and sg the stop-gradient; w = p^power.

    The gradient is that of `-p` (`-p^power / power` in general), so the value is no likelihood: log plain NLL beside
    it. A target with probability 0 (logprob of -inf, or so low that p underflows) gives value and gradient 0, as in the
    limit.

    SA-DFT takes another power for each kind of token: give it as the optional per-token input `token_power`, which
    replaces `power` (its code: 0.3 for tokens with a digit, 1 for stop words and punctuation, 0.7 for the rest).

    Detached: the weight. Without that, w = p (1 + logprob) would change sign at p = 1/e.

    When to use: demonstrations whose unlikely tokens are noise or style rather than content. The weight removes the
    1 / p by which NLL, read as a policy gradient, over-rewards unlikely tokens. Not to teach new facts: a token with
    p near 0 gets no gradient.

    Args:
        power: 1 is the paper's loss; 0 is NLL, values between weight unlikely tokens less harshly. Not negative.

    Left open: which powers suit which tokens; the paper has power 1 alone.

    Source: arXiv 2508.05629, equation 9. SA-DFT is in the authors' repository, not in the paper. The power form has the
    gradient of the deformed logarithm `(1 - p^power) / power` (derived).
    """

    power: float = 1.0
    name: ClassVar[str] = "dft"
    optional_inputs: ClassVar[tuple[str, ...]] = ("token_power",)

    def __post_init__(self) -> None:
        check_number(self, "power", low=0.0)

    def __call__(self, stats: TokenStats, token_power: Tensor | None = None) -> Tensor:
        """Per-token loss `[...]`, >= 0, from `stats.logprob`; `token_power` `[...]`, not negative."""
        logprob = statistic(self, stats, "logprob")
        power = self.power if token_power is None else constant(self, "token_power", token_power, logprob)
        return weighted_nll(probability_power(logprob.detach(), power), logprob)


@register
@dataclass(frozen=True)
class DeformedLog(SequenceLoss):
    """Deformed-logarithm likelihood ("beyond log-likelihood"): `(1 - p^a) / a`; w = p^a.

    - `form="constant"`: a = `exponent`. 0 is NLL (the limit), 1 is `1 - p`, whose gradient is DFT's.
    - `form="deft"`, DEFT: a = `sum_v p_v^2`, the chance that two draws agree: DFT where the model is sure, NLL where it
      is not.
    - `form="cayley"`: a = `f + (1 - f) p / (2 - p)` with `f = mean(p) / 2` over the counted tokens of the batch, held
      in [0.001, 1]. It looks at the whole batch, so its value depends on how a batch is split into micro-batches.

    Outside `min_prob <= p <= max_prob` a token's loss is 0, and it leaves the mean's divisor, as in the authors' code:
    the mean is over the tokens that are kept. Which these are is known after the statistics, so thresholds cost four
    GEMMs, and a `normalizer` from outside cannot know it: a global count of tokens, under gradient accumulation, keeps
    the dropped ones in. (The authors accumulate by averaging their micro-batches' means.) A logprob of -inf gives
    `1 / a` with gradient 0 (a = 0: inf with gradient -1).

    Detached: a where it depends on the model, and the thresholds' comparison. p^a is not: it is the loss itself.

    When to use: as DFT, with a value that is a loss; `exponent` sets how far between NLL and DFT. The paper advises a
    value near 1 for a model that knows the domain well and near 0 for one that does not.

    Args:
        form: `constant` by default.
        exponent: a of `form="constant"`, not negative; 1 by default (`1 - p`).
        min_prob, max_prob: 0 and 1 by default, which keeps every token; the authors' code offers either threshold,
            with the exponents 0 and 1.

    Left open: which exponent; how large Cayley's batch has to be.

    Source: the family arXiv 2510.00526 with its authors' code (GaotangLi/Beyond-Log-Likelihood); DEFT arXiv 2602.11424
    and all three forms from its authors' code (luludus/DEFT). The latter divides by `a + 1e-6`; this is
    `-expm1(a logprob) / a`, exactly.
    """

    form: str = "constant"
    exponent: float = 1.0
    min_prob: float = 0.0
    max_prob: float = 1.0
    name: ClassVar[str] = "deformed_log"
    of_sequences: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_one_of(self, "form", ("constant", "deft", "cayley"))
        check_number(self, "exponent", low=0.0)
        check_number(self, "min_prob", low=0.0, high=1.0)
        check_number(self, "max_prob", low=self.min_prob, high=1.0)
        if self.exponent != 1.0 and self.form != "constant":
            raise ValueError(f"DeformedLog: exponent belongs to form='constant', got {self.form!r}")

    @property
    def batch_wide(self) -> bool:
        return self.form == "cayley"

    @property
    def divided_by(self) -> Callable[[TokenStats | None, Mapping[str, Tensor]], Tensor | None] | None:
        if (self.min_prob, self.max_prob) == (0, 1):
            return None
        return lambda stats, inputs: None if stats is None else self._kept(stats)

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("logprob", "log_sum_sq") if self.form == "deft" else ("logprob",)

    def __call__(self, stats: TokenStats, mask: Tensor | None = None, sequence: Tensor | None = None) -> Tensor:
        """Per-token loss `[...]`, >= 0; `mask` (bool, the tokens that count) belongs to `form="cayley"` alone."""
        logprob = statistic(self, stats, "logprob")
        if self.form == "cayley":
            mask = sequences_of(self, logprob, mask, sequence).mask
            logprob = torch.where(mask, logprob, 0.0)
        loss = _deformed_nll(logprob, self._exponent(stats, logprob.detach(), mask))
        kept = self._kept(stats)
        return torch.where(kept if mask is None else kept & mask, loss, 0.0)

    def _kept(self, stats: TokenStats) -> Tensor:
        """`[...]` bool, where p is within the thresholds."""
        p = statistic(self, stats, "logprob").detach().exp()
        return (p >= self.min_prob) & (p <= self.max_prob)

    def _exponent(self, stats: TokenStats, logprob: Tensor, mask: Tensor | None) -> Tensor | float:
        if self.form == "constant":
            return self.exponent
        if self.form == "deft":
            return statistic(self, stats, "log_sum_sq").detach().exp()
        assert mask is not None
        p = torch.where(mask, logprob.exp(), 0.0)
        floor = 0.5 * p.sum() / mask.sum().clamp(min=1)
        return (floor + (1 - floor) * p / (2 - p)).clamp(1e-3, 1.0)


def _deformed_nll(logprob: Tensor, exponent: Tensor | float) -> Tensor:
    if not isinstance(exponent, Tensor) and exponent < 1e-12:  # a logprob cannot be so low that it would matter
        return -logprob
    return -torch.expm1(exponent * logprob) / exponent


@register
@dataclass(frozen=True)
class CHORDPhi(TokenLoss):
    """CHORD's token weight: `-sg(p (1 - p)) logprob`; w = p (1 - p), zero at both ends and at most 1/4.

    A logprob of -inf gives value and gradient 0. CHORD mixes this with a policy loss as `(1 - mu) L_RL + mu L_SFT`,
    each with its own mean, mu = 0.1 in its authors' code; CHORD-mu takes plain NLL (`nll`) in this place and
    schedules mu, and the same code's `sft_is` is `dft`.

    Detached: the weight.

    When to use: demonstrations beside reinforcement learning: neither what the model already says nor what it would
    never say pulls it.

    Args:
        cutoff: a token with p above it gets no gradient (its logprob counts as log cutoff); 1, the default, is off.

    Left open: mu's schedule is the trainer's.

    Source: arXiv 2508.11408, from its authors' code (Trinity-RFT).
    """

    cutoff: float = 1.0
    name: ClassVar[str] = "chord_phi"

    def __post_init__(self) -> None:
        check_number(self, "cutoff", low=0.0, low_open=True, high=1.0)

    def __call__(self, stats: TokenStats) -> Tensor:
        """Per-token loss `[...]`, >= 0, from `stats.logprob`."""
        logprob = statistic(self, stats, "logprob")
        weight = -logprob.detach().exp() * torch.expm1(logprob.detach())
        return weighted_nll(weight, logprob.clamp(max=math.log(self.cutoff)))


@register
@dataclass(frozen=True)
class LUFFYShaping(TokenLoss):
    """LUFFY's shaping of demonstrations: `-p / (p + gamma)`; w = gamma p / (p + gamma)^2, at most 1/4, at p = gamma.

    Between NLL and DFT: unlikely tokens pull in proportion to p / gamma, likely ones hardly. A logprob of -inf gives
    value and gradient 0. This is LUFFY's off-policy term with advantage 1; multiply by the advantage with
    `token_weight`. Its code's other shapes are in the registry too: `p^k` is k times `deformed_log` with exponent k
    (plus a constant), a multiple of the logprob is `nll`.

    Detached: nothing.

    When to use: expert answers among a policy's own rollouts, with the policy loss on the rest, or alone as a bounded
    SFT loss.

    Args:
        gamma: positive, 0.1 by default (the paper's).

    Left open: nothing in the loss.

    Source: arXiv 2504.14945, equations 6 and 7, with the sampler's probability taken as 1, and its authors' code
    (ElliottYan/LUFFY, `p_div_p_0.1`).
    """

    gamma: float = 0.1
    name: ClassVar[str] = "luffy_shaping"

    def __post_init__(self) -> None:
        check_number(self, "gamma", low=0.0, low_open=True)

    def __call__(self, stats: TokenStats) -> Tensor:
        """Per-token loss `[...]`, in (-1, 0], from `stats.logprob`."""
        return -torch.sigmoid(statistic(self, stats, "logprob") - math.log(self.gamma))


@register
@dataclass(frozen=True)
class Focal(TokenLoss):
    """Focal loss: `-(1 - p)^gamma logprob`; w = (1 - p)^gamma - gamma p logprob (1 - p)^(gamma - 1).

    The opposite of DFT: likely tokens hardly pull. w can exceed 1. A logprob of -inf gives inf with gradient -1, as NLL
    does; for gamma < 1, 1 - p is held above 1e-6, where its power has no finite slope.

    Detached: nothing; the gradient flows through (1 - p)^gamma.

    When to use: classes (tokens) of very different frequency, where the easy ones drown the rest.

    Args:
        gamma: not negative; 0 is NLL, 2 the usual default.

    Left open: nothing in the loss.

    Source: arXiv 1708.02002. Unverified source: the formula is by memory, w is derived.
    """

    gamma: float = 2.0
    name: ClassVar[str] = "focal"

    def __post_init__(self) -> None:
        check_number(self, "gamma", low=0.0)

    def __call__(self, stats: TokenStats) -> Tensor:
        """Per-token loss `[...]`, >= 0, from `stats.logprob`."""
        logprob = statistic(self, stats, "logprob")
        # Below -80, 1 - p is 1 in every precision, and the clamp keeps inf * 0 out of the backward.
        miss = -torch.expm1(logprob.clamp(min=-80.0))
        return -(miss.clamp(min=1e-6) if self.gamma < 1 else miss).pow(self.gamma) * logprob


@register
@dataclass(frozen=True)
class Unlikelihood(TokenLoss):
    """Unlikelihood: `-alpha log(1 - p)` on negative tokens; w = -alpha p / (1 - p).

    Every target is negative by default. The optional per-token input `negative` (0 or 1) says which are, and the others
    get NLL, so that good and bad tokens share a batch.

    -log(1 - p) continues linearly above logprob = -1e-6, with the slope 1e6 it has there; as a function of the logits
    the gradient stays below alpha. A clamp would leave exactly the surest negative tokens without a gradient.

    Detached: nothing.

    When to use: repetitions, contradictions or rejected answers that the model is to make less likely.

    Args:
        alpha: weight of the negative tokens, not negative; 1 is the usual value.

    Left open: which tokens are negative; the paper's candidates are the context's earlier tokens, one call for each.

    Source: arXiv 1908.04319 and its authors' code (facebookresearch/unlikelihood_training), which holds 1 - p above
    1e-5 and adds the term to the NLL of all tokens; the continuation is derived.
    """

    alpha: float = 1.0
    name: ClassVar[str] = "unlikelihood"
    optional_inputs: ClassVar[tuple[str, ...]] = ("negative",)

    def __post_init__(self) -> None:
        check_number(self, "alpha", low=0.0)

    def __call__(self, stats: TokenStats, negative: Tensor | None = None) -> Tensor:
        """Per-token loss `[...]`, >= 0, from `stats.logprob`; `negative` `[...]`, not 0 where the token is negative."""
        logprob = statistic(self, stats, "logprob")
        most = -1e-6
        miss = -torch.log(-torch.expm1(logprob.clamp(max=most)))
        loss = self.alpha * (miss + torch.relu(logprob - most) / math.expm1(-most))
        if negative is None:
            return loss
        return torch.where(constant(self, "negative", negative, logprob) != 0, loss, -logprob)


@register
@dataclass(frozen=True)
class EAFT(TokenLoss):
    """Entropy-adaptive fine-tuning: `-sg(h^alpha) logprob`, `h = min(entropy / log k, 1)`; w = h^alpha.

    The paper's h is the entropy of the k likeliest tokens, renormalised, over log k. Instead of this top-k, the whole
    distribution's entropy is taken here, cut off at 1. It needs no sorting, and is larger by what the tail adds. On
    Zipf distributions over 32000 tokens with exponents from 1 to 3 it is 1.0 to 1.5 times the paper's. With one likely
    token (0.9 to 0.99) over a flat tail it is about a hundred times as large, and the confident conflicts that the
    paper damps are hardly damped. Where that matters, compute the paper's h from the k greatest logits, and take `nll`
    with `token_weight=h ** alpha`.

    Detached: the weight.

    When to use: a model that already knows much: tokens where it is sure of something else (low entropy, low p) are
    held back, while DFT would also hold back those where it is unsure.

    Args:
        alpha: not negative; 1 is the paper's, 0 is NLL.
        k: the entropy counts in units of log k; 20, the paper's. At least 2.

    Left open: how far the substitute moves the paper's results.

    Source: arXiv 2601.02151, equations 2 and 3, which LLaMA-Factory has with 3.0 for log 20 and without a cut-off; the
    substitute is derived.
    """

    alpha: float = 1.0
    k: int = 20
    name: ClassVar[str] = "eaft"
    outputs: ClassVar[tuple[str, ...]] = ("logprob", "entropy")

    def __post_init__(self) -> None:
        check_number(self, "alpha", low=0.0)
        check_number(self, "k", low=2.0)

    def __call__(self, stats: TokenStats) -> Tensor:
        """Per-token loss `[...]`, >= 0, from `stats.logprob` and `stats.entropy`."""
        share = statistic(self, stats, "entropy").detach() / math.log(self.k)
        return weighted_nll(share.clamp(0.0, 1.0).pow(self.alpha), statistic(self, stats, "logprob"))


@register
@dataclass(frozen=True)
class SEDSFT(TokenLoss):
    """Selective-entropy SFT (SED-SFT): `-logprob + scale m (p - 1/2)^2`, m = 1 where entropy > min_entropy;
    w = 1 - 2 scale m p (p - 1/2), in [1 - scale, 1 + scale / 8].

    Where the model is flexible, p is drawn towards 1/2; elsewhere it is NLL. The paper tells flexible positions by a
    probability mass of the k likeliest tokens below tau. Instead of this top-k, the entropy is compared here.

    The authors' tau is no constant: it is the mass that 30% of the tokens of 100 validation texts stay below.
    `sed_sft_min_entropy` takes the same share of your own tokens, and its result is the setting to train with. Their
    function's own defaults are tau = 0.95 with k = 10; 2.2 nats, the default here, is the entropy of a geometric
    distribution whose ten likeliest tokens hold 0.95.

    Detached: the mask; the gradient flows through p.

    When to use: to keep the model's diversity through SFT.

    Args:
        scale: 1, with which the authors' command trains (0.2 is their function's default). Not negative.
        min_entropy: in nats, 2.2 by default as derived above.

    Left open: how far the substitute moves the paper's results. The authors' command takes the quantile of the mass
    of 10 tokens and compares that of 2 with it, where no k is given.

    Source: arXiv 2602.07464 and its authors' code (pppa2019/SED-SFT), which applies the penalty where the mass is low;
    the substitute is derived.
    """

    scale: float = 1.0
    min_entropy: float = 2.2
    name: ClassVar[str] = "sed_sft"
    outputs: ClassVar[tuple[str, ...]] = ("logprob", "entropy")

    def __post_init__(self) -> None:
        check_number(self, "scale", low=0.0)
        check_number(self, "min_entropy", low=0.0)

    def __call__(self, stats: TokenStats) -> Tensor:
        """Per-token loss `[...]`, >= 0, from `stats.logprob` and `stats.entropy`."""
        logprob = statistic(self, stats, "logprob")
        flexible = statistic(self, stats, "entropy").detach() > self.min_entropy
        return -logprob + torch.where(flexible, self.scale * (logprob.exp() - 0.5).square(), 0.0)


@register
@dataclass(frozen=True)
class IDFT(TokenLoss):
    """In-distribution fine-tuning: `-sg(p^g) logprob` with a power for each token; w = p^g.

    With `phi = logprob + entropy`, which has mean 0 under the model and is negative for a surprising token,
    `g = 1 + mix (clamp(exp(-phi / beta), min_power, max_power) - 1)`: a surprising token is weighted as with a high
    power of DFT, a typical one almost as with NLL. A logprob of -inf gives value and gradient 0.

    Detached: g, always; p^g by default, as in the authors' code since March 2026. Its first release let the gradient
    flow through p^g (`detach=False`): w = p^g (1 + g logprob), which pushes tokens with p < exp(-1/g) further down.

    When to use: as DFT, where rare but typical tokens are to be kept.

    Args:
        beta: temperature of phi, positive; 1, as in the code.
        min_power, max_power: bounds of g before mixing; 0.1 and 2, as in the code.
        mix: 0 is DFT, 1 the full rule; `idft_mix` gives the code's schedule over training.
        detach: True by default, today's code; False is its first release.

    Left open: the upper bound; the authors' scripts vary it from 1 to 10.

    Source: arXiv 2602.12222, from its authors' code (zhangmiaosen2000/Towards-On-Policy-SFT), which also holds p above
    a small constant.
    """

    beta: float = 1.0
    min_power: float = 0.1
    max_power: float = 2.0
    mix: float = 1.0
    detach: bool = True
    name: ClassVar[str] = "idft"
    outputs: ClassVar[tuple[str, ...]] = ("logprob", "entropy")

    def __post_init__(self) -> None:
        check_number(self, "beta", low=0.0, low_open=True)
        check_number(self, "min_power", low=0.0, low_open=True)
        check_number(self, "max_power", low=self.min_power)
        check_number(self, "mix", low=0.0, high=1.0)
        check_flag(self, "detach")

    def __call__(self, stats: TokenStats) -> Tensor:
        """Per-token loss `[...]`, >= 0, from `stats.logprob` and `stats.entropy`."""
        logprob = statistic(self, stats, "logprob")
        surprise = -(logprob + statistic(self, stats, "entropy")).detach() / self.beta
        power = 1 + self.mix * (surprise.exp().clamp(self.min_power, self.max_power) - 1)
        if self.detach:
            return weighted_nll(probability_power(logprob.detach(), power), logprob)
        logprob = logprob.clamp(min=torch.finfo(logprob.dtype).min)
        return -probability_power(logprob, power) * logprob


@register
@dataclass(frozen=True)
class ProFiT(TokenLoss):
    """ProFiT: `-1[p > threshold] logprob`; w is 1 for tokens that the model finds likely enough and 0 for the others.

    A dropped token stays in the mean's divisor, as in the authors' code. For a mask made offline from anything else
    (CFT's critical tokens: arXiv 2510.10974, unverified source), use `nll` with `token_weight=mask` and
    `normalizer=mask.sum()`.

    Detached: the comparison.

    When to use: demonstrations of which only the core is to be imitated, on the reading that unlikely tokens are
    wording that could as well be another.

    Args:
        threshold: in [0, 1); 0.1 by default, which the authors recommend and train with.

    Left open: nothing in the loss. The code's other directions (the unlikely tokens, the middle, random ones) are masks
    for `nll`.

    Source: arXiv 2601.09195, from its authors' code (Utaotao/ProFit).
    """

    threshold: float = 0.1
    name: ClassVar[str] = "profit"

    def __post_init__(self) -> None:
        check_number(self, "threshold", low=0.0, high=1.0, high_open=True)

    def __call__(self, stats: TokenStats) -> Tensor:
        """Per-token loss `[...]`, >= 0, from `stats.logprob`."""
        logprob = statistic(self, stats, "logprob")
        return torch.where(logprob.detach().exp() > self.threshold, -logprob, 0.0)


@register
@dataclass(frozen=True)
class GEM(TokenLoss):
    """GEM: the gradient `sum_v sg(q_v h_v) d(z_v - z_target)` of the logits z, `q = softmax(z / beta)`.

    A token stops being pushed up once it holds the tempered distribution q, so the model itself stays flatter than
    under NLL. h weights each entry by its gap to the target, `d_v = z_v - z_target`:

    - `h="logsigmoid"`: `h_v = sigmoid(d_v / 100)`, the authors' default: about 1/2, more where the target is unlikely;
    - `h="linear"`: `h_v = 1`, for which the gradient is `q - onehot`.

    The statistics are those at the temperature beta: `stats_temperature` says so, and `linear_loss` multiplies it into
    the head's own. With them `linear` is `-beta logprob`, exactly.

    For `logsigmoid` the loss is `-beta s logprob - beta^2 s (1 - s) H / 100`, with `s = sg(sigmoid(m / 100))`, H the
    entropy and `m = -beta (logprob + H)` the mean of d under q. This takes h as linear around m, where q lies, instead
    of a pass of its own over the vocabulary. An entry's gradient is off by at most `4.9e-6 q_v (d_v - m)^2`, and the
    target's by the sum of these: relative to h of 1/2, 1e-3 for a logit ten nats from the mean, and less than the
    rounding of bfloat16 (4e-3) within twenty.

    Detached: s. The authors' form, `sum_v sg(q_v h_v) (log p_v - log p_target)`, has another value; neither value is a
    likelihood, so log plain NLL beside it.

    When to use: to keep the model's diversity through SFT.

    Args:
        beta: in (0, 1]; 0.7, the authors' default. With linear h, 1 is NLL.
        h: `logsigmoid`, the default of the authors' function and of both their scripts, or `linear`, which alone their
            fused kernel has. The gradient of `logsigmoid` is half as large.

    Left open: nothing in the loss.

    Source: arXiv 2408.16673 and its authors' code (liziniu/GEM); the scalars with its gradient are derived.
    """

    beta: float = 0.7
    h: str = "logsigmoid"
    name: ClassVar[str] = "gem"

    def __post_init__(self) -> None:
        check_number(self, "beta", low=0.0, low_open=True, high=1.0)
        check_one_of(self, "h", ("logsigmoid", "linear"))

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("logprob",) if self.h == "linear" else ("logprob", "entropy")

    @property
    def stats_temperature(self) -> float:
        return self.beta

    def __call__(self, stats: TokenStats) -> Tensor:
        """Per-token loss `[...]`, from `stats.logprob` (and `stats.entropy`) at the temperature `stats_temperature`."""
        logprob = statistic(self, stats, "logprob")
        if self.h == "linear":
            return -self.beta * logprob
        entropy = statistic(self, stats, "entropy")
        weight = torch.sigmoid(-0.01 * self.beta * (logprob + entropy).detach())
        return -self.beta * weight * logprob - 0.01 * self.beta**2 * weight * (1 - weight) * entropy
