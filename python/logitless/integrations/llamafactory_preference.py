"""LLaMA-Factory's preference stages, `dpo` and `kto`: what their trainers read of logits, from statistics of tokens.

Both trainers sum the log-probabilities of a row, and report the mean of its logits. Their losses stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from .hidden_loss import loss_of_hidden, stats_of_hidden

#: What a model reads of a batch for KTO: of each answer, and of the images that all answers share.
OWN_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "cross_attention_mask")
IMAGE_INPUTS = ("pixel_values", "image_sizes", "image_grid_thw", "aspect_ratio_ids", "aspect_ratio_mask")


def row_logprobs(logprob: Tensor, labels: Tensor, later: float | None = None) -> tuple[Tensor, Tensor]:
    """The summed log-probabilities of rows, `[B]`, and how many tokens count in each.

    Args:
        logprob: `[B, T]`; position t is about the token at t + 1.
        labels: `[B, T]`, not shifted.
        later: the factor of LD-DPO (`ld_alpha`) on tokens beyond the shorter answer of a pair; the first half of the
            rows are the chosen answers. None weights all tokens alike.
    """
    logprob, counts = logprob[:, :-1], labels[:, 1:] != -100
    lengths = counts.sum(-1)
    if later is not None:
        chosen, rejected = lengths.chunk(2)
        shared = counts.int().argmax(-1) + torch.minimum(chosen, rejected).repeat(2)
        beyond = torch.arange(logprob.shape[1], device=logprob.device) >= shared[:, None]
        logprob = torch.where(beyond, later * logprob, logprob)
    return (logprob * counts).sum(-1), lengths


def _scores(model: Any, inputs: dict[str, Any], labels: Tensor) -> tuple[Tensor, Tensor]:
    """The log-probability of each next token and the mean logit at each position, `[B, T]`."""
    hidden = model(**inputs, hidden_only=True, return_dict=True, use_cache=False).logits
    logprob = loss_of_hidden(model, hidden, labels, token_outputs=("logprob",))["token_stats"].logprob
    with torch.no_grad():
        any_id = torch.zeros(labels.shape, dtype=torch.long, device=hidden.device)
        mean_logit = stats_of_hidden(model, hidden, any_id, ("mean_logit",)).mean_logit
    assert mean_logit is not None
    return logprob, mean_logit


def pair_forward(own: Callable[..., Any]) -> Callable[..., Any]:
    """`concatenated_forward` of the trainer for pairs, whose logits are their means over the vocabulary."""

    @wraps(own)
    def concatenated_forward(self: Any, model: Any, batch: dict[str, Any], is_ref_model: bool = False) -> Any:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with self.accelerator.autocast():
            logprob, mean_logit = _scores(model, inputs, batch["labels"])
        sums, lengths = row_logprobs(logprob, batch["labels"], None if is_ref_model else self.ld_alpha)
        means = sums / lengths
        averaged = self.loss_type in ("ipo", "orpo", "simpo")
        (chosen, rejected), averages = (means if averaged else sums).chunk(2), means.chunk(2)
        chosen_logits, rejected_logits = mean_logit.chunk(2)
        return {
            "chosen_logps": chosen,
            "rejected_logps": rejected,
            "chosen_logits": chosen_logits,
            "rejected_logits": rejected_logits,
            "chosen_logps_avg": averages[0],
        }

    return concatenated_forward


def unpaired_forward(own: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` of the trainer for single answers; its logits are their sums over the vocabulary, which it adds up."""

    @wraps(own)
    def forward(self: Any, model: Any, batch: dict[str, Any], prefix: str = "") -> Any:
        inputs = {name: batch[prefix + name] for name in OWN_INPUTS if prefix + name in batch}
        inputs |= {name: batch[name] for name in IMAGE_INPUTS if name in batch}
        with self.accelerator.autocast():
            logprob, mean_logit = _scores(model, inputs, batch[f"{prefix}labels"])
        sums, lengths = row_logprobs(logprob, batch[f"{prefix}labels"])
        return mean_logit * self.model.config.vocab_size, sums, sums / lengths

    return forward
