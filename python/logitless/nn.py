"""The one-call losses as modules: hyper-parameters once, tensors at every call."""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor, nn

from . import functional
from .linear import linear_loss
from .losses import DFT, DPO, NLL, FDivergenceSFT, Loss, PreferenceResult, get
from .types import OPTION_NAMES, LossReduction, OptionKeywords, Options, Reduction


class _LinearLoss(nn.Module):
    """A function of `logitless` with its keyword arguments bound; what is bound shows in `repr`."""

    def __init__(self, options: OptionKeywords, **bound: Any) -> None:
        super().__init__()
        Options(**options).transform  # noqa: B018  their names and values, checked now
        self.bound = {**bound, **options}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.bound.items())


class LinearLoss(_LinearLoss):
    """Any loss of the registry as a module: `LinearLoss("grpo", delta=4.0)(hidden, weight, targets, advantages=...)`.

    Args:
        loss: a loss, or its name.
        reduction, max_length: as in `logitless.linear_loss`, whose other arguments are given at the call.
        **settings: the loss's hyper-parameters, and the options of the head and the backend. A name that is both (the
            `temperature` of `iw_sft`) is refused with a loss's name; with an object it is the head's.
    """

    def __init__(
        self,
        loss: Loss | str,
        *,
        reduction: LossReduction | None = None,
        max_length: int | None = None,
        **settings: Any,
    ) -> None:
        options = {name: x for name, x in settings.items() if name in OPTION_NAMES}
        made = get(loss, **{name: x for name, x in settings.items() if name not in OPTION_NAMES})
        for name in options:
            if isinstance(loss, str) and name in vars(made):
                both = f"an option of the head and a hyper-parameter of {loss!r}"
                raise ValueError(
                    f"{name}: {both}; give the loss as an object, losses.{type(made).__name__}({name}=...)"
                )
        super().__init__(options, loss=made, reduction=reduction, max_length=max_length)  # type: ignore[arg-type]

    def forward(self, hidden: Tensor, weight: Tensor, targets: Tensor, **call: Any) -> Any:
        """`hidden [..., H]`, `weight [V, H]`, `targets [...]`; the loss's inputs and what changes by name."""
        bound = {**self.bound, **call}
        return linear_loss(bound.pop("loss"), hidden, weight, targets, **bound)


class LinearCrossEntropyLoss(_LinearLoss):
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


class LinearDFTLoss(_LinearLoss):
    """`logitless.linear_dft` as a module: `loss(hidden, weight, targets)`."""

    def __init__(self, *, power: float = 1.0, reduction: Reduction = "mean", **options: Unpack[OptionKeywords]) -> None:
        DFT(power=power)
        super().__init__(options, power=power, reduction=reduction)

    def forward(self, hidden: Tensor, weight: Tensor, targets: Tensor, **call: Any) -> Tensor:
        """`hidden [..., H]`, `weight [V, H]`, `targets [...]`; `bias`, `token_weight`, `normalizer` by name."""
        return functional.linear_dft(hidden, weight, targets, **{**self.bound, **call})


class LinearFDivergenceLoss(_LinearLoss):
    """`logitless.linear_f_divergence_sft` as a module: `loss(hidden, weight, targets, ref_logprob)`.

    The form per sequence is `linear_loss(losses.FDivergenceSFT(per="sequence"), ...)`.
    """

    def __init__(
        self,
        *,
        divergence: str = "pearson_chi2",
        beta: float = 0.1,
        value: str = "none",
        alpha: float = 0.5,
        saturate: bool = False,
        reduction: Reduction = "mean",
        **options: Unpack[OptionKeywords],
    ) -> None:
        own = dict(divergence=divergence, beta=beta, value=value, alpha=alpha, saturate=saturate)
        FDivergenceSFT(**own)  # type: ignore[arg-type]
        super().__init__(options, **own, reduction=reduction)

    def forward(self, hidden: Tensor, weight: Tensor, targets: Tensor, ref_logprob: Tensor, **call: Any) -> Tensor:
        """As the function; `ref_lse`, `bias`, `token_weight`, `normalizer`, `cu_seqlens` by name."""
        return functional.linear_f_divergence_sft(hidden, weight, targets, ref_logprob, **{**self.bound, **call})


class LinearDPOLoss(_LinearLoss):
    """`logitless.linear_dpo` as a module: `loss(hidden, weight, targets, ref_logprob=...)`.

    The fields of `losses.DPO` that it does not take are those of `linear_loss(losses.DPO(...), ...)`.
    """

    def __init__(
        self,
        *,
        beta: float = 0.1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        divergence: str = "reverse_kl",
        alpha: float = 0.5,
        reduction: Reduction = "mean",
        **options: Unpack[OptionKeywords],
    ) -> None:
        own = dict(beta=beta, loss_type=loss_type, label_smoothing=label_smoothing, divergence=divergence, alpha=alpha)
        DPO(**own)  # type: ignore[arg-type]
        super().__init__(options, **own, reduction=reduction)

    def forward(self, hidden: Tensor, weight: Tensor, targets: Tensor, **call: Any) -> PreferenceResult:
        """As the function; `ref_logprob` or `ref_hidden`, `ref_head`, `bias`, `cu_seqlens`, `normalizer` by name."""
        return functional.linear_dpo(hidden, weight, targets, **{**self.bound, **call})


__all__ = ["LinearCrossEntropyLoss", "LinearDFTLoss", "LinearDPOLoss", "LinearFDivergenceLoss"]
