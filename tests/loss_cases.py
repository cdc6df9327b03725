"""Plausible inputs of any loss of the registry, shared by the tests that run over all of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from logitless import linear_loss, losses
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


B, T, H, V = 6, 5, 4, 11


class LossBatch(NamedTuple):
    """Rows of sequences, `[B, T]`, and what a loss wants to know about them."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    inputs: dict[str, Tensor]

    def rows(self, rows: Any) -> LossBatch:
        inputs = {name: x if x.dim() == 0 else x[rows] for name, x in self.inputs.items()}
        return LossBatch(self.hidden[rows], self.weight, self.targets[rows], inputs)

    def padded(self, width: int) -> LossBatch:
        """More positions that do not count, with nonsense behind them."""
        inputs = {name: pad(x, width, 7.0) if x.dim() >= 2 else x for name, x in self.inputs.items()}
        return LossBatch(pad(self.hidden, width, 3.0), self.weight, pad(self.targets, width, -100), inputs)


def pad(x: Tensor, width: int, value: float) -> Tensor:
    return torch.cat([x, x.new_full((len(x), width, *x.shape[2:]), value)], dim=1)


def batch_of(loss: Loss) -> LossBatch:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(B, T, H, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64)
    targets = torch.randint(V, (B, T), generator=generator)
    targets[torch.arange(T) >= torch.tensor([5, 3, 4, 1, 5, 2])[:, None]] = -100
    inputs = loss_inputs(loss, B, T, H, generator)
    return LossBatch(hidden, weight, targets, inputs)


def length(loss: Loss) -> dict[str, int]:
    return {"max_length": 8} if loss.reduction == "constant_length" else {}


def run_loss(loss: Loss | str, batch: LossBatch, **options: Any) -> Any:
    """Loss and the gradients of hidden states and head."""
    options = {**length(losses.get(loss)), **options}
    hidden, weight = (x.clone().requires_grad_() for x in (batch.hidden, batch.weight))
    out = linear_loss(loss, hidden, weight, batch.targets, **batch.inputs, **options)
    value = out if isinstance(out, Tensor) else out.loss
    return value.detach(), *torch.autograd.grad(value, (hidden, weight))
