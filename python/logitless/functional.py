"""The one-call forms of single losses, each with the arguments of its own; `linear.linear_loss` has them all."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor

from . import reduce
from .linear import linear_loss
from .losses import DFT, DPO, NLL, FDivergenceSFT, PreferenceResult
from .ops import linear_logprobs, linear_token_loss
from .ops.call import Call, prepare
from .ops.checks import check_constant, check_tensor, check_tokens, require
from .ops.token_loss import check_token_input
from .types import Head, OptionKeywords, Options, Reduction, TokenStats, statistics_dtype

# ---------------------------------------------------------------------------------------------------------------------
# Cross-entropy


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
        class_weight: `[V]`, constants, of the NLL (and its smoothing), not of the z-loss. With label smoothing it needs
            the logits' weighted mean, which is linear in `hidden`: refused under a softcap.
        normalizer: number, or tensor of one, that "mean" divides by.
        shift: position t predicts target t + 1, as a causal language model's labels stand.
        **options: `logit_scale`, `softcap`, `temperature`, `backend`, `backward`, `chunk_bytes`; see `linear_logprobs`.

    Returns:
        A scalar, or per token for "none"; float32 (float64 for float64 inputs), whatever the reduction differentiable
        with any upstream gradient.
    """
    if shift:
        targets, token_weight = _shifted(targets, hidden, ignore_index), _shifted_weight(token_weight, targets)
    options = {**options, "bias": bias, "ignore_index": ignore_index}
    common: dict[str, Any] = dict(token_weight=token_weight, reduction=reduction, normalizer=normalizer)
    nll = NLL(label_smoothing=label_smoothing, z_loss=z_loss)
    if label_smoothing > 0 and bias is not None and not torch.compiler.is_compiling():
        masked = "label_smoothing: infinite where bias masks part of the vocabulary (-inf); expected 0"
        require(~bias.isneginf().any(), lambda: masked)
    if class_weight is None:
        out: Tensor = linear_loss(nll, hidden, weight, targets, **common, **options)
    else:
        out = _class_weighted(nll, hidden, weight, targets, class_weight, options=options, **common)
    return out[..., :-1] if shift and reduction == "none" else out


def _shifted(targets: Tensor, hidden: Tensor, ignore_index: int) -> Tensor:
    """Targets one place to the left; the last position predicts nothing. No copy of the hidden states."""
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


def _class_weighted(
    nll: NLL,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    class_weight: Tensor,
    *,
    token_weight: Tensor | None,
    reduction: Reduction,
    normalizer: Tensor | float | None,
    options: dict[str, Any],
) -> Tensor:
    """torch's class weights: `(1 - eps) w_t (-logp_t) + eps / V sum_j w_j (-logp_j)`, "mean" over the sum of the w_t.

    The sum over the vocabulary is `sum(w) lse - hidden @ (weight.T @ w)`: its first part is one of the token's own
    statistics, its second a product with one vector.
    """
    eps, vocabulary = nll.label_smoothing, weight.shape[0]
    call = prepare(hidden, weight, targets, Options(**options))
    class_weight = _checked_class_weight(class_weight, weight).to(statistics_dtype(call.hidden.dtype))
    if eps > 0 and call.options.softcap is not None:
        raise ValueError("class_weight: with label_smoothing it is refused under a softcap, got softcap and both")
    counts = targets != call.options.ignore_index
    own = torch.where(counts, class_weight[torch.where(counts, targets, 0).clamp(0, vocabulary - 1).long()], 0)
    scale = torch.ones_like(own) if token_weight is None else token_weight
    check_token_input("token_weight", scale, hidden)
    scale = scale.to(class_weight.dtype)
    coefficients = ((1 - eps) * scale * own, eps * scale * class_weight.mean(), nll.z_loss * scale)
    total = linear_token_loss(
        hidden,
        weight,
        targets,
        _nll_terms,
        token_inputs=coefficients,
        outputs=("logprob", "lse"),
        reduction="none" if reduction == "none" else "sum",
        **options,
    )
    if eps > 0:
        linear = _weighted_logits(call, counts.reshape(-1), class_weight).reshape(targets.shape)
        linear = torch.where(counts, linear * scale, 0) * (eps * call.options.transform.slope / vocabulary)
        total = total - (linear if reduction == "none" else linear.sum())
    return reduce.mean(total, own.sum() if normalizer is None else normalizer) if reduction == "mean" else total


def _weighted_logits(call: Call, counts: Tensor, class_weight: Tensor) -> Tensor:
    """`sum_j w_j (hidden @ weight.T + bias)_j`, `[N]`, by a product with one vector."""
    hidden = call.hidden.masked_fill(~counts[:, None], 0)  # an ignored token's NaN would reach the vector's gradient
    with torch.autocast(hidden.device.type, enabled=False):
        row = class_weight.to(call.weight.dtype) @ call.weight
        linear = hidden.to(class_weight.dtype) @ row.to(class_weight.dtype)
        return linear if call.options.bias is None else linear + (class_weight * call.options.bias).sum()


def _nll_terms(stats: TokenStats, target: Tensor, uniform: Tensor, square: Tensor) -> Tensor:
    assert stats.logprob is not None and stats.lse is not None
    return uniform * stats.lse + square * stats.lse.square() - target * stats.logprob


def _checked_class_weight(class_weight: Tensor, weight: Tensor) -> Tensor:
    check_tensor("class_weight", class_weight, f"[{weight.shape[0]}]", 1)
    if len(class_weight) != weight.shape[0]:
        raise ValueError(f"class_weight: expected shape [{weight.shape[0]}], got {list(class_weight.shape)}")
    check_constant("class_weight", class_weight, weight.device, like="weight")
    return class_weight


# ---------------------------------------------------------------------------------------------------------------------
# Shortcuts


def linear_dft(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    power: float = 1.0,
    token_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    normalizer: Tensor | float | None = None,
    **options: Unpack[OptionKeywords],
) -> Tensor:
    """Dynamic fine-tuning, `-sg(p^power) log p` per token: `linear_loss(losses.DFT(power), ...)`.

    Source: arXiv 2508.05629, equation 9. See `losses.DFT` for the formula and `linear_loss` for the arguments.
    """
    return linear_loss(
        DFT(power=power),
        hidden,
        weight,
        targets,
        token_weight=token_weight,
        reduction=reduction,
        normalizer=normalizer,
        **options,
    )


def linear_f_divergence_sft(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ref_logprob: Tensor,
    *,
    divergence: str = "pearson_chi2",
    beta: float = 0.1,
    value: str = "none",
    ref_lse: Tensor | None = None,
    alpha: float = 0.5,
    saturate: bool = False,
    cu_seqlens: Tensor | None = None,
    token_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    normalizer: Tensor | float | None = None,
    **options: Unpack[OptionKeywords],
) -> Tensor:
    """f-divergence SFT, `-phi(beta (logprob - ref_logprob)) / beta` per token: `linear_loss(FDivergenceSFT(...), ...)`.

    `ref_logprob`, and with `value="lse"` or `"one_step"` `ref_lse`, have the targets' shape: the reference model's
    statistics on the same tokens, constants. The form per sequence: `linear_loss(FDivergenceSFT(per="sequence"), ...)`.
    Source: arXiv 2507.00018, derived as `losses.FDivergenceSFT` says.
    """
    loss = FDivergenceSFT(divergence=divergence, beta=beta, value=value, alpha=alpha, saturate=saturate)
    inputs: dict[str, Any] = (
        {"ref_logprob": ref_logprob} if ref_lse is None else {"ref_logprob": ref_logprob, "ref_lse": ref_lse}
    )
    return linear_loss(
        loss,
        hidden,
        weight,
        targets,
        token_weight=token_weight,
        cu_seqlens=cu_seqlens,
        reduction=reduction,
        normalizer=normalizer,
        **inputs,
        **options,
    )


def linear_dpo(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ref_logprob: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_head: Tensor | Head | None = None,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    divergence: str = "reverse_kl",
    alpha: float = 0.5,
    cu_seqlens: Tensor | None = None,
    reduction: Reduction = "mean",
    normalizer: Tensor | float | None = None,
    **options: Unpack[OptionKeywords],
) -> PreferenceResult:
    """Direct preference optimisation of B pairs: `linear_loss(losses.DPO(...), ...)`.

    Args:
        hidden: `[2B, T, H]`, the first half chosen, the second rejected, or flat `[N, H]` with `cu_seqlens`.
        weight: `[V, H]`.
        targets: `[2B, T]` (`[N]`); ignore the prompt and the padding.
        ref_logprob: `[2B, T]` (`[N]`) the reference's log-probs of the same targets, constants; or
        ref_hidden: `[..., H']` the reference's hidden states, scored here without a gradient, by
        ref_head: its head, a weight `[V, H']` with the options of the model's head, or a `Head` with its own. None: the
            model's own head, as under LoRA.
        beta, loss_type, label_smoothing, divergence, alpha: see `losses.DPO`. IPO averages over tokens. Its other
            fields (LD-DPO's `tail_weight`, WPO's `use_weighting`): `linear_loss(losses.DPO(...), ...)`.
        cu_seqlens, reduction, normalizer, **options: see `linear_loss`.

    Returns:
        `PreferenceResult`: `loss` reduced, and `[B]` detached rewards, margin, accuracy and log-probs.

    Source: arXiv 2305.18290, equation 7.
    """
    loss = DPO(beta=beta, loss_type=loss_type, label_smoothing=label_smoothing, divergence=divergence, alpha=alpha)
    if (ref_logprob is None) == (ref_hidden is None):
        got = "neither" if ref_logprob is None else "both"
        raise ValueError(f"ref_logprob: expected either it or ref_hidden, got {got}")
    check_tokens(hidden, targets)
    if ref_hidden is not None:
        ref_logprob = _reference_logprob(ref_hidden, weight if ref_head is None else ref_head, targets, options)
    elif ref_head is not None:
        raise ValueError("ref_head: goes with ref_hidden, got ref_logprob")
    return linear_loss(
        loss,
        hidden,
        weight,
        targets,
        ref_logprob=ref_logprob,
        cu_seqlens=cu_seqlens,
        reduction=reduction,
        normalizer=normalizer,
        **options,
    )


def _reference_logprob(hidden: Tensor, head: Tensor | Head, targets: Tensor, options: OptionKeywords) -> Tensor:
    """The reference's log-probs of the same targets, without a gradient."""
    merged: dict[str, Any] = {**options, "backward": "auto"}
    merged |= head._asdict() if isinstance(head, Head) else {"weight": head}
    weight = merged.pop("weight")
    check_tensor("ref_head", weight, "[V, H'], or a Head", 2)
    check_tensor("ref_hidden", hidden, f"[..., {weight.shape[1]}]")
    expected = [*targets.shape, weight.shape[1]]
    if list(hidden.shape) != expected:
        raise ValueError(f"ref_hidden: expected shape {expected} to fit targets and head, got {list(hidden.shape)}")
    with torch.no_grad():
        logprob = linear_logprobs(hidden, weight, targets, **merged).logprob
    assert logprob is not None
    return logprob


__all__ = [
    "linear_cross_entropy",
    "linear_dft",
    "linear_dpo",
    "linear_f_divergence_sft",
]
