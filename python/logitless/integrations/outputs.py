"""What a patched model returns. Imports Transformers, so nothing imports this before a model is patched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..types import TokenStats


@dataclass
class LinearCausalLMOutput(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast`, and what a loss without logits can give besides.

    Args:
        loss: scalar, with everything the model itself adds to it (a router's or a z-loss).
        logits: None where the loss was computed without them; the hidden states `[B, T, H]` with `hidden_only=True`.
        aux_loss, router_logits: as in `MoeCausalLMOutputWithPast`, where the router's logits were asked for.
        token_stats: `TokenStats` of `[B, T]` tensors, those named in `token_outputs`; position t is about predicting
            token t + 1, and 0 where that is ignored (the last position among them).
        loss_result: the named tuple of a pair loss, such as DPO's rewards and margins.
    """

    aux_loss: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    token_stats: TokenStats | None = None
    loss_result: Any = None
