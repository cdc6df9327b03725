"""OpenRLHF's actors without logits: `enable()` before a trainer is made.

SFT, DPO and PPO score through one method, `Actor.forward`. Where it is asked for log-probabilities, with or without the
entropy, its model returns hidden states, and the two functions that read logits compute from these. OpenRLHF's losses
stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ..types import TokenStats
from .hidden_loss import drop_logits, inner_model, is_patched, stats_of_hidden
from .hosts import Change, Switch, UnsupportedHostError
from .transformers import patch

#: Releases of OpenRLHF that the tests ran.
TESTED = ">=0.11.2,<0.12"
_ACTOR = Switch("openrlhf", TESTED)


@dataclass
class _Scoring:
    """One call of an actor: its model, its temperature, and what has been computed of its hidden states."""

    model: Any
    temperature: float
    targets: Tensor | None  # None for packed rows, whose targets come with the question for log-probabilities
    stats: TokenStats | None = None

    def compute(self, hidden: Tensor, targets: Tensor, *outputs: str) -> TokenStats:
        """The statistics, at the actor's temperature."""
        return stats_of_hidden(self.model, hidden, targets, outputs, self.temperature)


_CURRENT: ContextVar[_Scoring | None] = ContextVar("logitless_openrlhf", default=None)


def enable() -> Switch:
    """Makes OpenRLHF's actors score without logits; their models are patched at the first call.

    A call that asks for logits themselves gets them. `disable()` or the end of a `with` block takes it back; models
    stay patched. With packed rows the entropy takes a product with the vocabulary of its own.

    Raises:
        UnsupportedHostError: another release than `TESTED`, or enabled already. Later, at a call: a model of images.
    """
    return _ACTOR.on(_actor_changes)


def disable() -> None:
    """Puts OpenRLHF's own functions back."""
    _ACTOR.off()


def _actor_changes() -> list[Change]:
    from openrlhf.models import actor

    asked = (
        *("self", "sequences", "action_mask", "attention_mask", "return_output", "allgather_logits"),
        *("return_logprobs", "ring_attn_group", "packed_seq_lens", "return_entropy", "mm_inputs"),
    )
    return [
        Change(actor.Actor, "forward", asked, _without_logits),
        Change(actor, "log_probs_from_logits", ("logits", "labels", "temperature"), _log_probs),
        Change(actor, "compute_entropy", ("logits",), _entropies),
    ]


def _without_logits(own: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(own)
    def forward(self: Any, sequences: Tensor, action_mask: Tensor | None = None, *args: Any, **asked: Any) -> Any:
        named = {**dict(zip(("attention_mask", "return_output", "allgather_logits"), args, strict=False)), **asked}
        if len(args) > 3:
            raise UnsupportedHostError("Actor.forward: pass what follows allgather_logits by name")
        if action_mask is None and not named.get("return_logprobs"):
            return own(self, sequences, action_mask, **named)  # the caller asks for logits
        if getattr(self, "is_vlm", False):
            raise UnsupportedHostError("is_vlm: models of images are not served")
        if not is_patched(self.model):
            patch(inner_model(self.model))
        targets = None if self.packing_samples else torch.roll(sequences, shifts=-1, dims=1)
        token = _CURRENT.set(_Scoring(self.model, self.temperature, targets))
        temperature, self.temperature = self.temperature, 1.0  # OpenRLHF would divide the hidden states by it
        try:
            result = own(self, sequences, action_mask, **named, hidden_only=True)
        finally:
            self.temperature = temperature
            _CURRENT.reset(token)
        if isinstance(result, tuple):
            drop_logits(result[1])
        return result

    return forward


def _log_probs(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(own)
    def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
        scoring = _CURRENT.get()
        if scoring is None:
            return own(logits, labels, temperature)
        found = (scoring.stats or scoring.compute(logits, labels, "logprob")).logprob
        assert found is not None
        return found

    return log_probs_from_logits


def _entropies(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(own)
    def compute_entropy(logits: Tensor) -> Tensor:
        scoring = _CURRENT.get()
        if scoring is None:
            return own(logits)
        if scoring.targets is None:
            any_id = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
            found = scoring.compute(logits, any_id, "entropy").entropy
        else:
            scoring.stats = scoring.compute(logits, scoring.targets, "logprob", "entropy")
            found = scoring.stats.entropy
        assert found is not None
        return found

    return compute_entropy
