"""What is planned: a loss over some tokens under a head, the strategies that serve it, and the chunks they take."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from .. import backends
from ..backends import native
from ..backends.exact.chunks import equal_chunks
from ..backends.exact.divergence import tokens_of_both_sides
from ..backends.exact.products import operand_dtype
from ..losses import Loss
from ..losses.whole_sequence import WholeSequenceLoss
from ..types import Head, Options, statistics_dtype

#: The strategies that are predicted, the one on full logits first.
STRATEGIES = ("materialised", "recompute", "single_pass")
#: Those that are not, and why.
NOT_PREDICTED = dict.fromkeys(
    ("tail_corrected", "screened"),
    "its memory and time depend on how many entries carry probability, which is data",
)


@dataclass(frozen=True)
class Step:
    """A training step's head and loss. All tokens count: those that are ignored cost nothing and are left out of N.

    Args:
        length: tokens of a sequence, which say whether a pair fits a chunk; None: every one is taken to fit.
        device: "cpu" or "cuda".
        backend: a name in `backends.BACKENDS`.
    """

    tokens: int
    hidden: int
    vocabulary: int
    loss: Loss
    dtype: torch.dtype
    device: str
    backend: str
    frozen_head: bool = False
    softcap: float | None = None
    length: int | None = None
    chunk_bytes: int | None = None

    # -----------------------------------------------------------------------------------------------------------------
    # Dtypes

    @property
    def size(self) -> int:
        """Bytes of a number of the hidden states and the head."""
        return self.dtype.itemsize

    @property
    def wide(self) -> int:
        """Bytes of a number of the logits and of the sums."""
        return statistics_dtype(self.dtype).itemsize

    @property
    def operand(self) -> torch.dtype:
        """The dtype of a chunk's gradient where it is multiplied."""
        return operand_dtype(self.dtype, torch.device(self.device))

    @property
    def rounds(self) -> bool:
        """Whether gradients are summed in a wider dtype than they are given in."""
        return self.size < self.wide

    @property
    def in_place(self) -> bool:
        """Whether kernels write a chunk's gradient where its logits were."""
        return self.backend != "chunked"

    @property
    def by_library(self) -> bool:
        """Whether the CPU's compiled kernels make the products."""
        return self.backend == "chunked" and native.multiplies(self.dtype, torch.device(self.device))

    @property
    def by_kernels(self) -> bool:
        """Whether they compute the statistics too."""
        return self.by_library and self.softcap is None

    @property
    def one_product(self) -> bool:
        """Whether a sweep makes the head's gradient by one product, rounded: its kernels finish the only chunk's."""
        finished = self.in_place and self.operand == torch.bfloat16
        return finished and not self.frozen_head and self.tokens <= self.tokens_at_once

    # -----------------------------------------------------------------------------------------------------------------
    # Chunks

    @cached_property
    def tokens_at_once(self) -> int:
        """The most tokens of a chunk, by the library's own rule."""
        with FakeTensorMode():  # tensors of a device that need not be here, without memory
            hidden = torch.empty(1, self.hidden, dtype=self.dtype, device=self.device)
            weight = torch.empty(self.vocabulary, self.hidden, dtype=self.dtype, device=self.device)
            weight.requires_grad_(not self.frozen_head)
            if self.loss.compares_distributions:
                return tokens_of_both_sides(hidden, weight, self.chunk_bytes, trainable=not self.frozen_head)
            options = Options(softcap=self.softcap, chunk_bytes=self.chunk_bytes)
            return backends.BACKENDS[self.backend].tokens_at_once(hidden, Head(weight, softcap=self.softcap), options)

    @property
    def chunk(self) -> int:
        """Tokens of a chunk, n."""
        return equal_chunks(self.tokens, self.tokens_at_once, self.device)

    @property
    def group(self) -> int | None:
        """Tokens of a pair or a sequence that a single pass keeps whole, if it is known."""
        sides = 2 if self.loss.level == "pair" else 1
        return None if self.length is None else sides * self.length

    # -----------------------------------------------------------------------------------------------------------------
    # Strategies

    @property
    def token_wise(self) -> bool:
        """Whether a sweep over the tokens knows each one's gradient at once."""
        return self.loss.token_wise and self.loss.divided_by is None

    def obstacle(self, strategy: str) -> str | None:
        """Why a strategy does not serve this step, or is not predicted; None where it is."""
        if strategy == "materialised":
            return self._not_on_logits()
        if strategy == "recompute" or self.token_wise or self.loss.compares_distributions:
            return None
        if self.frozen_head:
            return "the entropy's gradient needs a second vector per token" if "entropy" in self.loss.outputs else None
        if not isinstance(self.loss, WholeSequenceLoss) or not self.loss.sums_by_group:
            return "the loss needs all tokens' statistics before any gradient"
        if self.group is not None and self.group > self.tokens_at_once:
            return f"{self.group} tokens of a {self.loss.level} loss's group exceed a chunk of {self.tokens_at_once}"
        return None

    def _not_on_logits(self) -> str | None:
        if self.loss.outputs != ("logprob",):
            return "not predicted: there is no one way to write this loss on full logits"
        if self.loss.compares_distributions:
            return "not predicted: there is no one way to write a divergence on full logits"
        return "not predicted: there is no one way to write a softcap on full logits" if self.softcap else None

    def unit_gradient(self, strategy: str) -> bool:
        """Whether the forward keeps `d logprob / d hidden`, as under a frozen head for a loss of statistics."""
        return strategy == "single_pass" and self.frozen_head and not self.token_wise

    def by_groups(self, strategy: str) -> bool:
        """Whether a single pass keeps pairs or sequences whole, for which it sorts the tokens."""
        return strategy == "single_pass" and not self.frozen_head and not self.token_wise
