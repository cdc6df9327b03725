"""logitless itself: NLL, DPO and every registered loss, by backend and strategy."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

import logitless
from logitless import TokenStats
from logitless.losses import Loss as RegisteredLoss
from logitless.types import APPROXIMATE, BackendName, BackwardName

from ..problem import Inputs
from ..provider import Provider
from .materialised import BETA, LOSSES, constants, reduced, ref_hidden, targets_of


def nll(
    hidden: Tensor,
    weight: Tensor,
    inputs: Inputs,
    backward: BackwardName = "auto",
    backend: BackendName = "auto",
    chunk_dtype: torch.dtype | None = None,
) -> Tensor:
    return logitless.linear_cross_entropy(
        hidden,
        weight,
        inputs.targets,
        backward=backward,
        backend=backend,
        chunk_bytes=inputs.problem.chunk_bytes,
        chunk_dtype=chunk_dtype,
    )


def dpo(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    shape = (2 * inputs.problem.pairs, inputs.problem.length)
    return logitless.linear_dpo(
        hidden.view(*shape, -1),
        weight,
        inputs.targets.view(shape),
        ref_logprob=inputs.ref_logprob.view(shape),
        beta=BETA,
        chunk_bytes=inputs.problem.chunk_bytes,
    ).loss


def registered_loss(
    loss: RegisteredLoss, hidden: Tensor, weight: Tensor, inputs: Inputs, backward: BackwardName = "auto"
) -> Tensor:
    """Any loss by `linear_loss`, as its paper reduces it."""
    shape = inputs.problem.shape
    given: dict[str, Any] = dict(constants(loss, inputs))
    if loss.compares_distributions:
        given["ref_hidden"] = ref_hidden(inputs).view(*shape, -1)
    if loss.reduction == "constant_length":
        given["max_length"] = inputs.problem.length
    return reduced(
        logitless.linear_loss(
            loss,
            hidden.view(*shape, -1),
            weight,
            targets_of(loss, inputs),
            backward=backward,
            chunk_bytes=inputs.problem.chunk_bytes,
            **given,
        )
    )


def logprobs(
    hidden: Tensor, weight: Tensor, inputs: Inputs, backward: BackwardName = "recompute", **options: Any
) -> Tensor:
    """The statistics alone: what a loss that looks along sequences is paid on top of."""
    budget = inputs.problem.chunk_bytes
    stats = logitless.linear_logprobs(hidden, weight, inputs.targets, backward=backward, chunk_bytes=budget, **options)
    return negative_logprob(stats).mean()


def token_loss_nll(hidden: Tensor, weight: Tensor, inputs: Inputs, **options: Any) -> Tensor:
    """NLL as a user writes a loss of per-token statistics."""
    return logitless.linear_token_loss(hidden, weight, inputs.targets, negative_logprob, **options)


def negative_logprob(stats: TokenStats) -> Tensor:
    assert stats.logprob is not None
    return -stats.logprob


def of_registry(name: str, backward: BackwardName = "auto") -> Provider:
    """The loss of that name in `LOSSES`."""
    loss = partial(registered_loss, LOSSES[name], backward=backward)
    return Provider(name, "logitless", loss, name, approximate=backward in APPROXIMATE)


def of_levels(*levels: str, backward: BackwardName = "auto") -> tuple[Provider, ...]:
    """The losses of these levels."""
    return tuple(of_registry(name, backward) for name, loss in LOSSES.items() if loss.level in levels)


def _strategies() -> Iterator[Provider]:
    for backend in get_args(BackendName):
        if backend in ("auto", "reference"):
            continue
        for backward in get_args(BackwardName)[1:]:
            if backward != "screened":  # a CPU's
                loss = partial(nll, backend=backend, backward=backward)
                yield Provider(f"{backend}, {backward}", "logitless", loss, approximate=backward in APPROXIMATE)
        frozen = partial(nll, backend=backend, backward="single_pass")
        yield Provider(f"{backend}, frozen head", "logitless", frozen, frozen=True)


NLL = Provider("logitless", "logitless", nll)
NLL_RECOMPUTE = Provider("logitless, recompute", "logitless", partial(nll, backward="recompute"))
DPO = Provider("logitless DPO", "logitless", dpo, "dpo")
LOGPROBS = Provider("log-probs alone", "logitless", logprobs)
#: NLL by every backend and strategy that `logitless.types` names, and with a frozen head in a single pass.
STRATEGIES = tuple(_strategies())
