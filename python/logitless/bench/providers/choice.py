"""The competitors of one loss: floors, materialised logits, logitless's strategies and the libraries asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from logitless import losses
from logitless.types import BackwardName

from ..environment import BF16_UNITS
from ..problem import Problem
from ..provider import Provider
from . import floors, materialised, own, peers

#: What `--against` may name, and what it stands for.
AGAINST = {
    "materialised": "the loss on full logits, in PyTorch; always measured",
    "compiled": "the same under torch.compile",
    "torch": "torch's F.linear_cross_entropy (torch 2.13)",
    "liger": "Liger Kernel",
    "trl": "TRL",
    "cce": "Cut Cross-Entropy",
    "quack": "quack",
    "flash-attn": "flash-attn's cross-entropy",
}
#: Those whose definitions take nothing from logitless.
_MATERIALISED = {"nll": materialised.NLL, "dpo": materialised.DPO}


def floors_of(loss: str, problem: Problem, *, gpu: bool) -> tuple[Provider, ...]:
    """The products that the loss needs, and a copy in memory."""
    if losses.get(loss).compares_distributions:
        products = floors.GEMMS_OF_BOTH_HEADS
    elif problem.dtype.itemsize < 4 and not gpu and not (problem.dtype == torch.bfloat16 and BF16_UNITS):
        products = floors.FLOAT32_GEMMS  # PyTorch multiplies half types tens of times slower there
    else:
        products = floors.GEMMS
    return products, floors.COPY


def materialised_of(loss: str) -> Provider:
    """The loss on full logits."""
    definition = materialised.DEFINITIONS[loss]
    return _MATERIALISED.get(loss) or Provider(f"materialised {loss}", "materialised", definition, loss)


def ours(loss: str, strategies: Sequence[BackwardName]) -> tuple[Provider, ...]:
    """The loss by logitless with each of the strategies."""
    return tuple(
        replace(own.of_registry(loss, strategy), name=f"logitless, {strategy.replace('_', '-')}")
        for strategy in strategies
    )


def others(loss: str, libraries: Sequence[str], *, gpu: bool) -> tuple[Provider, ...]:
    """What these libraries have of the loss; a library that has nothing is a provider that says so."""
    known = [*_compiled(loss), *peers.OF_REGISTRY.get(loss, ())]
    if loss == "nll":
        known += peers.ON_GPU if gpu else peers.ON_PROCESSOR
    result: list[Provider] = []
    for library in libraries:
        if library != "materialised":
            result += [p for p in known if p.library == library] or [_absent(library, loss)]
    return tuple(result)


def _compiled(loss: str) -> tuple[Provider, ...]:
    if loss == "nll":
        return (replace(materialised.COMPILED_NLL, compared=loss),)
    registered = materialised.LOSSES[loss]
    if not materialised.reads_logprobs_alone(registered):
        return ()
    function = partial(materialised.compiled_loss, registered)
    return (Provider(materialised.COMPILED_NLL.name, "materialised", function, loss, library="compiled"),)


def _absent(library: str, loss: str) -> Provider:
    """A provider that is never called."""
    reason = f"no {loss} of it is known for this device"
    return Provider(library, "peer", materialised.DEFINITIONS[loss], "", library=library, absent=reason)
