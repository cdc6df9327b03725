"""The report of what approximate backwards left out, token by token, with bounds on their error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class TailReport:
    """Gradients that approximate backwards left out, token by token in the order in which the backwards ran.

    Only tokens that count are listed. `left` is exact, not an estimate; the bounds follow from it alone.
    """

    _left: list[Tensor] = field(default_factory=list)
    _threshold: list[Tensor] = field(default_factory=list)
    _coefficient: list[Tensor] = field(default_factory=list)
    kept: int = 0
    """Entries of the logits' gradient that were kept, the targets' among them."""
    entries: int = 0
    """Entries in all: tokens times vocabulary."""
    exact_tokens: int = 0
    """Tokens that took the exact products, because their chunk was too flat."""

    @property
    def left(self) -> Tensor:
        """`[tokens]`: the L1 norm of the token's logit gradient that was put back as block means; 0 where exact."""
        return torch.cat(self._left) if self._left else torch.empty(0)

    @property
    def tail_mass(self) -> Tensor:
        """`[tokens]`: `left` over the size of the token's upstream gradient. The probability mass, for a logprob's."""
        coefficient = torch.cat(self._coefficient) if self._coefficient else torch.empty(0)
        return torch.where(coefficient > 0, self.left / coefficient, 0)

    @property
    def l1_bound(self) -> Tensor:
        """`[tokens]`: the error of the token's logit gradient is at most this in the L1 norm."""
        return 2 * self.left

    @property
    def l2_bound(self) -> Tensor:
        """`[tokens]`: the error of the token's logit gradient is at most this in the L2 norm.

        Every entry left is below the threshold, so its square is below the threshold times it. Putting means back only
        shortens the error.
        """
        return (torch.cat(self._threshold) * self.left).sqrt() if self._left else torch.empty(0)

    def add(self, left: Tensor, threshold: Tensor, coefficient: Tensor, kept: int, vocabulary: int) -> None:
        """Adds a chunk whose gradient was approximated."""
        for values, value in ((self._left, left), (self._threshold, threshold), (self._coefficient, coefficient)):
            values.append(value.detach().expand(len(left)).to("cpu", torch.float64))
        self.kept += kept
        self.entries += len(left) * vocabulary

    def add_exact(self, tokens: int, vocabulary: int) -> None:
        """Adds tokens that took the exact products."""
        zero = torch.zeros(tokens)
        self.add(zero, zero, zero, tokens * vocabulary, vocabulary)
        self.exact_tokens += tokens


_collecting: list[TailReport] = []


@contextmanager
def tail_report() -> Iterator[TailReport]:
    """Collects what the approximate backwards inside leave out. Without it, nothing is collected.

    with tail_report() as report:
        loss.backward()
    report.tail_mass.mean(), report.l1_bound.max()
    """
    report = TailReport()
    _collecting.append(report)
    try:
        yield report
    finally:
        _collecting.remove(report)


def reports() -> tuple[TailReport, ...]:
    """The reports that are collecting now."""
    return tuple(_collecting)
