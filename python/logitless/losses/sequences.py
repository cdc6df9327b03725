"""Sums and scans over the tokens of each sequence, for losses that look along time or sum whole sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .loss import Loss


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that lacks it."""
    return torch.float32 if device.type == "mps" else torch.float64


class Sequences:
    """The sequences of a batch: which tokens belong together, and which of them count.

    Without `sequence` every row (the last axis) is one sequence. With it, tokens lie behind one another in reading
    order, and a sequence is a run of equal numbers.

    Args:
        mask: bool `[...]`, the tokens that count.
        sequence: int64 of the same shape, the number of each token's sequence; each sequence in one piece.

    Raises:
        ValueError: a dtype or a shape does not fit.
    """

    def __init__(self, mask: Tensor, sequence: Tensor | None = None) -> None:
        _expect("mask", mask, torch.bool, mask.shape)
        self.mask = mask
        self._run: Tensor | None = None  # [N], 0 for the first sequence of the flattened tokens, then 1, 2, ...
        if sequence is not None:
            _expect("sequence", sequence, torch.int64, mask.shape)
            flat = sequence.reshape(-1)
            self._run = (flat.diff(prepend=flat[:1]) != 0).cumsum(-1)

    def sum(self, values: Tensor) -> Tensor:
        """`[...]`: for every token the sum of its sequence's counted values, 0 where none counts. Differentiable."""
        values = torch.where(self.mask, values, 0.0)
        if self._run is None:
            return values.sum(-1, keepdim=True).expand_as(values)
        # One token after another, where a thousand in float32 lose three digits.
        total = torch.zeros(len(self._run), dtype=wide_dtype(values.device), device=values.device)
        total = total.index_add(0, self._run, values.reshape(-1).to(total.dtype)).to(values.dtype)
        return total[self._run].reshape(values.shape)

    def count(self, dtype: torch.dtype) -> Tensor:
        """`[...]`: how many tokens of its sequence count, at least 1."""
        return self.sum(self.mask.to(dtype)).clamp(min=1.0)

    def mean(self, values: Tensor) -> Tensor:
        """`[...]`: for every token the mean of its sequence's counted values; 0 where none counts."""
        return self.sum(values) / self.count(values.dtype)

    def max(self, values: Tensor) -> Tensor:
        """`[...]`: for every token the greatest of its sequence's counted values; -inf where none counts."""
        values = torch.where(self.mask, values, -torch.inf)
        if self._run is None:
            padded = torch.nn.functional.pad(values, (0, 1), value=-torch.inf)  # a row may have no places at all
            return padded.amax(-1, keepdim=True).expand_as(values)
        flat = values.reshape(-1)
        most = torch.full_like(flat, -torch.inf).scatter_reduce(0, self._run, flat, "amax")
        return most[self._run].reshape(values.shape)

    def first(self) -> Tensor:
        """`[...]` bool: the first counted token of every sequence."""
        one = self.mask.to(wide_dtype(self.mask.device))
        return self.mask & (self.discounted(one, 1.0) == self.sum(one))

    def discounted(self, values: Tensor, factor: float | Tensor) -> Tensor:
        """`y_t = values_t + factor_t y_next`, next the following counted token of the sequence; 0 where not counted."""
        carry = torch.where(self.mask, factor * torch.ones_like(values), 1.0)
        return torch.where(self.mask, self._scan(torch.where(self.mask, values, 0.0), carry), 0.0)

    def following(self, values: Tensor) -> Tensor:
        """`[...]`: the value of the following counted token of the sequence, 0 after the last."""
        carry = (~self.mask).to(values.dtype)
        from_here = self._lines(self._scan(torch.where(self.mask, values, 0.0), carry))
        return (_ahead(from_here, 1) * self._connected(from_here)).reshape(values.shape)

    def _scan(self, values: Tensor, carry: Tensor) -> Tensor:
        """`y_t = values_t + carry_t y_{t+1}` within a sequence, by doubling: log2 T steps over all tokens."""
        total, carry = self._lines(values), self._lines(carry)
        carry = carry * self._connected(total)
        step = 1
        while step < total.shape[-1]:
            total = total + carry * _ahead(total, step)
            carry = carry * _ahead(carry, step)
            step *= 2
        return total.reshape(values.shape)

    def _lines(self, values: Tensor) -> Tensor:
        return values if self._run is None else values.reshape(-1)

    def _connected(self, lines: Tensor) -> Tensor:
        """1 where the next token of the line belongs to the same sequence."""
        if self._run is None:
            return _ahead(torch.ones_like(lines), 1)
        return _ahead((self._run.diff(prepend=self._run[:1]) == 0).to(lines.dtype), 1)


def _ahead(lines: Tensor, step: int) -> Tensor:
    """The values `step` places further on the last axis, 0 beyond its end."""
    return torch.nn.functional.pad(lines[..., step:], (0, min(step, lines.shape[-1])))


def _expect(name: str, value: Tensor, dtype: torch.dtype, shape: torch.Size) -> None:
    if value.dtype != dtype or value.shape != shape:
        got = f"{value.dtype} {list(value.shape)}"
        raise ValueError(f"{name}: expected {dtype} of shape {list(shape)}, got {got}")


def sequences_of(loss: Loss, like: Tensor, mask: Tensor | None, sequence: Tensor | None) -> Sequences:
    """The sequences of a loss's tokens, all of which count if there is no mask.

    Raises:
        ValueError: `mask` or `sequence` has another shape than `like`, or another dtype than it should.
    """
    if mask is not None and mask.shape != like.shape:
        raise ValueError(f"{loss.name}: mask must have shape {tuple(like.shape)}, got {tuple(mask.shape)}")
    return Sequences(torch.ones_like(like, dtype=torch.bool) if mask is None else mask, sequence)


def sequence_logprob(
    logprob: Tensor,
    *,
    sequence: Tensor | None = None,
    num_sequences: int | None = None,
    mask: Tensor | None = None,
    average: bool = False,
) -> Tensor:
    """Log-probabilities of sequences from those of their tokens: `sum_t m_t logprob_t`, or that over `sum_t m_t`.

    Args:
        logprob: `[B, T]`, one row per sequence; or flat `[N]` with `sequence`.
        sequence: `[N]` int64, the number of the sequence that each token belongs to (in any order).
        num_sequences: B of the flat form; the largest number in `sequence` plus one by default (a GPU is waited
            for).
        mask: bool, of the shape of `logprob`: the tokens that count. All by default; the ops give 0 for an ignored
            token, so that a sum needs no mask and an average does.
        average: divide by the number of tokens that count (IPO); a sequence without any gives 0.

    Returns:
        `[B]`, float32 (float64 for float64 input): bf16 cannot count beyond 256. Differentiable.

    Raises:
        ValueError, TypeError: a shape or a dtype does not fit.
        IndexError: (CPU) a number in `sequence` is outside `[0, num_sequences)`.
    """
    _check_tokens(logprob, sequence, num_sequences, mask)
    logprob = logprob.to(torch.promote_types(logprob.dtype, torch.float32))
    if mask is not None:
        logprob = logprob.masked_fill(~mask, 0.0)
    if sequence is not None and num_sequences is None:
        num_sequences = int(sequence.max()) + 1 if sequence.numel() else 0
    total = _sum_by_sequence(logprob, sequence, num_sequences)
    if not average:
        return total
    counted = torch.ones_like(logprob) if mask is None else mask.to(logprob.dtype)
    return total / _sum_by_sequence(counted, sequence, num_sequences).clamp(min=1.0)


def _sum_by_sequence(values: Tensor, sequence: Tensor | None, num_sequences: int | None) -> Tensor:
    if sequence is None or num_sequences is None:
        return values.sum(-1)
    # One token after another, where a thousand in float32 lose three digits.
    total = torch.zeros(num_sequences, dtype=wide_dtype(values.device), device=values.device)
    return total.index_add(0, sequence, values.to(total.dtype)).to(values.dtype)


def _check_tokens(logprob: Tensor, sequence: Tensor | None, num_sequences: int | None, mask: Tensor | None) -> None:
    where = "sequence_logprob"
    if not logprob.is_floating_point():
        raise TypeError(f"{where}: logprob must be a floating-point tensor, got {logprob.dtype}")
    if logprob.dim() != (2 if sequence is None else 1):
        expected = "[B, T]; flat [N] needs `sequence`" if sequence is None else "[N] when `sequence` is given"
        raise ValueError(f"{where}: logprob must be {expected}; got shape {tuple(logprob.shape)}")
    if sequence is None and num_sequences is not None:
        raise ValueError(f"{where}: num_sequences={num_sequences} belongs to the flat form, with `sequence`")
    if sequence is not None and (sequence.dtype != torch.int64 or sequence.shape != logprob.shape):
        got = f"{sequence.dtype} {tuple(sequence.shape)}"
        raise ValueError(f"{where}: sequence must be int64 of shape {tuple(logprob.shape)}, got {got}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != logprob.shape):
        got = f"{mask.dtype} {tuple(mask.shape)}"
        raise ValueError(f"{where}: mask must be bool of shape {tuple(logprob.shape)}, got {got}")
