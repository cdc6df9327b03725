"""Types that every layer shares: the statistics of a token, a head and its options, and the names of the strategies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypedDict, get_args

import torch
from torch import Tensor

from .parallel import VocabularyGroup
from .peers import value_hint

BackendName = Literal["auto", "reference", "chunked", "triton", "cuda"]
BackwardName = Literal["auto", "recompute", "single_pass", "tail_corrected", "screened"]
Reduction = Literal["none", "sum", "mean"]
LossReduction = Literal["none", "sum", "mean", "sequence_mean", "mean_of_means", "constant_length"]

#: The strategies that approximate gradients.
APPROXIMATE = ("tail_corrected", "screened")
#: Default tolerance of an approximate backward: at most twice the error of bfloat16 arithmetic
#: (docs/tail-corrected.md).
TAIL_TOLERANCE = 2**-12
#: The fields of `TokenStats`, in order; the first four carry gradients.
OUTPUTS = ("logprob", "lse", "entropy", "mean_logit", "correct", "log_sum_sq")
DIFFERENTIABLE = OUTPUTS[:4]
#: The fields of `TokenStats` for tokens that list several ids, all of them differentiable.
LIST_OUTPUTS = ("logprob", "lse", "entropy", "tail")
#: Vocabulary entries in the block of a (token, block) pair: the width of a tile of the tensor-core kernels.
PAIR_BLOCK = 128
#: Tokens in a span of a block's list of pairs: the height of that tile.
PAIR_SPAN = 128


class TokenStats(NamedTuple):
    """Statistics of a token's next-token distribution `p = softmax(z)` over V logits `z`; no loss knows more of it.

    Every field has the leading shape of `hidden`, float32 (float64 for float64 inputs), and is `None` where it was not
    asked for; `logprob` has the shape of the targets, which may be `[..., K]`. Natural logarithms throughout; 0 where
    the target is ignored.
    """

    logprob: Tensor | None = None
    """`z[target] - lse`, in nats; right to rounding for confident tokens too. Differentiable."""
    lse: Tensor | None = None
    """`log sum_j exp(z_j)`. Differentiable."""
    entropy: Tensor | None = None
    """`-sum_j p_j log p_j`, in nats. Differentiable."""
    mean_logit: Tensor | None = None
    """`mean_j z_j`, or `mean_j w_j z_j` with weights w; label smoothing is linear in it. Differentiable."""
    correct: Tensor | None = None
    """1 where no logit exceeds the target's (ties count as correct), else 0. Not differentiable."""
    log_sum_sq: Tensor | None = None
    """`log sum_j p_j^2`, the logarithm of the collision probability. Not differentiable."""
    tail: Tensor | None = None
    """`log(1 - sum_k p_k)`, the logarithm of the mass that no listed id has, of targets `[..., K]`. Differentiable."""


class Head(NamedTuple):
    """An output head and the options that turn `hidden @ weight.T` into logits (see `LogitTransform`)."""

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def transform(self) -> LogitTransform:
        """The last three fields as the function that they describe."""
        return _transform(self.logit_scale, self.softcap, self.temperature)


@dataclass(frozen=True)
class LogitTransform:
    """`z = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap) / temperature`, in that order.

    Scale before cap, as Grok has both; Gemma has the cap alone, Cohere and Granite the scale alone; temperature is the
    sampler's and comes last. Without a softcap the transform is one factor, `slope`. A logit that is -inf before the
    cap (a masked vocabulary entry) stays -inf.
    """

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check_number("logit_scale", self.logit_scale, "a positive number", lambda x: 0 < x < math.inf)
        _check_number("temperature", self.temperature, "a positive number", lambda x: 0 < x < math.inf)
        if self.softcap is not None:
            _check_number("softcap", self.softcap, "a positive number or None", lambda x: 0 < x < math.inf)

    @property
    def numbers(self) -> tuple[float, float | None, float]:
        """logit_scale, softcap and temperature. (Dynamo of torch 2.11 has no rule for `vars` of a dataclass.)"""
        return self.logit_scale, self.softcap, self.temperature

    def packed(self) -> list[float]:
        """The three numbers as an op's schema takes them; an infinite softcap stands for none."""
        softcap = math.inf if self.softcap is None else float(self.softcap)
        return [float(self.logit_scale), softcap, float(self.temperature)]

    @staticmethod
    def unpacked(numbers: Sequence[float]) -> LogitTransform:
        """The inverse of `packed`."""
        logit_scale, softcap, temperature = numbers
        return _transform(logit_scale, None if softcap == math.inf else softcap, temperature)

    @property
    def slope(self) -> float:
        """`d z / d (hidden @ weight.T + bias)` where the cap does not bend it."""
        return self.logit_scale / self.temperature

    def apply_(self, logits: Tensor, *, may_be_masked: bool) -> Tensor | None:
        """Transforms raw products in place; returns the derivative per entry, None where it is `slope`."""
        if self.softcap is None:
            if self.slope != 1.0:
                logits.mul_(self.slope)
            return None
        masked = logits.isneginf() if may_be_masked else None
        logits.mul_(self.logit_scale / self.softcap).tanh_()
        derivative = logits.square().neg_().add_(1).mul_(self.slope)
        logits.mul_(self.softcap / self.temperature)
        if masked is not None:
            logits.masked_fill_(masked, -math.inf)
        return derivative

    def derivative_at(self, logits: Tensor) -> Tensor | float:
        """The derivative that `apply_` returns, from finished logits."""
        if self.softcap is None:
            return self.slope
        capped = (logits * (self.temperature / self.softcap)).clamp(-1, 1)  # tanh; -inf has slope 0
        return (1 - capped.square()) * self.slope


@lru_cache(typed=True)
def _transform(logit_scale: float, softcap: float | None, temperature: float) -> LogitTransform:
    """A transform of these numbers, made and checked once: a sweep asks its head for one again and again."""
    return LogitTransform(logit_scale, softcap, temperature)


DivergenceKind = Literal[
    "forward_kl",
    "reverse_kl",
    "symmetric_kl",
    "js",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
    "squared_hellinger",
    "pearson_chi2",
    "neyman_chi2",
    "alpha",
    "cross_entropy",
]


@dataclass(frozen=True)
class DivergenceOptions:
    """Which divergence of `linear_divergence`, and its parameters; checked here for the op and for the losses on it.

    A parameter that differs from its default but that `kind` does not read is an error, not silence.
    """

    kind: DivergenceKind
    mixture: float = 0.5
    skew: float = 0.1
    alpha: float = 0.5
    normalized: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(DivergenceKind):
            expected, hint = list(get_args(DivergenceKind)), value_hint("kind", self.kind)
            raise ValueError(f"kind: expected one of {expected}, got {self.kind!r}{hint}")
        if not isinstance(self.normalized, bool):
            raise TypeError(f"normalized: expected a bool, got {type(self.normalized).__name__}")
        _check_number("mixture", self.mixture, "a number in [0, 1]", lambda x: 0 <= x <= 1)
        _check_number("skew", self.skew, "a number in [0, 1)", lambda x: 0 <= x < 1)
        _check_number("alpha", self.alpha, "a finite number", math.isfinite)
        if self.kind == "js" and not self.normalized and self.mixture in (0, 1):
            raise ValueError(
                f"mixture: the js divergence with mixture {self.mixture} is 0 for all distributions; with "
                "normalized=True it is forward_kl at 0 and reverse_kl at 1"
            )
        unread = {
            "mixture": self.kind not in ("js", "symmetric_kl") and self.mixture != 0.5,
            "normalized": self.kind != "js" and self.normalized,
            "skew": not self.kind.startswith("skew") and self.skew != 0.1,
            "alpha": self.kind != "alpha" and self.alpha != 0.5,
        }
        for name, given in unread.items():
            if given:
                raise ValueError(f"{name}: kind {self.kind!r} does not read it, got {getattr(self, name)}")


@dataclass(frozen=True)
class Options:
    """The options of the head and of the backend that every op of the library takes, with their defaults.

    `logit_weight` is an argument of `linear_logprobs` and `linear_token_loss` alone: a loss that smooths labels reads
    the plain mean.
    """

    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    ignore_index: int = -100
    backend: BackendName = "auto"
    backward: BackwardName = "auto"
    chunk_bytes: int | None = None
    chunk_dtype: torch.dtype | None = None
    tail_tolerance: float = TAIL_TOLERANCE
    vocabulary_order: Tensor | None = None
    group: VocabularyGroup | None = None
    logit_weight: Tensor | None = None
    grad_out: Tensor | None = None

    @property
    def transform(self) -> LogitTransform:
        return LogitTransform(self.logit_scale, self.softcap, self.temperature)

    def keywords(self) -> OptionKeywords:
        """The options as keyword arguments of an op."""
        return {name: getattr(self, name) for name in OPTION_NAMES}  # type: ignore[return-value]

    def approximates(self) -> bool:
        """Whether an approximate backward was asked for; at a tolerance of 0 it is exact."""
        return self.backward in APPROXIMATE and self.tail_tolerance > 0


class OptionKeywords(TypedDict, total=False):
    """`Options` as keyword arguments, for the signatures of the functions that pass them on."""

    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    temperature: float
    ignore_index: int
    backend: BackendName
    backward: BackwardName
    chunk_bytes: int | None
    chunk_dtype: torch.dtype | None
    tail_tolerance: float
    vocabulary_order: Tensor | None
    group: Any
    grad_out: Tensor | None


OPTION_NAMES = tuple(OptionKeywords.__annotations__)


def split_options(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options among keyword arguments, and the rest that is not None.

    A tensor called `group` is no option but an input of a loss: which prompt a sequence belongs to.
    """
    options = {k: v for k, v in arguments.items() if k in OPTION_NAMES and not (k == "group" and isinstance(v, Tensor))}
    return options, {k: v for k, v in arguments.items() if k not in options and v is not None}


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for every input but float64: a token's statistics are never rounded to a half type."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_number(name: str, value: object, expected: str, accept) -> None:  # type: ignore[no-untyped-def]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
    if not accept(value):
        raise ValueError(f"{name}: expected {expected}, got {value}")
