"""Losses on materialised logits: what every other provider is compared with, and the losses' constants."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import logitless
from logitless import Head, TokenStats, losses
from logitless.losses import Distillation
from logitless.losses import Loss as RegisteredLoss
from logitless.testing import TokenProblem, materialised
from logitless.types import LogitTransform

from ..internals import evaluate_rows
from ..problem import LISTED, Inputs, Problem
from ..provider import Loss, Provider

BETA = 0.1

#: Every registered loss with its defaults, and two more distillations.
LOSSES: dict[str, RegisteredLoss] = {name: losses.get(name) for name in losses.names()} | {
    "js": Distillation("js"),
    "distillation and nll": Distillation(nll_weight=1.0),
}


def materialised_nll(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    """Cross-entropy of full logits: what everybody writes."""
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


def materialised_loss(loss: RegisteredLoss, hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    """A loss of the registry from the statistics of full logits."""
    problem = TokenProblem(hidden, weight, None, targets_of(loss, inputs).view(len(hidden), -1).squeeze(-1))
    stats = materialised(problem, LogitTransform(temperature=loss.stats_temperature), outputs=loss.outputs)
    divergence = None
    if isinstance(loss, losses.DistributionLoss) and loss.compares_distributions:
        heads = Head(weight), Head(weight.detach())
        divergence = logitless.linear_divergence(
            hidden, heads[0], ref_hidden(inputs), heads[1], backend="reference", **loss.linear_divergence
        )
    return of_stats(loss, stats, inputs, divergence)


def of_stats(loss: RegisteredLoss, stats: TokenStats, inputs: Inputs, divergence: Tensor | None = None) -> Tensor:
    """A loss of the registry from the tokens' statistics `[N]`, as its paper reduces it."""
    shape = inputs.problem.shape
    rows = TokenStats(*(None if x is None else x.view(*shape, *x.shape[1:]) for x in stats))
    length = inputs.problem.length if loss.reduction == "constant_length" else None
    divergence = None if divergence is None else divergence.view(shape)
    return reduced(evaluate_rows(loss, rows, constants(loss, inputs), length, divergence))


def targets_of(loss: RegisteredLoss, inputs: Inputs) -> Tensor:
    """`[sequences, length]` targets, or `[sequences, length, LISTED]` ids for a loss of lists."""
    return (
        inputs.lists().view(*inputs.problem.shape, LISTED) if loss.lists else inputs.targets.view(inputs.problem.shape)
    )


def reduced(out: Any) -> Tensor:
    """The loss itself, where `linear_loss` returns metrics beside it."""
    return out if isinstance(out, Tensor) else out.loss


def ref_hidden(inputs: Inputs) -> Tensor:
    """Hidden states `[N, H]` of a reference that shares the head: those of other tokens."""
    return inputs.hidden.detach().flip(0)


def constants(loss: RegisteredLoss, inputs: Inputs) -> dict[str, Tensor]:
    """Plausible constants for a loss's inputs, `[sequences, length]` each; the same ones for every dtype and device."""
    return _drawn(loss, inputs.problem, inputs.hidden.device)


def forget_constants() -> None:
    """Frees the constants of all problems so far, which are kept so that no timed step waits for a copy to a GPU."""
    _drawn.cache_clear()


@cache
def _drawn(loss: RegisteredLoss, problem: Problem, device: torch.device) -> dict[str, Tensor]:
    """The constants, drawn on the processor and copied to the device.

    An optional input is left out, but for an older policy's log-probabilities, which clipping needs to do anything.
    """
    draw = torch.Generator().manual_seed(0)
    names = (*loss.inputs, *(x for x in loss.optional_inputs if x == "old_logprob"))
    result = {name: _per_token(name, problem, draw) for name in names}
    result |= {name: _per_sequence(name, problem) for name in loss.sequence_inputs}
    return {name: x.to(device) for name, x in result.items()}


def _per_token(name: str, problem: Problem, draw: torch.Generator) -> Tensor:
    shape, uniform = problem.shape, -math.log(problem.vocabulary)
    rows = torch.arange(shape[0])[:, None].expand(shape)
    if name == "ref_logprob":
        return torch.full(shape, uniform)
    if name == "group":
        return rows // 2
    if name == "demonstration":
        return rows % 4 == 0
    noise = torch.randn(shape, generator=draw)
    if name == "advantages":
        return noise[:, :1].expand(shape)
    if name == "negative":
        return noise < -0.5
    if name == "teacher_logprob":
        return torch.randn((*shape, LISTED), generator=draw).log_softmax(-1) - 0.1
    if name.endswith("logprob"):
        return uniform - 2 + noise / 2  # of logits with a standard deviation of 2 nats
    return noise


def _per_sequence(name: str, problem: Problem) -> Tensor:
    """Constants of a loss of whole sequences: marks of every other one; else one number for all."""
    marks = name in ("desirable", "from_reference")
    return torch.arange(problem.shape[0]) % 2 == 0 if marks else torch.tensor(0.1)


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(
        lambda hidden, weight, targets, reduction: F.cross_entropy(hidden @ weight.T, targets, reduction=reduction),
        dynamic=False,
    )


def compiled_nll(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    """Cross-entropy of full logits under `torch.compile`."""
    return _compiled()(hidden, weight, inputs.targets, "mean")


def compiled_loss(loss: RegisteredLoss, hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    """A loss of log-probabilities, with those of full logits under `torch.compile`."""
    return of_stats(loss, TokenStats(-_compiled()(hidden, weight, inputs.targets, "none")), inputs)


def reads_logprobs_alone(loss: RegisteredLoss) -> bool:
    """Whether a token's log-probability, untempered, is all that the loss reads of the logits."""
    plain = loss.outputs == ("logprob",) and not loss.lists and loss.stats_temperature == 1
    return plain and not loss.compares_distributions


#: What each loss is compared with, by name. NLL's and DPO's take nothing from logitless.
DEFINITIONS: dict[str, Loss] = {name: partial(materialised_loss, loss) for name, loss in LOSSES.items()} | {
    "nll": materialised_nll,
    "dpo": materialised_dpo,
}

NLL = Provider("materialised", "materialised", materialised_nll)
COMPILED_NLL = Provider("materialised, compiled", "materialised", compiled_nll, compared="", library="compiled")
DPO = Provider("materialised DPO", "materialised", materialised_dpo, "dpo")
JS = Provider("materialised js", "materialised", DEFINITIONS["js"], "js")
TOP_K = Provider("materialised top-k", "materialised", DEFINITIONS["top_k_distillation"], "top_k_distillation")
