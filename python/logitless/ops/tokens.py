"""The tokens of a call that count: which of them a backend sees, and how its results go back to all tokens.

How many tokens count is data. To drop the others the host waits for that number, some tens of microseconds, and saves
their share of the work, which prompts often make half of it. While a CUDA graph is captured nobody may wait: then a
backend gets all tokens, with hidden states, targets and upstream gradients of 0 where they do not count, and results
are 0 there.
"""

from __future__ import annotations

from typing import NamedTuple, overload

import torch
from torch import Tensor

from .checks import check_ids

#: Stands for the lse of a token that does not count: `exp(z - lse)` is 0 for every logit, and no product with 0 is NaN.
NO_LSE = 1e30


class Tokens(NamedTuple):
    """Which tokens a backend sees. At most one of the two fields is set, none where all tokens count."""

    kept: Tensor | None  # [K] int64, the indices of those that it sees
    mask: Tensor | None  # [N] bool, where it sees all: those that count

    @overload
    def take(self, x: Tensor, fill: float = 0.0) -> Tensor: ...

    @overload
    def take(self, x: None, fill: float = 0.0) -> None: ...

    def take(self, x: Tensor | None, fill: float = 0.0) -> Tensor | None:
        """The rows of `[N, ...]` that a backend sees; `fill` where a token that it sees does not count."""
        if x is None:
            return None
        return self.masked(x, fill) if self.kept is None else x[self.kept]

    def spread(self, x: Tensor | None, like: Tensor) -> Tensor:
        """A backend's result for all of the N tokens of `like`, 0 where they do not count; empty for None."""
        if x is None:
            return like.new_empty(0)
        if self.kept is None:
            return self.masked(x)
        return x.new_zeros(len(like), *x.shape[1:]).index_copy_(0, self.kept, x)

    def together(self, groups: Tensor) -> Tokens:
        """A new order of the tokens that count: those of each of the `groups [N]` side by side."""
        if self.kept is None:
            return Tokens(groups.argsort(stable=True), None)
        return Tokens(self.kept[groups[self.kept].argsort(stable=True)], None)

    def masked(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """`x`, with `fill` where one of a backend's tokens does not count."""
        if self.mask is None:
            return x
        return x.masked_fill(~self.mask.view(-1, *[1] * (x.dim() - 1)), fill)


def of_targets(targets: Tensor, ignore_index: int, vocabulary: int) -> Tokens:
    """The tokens whose target is not `ignore_index`, or of targets `[N, K]` those that list an id (-1: none).

    An id outside the vocabulary is an error.
    """
    counts = targets != (ignore_index if targets.dim() == 1 else -1)
    check_ids(targets, counts, ignore_index, vocabulary)
    return of_mask(counts if targets.dim() == 1 else counts.any(-1))


def of_mask(mask: Tensor | None) -> Tokens:
    """The tokens of a mask `[N]`; None stands for all."""
    if mask is None:
        return Tokens(None, None)
    if is_captured(mask.device):
        return Tokens(None, mask)
    kept = mask.nonzero()[:, 0]  # waits for their number; to ask first whether there are others would wait twice
    return Tokens(None if len(kept) == len(mask) else kept, None)


def is_captured(device: torch.device) -> bool:
    """Whether what is queued on the device becomes a CUDA graph, so that the host may not wait for it."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def refuse_capture(device: torch.device, what: str, instead: str) -> None:
    """Raises while a CUDA graph is captured: `what` reads numbers of the device on the host."""
    if is_captured(device):
        raise RuntimeError(f"logitless: {what} waits for the device, which a CUDA graph cannot capture; {instead}")
