"""The one-call losses as modules: hyper-parameters once, tensors at every call."""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor

from . import functional
from .aliases import LinearDFTLoss, LinearDPOLoss, LinearFDivergenceLoss
from .losses.sft.likelihood import NLL
from .module import BoundLoss, LinearLoss
from .types import OptionKeywords, Reduction


class LinearCrossEntropyLoss(BoundLoss):
    """`logitless.linear_cross_entropy` as a module: `loss(hidden, weight, targets, bias=..., normalizer=...)`.

    Args are those of the function; `class_weight` is kept as a buffer, so that it moves with the module.
    """

    class_weight: Tensor | None

    def __init__(
        self,
        *,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        class_weight: Tensor | None = None,
        shift: bool = False,
        reduction: Reduction = "mean",
        **options: Unpack[OptionKeywords],
    ) -> None:
        NLL(label_smoothing=label_smoothing, z_loss=z_loss)  # its checks, now rather than at the first call
        super().__init__(options, label_smoothing=label_smoothing, z_loss=z_loss, shift=shift, reduction=reduction)
        self.register_buffer("class_weight", class_weight)

    def forward(self, hidden: Tensor, weight: Tensor, targets: Tensor, **call: Any) -> Tensor:
        """`hidden [..., H]`, `weight [V, H]`, `targets [...]`; `bias`, `token_weight`, `normalizer` by name."""
        return functional.linear_cross_entropy(
            hidden, weight, targets, class_weight=self.class_weight, **{**self.bound, **call}
        )


__all__ = ["LinearCrossEntropyLoss", "LinearDFTLoss", "LinearDPOLoss", "LinearFDivergenceLoss", "LinearLoss"]
