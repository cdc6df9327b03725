"""Weighted sums of pair losses: any terms, and RPO and MPO, which are two such sums.

A sum is given summed log-probabilities and lengths, and divides for the terms that take averages.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..catalogue import get, register
from ..checks import check_number, constant
from ..whole_sequence import PairLoss, PreferenceResult
from .dpo import DPO, check_pair
from .reference_free import ChosenNLL


class _Sum(PairLoss):
    """A weighted sum of pair losses, which needs all that its terms need."""

    @property
    def parts(self) -> tuple[tuple[float, PairLoss], ...]:
        """The weights and the terms."""
        raise NotImplementedError

    @property
    def inputs(self) -> tuple[str, ...]:
        return _union(term.inputs for _, term in self.parts)

    @property
    def outputs(self) -> tuple[str, ...]:
        return _union(term.outputs for _, term in self.parts)

    @property
    def extras(self) -> tuple[str, ...]:
        return _union((*term.extras, *(("length",) if term.average_logprob else ())) for _, term in self.parts)

    @property
    def sequence_inputs(self) -> tuple[str, ...]:
        return _union(term.sequence_inputs for _, term in self.parts)

    @property
    def tail_weight(self) -> float:
        return self.parts[0][1].tail_weight

    @property
    def batch_wide(self) -> bool:
        return any(term.batch_wide for _, term in self.parts)

    def __call__(
        self,
        chosen: Tensor,
        rejected: Tensor,
        ref_chosen: Tensor | None = None,
        ref_rejected: Tensor | None = None,
        **extras: Tensor,
    ) -> PreferenceResult:
        """Per-pair loss, and the metrics of the first term; log-probabilities are sums over tokens, all `[B]`.

        Args:
            chosen, rejected: the model's.
            ref_chosen, ref_rejected: the reference's, constants, where a term has one.
            **extras: both sides of those that `extras` and `sequence_inputs` name: `chosen_length`,
                `rejected_length`, ....

        Raises:
            ValueError: a shape does not fit, or something is missing.
        """
        check_pair(self, chosen, rejected)
        pair = {"chosen": chosen, "rejected": rejected, "ref_chosen": ref_chosen, "ref_rejected": ref_rejected}
        results = [(weight, _of_term(self, term, pair, extras)) for weight, term in self.parts]
        loss = sum((weight * result.loss for weight, result in results), start=chosen.new_zeros(()))
        return results[0][1]._replace(loss=loss, chosen_logprob=chosen.detach(), rejected_logprob=rejected.detach())


def _of_term(
    whole: PairLoss, term: PairLoss, pair: dict[str, Tensor | None], extras: dict[str, Tensor]
) -> PreferenceResult:
    """The result of one term, from averages if the term takes these."""
    wanted = pair if term.inputs else {side: pair[side] for side in ("chosen", "rejected")}
    if term.average_logprob:
        wanted = {name: _average(whole, name, value, extras) for name, value in wanted.items()}
    named = [f"{side}_{extra}" for extra in (*term.extras, *term.sequence_inputs) for side in ("chosen", "rejected")]
    return term(**wanted, **{name: extras[name] for name in named if name in extras})


def _average(whole: PairLoss, name: str, value: Tensor | None, extras: dict[str, Tensor]) -> Tensor | None:
    if value is None:
        return None
    length = f"{name.removeprefix('ref_')}_length"
    return value / constant(whole, length, extras.get(length), value).clamp(min=1.0)


def _union(groups: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for group in groups for name in group))


@register
@dataclass(frozen=True)
class WeightedSum(_Sum):
    """`sum_k weights_k terms_k`: several pair losses at once, in one pass.

    Each term keeps its own meaning: one of averages is given averages, one with weights its weights, one without a
    reference none. The metrics are those of the first term.

    Detached: what the terms detach.

    When to use: a preference loss with the NLL of the chosen completion, or any other mixture that has no name here.

    Args:
        terms: pair losses: objects, names, or mappings of a name and hyper-parameters, as a YAML file has them:
            `["dpo", {"name": "dpo", "loss_type": "bco_pair"}, "chosen_nll"]`. DPO and the NLL of the chosen completion
            by default. All of them share one `tail_weight`.
        weights: positive, one per term; 1 each by default, as in TRL (`loss_weights`).

    Left open: nothing.

    Source: TRL's lists of `loss_type` and `loss_weights`.
    """

    terms: Sequence[PairLoss | str | Mapping[str, Any]] = (DPO(), ChosenNLL())
    weights: Sequence[float] | None = None
    name: ClassVar[str] = "weighted_sum"

    def __post_init__(self) -> None:
        terms = tuple(_term(value) for value in _listed("terms", self.terms))
        object.__setattr__(self, "terms", terms)
        weights = [1.0] * len(terms) if self.weights is None else _listed("weights", self.weights)
        object.__setattr__(self, "weights", _positive("WeightedSum", weights, len(terms)))
        tails = {term.tail_weight for term in terms}
        if len(tails) > 1:
            raise ValueError(f"WeightedSum: terms must share one tail_weight, got {sorted(tails)}")

    @property
    def parts(self) -> tuple[tuple[float, PairLoss], ...]:
        return tuple(zip(self.weights or (), self.terms, strict=True))  # type: ignore[arg-type]  # checked when made


def _term(value: Any) -> PairLoss:
    """A pair loss from an object, a name, or a mapping of a name and hyper-parameters."""
    if isinstance(value, Mapping):
        settings = dict(value)
        if not isinstance(settings.get("name"), str):
            raise ValueError(f"WeightedSum: a term given as a mapping needs the loss's name, got {value!r}")
        loss = get(settings.pop("name"), **settings)
    else:
        loss = get(value)
    if not isinstance(loss, PairLoss):
        raise ValueError(f"WeightedSum: terms must be pair losses, got {loss.name!r} of level {loss.level!r}")
    return loss


def _listed(field: str, value: Any) -> list[Any]:
    if isinstance(value, (str, Mapping)) or not isinstance(value, Iterable):
        raise TypeError(f"WeightedSum: {field} must be a list, got {type(value).__name__} {value!r}")
    return list(value)


def _positive(loss: str, weights: Iterable[Any], count: int) -> tuple[float, ...]:
    values = tuple(weights)
    numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in values)
    if not numbers or len(values) != count or count == 0 or not all(0 < x < float("inf") for x in values):
        raise ValueError(f"{loss}: weights must be {max(count, 1)} finite positive numbers, one per term, got {values}")
    return tuple(float(x) for x in values)


@register
@dataclass(frozen=True)
class RPO(_Sum):
    """DPO and the NLL of the chosen completion: `-logsigmoid(beta h) + nll_weight (-logprob(chosen) / |chosen|)`.

    `h = v_chosen - v_rejected`, v = logprob - ref_logprob. Extreme values as in `DPO` and `ChosenNLL`.

    Detached: the reference and the metrics, which are DPO's.

    When to use: DPO on reasoning, where it would otherwise make the chosen completions less likely.

    Args:
        beta: positive; 0.1 as in DPO.
        nll_weight: positive; 1.0, for which the paper's and TRL's weighting are the same. TRL's `rpo_alpha`.

    Left open: which term the weight is on: the paper puts it on DPO's (unverified source), TRL on the NLL. Other loss
    types beside the NLL: `WeightedSum`.

    Source: arXiv 2404.19733 (iterative reasoning preference optimisation), unverified source for the normalisation by
    the completion's length; TRL 0.23 took one mean over the micro-batch's tokens.
    """

    beta: float = 0.1
    nll_weight: float = 1.0
    name: ClassVar[str] = "rpo"

    def __post_init__(self) -> None:
        check_number(self, "beta", low=0.0, low_open=True)
        check_number(self, "nll_weight", low=0.0, low_open=True)

    @property
    def parts(self) -> tuple[tuple[float, PairLoss], ...]:
        return (1.0, DPO(beta=self.beta)), (self.nll_weight, ChosenNLL())


@register
@dataclass(frozen=True)
class MPO(_Sum):
    """Mixed preference optimisation: preference, quality and generation, the terms of DPO, BCO and NLL.

    `weights[0] sigmoid + weights[1] bco_pair + weights[2] (-logprob(chosen) / |chosen|)`, with DPO's loss types of
    those names. Extreme values as in `DPO` and `ChosenNLL`.

    Detached: the reference and the metrics, which are DPO's.

    When to use: multimodal reasoning, which it was made for; where relative preference alone degrades generation.

    Args:
        beta: positive; 0.1 as in DPO.
        weights: three positive numbers; (0.8, 0.2, 1.0) as in TRL's example of MPO.

    Left open: the authors' code (InternVL) has BCO's shift, a mean of the rewards so far, in the quality term; TRL's
    sum of losses, and this one, has none. With it: `BCOPair` in a `WeightedSum`.

    Source: arXiv 2411.10442; terms and weights as in its authors' code (InternVL's) and TRL's documentation.
    """

    beta: float = 0.1
    weights: Sequence[float] = (0.8, 0.2, 1.0)
    name: ClassVar[str] = "mpo"

    def __post_init__(self) -> None:
        check_number(self, "beta", low=0.0, low_open=True)
        object.__setattr__(self, "weights", _positive("MPO", _listed("weights", self.weights), 3))

    @property
    def parts(self) -> tuple[tuple[float, PairLoss], ...]:
        terms = DPO(beta=self.beta), DPO(beta=self.beta, loss_type="bco_pair"), ChosenNLL()
        return tuple(zip(self.weights, terms, strict=True))
