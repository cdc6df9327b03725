"""Text that every machine with Python has, as sequences of token ids."""

from __future__ import annotations

from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor


def reference() -> str:
    """Topics of Python's language reference: 450 KB of English and code."""
    return "\n\n".join(topics[name] for name in sorted(topics))


def tokenised(tokenizer: Any, text: str) -> Tensor:
    """The ids of a text. `verbose=False`: it is cut into sequences before a model reads it, however long it is."""
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"])


def sequences(ids: Tensor, length: int) -> Tensor:
    """`[sequences, length + 1]` ids: a sequence's last is the next one's first. What is left over is dropped."""
    return ids.unfold(0, length + 1, length)
