"""Floors: the products that a loss needs and nothing else, no softmax, no loss.

Each is a loss whose forward and backward do the products, so that autograd runs it like every other provider.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..internals import tokens_at_once
from ..problem import Inputs
from ..provider import Provider
from .materialised import ref_hidden

#: Bytes of the copy: many times the last cache.
COPIED = 2**28


class _Products(torch.autograd.Function):
    """One product forwards, one for each gradient backwards, each in one piece."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        z = hidden @ weight.T
        ctx.save_for_backward(hidden, weight, z)
        return z.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, Tensor | None]:
        hidden, weight, z = ctx.saved_tensors
        return z @ weight, z.T @ hidden if ctx.needs_input_grad[1] else None


class _ChunkedProducts(torch.autograd.Function):
    """Three products in a single pass, arranged as the chunked backend does it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, tokens: int) -> Tensor:
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        buffer = hidden.new_empty(weight.shape[0] * tokens)
        for rows, out in zip(hidden.split(tokens), d_hidden.split(tokens), strict=True):
            z = buffer[: weight.shape[0] * len(rows)].view(-1, len(rows))
            z = torch.mm(weight, rows.T, out=z).T
            torch.mm(z, weight, out=out)
            if d_weight is not None:
                d_weight.addmm_(z.T, rows)
        ctx.gradients = d_hidden, d_weight
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, Tensor | None, None]:
        return *ctx.gradients, None


class _Copy(torch.autograd.Function):
    """A copy of `COPIED` bytes forwards, nothing backwards."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        source, destination = _buffers(hidden.device)
        destination.copy_(source)
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        return None


@cache
def _buffers(device: torch.device) -> tuple[Tensor, Tensor]:
    source, destination = torch.zeros(2, COPIED, dtype=torch.uint8, device=device)
    return source, destination


def copy(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    """A copy in memory: the bandwidth that passes over logits are paid with."""
    return _Copy.apply(hidden)


def products(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    """The logits, and the products with them that the gradients need."""
    return _Products.apply(hidden, weight)


def chunked_products(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    """The products of the chunked backend: what its row operations are paid on top of."""
    return _ChunkedProducts.apply(hidden, weight, tokens_at_once(inputs))


def products_of_both_heads(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    """The products, and the logits of a reference: what a divergence from it needs."""
    ref_hidden(inputs) @ inputs.weight.T
    return products(hidden, weight, inputs)


GEMMS = Provider("GEMMs alone", "floor", products, "")
FROZEN_GEMMS = Provider("GEMMs alone, frozen head", "floor", products, "", frozen=True)
CHUNKED_GEMMS = Provider("GEMMs alone, in chunks", "floor", chunked_products, "")
GEMMS_OF_BOTH_HEADS = Provider("GEMMs alone, of both heads", "floor", products_of_both_heads, "")
#: The floor for half types on a processor that has no units for them.
FLOAT32_GEMMS = Provider("GEMMs alone, in float32", "floor", products, "", dtype=torch.float32)
COPY = Provider("copy", "floor", copy, "", bytes=2 * COPIED)
