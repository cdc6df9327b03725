"""Functions and modules named after single losses: `linear_loss` of one loss, whose hyper-parameters go in by name.

    linear_dft(hidden, weight, targets, power=0.5)    is    linear_loss(DFT(power=0.5), hidden, weight, targets)

An alias takes the fields of its loss and the arguments of `linear_loss`, all with their own defaults.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from .linear import linear_loss
from .losses import Loss, PreferenceResult
from .losses.preference.dpo import DPO
from .losses.sft.f_divergence import FDivergenceSFT
from .losses.sft.token_weights import DFT
from .module import BoundLoss

#: The hyper-parameters of the losses; `torch.compile` cannot trace `dataclasses.fields`.
_FIELDS: dict[type[Loss], tuple[str, ...]] = {
    loss: tuple(field.name for field in dataclasses.fields(loss)) for loss in (DFT, FDivergenceSFT, DPO)
}


_SomeLoss = TypeVar("_SomeLoss", bound=Loss)


def _split(loss: type[_SomeLoss], arguments: Mapping[str, Any]) -> tuple[_SomeLoss, dict[str, Any]]:
    """The loss, from its hyper-parameters among the arguments, and the other arguments."""
    own = {name: x for name, x in arguments.items() if name in _FIELDS[loss]}
    return loss(**own), {name: x for name, x in arguments.items() if name not in own}


def linear_dft(hidden: Tensor, weight: Tensor, targets: Tensor, **arguments: Any) -> Tensor:
    """Dynamic fine-tuning, `-sg(p^power) log p` per token: `linear_loss(losses.DFT(...), ...)`.

    Source: arXiv 2508.05629, equation 9. See `losses.DFT` for the hyper-parameters and `linear_loss` for the rest.
    """
    loss, rest = _split(DFT, arguments)
    return linear_loss(loss, hidden, weight, targets, **rest)


def linear_f_divergence_sft(
    hidden: Tensor, weight: Tensor, targets: Tensor, ref_logprob: Tensor | None = None, **arguments: Any
) -> Tensor:
    """f-divergence SFT, `-phi(beta (logprob - ref_logprob)) / beta` per token: `linear_loss(FDivergenceSFT(...), ...)`.

    Source: arXiv 2507.00018, derived as `losses.FDivergenceSFT` says, which has the hyper-parameters. The reference is
    `ref_logprob` (and `ref_lse` where `value` needs it), or `ref_hidden`, as in `linear_loss`.
    """
    loss, rest = _split(FDivergenceSFT, arguments)
    return linear_loss(loss, hidden, weight, targets, ref_logprob=ref_logprob, **rest)


def linear_dpo(hidden: Tensor, weight: Tensor, targets: Tensor, **arguments: Any) -> PreferenceResult:
    """Direct preference optimisation of B pairs: `linear_loss(losses.DPO(...), ...)`.

    `hidden` is `[2B, T, H]`, the first half chosen, the second rejected, or flat `[N, H]` with `cu_seqlens`; `targets`
    ignore the prompt and the padding. The reference is `ref_logprob`, or `ref_hidden` (and `ref_head`). The result has
    `loss` reduced, and `[B]` detached rewards, margin, accuracy and log-probs.

    Source: arXiv 2305.18290, equation 7. See `losses.DPO` for the hyper-parameters and `linear_loss` for the rest.
    """
    loss, rest = _split(DPO, arguments)
    return linear_loss(loss, hidden, weight, targets, **rest)


def _signature(function: Callable[..., Any], loss: type[Loss]) -> inspect.Signature:
    """The tensors of an alias, the hyper-parameters of its loss, and the keyword arguments of `linear_loss`."""
    tensors = [x for x in inspect.signature(function).parameters.values() if x.kind is x.POSITIONAL_OR_KEYWORD]
    rest = [x for x in inspect.signature(linear_loss).parameters.values() if x.kind is not x.POSITIONAL_OR_KEYWORD]
    own = [x.replace(kind=x.KEYWORD_ONLY) for x in inspect.signature(loss).parameters.values()]
    return inspect.Signature([*tensors, *own, *rest])


linear_dft.__signature__ = _signature(linear_dft, DFT)  # type: ignore[attr-defined]
linear_f_divergence_sft.__signature__ = _signature(linear_f_divergence_sft, FDivergenceSFT)  # type: ignore[attr-defined]
linear_dpo.__signature__ = _signature(linear_dpo, DPO)  # type: ignore[attr-defined]


class _Alias(BoundLoss):
    """An alias as a module: hyper-parameters, options and `reduction` are given once, tensors at every call."""

    function: ClassVar[Callable[..., Any]]
    loss: ClassVar[type[Loss]]

    def __init__(self, **arguments: Any) -> None:
        loss, options = _split(self.loss, arguments)
        bound = {name: getattr(loss, name) for name in _FIELDS[self.loss]}
        reduction = options.pop("reduction", loss.reduction)
        super().__init__(options, **bound, reduction=reduction)  # type: ignore[arg-type]

    def forward(self, *tensors: Tensor, **call: Any) -> Any:
        """The function's result; `hidden [..., H]`, `weight [V, H]`, `targets [...]`, and what changes by name."""
        return type(self).function(*tensors, **{**self.bound, **call})


class LinearDFTLoss(_Alias):
    """`logitless.linear_dft` as a module: `LinearDFTLoss(power=0.5)(hidden, weight, targets)`."""

    function, loss = staticmethod(linear_dft), DFT


class LinearFDivergenceLoss(_Alias):
    """`logitless.linear_f_divergence_sft` as a module: `loss(hidden, weight, targets, ref_logprob)`."""

    function, loss = staticmethod(linear_f_divergence_sft), FDivergenceSFT


class LinearDPOLoss(_Alias):
    """`logitless.linear_dpo` as a module: `loss(hidden, weight, targets, ref_logprob=...)`."""

    function, loss = staticmethod(linear_dpo), DPO


__all__ = [
    "LinearDFTLoss",
    "LinearDPOLoss",
    "LinearFDivergenceLoss",
    "linear_dft",
    "linear_dpo",
    "linear_f_divergence_sft",
]
