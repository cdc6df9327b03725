"""An order of the vocabulary in which neighbours are alike, for the blocks of a tail-corrected backward.

Such a backward puts back what it leaves of a block as the block's mean, so its error is the difference of entries from
their block's mean. A block that is kept or left as a whole costs less where a few blocks hold most of the probability.
Both ask for clusters: entries whose logits rise and fall together. Sorting by mean probability gives less than half of
the gain (docs/tail-corrected.md). The head itself is never reordered.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..interface import Gradients, Problem

#: Clusters have these sizes, the smaller ones nested in the larger: every block size in use is one of them.
SIZES = (256, 128, 64)
#: Hidden states whose logits are compared. 64 are nearly as good (docs/tail-corrected.md).
SAMPLE = 256
#: Of the power iteration; a rough principal component cuts as well as an exact one.
ITERATIONS = 4


@torch.no_grad()
def vocabulary_order(weight: Tensor, hidden: Tensor | None = None) -> Tensor:
    """A permutation of the vocabulary with like entries side by side, for `backward="tail_corrected"`.

    The vocabulary is halved again and again, each time at the median of the part's first principal component, down to
    64 entries. Deterministic; a second or two at V = 49152, H = 576 on one CPU core. Keep it for many steps: gradients
    are right within their bounds in any order, only the less exact the less alike neighbours have become.

    Args:
        weight: `[V, H]`, the head, of any floating dtype.
        hidden: `[..., H]` hidden states of any text like that to be trained on; entries are alike whose logits are.
            Evenly spaced, 256 of them are used. None: entries are alike whose rows of the head are, which is less good.

    Returns:
        `[V]` int64: the entry at each place, on `weight`'s device.

    Raises:
        TypeError, ValueError: something else than floating tensors of these shapes, or on two devices.
    """
    _check_floating("weight", weight, weight.dim() == 2 if isinstance(weight, Tensor) else False, "[V, H]")
    rows = weight.float()
    if hidden is not None:
        fits = isinstance(hidden, Tensor) and hidden.shape[-1:] == weight.shape[1:] and hidden.numel() > 0
        _check_floating("hidden", hidden, fits, f"[..., {weight.shape[1]}]")
        if hidden.device != weight.device:
            raise ValueError(f"hidden: expected it on {weight.device} like weight, got {hidden.device}")
        states = hidden.reshape(-1, hidden.shape[-1])
        rows = rows @ states[:: -(-len(states) // SAMPLE)].float().T
    order = torch.arange(len(weight), device=weight.device)
    parts = [(0, len(weight))]
    while parts:
        start, stop = parts.pop()
        if stop - start > SIZES[-1]:
            here = order[start:stop].clone()
            order[start:stop] = here[_along_first_component(rows.index_select(0, here))]
            cut = start + _first_half(stop - start)
            parts += [(start, cut), (cut, stop)]
    return order


def _check_floating(name: str, value: object, fits: bool, shape: str) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected a floating tensor of shape {shape}, got {kind}")
    if hasattr(value, "full_tensor"):
        raise TypeError(
            f"{name}: expected a plain tensor, got a DTensor; give {name}.full_tensor(), once for many steps"
        )
    if not fits:
        raise ValueError(f"{name}: expected shape {shape}, got {list(value.shape)}")


def _along_first_component(rows: Tensor) -> Tensor:
    """Indices that sort the rows along their first principal component."""
    centred = rows - rows.mean(0)
    direction = centred[centred.square().sum(1).argmax()]
    for _ in range(ITERATIONS):
        direction = F.normalize(centred.T @ (centred @ direction), dim=0)
    return (centred @ direction).argsort(stable=True)


def _first_half(count: int) -> int:
    """Half of a part, in whole blocks of the largest size that the part exceeds."""
    size = next(size for size in SIZES if count > size)
    return max(size, count // 2 // size * size)


def permuted(problem: Problem) -> Problem:
    """A problem with its vocabulary in its order: a copy of the head, for kernels that take whole blocks."""
    order, head = problem.vocabulary_order, problem.head
    if order is None:
        return problem
    bias = None if head.bias is None else head.bias.index_select(0, order)
    head = head._replace(weight=head.weight.index_select(0, order), bias=bias)
    targets = inverse(order).index_select(0, problem.targets)
    logit_weight = None if problem.logit_weight is None else problem.logit_weight.index_select(0, order)
    return replace(problem, head=head, targets=targets, vocabulary_order=None, logit_weight=logit_weight)


def restored(gradients: Gradients, order: Tensor | None) -> Gradients:
    """Gradients of the problem that `permuted` gives, as those of the problem itself."""
    if order is None:
        return gradients
    place = inverse(order)
    weight, bias = (None if x is None else x.index_select(0, place) for x in gradients[1:])
    return Gradients(gradients.hidden, weight, bias)


def inverse(order: Tensor) -> Tensor:
    """`[V]` int64: the place of each entry in an order."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
