"""Tokenised rows: sequences with labels that say where the loss counts, and what became of a dataset's rows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch

IGNORED = -100


class Example(NamedTuple):
    """One tokenised sequence; `labels` equal `input_ids` where the loss counts and -100 elsewhere."""

    input_ids: torch.Tensor  # [T] int32
    labels: torch.Tensor  # [T] int32
    inputs: Mapping[str, torch.Tensor] = MappingProxyType({})  # [T] each: the loss's inputs that are columns of the row


Item = tuple[Example, ...]  # (example,) of a token loss, (chosen, rejected) of a preference loss


@dataclass(frozen=True)
class TokenizedData:
    """The usable rows of a dataset and what happened to the others."""

    items: list[Item]
    rows: int
    dropped: int  # nothing that counts was left
    truncated: int
    kept: tuple[int, ...]  # the numbers of the rows that the items are, from 0
    ties: int = 0  # pairs whose two answers are the same tokens

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(len(example.input_ids) for item in self.items for example in item)

    @property
    def counted(self) -> int:
        """Tokens whose prediction counts in the loss."""
        return sum(int((example.labels != IGNORED).sum()) for item in self.items for example in item)

    def fingerprint(self) -> str:
        """A hash of every token and label in order: equal for equal training data only."""
        digest = hashlib.sha256()
        for example in (example for item in self.items for example in item):
            for tensor in (example.input_ids, example.labels, *example.inputs.values()):
                digest.update(len(tensor).to_bytes(8, "little"))
                digest.update(tensor.numpy().tobytes())
            digest.update("".join(example.inputs).encode())
        return digest.hexdigest()

    def summary(self) -> str:
        """One line for the log."""
        line = f"{len(self.items)} of {self.rows} rows, {self.tokens} tokens, loss on {self.counted}"
        notes = [f"{self.truncated} truncated"] if self.truncated else []
        notes += [f"{self.dropped} dropped: no token that counts within max_length"] if self.dropped else []
        notes += [f"{self.ties} dropped: chosen and rejected are the same tokens"] if self.ties else []
        return f"{line} ({'; '.join(notes)})" if notes else line
