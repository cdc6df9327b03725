"""The output of a patched model. It imports Transformers, so nothing imports this file before a model is patched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..types import TokenStats


@dataclass
class LinearCausalLMOutput(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast` with the results of a loss that was computed without logits.

    Args:
        loss: a scalar. It includes the terms that the model itself adds (a router's loss, a z-loss).
        logits: None if the loss was computed without them, or the hidden states `[B, T, H]` with `hidden_only=True`.
        aux_loss, router_logits: as in `MoeCausalLMOutputWithPast`, if the router's logits were asked for.
        token_stats: `TokenStats` with the `[B, T]` tensors that `token_outputs` names. Position t is about predicting
            token t + 1. It is 0 if that token is ignored, and the last position always is.
        loss_result: the named tuple of a pair loss, such as DPO's rewards and margins.
    """

    aux_loss: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    token_stats: TokenStats | None = None
    loss_result: Any = None
