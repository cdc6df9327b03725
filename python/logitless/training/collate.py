"""From token sequences to batches: which rows go where, and in which shape.

Three shapes, chosen once per run:

    padded         [B, T] rows, padded on the right, with an attention mask
    packed         [B, T] rows that each hold several sequences; position_ids restart at each, and no attention mask is
                   given, which is how Transformers' SDPA and eager attention find the boundaries
    padding-free   [1, total], all sequences one after the other; flash attention finds the boundaries likewise

Labels of a sequence's first token are always -100 (`render.py`), so the shifted loss never crosses a boundary.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.nn import functional

from logitless.training.columns import ABSENT
from logitless.training.examples import IGNORED, Example

Inputs = Mapping[str, torch.Tensor]  # per-token inputs of the loss, [T] each, aligned with an example's tokens
Stored = list[tuple[Inputs, ...]]  # the inputs of every item and example, where they were computed before


@dataclass(frozen=True)
class Piece:
    """One sequence on its way into a batch."""

    example: Example
    loss_inputs: Inputs = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Position t of a loss input holds the value for predicting token t + 1."""

    input_ids: torch.Tensor  # [B, T] int64
    labels: torch.Tensor  # [B, T] int64, -100 where nothing counts
    attention_mask: torch.Tensor | None = None  # [B, T] int64; padded batches only
    position_ids: torch.Tensor | None = None  # [B, T] int64; packed and padding-free batches only
    cu_seqlens: torch.Tensor | None = None  # [sequences + 1] int32, in the flattened rows; packed and padding-free
    loss_inputs: dict[str, torch.Tensor] = field(default_factory=dict)  # [B, T] or [B, T, K] each
    tokens: int = 0  # without padding
    examples: tuple[Example, ...] = ()  # the sequences, in their order

    @property
    def counted(self) -> int:
        """Tokens whose prediction counts in the loss."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    def to(self, device: torch.device) -> Batch:
        """A copy of the batch on another device."""

        def move(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return tensor if tensor is None else tensor.to(device, non_blocking=True)

        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            attention_mask=move(self.attention_mask),
            position_ids=move(self.position_ids),
            cu_seqlens=move(self.cu_seqlens),
            loss_inputs={name: tensor.to(device, non_blocking=True) for name, tensor in self.loss_inputs.items()},
        )

    def with_inputs(self, **inputs: Any) -> Batch:
        """A copy of the batch with further inputs of the loss."""
        return replace(self, loss_inputs={**self.loss_inputs, **inputs})

    def without_inputs(self, *names: str) -> Batch:
        """A copy of the batch without these inputs."""
        return replace(self, loss_inputs={name: x for name, x in self.loss_inputs.items() if name not in names})

    def model_inputs(self) -> dict[str, torch.Tensor]:
        """What the model's forward is given, labels apart."""
        inputs = {"input_ids": self.input_ids}
        if self.attention_mask is not None:
            inputs["attention_mask"] = self.attention_mask
        if self.position_ids is not None:
            inputs["position_ids"] = self.position_ids
        return inputs


def by_sequence(batch: Batch, values: torch.Tensor) -> list[torch.Tensor]:
    """Values of a batch, `[B, T]`, as one tensor `[T]` for each of its sequences, without padding."""
    lengths = [len(example.input_ids) for example in batch.examples]
    if batch.cu_seqlens is None:
        return [row[:length].clone() for row, length in zip(values, lengths, strict=True)]
    return [part.clone() for part in values.flatten()[: sum(lengths)].split(lengths)]


def padded(pieces: Sequence[Piece], pad_token: int) -> Batch:
    """One row per sequence, padded on the right to the longest."""
    batch = packed([[piece] for piece in pieces], pad_token)
    lengths = torch.tensor([len(piece.example.input_ids) for piece in pieces])
    mask = torch.arange(batch.input_ids.shape[1]) < lengths[:, None]
    return replace(batch, attention_mask=mask.long(), position_ids=None, cu_seqlens=None)


def packed(packs: Sequence[Sequence[Piece]], pad_token: int) -> Batch:
    """One row per pack; the padding behind it is further sequences, in which nothing counts.

    None of them is longer than the batch's longest, so that their positions are ones that the model has.
    """
    lengths = [[len(piece.example.input_ids) for piece in pack] for pack in packs]
    width = max(sum(row) for row in lengths)
    longest = max(map(max, lengths))
    spans = [[*row, *_filled(width - sum(row), longest)] for row in lengths]

    def rows(fill: float, parts: Callable[[Piece], torch.Tensor]) -> torch.Tensor:
        return torch.stack([_row([parts(piece) for piece in pack], width, fill) for pack in packs])

    return Batch(
        input_ids=rows(pad_token, lambda piece: piece.example.input_ids.long()),
        labels=rows(IGNORED, lambda piece: piece.example.labels.long()),
        position_ids=torch.stack([torch.cat([torch.arange(span) for span in row]) for row in spans]),
        cu_seqlens=torch.tensor([0, *(span for row in spans for span in row)]).cumsum(0).int(),
        loss_inputs={name: rows(0.0, _same_width(name, packs)) for name in packs[0][0].loss_inputs},
        tokens=sum(map(sum, lengths)),
        examples=tuple(piece.example for pack in packs for piece in pack),
    )


def padding_free(pieces: Sequence[Piece]) -> Batch:
    """All sequences in one row."""
    return packed([pieces], 0)


def _filled(space: int, longest: int) -> list[int]:
    """Lengths of at most `longest` that fill the space."""
    return [min(longest, space - start) for start in range(0, space, longest)]


def _row(parts: list[torch.Tensor], width: int, fill: float) -> torch.Tensor:
    used = sum(len(part) for part in parts)
    return torch.cat([*parts, torch.full((width - used, *parts[0].shape[1:]), fill, dtype=parts[0].dtype)])


def _same_width(name: str, packs: Sequence[Sequence[Piece]]) -> Callable[[Piece], torch.Tensor]:
    """One of the loss inputs, `[T]`, or `[T, K]` with the K of the piece that has most."""
    width = max(math.prod(piece.loss_inputs[name].shape[1:]) for pack in packs for piece in pack)

    def values(piece: Piece) -> torch.Tensor:
        own = piece.loss_inputs[name]
        return own if own.dim() == 1 else functional.pad(own, (0, width - own.shape[1]), value=ABSENT)

    return values


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` grouped into packs of at most `capacity`: best-fit decreasing.

    The longest go first, each into the fullest pack that still has room. Deterministic; O(n log n) comparisons.
    Raises ValueError for a length above the capacity.
    """
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (space left, pack), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[index] > capacity:
            raise ValueError(f"length {lengths[index]} is above the capacity {capacity}")
        slot = bisect.bisect_left(room, (lengths[index], -1))
        if slot == len(room):
            packs.append([])
            space, pack = capacity, len(packs) - 1
        else:
            space, pack = room.pop(slot)
        packs[pack].append(index)
        bisect.insort(room, (space - lengths[index], pack))
    return packs


def consecutive(units: int, size: int) -> list[list[int]]:
    """range(units) in order, cut into lists of `size`; the last may be shorter."""
    return [list(range(start, min(start + size, units))) for start in range(0, units, size)]
