"""Plausible inputs of any loss of the registry, shared by the tests that run over all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from logitless.losses import Loss


def loss_inputs(
    loss: Loss, rows: int, width: int, hidden_size: int, generator: torch.Generator, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """All that `linear_loss` may be given for `rows` sequences of `width` tokens, the optional inputs too."""
    names = (*loss.inputs, *loss.optional_inputs)
    inputs = {name: _per_token(name, rows, width, generator, dtype) for name in names}
    inputs |= {name: _per_sequence(name, rows, dtype) for name in loss.sequence_inputs}
    if loss.compares_distributions:
        inputs["ref_hidden"] = torch.randn(rows, width, hidden_size, generator=generator, dtype=dtype)
    return inputs


def _per_token(name: str, rows: int, width: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    if name == "demonstration":
        return (torch.arange(rows) % 3 == 0)[:, None].expand(rows, width).clone()
    if name == "negative":
        return torch.rand(rows, width, generator=generator) < 0.4
    if name == "group":
        return (torch.arange(rows) // 2)[:, None].expand(rows, width).clone()
    if name.endswith("logprob"):
        return -2 * torch.rand(rows, width, generator=generator, dtype=dtype)
    if name in ("policy_weight", "quality", "token_power"):
        return torch.rand(rows, width, generator=generator, dtype=dtype)
    return torch.randn(rows, width, generator=generator, dtype=dtype)


def _per_sequence(name: str, rows: int, dtype: torch.dtype) -> Tensor:
    if name == "desirable":
        return torch.arange(rows) % 3 != 1
    return torch.tensor(0.1, dtype=dtype)  # a reference point, a shift of the reward: one for the batch
