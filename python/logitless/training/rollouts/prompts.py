"""Rows as prompts that a model continues, and with the answer that a row has as a demonstration."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from logitless.training.checks import Extreme, Reach
from logitless.training.data import Row, require_text
from logitless.training.errors import InputError
from logitless.training.examples import IGNORED, Example, TokenizedData
from logitless.training.forms import Text, canonical_prompt
from logitless.training.render import Renderer


class Demonstration(NamedTuple):
    """A row's own answer, `[T]` int32 ids, behind the ids of its prompt, which its template may write otherwise."""

    prompt: torch.Tensor
    ids: torch.Tensor


class Prompt(NamedTuple):
    """One row to be answered."""

    ids: torch.Tensor
    """`[T]` int32, up to where an answer begins."""
    demonstration: Demonstration | None
    asked: Text
    """What a reward function is given: a string or turns."""
    columns: Mapping[str, Any]
    """All columns of the row, as its file has them."""
    origin: str


@dataclass(frozen=True)
class Prompts(TokenizedData):
    """The usable prompts of a dataset; an item is a prompt with its demonstration, of which nothing counts."""

    prompts: tuple[Prompt, ...] = ()

    def fingerprint(self) -> str:
        """A hash of every prompt, its demonstration and its columns, in order."""
        digest = hashlib.sha256(super().fingerprint().encode())
        for prompt in self.prompts:
            digest.update(repr(sorted((name, str(value)) for name, value in prompt.columns.items())).encode())
        return digest.hexdigest()

    def summary(self) -> str:
        """One line for the log."""
        shown = sum(prompt.demonstration is not None for prompt in self.prompts)
        line = f"{len(self.items)} of {self.rows} rows as prompts, {shown} with a demonstration"
        return f"{line} ({self.dropped} dropped: no room for a completion within max_length)" if self.dropped else line


def read_prompts(
    rows: Iterable[Row], renderer: Renderer, origin: str, *, room: int, demonstrations: bool, required: str = ""
) -> Prompts:
    """The rows as prompts.

    Args:
        renderer: of the tokenizer; its `max_length` bounds a prompt and a completion together.
        origin: of the rows, for messages.
        room: longest completion, in tokens. A prompt that leaves less is dropped: cut, it would ask something else.
        demonstrations: whether the rows' own answers are read, of which the first `room` tokens are shown, up to their
            end token.
        required: the loss that needs one of them at least; none by default.

    Raises:
        InputError: a row without a prompt, none that leaves room, or no demonstration where one is needed.
    """
    found, kept, total = [], [], 0
    for row in rows:
        require_text(row)
        prompt = _prompt_of(row, renderer, room if demonstrations else 0)
        total += 1
        if len(prompt.ids) + room <= renderer.max_length:
            found.append(prompt)
            kept.append(total - 1)
    if not found:
        raise InputError(
            f"{origin}: none of {total} prompts leaves room for {room} tokens (max_completion_length) within "
            f"max_length={renderer.max_length}"
        )
    if required and all(prompt.demonstration is None for prompt in found):
        raise InputError(
            f"{origin}: {required} reads demonstrations, and no row has an answer; expected prompt and completion, "
            "messages, or another form of docs/training.md, 'Forms of rows'"
        )
    return Prompts([(_whole(each),) for each in found], total, total - len(found), 0, tuple(kept), 0, tuple(found))


def _prompt_of(row: Row, renderer: Renderer, room: int) -> Prompt:
    asked = canonical_prompt(row, chat=bool(renderer.tokenizer.chat_template))
    ids = renderer.opening(asked)
    if not len(ids):
        raise InputError(f"{row.origin}: the prompt is empty, and the tokenizer has no start token to continue")
    shown = _answer_of(asked, renderer, room) if room and "completion" in asked.values else None
    return Prompt(ids, shown, asked.values["prompt"], row.values, row.origin)


def _answer_of(row: Row, renderer: Renderer, room: int) -> Demonstration | None:
    """What the row answers; None where nothing of it would be learned."""
    example = renderer.whole(row)
    counted = (example.labels != IGNORED).nonzero()[:, 0]
    counted = counted[counted > 0]  # a first token has nothing before it
    if not len(counted):
        return None
    start, end = int(counted[0]), int(counted[-1]) + 1
    ids = example.input_ids[start : min(end, start + room)]
    ends = torch.isin(ids, torch.tensor(written_ends(renderer.tokenizer, renderer.answer_end), dtype=ids.dtype))
    # what a template writes behind the end token no policy comes to
    return Demonstration(example.input_ids[:start], ids[: int(ends.nonzero()[0]) + 1] if ends.any() else ids)


def written_ends(tokenizer: Any, template_end: str) -> list[int]:
    """The ids that end an answer in text: the tokenizer's, and what its chat template ends one with, if not ""."""
    found = {tokenizer.eos_token_id} | ({tokenizer.convert_tokens_to_ids(template_end)} if template_end else set())
    return sorted(found - {None})


def _whole(prompt: Prompt) -> Example:
    ids = prompt.ids if prompt.demonstration is None else torch.cat(prompt.demonstration)
    return Example(ids, torch.full_like(ids, IGNORED))


def reach_of_prompts(prompts: Prompts, room: int) -> Reach:
    """What prompts and completions of at most `room` tokens ask of a model."""
    read = [(int(item[0].input_ids.max()), len(prompt.ids) + room, prompt.origin)
            for item, prompt in zip(prompts.items, prompts.prompts, strict=True)]  # fmt: skip
    largest, longest = max(read, key=lambda each: each[0]), max(read, key=lambda each: each[1])
    return Reach(read=Extreme(largest[0], largest[2]), length=Extreme(longest[1], longest[2]))
