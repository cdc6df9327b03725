"""The text that each token of a sequence adds, so that the pieces put together are the whole text.

A tokenizer of bytes cuts some characters into several tokens. Such a character belongs to the token that ends it, and
the tokens before it add nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED_CHARACTER = "\N{REPLACEMENT CHARACTER}"
#: The bytes of a character; a longer run without one is no text in UTF-8, and is shown as it decodes.
MOST_BYTES = 4


def token_pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """A text for each id. Special tokens are written out.

    A token is decoded behind the one before it, since tokenizers drop a space at the start of a text.
    """
    pieces: list[str] = []
    before = start = 0  # the tokens before `start` are written, and are decoded from `before` on
    for end in range(1, len(ids) + 1):
        known = _decoded(tokenizer, ids[before:start])
        text = _decoded(tokenizer, ids[before:end])
        waits = text.endswith(UNFINISHED_CHARACTER) and end < len(ids) and end - start < MOST_BYTES
        if waits:
            pieces.append("")
        else:
            pieces.append(text[len(known) :])
            before, start = start, end
    return pieces


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
