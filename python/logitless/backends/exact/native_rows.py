"""A row engine for CPUs: `TorchRows`, whose statistics of a float32 chunk come from one kernel (kernels/cpu/measure.h).

The kernel reads the chunk twice and writes it once, where PyTorch's operations go over it six times. Without an entropy
a bfloat16 head's exponentials are written in bfloat16 at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...types import Head, TokenStats
from .. import native
from ..interface import Tile
from .products import operand_dtype
from .torch_rows import TorchRows, statistics_of


class NativeRows(TorchRows):
    """The row engine of the CPU library where it makes the products too, and of PyTorch's operations elsewhere.

    Elsewhere is on other devices and processors, in float64, under a softcap, and for what is not vocabulary-major.
    """

    def measure(
        self, raw: Tensor, head: Head, targets: Tensor, outputs: tuple[str, ...], mean_logit: Tensor | None
    ) -> Tile:
        if not _measures(raw, head):
            return super().measure(raw, head, targets, outputs, mean_logit)
        return _measured(raw, head, targets, outputs, mean_logit, narrows="entropy" not in outputs)

    def recall(self, raw: Tensor, head: Head, targets: Tensor, stats: TokenStats) -> Tile:
        if not _measures(raw, head):
            return super().recall(raw, head, targets, stats)
        return _measured(raw, head, targets, (), None, narrows=stats.entropy is None)._replace(stats=stats)


def _measured(
    raw: Tensor, head: Head, targets: Tensor, outputs: tuple[str, ...], mean_logit: Tensor | None, *, narrows: bool
) -> Tile:
    """The tile of the kernel. `narrows`: no logarithm of an exponential is needed, so that bfloat16 will do for it."""
    chunk, count = raw.T, len(targets)
    narrow = None
    if narrows and operand_dtype(head.weight.dtype, raw.device) == torch.bfloat16:
        narrow = torch.empty(len(chunk), count, dtype=torch.bfloat16)
    target, moments = torch.empty(count), torch.empty(5, count)
    want = ("entropy" in outputs) + 2 * ("log_sum_sq" in outputs)
    bias = None if head.bias is None else head.bias.contiguous()
    targets = targets.contiguous()
    library = native.loaded()

    def one(tokens: slice) -> None:
        part = None if narrow is None else narrow[:, tokens]
        arguments = (chunk[:, tokens], bias, head.transform.slope, targets[tokens], want, part)
        library.measure(*arguments, target[tokens], moments[:, tokens])

    native.in_threads(one, native.shares_of(count, native.TOKEN_STEP))
    logits = raw if narrow is None else narrow.T
    top, leads, rest, weighted, squares = moments
    others = torch.where(leads > 0, leads.log() + torch.log1p(rest / leads), rest.log())
    return statistics_of(logits, targets, outputs, target, top, others, weighted, squares, mean_logit)


def _measures(raw: Tensor, head: Head) -> bool:
    laid = raw.dtype == torch.float32 and (raw.stride(0) == 1 or len(raw) == 1) and len(raw) > 0
    plain = head.softcap is None and head.transform.slope > 0
    return laid and plain and native.multiplies(head.weight.dtype, raw.device)
