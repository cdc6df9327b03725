"""From text to token ids, and from places in the text to places among the tokens."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple


class Encoded(NamedTuple):
    """The token ids of a text, and the way from a place in it to its tokens."""

    ids: list[int]
    token_at: Callable[[int], int]  # the first token that is not wholly before this character

    def between(self, span: tuple[int, int]) -> slice:
        """The tokens of a span of characters; one that reaches into the span from before belongs to it."""
        return slice(*map(self.token_at, span))

    def touching(self, span: tuple[int, int]) -> slice:
        """The tokens of a span of characters, with one that reaches into it or out of it."""
        begin, end = span
        return slice(self.token_at(begin), max(self.token_at(end), self.token_at(end - 1) + 1))


class TextEncoder:
    """A tokenizer that writes one start token and one end token, whoever else wants to add them.

    Args:
        tokenizer: a Transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def plain(self, text: str) -> Encoded:
        """A text between the tokenizer's start token and its end token, each once, also where the text has it.

        White space behind the text's own end token stays, as chat templates write it.
        """
        encoded = self.rendered(text)
        start, end = self._added
        start = [] if encoded.ids[: len(start)] == start else start
        written = encoded.ids[: encoded.token_at(len(text.rstrip()))]
        end = [] if end and written[-len(end) :] == end else end
        return Encoded([*start, *encoded.ids, *end], lambda place: len(start) + encoded.token_at(place))

    def opened(self, text: str) -> list[int]:
        """The ids of a text behind the tokenizer's start token, once, to be continued."""
        ids, (start, _) = self._ids(text), self._added
        return ids if ids[: len(start)] == start else [*start, *ids]

    def rendered(self, text: str) -> Encoded:
        """A text that has its special tokens already, as a chat template writes it.

        A tokenizer without offsets is asked again for the start of the text, whenever a place is looked up.
        """
        if not self.tokenizer.is_fast:
            ids = self._ids(text)
            return Encoded(ids, lambda place: common_prefix(self._ids(text[:place]), ids))
        found = self._call(text, return_offsets_mapping=True)
        ends = list(accumulate((end for _, end in found["offset_mapping"]), max))
        return Encoded(list(found["input_ids"]), lambda place: bisect_right(ends, place))

    @cached_property
    def _added(self) -> tuple[list[int], list[int]]:
        """What stands before and behind a text: what the tokenizer adds, or else the end-of-text token."""
        inner, whole = self._ids("a"), list(self.tokenizer("a", return_attention_mask=False)["input_ids"])
        place = next((i for i in range(len(whole)) if whole[i : i + len(inner)] == inner), 0)
        end = self.tokenizer.eos_token_id
        return whole[:place], whole[place + len(inner) :] or ([] if end is None else [end])

    def _ids(self, text: str) -> list[int]:
        return list(self._call(text)["input_ids"])

    def _call(self, text: str, **options: Any) -> Any:
        return self.tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False, **options)


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of the longest common start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
