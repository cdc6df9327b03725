"""Several hidden states over one head, as multi-token prediction has them: one sweep, and a loss for each depth.

A model that predicts several tokens ahead (DeepSeek-V3's, Qwen3-Next's, GLM's MTP modules) has the hidden states of D
depths and one output head, and trains

    L = sum_d w_d L_d,    L_d = sum_t loss(h_d[t], target_d[t]) / Z_d

Every L_d divides by a count Z_d of its own, because a deeper head has fewer targets. The tokens of all depths go
through the head as one batch, so that its gradient is summed in one buffer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reduce
from .arguments import loss_inputs
from .linear import WithInputs, linear_loss
from .losses import Loss, get
from .losses.layout import token_layout
from .ops.call import prepare_call
from .ops.checks import check_ignore_index, check_tensor, check_tokens
from .ops.sharded import on_whole_tensors
from .ops.token_loss import check_token_input, sum_in_one_sweep, sums_in_one_sweep
from .types import Options, split_options, statistics_dtype


class DepthLosses(NamedTuple):
    """The result of `linear_depth_loss`."""

    loss: Tensor
    """`[]`, the weighted sum of the depths' losses. Differentiable."""
    losses: Tensor
    """`[D]`, each depth's own mean before its weight, for logs. Not differentiable."""


@on_whole_tensors
def linear_depth_loss(
    loss: Loss | str,
    hidden: Sequence[Tensor],
    weight: Tensor,
    targets: Sequence[Tensor],
    *,
    depth_weight: Sequence[float],
    token_weight: Sequence[Tensor] | None = None,
    normalizer: Sequence[Tensor | float] | Tensor | float | None = None,
    **inputs_and_options: Any,
) -> DepthLosses:
    """`sum_d depth_weight[d] * mean_t loss(hidden[d][t], targets[d][t])` over one head, with every depth's own mean.

    All depths share a sweep over the logits, three GEMMs for all tokens, and one gradient of the head.

    Args:
        loss: a loss of each token's own statistics whose paper's reduction is the mean over tokens, or its name:
            `"nll"`, `"dft"`, `losses.NLL(z_loss=1e-4)`.
        hidden: D tensors `[..., H]`, one a depth; leading shapes may differ, as a deeper head has fewer positions.
        weight: `[V, H]`, the head that they share; also sharded, as in `linear_logprobs`.
        targets: D tensors `[...]`, aligned with `hidden`, as `depth_targets` makes them.
        depth_weight: D positive numbers. No default, as models differ: DeepSeek-V3 has 1 for its own next token and
            0.3 / (D - 1), later 0.1 / (D - 1), for each further depth.
        token_weight: D tensors `[...]` of constants that multiply the tokens' losses.
        normalizer: the count that each mean divides by in place of the call's own: D numbers (a sequence, or a tensor
            `[D]`), or one number for all. Under gradient accumulation and data parallelism it is a depth's global
            number of tokens that count, which differs from depth to depth. 1 gives sums. A depth that counts nothing
            gives 0.
        **inputs_and_options: the loss's own inputs, each a sequence of D tensors, and the options of the head and the
            backend that `linear_logprobs` documents.

    Returns:
        `DepthLosses`, float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: a loss of another kind, sequences of other lengths, or what `linear_loss` refuses.

    Source: DeepSeek-V3, arXiv 2412.19437, equations 24 and 25.
    """
    loss = get(loss)
    _check_loss(loss)
    depths = _check_depths(hidden, targets)
    _check_weights(depth_weight, depths)
    options, given = split_options(inputs_and_options)
    ignore_index = Options(**options).ignore_index
    check_ignore_index(ignore_index)
    tokens = torch.cat([h.reshape(-1, h.shape[-1]) for h in hidden])
    ids = torch.cat([t.reshape(-1) for t in targets])
    known = (*loss.inputs, *loss.optional_inputs)  # the others are refused in the next line
    joined = {name: _joined(name, x, targets) if name in known else x for name, x in given.items()}
    inputs = loss_inputs(loss, joined, token_layout(ids != ignore_index, None), tokens.device)
    if normalizer is None:
        normalizer = [(t != ignore_index).sum() for t in targets]
    dtype = statistics_dtype(tokens.dtype)
    factors = torch.tensor([float(w) for w in depth_weight], dtype=dtype, device=tokens.device)
    share = factors / _divisors(normalizer, factors)
    depth = torch.cat([torch.full_like(t.reshape(-1), d, dtype=torch.long) for d, t in enumerate(targets)])
    weights = share[depth]
    if token_weight is not None:
        of_tokens = _joined("token_weight", token_weight, targets)
        check_token_input("token_weight", of_tokens, tokens)
        weights = weights * of_tokens
    total, parts = _sum_and_parts(loss, tokens, weight, ids, weights, inputs, options)
    return DepthLosses(total, parts.new_zeros(depths).index_add_(0, depth, parts) / factors)


def depth_targets(
    labels: Tensor, depths: int, *, cu_seqlens: Tensor | None = None, ignore_index: int = -100
) -> tuple[Tensor, ...]:
    """Targets of every depth from labels as a causal language model's stand: depth d at position t has label t + 1 + d.

    Depth 0 is the model's own next token. A target beyond its sequence's end is `ignore_index`, so that no depth looks
    across the boundary of two packed sequences. With position t of `hidden[d]` the state that stands for token t.

    Args:
        labels: `[..., T]`, where position t holds the label of token t, `ignore_index` where it does not count.
        depths: how many, at least 1.
        cu_seqlens: `[S + 1]` boundaries of sequences that are packed behind one another, of the flattened labels. None:
            a row is a sequence.
        ignore_index: -100 as in PyTorch.

    Returns:
        One tensor of the shape of `labels` for each depth.

    Raises:
        TypeError, ValueError: `labels` is no tensor or has no positions, `depths` is no positive int, or `cu_seqlens`
            are no boundaries of so many tokens.
    """
    check_tensor("labels", labels, "[..., T]")
    if labels.dim() < 1:
        raise ValueError("labels: expected shape [..., T], got []")
    if isinstance(depths, bool) or not isinstance(depths, int) or depths < 1:
        raise ValueError(f"depths: expected a positive int, got {depths!r}")
    check_ignore_index(ignore_index)
    if cu_seqlens is None:
        return tuple(_later(labels, d + 1, ignore_index) for d in range(depths))
    sequence = token_layout(torch.ones_like(labels, dtype=torch.bool), cu_seqlens).sequence
    assert sequence is not None
    sequence, flat = sequence.flatten(), labels.flatten()
    ahead = [(_later(flat, d + 1, ignore_index), _later(sequence, d + 1, -1)) for d in range(depths)]
    return tuple(x.where(other == sequence, ignore_index).view_as(labels) for x, other in ahead)


def _later(x: Tensor, steps: int, fill: int) -> Tensor:
    """The values of `x [..., T]` some places further on, `fill` beyond its end."""
    return F.pad(x[..., steps:], (0, min(steps, x.shape[-1])), value=fill)


def _sum_and_parts(
    loss: Loss,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    inputs: Mapping[str, Tensor],
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """The sum of the weighted losses of flat tokens, differentiable, and each of them `[N]`, constants."""
    scaled = {**options, "temperature": options.get("temperature", 1.0) * loss.stats_temperature}
    call = prepare_call(hidden, weight, targets, Options(**scaled))
    if not sums_in_one_sweep(call, loss.outputs):
        arguments = {**inputs, **options}
        losses = linear_loss(loss, hidden, weight, targets, token_weight=weights, reduction="none", **arguments)
        return losses.sum(), losses.detach()
    function = WithInputs(loss, tuple(inputs), 1)
    total, _, losses = sum_in_one_sweep(call, function, [weights, *inputs.values()], loss.outputs)
    return total, losses


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def _check_loss(loss: Loss) -> None:
    """Raises unless the loss is one value a token, divided by the number of tokens that count."""
    if not loss.token_wise or loss.lists or loss.compares_distributions:
        raise ValueError(f"loss: expected one of each token's own statistics, got {loss.name!r}, a {loss.level} loss")
    if loss.reduction != "mean" or loss.divided_by is not None:
        raise ValueError(f"loss: expected one that is averaged over all tokens that count, got {loss.name!r}")


def _check_depths(hidden: Sequence[Tensor], targets: Sequence[Tensor]) -> int:
    """How many depths; raises unless hidden states and targets fit together."""
    for name, value in (("hidden", hidden), ("targets", targets)):
        if isinstance(value, Tensor) or not isinstance(value, Sequence) or not value:
            got = type(value).__name__ if isinstance(value, Tensor) or not isinstance(value, Sequence) else "none"
            raise TypeError(f"{name}: expected a sequence of tensors, one a depth, got {got}")
    if len(hidden) != len(targets):
        raise ValueError(f"targets: expected {len(hidden)} tensors like hidden, got {len(targets)}")
    for d, (states, ids) in enumerate(zip(hidden, targets, strict=True)):
        check_tokens(states, ids)
        if ids.shape != states.shape[:-1]:
            raise ValueError(f"targets[{d}]: expected shape {list(states.shape[:-1])}, got {list(ids.shape)}")
        if (states.shape[-1], states.dtype, states.device) != (hidden[0].shape[-1], hidden[0].dtype, hidden[0].device):
            expected = f"[..., {hidden[0].shape[-1]}] {hidden[0].dtype} on {hidden[0].device}"
            got = f"{list(states.shape)} {states.dtype} on {states.device}"
            raise ValueError(f"hidden[{d}]: expected {expected} like hidden[0], got {got}")
    return len(hidden)


def _check_weights(depth_weight: Sequence[float], depths: int) -> None:
    """Raises unless there is a positive number for each depth."""
    if isinstance(depth_weight, (str, Tensor)) or not isinstance(depth_weight, Sequence):
        raise TypeError(f"depth_weight: expected a sequence of {depths} numbers, got {type(depth_weight).__name__}")
    if len(depth_weight) != depths:
        raise ValueError(f"depth_weight: expected {depths} numbers, one a depth, got {len(depth_weight)}")
    for d, value in enumerate(depth_weight):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(
                f"depth_weight[{d}]: expected a positive number (leave the depth out for 0), got {value!r}"
            )


def _divisors(normalizer: Sequence[Tensor | float] | Tensor | float, like: Tensor) -> Tensor:
    """What each depth's sum is divided by, `[D]` as `like` or `[1]`; 1 where nothing counts."""
    numbers = normalizer if isinstance(normalizer, Sequence) else [normalizer]
    if isinstance(normalizer, Tensor) and normalizer.numel() == len(like):
        numbers = list(normalizer.reshape(-1))
    if len(numbers) not in (1, len(like)) or (isinstance(normalizer, Tensor) and len(numbers) != normalizer.numel()):
        got = list(normalizer.shape) if isinstance(normalizer, Tensor) else len(numbers)
        raise ValueError(f"normalizer: expected one number, or {len(like)}, one a depth, got {got}")
    for number in numbers:
        reduce.check("mean", number)
    counts = torch.stack([torch.as_tensor(x).detach().to(like).reshape(()) for x in numbers])
    return torch.where(counts == 0, torch.ones_like(counts), counts)


def _joined(name: str, values: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """The constants of all depths' tokens, `[N]`."""
    if isinstance(values, Tensor) or not isinstance(values, Sequence) or len(values) != len(targets):
        got = len(values) if isinstance(values, Sequence) else type(values).__name__
        raise ValueError(f"{name}: expected a sequence of {len(targets)} tensors, one a depth, got {got}")
    for d, (value, ids) in enumerate(zip(values, targets, strict=True)):
        check_tensor(f"{name}[{d}]", value, f"{list(ids.shape)}")
        if value.shape != ids.shape:
            raise ValueError(f"{name}[{d}]: expected shape {list(ids.shape)} like its targets, got {list(value.shape)}")
    return torch.cat([value.reshape(-1) for value in values])


__all__ = ["DepthLosses", "depth_targets", "linear_depth_loss"]
