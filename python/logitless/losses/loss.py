"""The base class of all losses, and the levels of those that give one value a token.

A loss is a frozen dataclass of one of five levels: its fields are its hyper-parameters, checked when it is made, and
calling it is a pure function of per-token or per-sequence vectors. It knows nothing of heads, chunks, masks or means.

    TokenLoss          loss(stats, **inputs) -> [...]
    SequenceLoss       loss(stats, **inputs, mask=, sequence=) -> [...]
    DistributionLoss   loss(stats, divergence) -> [...]
    PairLoss           loss(chosen, rejected, ref_chosen, ref_rejected, **extras) -> PreferenceResult of [B]
    UnpairedLoss       loss(logprob, ref_logprob, **sequence_inputs, **extras) -> UnpairedResult of [S]

The last two, which sum whole sequences, are in `whole_sequence`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from .. import reduce
from ..types import LossReduction, TokenStats
from .layout import TokenLayout, reduction_rule


class Loss:
    """Base class of the five levels: what a loss declares about itself.

    A subclass answers with a ClassVar where the answer is a constant, and with a property where it depends on the
    hyper-parameters. (Here all are properties: mypy lets either of the two override one, but no property a ClassVar.)

    The inputs, the reference's values among them, are constants, which the loss detaches. A loss does not mask: its
    value at a token that does not count is arbitrary, and the reduction sets it to 0.
    """

    name: ClassVar[str]
    __call__: Callable[..., Any]

    @property
    def level(self) -> str:
        """The level's name in listings: "token", "sequence", "distribution", "pair" or "unpaired"."""
        levels = "TokenLoss, SequenceLoss, DistributionLoss, PairLoss, UnpairedLoss"
        raise NotImplementedError(f"{type(self).__name__}: expected a class that derives from one of {levels}")

    @property
    def inputs(self) -> tuple[str, ...]:
        """The per-token constants needed beside the statistics, in call order, such as `("ref_logprob",)`."""
        return ()

    @property
    def optional_inputs(self) -> tuple[str, ...]:
        """Per-token constants that the loss can do without."""
        return ()

    @property
    def sequence_inputs(self) -> tuple[str, ...]:
        """Constants per sequence, `[S]`, or of one number, `[]`, that a loss of whole sequences needs."""
        return ()

    @property
    def outputs(self) -> tuple[str, ...]:
        """The fields of `TokenStats` that the loss reads."""
        return ("logprob",)

    @property
    def lists(self) -> bool:
        """Whether a token's target is a list of ids, so that `stats.logprob` and `inputs` are `[..., K]`."""
        return False

    @property
    def within_list(self) -> bool:
        """Whether log-probs renormalised over the list will do, so that no other logit is computed."""
        return False

    @property
    def token_wise(self) -> bool:
        """Whether a value depends on nothing but its token's statistics and inputs, so that one sweep will do."""
        return False

    @property
    def of_sequences(self) -> bool:
        """Whether a value depends on where sequences begin."""
        return False

    @property
    def own_means(self) -> bool:
        """Whether the paper averages demonstrations and own tokens apart, by `token_weight=own_means(...)`."""
        return False

    @property
    def batch_wide(self) -> bool:
        """Whether a value depends on the whole batch, so that no part of it can be computed alone."""
        return False

    @property
    def compares_distributions(self) -> bool:
        """Whether the loss needs the reference's whole distributions: its hidden states and head."""
        return False

    @property
    def stats_temperature(self) -> float:
        """The temperature at which the statistics are taken, a factor on the head's own."""
        return 1.0

    @property
    def reduction(self) -> LossReduction:
        """The reduction of the paper, by its name in `logitless.reduce`."""
        return "mean"

    @property
    def divided_by(self) -> Callable[[TokenStats | None, Mapping[str, Tensor]], Tensor | None] | None:
        """Which tokens the reduction's divisor counts: a function of statistics and inputs to bool `[...]`.

        None, the usual case: all that count. It concerns the divisor of a batch's own, not a `normalizer` from outside.
        A divisor that depends on the statistics is known after them alone, so that a sweep cannot have it: where it is
        wanted, a loss of tokens costs four GEMMs. A count over several batches is made before any statistics; the
        function is then called with None for these, and gives None where it needs them.
        """
        return None

    def evaluate(
        self,
        stats: TokenStats,
        tokens: TokenLayout,
        inputs: Mapping[str, Tensor],
        *,
        token_weight: Tensor | None = None,
        reduction: LossReduction = "mean",
        normalizer: Tensor | float | None = None,
        max_length: int | None = None,
        divergence: Tensor | None = None,
    ) -> Any:
        """The loss of one batch from the statistics it reads: the result of `linear_loss`, without its sweep.

        The statistics may come from `linear_logprobs`, from a patched model or from full logits.

        Args:
            stats: of the mask's shape, with the fields that `outputs` names.
            tokens: which tokens count, and their sequences.
            inputs: the loss's inputs of the mask's shape; of a loss of whole sequences also its sequence inputs, `[S]`
                or `[]`.
            token_weight, reduction, normalizer, max_length: see `linear_loss`.
            divergence: per token, for a loss that compares distributions.
        """
        raise NotImplementedError(self.level)


class _TensorLoss(Loss):
    """A loss of one value a token."""

    __call__: Callable[..., Tensor]

    def evaluate(
        self,
        stats: TokenStats,
        tokens: TokenLayout,
        inputs: Mapping[str, Tensor],
        *,
        token_weight: Tensor | None = None,
        reduction: LossReduction = "mean",
        normalizer: Tensor | float | None = None,
        max_length: int | None = None,
        divergence: Tensor | None = None,
    ) -> Tensor:
        """The reduced loss, or for "none" one value a token, 0 where it does not count."""
        known = {name: reduce.zero_outside(tokens.mask, x) for name, x in inputs.items()}
        losses = self._values(stats, tokens, known, divergence)
        if token_weight is not None:
            losses = losses * token_weight.to(losses.dtype)
        divided_by = None if self.divided_by is None else self.divided_by(stats, known)
        rule = reduction_rule(tokens, reduction, normalizer, max_length, divided_by)
        return reduce.apply(losses, tokens.mask, rule, keep_tokens=reduction == "none")

    def _values(
        self, stats: TokenStats, tokens: TokenLayout, inputs: Mapping[str, Tensor], divergence: Tensor | None
    ) -> Tensor:
        """One value a token; arbitrary where it does not count."""
        return self(stats, **inputs)


class TokenLoss(_TensorLoss):
    """A loss of each token's own statistics: `loss(stats, **inputs)` gives one value a token, `[...]`.

    It costs one sweep over the logits, three GEMMs.
    """

    level: ClassVar[str] = "token"
    token_wise: ClassVar[bool] = True


class SequenceLoss(_TensorLoss):
    """A loss that may look along time or over the batch: `loss(stats, **inputs, mask=, sequence=)`, `[...]`.

    Tokens where `mask` (bool) is False get 0. `sequence` (int64) numbers the tokens' sequences; None: a row of the last
    axis is one. It costs the statistics first and recomputation afterwards, four GEMMs.

    Whether a loss looks at other tokens can depend on its hyper-parameters, as in `FDivergenceSFT(per=)` or
    `PPO(top_entropy=)`. Its class does not: `of_sequences` and `batch_wide` say what these settings make of it. Where
    both are False it is `token_wise`, is called without `mask` and `sequence`, and costs what a `TokenLoss` does. One
    class is simpler than a constructor that returns one of two: objects compare, copy, pickle and go through
    `torch.compile` as any dataclass does.
    """

    @property
    def level(self) -> str:
        return "token" if self.token_wise else "sequence"

    @property
    def token_wise(self) -> bool:
        return not (self.of_sequences or self.batch_wide)

    @property
    def of_sequences(self) -> bool:
        return True

    def _values(
        self, stats: TokenStats, tokens: TokenLayout, inputs: Mapping[str, Tensor], divergence: Tensor | None
    ) -> Tensor:
        if self.token_wise:
            return self(stats, **inputs)
        return self(stats, **inputs, mask=tokens.mask, sequence=None if tokens.rows else tokens.sequence)


class DistributionLoss(_TensorLoss):
    """A loss of the whole distribution against a reference's: `loss(stats, divergence)`, `[...]`.

    It is affine in the divergence that `linear_divergence` gives per token: `loss(stats, 0) + divergence_weight *
    divergence`. Without `outputs` the loss is that divergence itself. A sweep sums each of the two parts.

    Settings under which a loss estimates the divergence from `inputs` instead (k3 in `ASFT`) leave `linear_divergence`
    empty: it is then `token_wise`, and is called as `loss(stats, **inputs)`.
    """

    @property
    def level(self) -> str:
        return "token" if self.token_wise else "distribution"

    @property
    def token_wise(self) -> bool:
        return not self.linear_divergence

    @property
    def compares_distributions(self) -> bool:
        return bool(self.linear_divergence)

    @property
    def linear_divergence(self) -> dict[str, Any]:
        """Keyword arguments of `logitless.linear_divergence`."""
        return {}

    @property
    def divergence_weight(self) -> float:
        """The constant factor of the divergence, so that each part can have a sweep of its own."""
        return 1.0

    def _values(
        self, stats: TokenStats, tokens: TokenLayout, inputs: Mapping[str, Tensor], divergence: Tensor | None
    ) -> Tensor:
        return self(stats, **inputs) if self.token_wise else self(stats, divergence)
