"""Floors, the materialised losses and logitless itself: functions from `Inputs` to an `Outcome`.

A provider does what a training step does: forward, `backward()`, gradients in `.grad`. A floor does the products alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import logitless
from logitless.backends import chunked
from logitless.types import BackwardName, Options

from .problems import Inputs

Role = Literal["floor", "materialised", "logitless", "peer"]
BETA = 0.1


class Outcome(NamedTuple):
    """What a step leaves behind. A floor has gradients of nothing in particular and no loss."""

    loss: Tensor | None
    d_hidden: Tensor | None
    d_weight: Tensor | None


@dataclass(frozen=True)
class Provider:
    """One way through a problem; `loss` names the definition that its gradients are compared with ("" for a floor)."""

    name: str
    role: Role
    loss: Literal["nll", "dpo", ""]
    step: Callable[[Inputs], Outcome]


def differentiate(loss: Callable[[Tensor, Tensor, Inputs], Tensor], inputs: Inputs) -> Outcome:
    """Forward and backward of `loss(hidden, weight, inputs)`, the weight a constant where the head is frozen."""
    hidden = inputs.hidden.detach().requires_grad_()
    weight = inputs.weight.detach().requires_grad_(not inputs.problem.frozen_head)
    value = loss(hidden, weight, inputs)
    value.backward()
    return Outcome(value.detach(), hidden.grad, weight.grad)


# ---------------------------------------------------------------------------------------------------------------------
# Definitions


def materialised_nll(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    """What everybody writes."""
    return F.cross_entropy(hidden @ weight.T, inputs.targets)


def materialised_dpo(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    """DPO on logits; `cross_entropy` is the leanest of PyTorch's ways to a target's log-probability."""
    logits = hidden @ weight.T
    return dpo_of_logprob(-F.cross_entropy(logits, inputs.targets, reduction="none"), inputs)


def dpo_of_logprob(logprob: Tensor, inputs: Inputs) -> Tensor:
    """arXiv 2305.18290, equation 7, from per-token log-probabilities `[N]`; the mean over pairs."""
    ratio = (logprob.to(torch.promote_types(logprob.dtype, torch.float32)) - inputs.ref_logprob).view(
        2, inputs.problem.pairs, inputs.problem.length
    )
    chosen, rejected = ratio.sum(-1)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


DEFINITIONS = {"nll": materialised_nll, "dpo": materialised_dpo}

# ---------------------------------------------------------------------------------------------------------------------
# Floors


def gemms(inputs: Inputs) -> Outcome:
    """The logits, and the products with them that the gradients need: nothing else, each product in one piece."""
    z = inputs.hidden @ inputs.weight.T
    d_hidden = z @ inputs.weight
    return Outcome(None, d_hidden, None if inputs.problem.frozen_head else z.T @ inputs.hidden)


def float32_gemms(inputs: Inputs) -> Outcome:
    """The floor for half types on a CPU that has no units for them."""
    return gemms(inputs.to(torch.float32))


def chunked_gemms(inputs: Inputs) -> Outcome:
    """The same products as the chunked backend arranges them: what its row operations are paid on top of."""
    hidden, weight, problem = inputs.hidden, inputs.weight, inputs.problem
    tokens = chunked.tokens_at_once(hidden, weight, Options(chunk_bytes=problem.chunk_bytes))
    d_hidden = torch.empty_like(hidden)
    d_weight = None if problem.frozen_head else torch.zeros_like(weight)
    buffer = hidden.new_empty(weight.shape[0] * tokens)
    for rows, out in zip(hidden.split(tokens), d_hidden.split(tokens), strict=True):
        z = buffer[: weight.shape[0] * len(rows)].view(-1, len(rows))
        z = torch.mm(weight, rows.T, out=z).T
        torch.mm(z, weight, out=out)
        if d_weight is not None:
            d_weight.addmm_(z.T, rows)
    return Outcome(None, d_hidden, d_weight)


# ---------------------------------------------------------------------------------------------------------------------
# logitless


def logitless_nll(hidden: Tensor, weight: Tensor, inputs: Inputs, backward: BackwardName = "auto") -> Tensor:
    return logitless.linear_cross_entropy(
        hidden, weight, inputs.targets, backward=backward, chunk_bytes=inputs.problem.chunk_bytes
    )


def logitless_dpo(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    shape = (2 * inputs.problem.pairs, inputs.problem.length)
    return logitless.linear_dpo(
        hidden.view(*shape, -1),
        weight,
        inputs.targets.view(shape),
        ref_logprob=inputs.ref_logprob.view(shape),
        beta=BETA,
        chunk_bytes=inputs.problem.chunk_bytes,
    ).loss


MATERIALISED_NLL = Provider("materialised", "materialised", "nll", partial(differentiate, materialised_nll))
MATERIALISED_DPO = Provider("materialised DPO", "materialised", "dpo", partial(differentiate, materialised_dpo))
GEMMS = Provider("GEMMs alone", "floor", "", gemms)
FLOAT32_GEMMS = Provider("GEMMs alone, in float32", "floor", "", float32_gemms)
CHUNKED_GEMMS = Provider("GEMMs alone, in chunks", "floor", "", chunked_gemms)
NLL = Provider("logitless", "logitless", "nll", partial(differentiate, logitless_nll))
NLL_RECOMPUTE = Provider(
    "logitless, recompute", "logitless", "nll", partial(differentiate, partial(logitless_nll, backward="recompute"))
)
DPO = Provider("logitless DPO", "logitless", "dpo", partial(differentiate, logitless_dpo))
