"""The one-call losses as functions: `linear_cross_entropy`, the drop-in for torch's, and the aliases of `aliases`."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor

from .aliases import linear_dft, linear_dpo, linear_f_divergence_sft
from .class_weight import class_weighted_nll
from .linear import linear_loss
from .losses.sft.likelihood import NLL
from .ops.checks import check_tensor, require
from .ops.sharded import on_whole_tensors
from .peers import refuse_unknown
from .types import OPTION_NAMES, OptionKeywords, Reduction


@on_whole_tensors
def linear_cross_entropy(  # type: ignore[misc]  # bias and ignore_index, named here, are among the options too
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    shift: bool = False,
    **options: Unpack[OptionKeywords],
) -> Tensor:
    """Cross-entropy of `softmax(hidden @ weight.T + bias)`, in place of `F.cross_entropy` on logits.

    Per token: NLL with label smoothing as `torch.nn.functional.cross_entropy` defines it, plus `z_loss * lse**2`, times
    `token_weight`.

    Args:
        hidden: `[..., H]`; with `shift=True` `[..., T, H]`.
        weight: `[V, H]`. bias: `[V]`, may be -inf where the vocabulary is masked.
        targets: `[...]` token ids in [0, V), aligned with `hidden` unless `shift`.
        ignore_index: tokens with this target do not count.
        reduction: "mean" divides by the number of tokens that count (with `class_weight`, by the sum of their targets'
            weights, as torch does), or by `normalizer`; all ignored gives 0, where torch gives NaN. "sum". "none" gives
            `[...]`, with `shift` `[..., T - 1]`.
        label_smoothing: in [0, 1]; refused where the bias masks part of the vocabulary, which makes it infinite.
        z_loss: weight of the squared logsumexp, >= 0.
        token_weight: `[...]` like `targets`, constants.
        class_weight: `[V]` like the rows of `weight`, constants, of the NLL (and its smoothing), not of the z-loss.
        normalizer: number, or tensor of one, that "mean" divides by.
        shift: position t predicts target t + 1, as a causal language model's labels stand.
        **options: `logit_scale`, `softcap`, `temperature`, `backend`, `backward`, `chunk_bytes`; see `linear_logprobs`.

    Returns:
        A scalar, or per token for "none"; float32 (float64 for float64 inputs), whatever the reduction differentiable
        with any upstream gradient.
    """
    refuse_unknown("linear_cross_entropy", options, OPTION_NAMES)
    if shift:
        targets, token_weight = _shifted(targets, hidden, ignore_index), _shifted_weight(token_weight, targets)
    options = {**options, "bias": bias, "ignore_index": ignore_index}
    common: dict[str, Any] = dict(token_weight=token_weight, reduction=reduction, normalizer=normalizer)
    nll = NLL(label_smoothing=label_smoothing, z_loss=z_loss)
    if label_smoothing > 0 and bias is not None and not torch.compiler.is_compiling():
        masked = "label_smoothing: infinite where bias masks part of the vocabulary (-inf); expected 0"
        require(~bias.isneginf().any(), lambda: masked)
    if class_weight is None:
        out = linear_loss(nll, hidden, weight, targets, **common, **options)
    else:
        out = class_weighted_nll(nll, hidden, weight, targets, class_weight, options=options, **common)
    return out[..., :-1] if shift and reduction == "none" else out


def _shifted(targets: Tensor, hidden: Tensor, ignore_index: int) -> Tensor:
    """The targets one place to the left, so that the hidden states need no copy; the last position predicts nothing."""
    check_tensor("targets", targets, f"{list(hidden.shape[:-1])}")
    if targets.dim() < 1:
        raise ValueError("shift: needs a time axis, got a single token")
    return torch.cat([targets[..., 1:], torch.full_like(targets[..., :1], ignore_index)], dim=-1)


def _shifted_weight(token_weight: Tensor | None, targets: Tensor) -> Tensor | None:
    if token_weight is None:
        return None
    check_tensor("token_weight", token_weight, f"{list(targets.shape)}")
    if token_weight.shape != targets.shape:
        expected, got = list(targets.shape), list(token_weight.shape)
        raise ValueError(f"token_weight: expected shape {expected} like targets, got {got}")
    return torch.cat([token_weight[..., 1:], torch.zeros_like(token_weight[..., :1])], dim=-1)


__all__ = ["linear_cross_entropy", "linear_dft", "linear_dpo", "linear_f_divergence_sft"]
