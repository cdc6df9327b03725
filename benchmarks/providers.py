"""Floors, the materialised losses and logitless itself: functions from `Inputs` to an `Outcome`.

A provider does what a training step does: forward, `backward()`, gradients in `.grad`. A floor does the products alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import logitless
from logitless import losses
from logitless.backends import chunked
from logitless.types import BackendName, BackwardName, Options

from .definitions import (
    BETA,
    LOSSES,
    constants,
    materialised_dpo,
    materialised_loss,
    materialised_nll,
    reduced,
    ref_hidden,
)
from .problems import Inputs

Role = Literal["floor", "materialised", "logitless", "peer"]
Loss = Callable[[Tensor, Tensor, Inputs], Tensor]  # of hidden, weight and the rest


class Outcome(NamedTuple):
    """What a step leaves behind. A floor has gradients of nothing in particular and no loss."""

    loss: Tensor | None
    d_hidden: Tensor | None
    d_weight: Tensor | None


@dataclass(frozen=True)
class Provider:
    """One way through a problem; `loss` names what its gradients are compared with, of `DEFINITIONS` ("": nothing)."""

    name: str
    role: Role
    loss: str
    step: Callable[[Inputs], Outcome]


def differentiate(loss: Loss, inputs: Inputs, between: Callable[[], object] = lambda: None) -> Outcome:
    """Forward, `between()` and backward of `loss(hidden, weight, inputs)`; a frozen head's weight is a constant."""
    hidden = inputs.hidden.detach().requires_grad_()
    weight = inputs.weight.detach().requires_grad_(not inputs.problem.frozen_head)
    value = loss(hidden, weight, inputs)
    between()
    value.backward()
    return Outcome(value.detach(), hidden.grad, weight.grad)


# ---------------------------------------------------------------------------------------------------------------------
# Floors


def gemms(inputs: Inputs) -> Outcome:
    """The logits, and the products with them that the gradients need: nothing else, each product in one piece."""
    z = inputs.hidden @ inputs.weight.T
    d_hidden = z @ inputs.weight
    return Outcome(None, d_hidden, None if inputs.problem.frozen_head else z.T @ inputs.hidden)


def gemms_of_both_heads(inputs: Inputs) -> Outcome:
    """The same, and the logits of a reference: what a divergence from it needs."""
    outcome = gemms(inputs)
    ref_hidden(inputs) @ inputs.weight.T
    return outcome


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


def logitless_nll(
    hidden: Tensor, weight: Tensor, inputs: Inputs, backward: BackwardName = "auto", backend: BackendName = "auto"
) -> Tensor:
    chunk_bytes = inputs.problem.chunk_bytes
    return logitless.linear_cross_entropy(
        hidden, weight, inputs.targets, backward=backward, backend=backend, chunk_bytes=chunk_bytes
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


def logitless_loss(
    loss: losses.Loss, hidden: Tensor, weight: Tensor, inputs: Inputs, backward: BackwardName = "auto"
) -> Tensor:
    """Any loss by `linear_loss`, as its paper reduces it."""
    shape = inputs.problem.shape
    given: dict[str, Any] = dict(constants(loss, inputs.problem))
    if loss.compares_distributions:
        given["ref_hidden"] = ref_hidden(inputs).view(*shape, -1)
    if loss.reduction == "constant_length":
        given["max_length"] = inputs.problem.length
    return reduced(
        logitless.linear_loss(
            loss,
            hidden.view(*shape, -1),
            weight,
            inputs.targets.view(shape),
            backward=backward,
            chunk_bytes=inputs.problem.chunk_bytes,
            **given,
        )
    )


def logitless_logprobs(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    """The statistics alone, recomputed in the backward: what a loss that looks along sequences is paid on top of."""
    logprob = logitless.linear_logprobs(
        hidden, weight, inputs.targets, backward="recompute", chunk_bytes=inputs.problem.chunk_bytes
    ).logprob
    assert logprob is not None
    return -logprob.mean()


def of_registry(name: str, backward: BackwardName = "auto") -> Provider:
    """The loss of that name in `LOSSES`."""
    step = partial(differentiate, partial(logitless_loss, LOSSES[name], backward=backward))
    return Provider(name, "logitless", name, step)


MATERIALISED_NLL = Provider("materialised", "materialised", "nll", partial(differentiate, materialised_nll))
MATERIALISED_DPO = Provider("materialised DPO", "materialised", "dpo", partial(differentiate, materialised_dpo))
GEMMS = Provider("GEMMs alone", "floor", "", gemms)
FLOAT32_GEMMS = Provider("GEMMs alone, in float32", "floor", "", float32_gemms)
GEMMS_OF_BOTH_HEADS = Provider("GEMMs alone, of both heads", "floor", "", gemms_of_both_heads)
CHUNKED_GEMMS = Provider("GEMMs alone, in chunks", "floor", "", chunked_gemms)
NLL = Provider("logitless", "logitless", "nll", partial(differentiate, logitless_nll))
NLL_RECOMPUTE = Provider(
    "logitless, recompute", "logitless", "nll", partial(differentiate, partial(logitless_nll, backward="recompute"))
)
DPO = Provider("logitless DPO", "logitless", "dpo", partial(differentiate, logitless_dpo))
LOGPROBS = Provider("log-probs alone", "logitless", "nll", partial(differentiate, logitless_logprobs))
MATERIALISED_JS = Provider(
    "materialised js", "materialised", "js", partial(differentiate, partial(materialised_loss, LOSSES["js"]))
)
