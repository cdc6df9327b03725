"""Where the answers of a conversation stand in the text that a chat template makes of it.

A template is a program that turns a whole conversation into one text, and it says nothing of which part came from which
turn. Many write a turn otherwise once later ones follow: Qwen 3 leaves the thinking of earlier answers out, Phi 3 ends
every text with an end token, GPT-OSS ends the last answer with a mark of its own. So an answer is looked for where it
stands in the text of the whole conversation, which is what the model reads:

1. The conversation is rendered once more with a mark behind what every turn says. Without the marks it must be the same
   text; with them it tells where each turn's text ends.
2. The conversation before an answer is rendered with the generation prompt. What then follows the last mark is how an
   answer begins: as far as the whole text agrees with it, it is prompt and not answer.
3. The conversation up to the answer is rendered. What then follows the last mark is how an answer ends.

Steps 2 and 3 are made once for every kind of turn, so the cost grows with the length of the conversation. Nothing is
tokenised on the way. Empty thinking that a template writes for a turn without any, as Qwen 3's does, is part of the
prompt: it is the prompt for an answer without thinking.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from logitless.training.chat import ChatTemplate
from logitless.training.errors import InputError
from logitless.training.marks import Marks, Place, answers, called, said, says_something, thoughts, written
from logitless.training.turns import Turn

Span = tuple[int, int]  # of characters
_Kind = tuple[str, bool, str, bool]  # a turn's role, whether it calls tools, the space at its end; a prompt behind it?

_NO_THINKING = re.compile(r"\s*(<think>)?\s*</think>\s*")


class _Tail(NamedTuple):
    """The end of a rendering, behind its last mark."""

    size: int  # turns that are rendered
    turn: int | None  # the marked turn; None if there is none
    before: str  # the text up to the mark
    text: str  # the text behind it


class Conversation:
    """The text of a conversation under a chat template, and where its answers stand.

    Args:
        template: the template.
        turns: the turns, each with a role and a string as content.
        origin: where the row stands, for messages.
        settings: further variables of the template, such as tools.

    Raises:
        InputError: the template refuses the conversation, or leaves out the tools, or what a role says that it does
            not know.
    """

    def __init__(
        self, template: ChatTemplate, turns: Sequence[Turn], origin: str, settings: Mapping[str, Any] | None = None
    ) -> None:
        self.template, self.turns, self.origin, self.settings = template, turns, origin, settings or {}
        self.text = template.render(turns, origin, self.settings)
        for index, turn in enumerate(turns):
            if turn["role"] != "assistant" and not self._is_written(index):
                raise InputError(
                    f"{origin}: turn {index + 1}: the tokenizer's chat template leaves content out that the role "
                    f"{turn['role']!r} says; name a role that it knows, or use another template (chat_template_path)"
                )
        if self.settings.get("tools") and not self._writes_tools():
            raise InputError(
                f"{origin}: tools: the tokenizer's chat template writes none of them; use one that does "
                "(chat_template_path), or leave the column out to train without it"
            )
        self._known: dict[_Kind, str] = {}  # how texts end behind a kind of turn
        self._unspoken: dict[_Kind, str | None] = {}  # and would end behind a turn that says nothing, if it did

    def answer(self, index: int) -> Span:
        """Where an assistant's turn stands: behind the prompt for it, up to what ends it.

        Raises:
            InputError: the place cannot be told, or the turn's text does not stand there.
        """
        start = self._start(index)
        span = start, max(start, self._end(index, start))
        self._require_text(index, span, alone=True)
        return span

    def completion(self, index: int) -> Span:
        """Where the turns from `index` on stand, an answer without its prompt.

        Raises:
            InputError: the template writes the turns before them otherwise once these follow, or not all of them.
        """
        if self.turns[index]["role"] == "assistant":
            start = self._start(index, appended=True)
        else:
            start = self._agreed(self._appended(self._tail(index, generation_prompt=False)))[0] if index else 0
        span = start, len(self.text)
        for number, turn in enumerate(self.turns[index:], index):
            if turn["role"] == "assistant":
                self._require_text(number, span, alone=False)
        return span

    def _is_written(self, index: int) -> bool:
        """Whether the text of a turn stands in what the template wrote, and not only as a part of another text."""
        text = said(self.turns[index])
        marked = not self._found[0] or index in self._text_ends
        return not text or (marked and any(form in self.text for form in written(text)))

    def _writes_tools(self) -> bool:
        """Whether the text is another one than that of the conversation without tools."""
        try:
            return self.template.render(self.turns, self.origin, {**self.settings, "tools": None}) != self.text
        except InputError:  # the template asks for them
            return True

    def _start(self, index: int, appended: bool = False) -> int:
        """Behind the prompt for an answer, which has the empty thinking that the template writes and not the turn."""
        place = self._behind_prompt(index, appended)
        turn = self.turns[index]
        own = "</think>" in turn["content"] and not thoughts(turn)  # the turn writes that it does not think
        empty = None if own else _NO_THINKING.match(self.text, place)
        return empty.end() if empty else place

    def _behind_prompt(self, index: int, appended: bool) -> int:
        if not index:
            return self._start_by_prompt(index)
        last = index == len(self.turns) - 1  # which has a prompt of its own in many templates
        try:
            tail = self._tail(index, generation_prompt=True, known=not (appended or last))
        except InputError:  # many templates refuse a conversation without a user
            return self._start_by_prompt(index)
        place, whole = self._agreed(self._appended(tail) if appended else tail)
        own = self._text_start(index)
        return place if whole or own is None else min(place, own)

    def _start_by_prompt(self, index: int) -> int:
        """Behind the last generation prompt before the turn's text, or behind as much of it as stands there."""
        own = self._text_start(index)
        if own is None:
            raise InputError(
                f"{self.origin}: turn {index + 1}: nothing tells where the answer begins: the tokenizer's chat "
                "template refuses the turns before it, and it has no content"
            )
        low = max((end for turn, end in self._ends.items() if turn < index), default=0)
        prompt = self.template.generation_prompt(self.settings)
        for length in range(len(prompt), 0, -1):
            place = self.text.rfind(prompt[:length], low, own)
            if place >= 0:
                return place + self.template.agreement(prompt, self.text[place:own])
        return own

    def _end(self, index: int, start: int) -> int:
        if index == len(self.turns) - 1:
            return len(self.text)
        if not says_something(self.turns[index]):
            return self._end_of_silence(index, start)
        tail = self._answered(index)
        place, whole = self._agreed(tail)
        if not whole and tail.turn == index and not self.template.has_special(self.text[self._ends[index] : place]):
            # the last answer of all is ended by another token than an earlier one
            place += self.template.first_special(self.text[place:])
        return place

    def _end_of_silence(self, index: int, start: int) -> int:
        """Behind what would end an answer, where one says nothing."""
        tail = self._tail_of_a_word(index)
        if tail is None:
            return self._agreed(self._answered(index))[0]
        opening = tail[: self.template.first_special(tail)] or tail
        place = self.text.find(opening, start, min((p.at for p in self._found[1] if p.turn > index), default=None))
        return start if place < 0 else place + self.template.agreement(tail, self.text[place : place + len(tail) + 64])

    def _tail_of_a_word(self, index: int) -> str | None:
        """How the text would end behind this answer if it said something; None if that is not found."""
        kind = self._kind(index, False)
        if kind not in self._unspoken:
            spoken = [*self.turns[:index], {**self.turns[index], "content": "a"}]
            stand_in = Conversation(self.template, spoken, self.origin, self.settings)
            end = stand_in._ends.get(index)
            self._unspoken[kind] = None if end is None else stand_in.text[end:]
        return self._unspoken[kind]

    def _answered(self, index: int) -> _Tail:
        """How the text ends behind an answer."""
        try:
            return self._tail(index + 1, generation_prompt=False, known=True)
        except InputError:
            # the template refuses a conversation without a user; answers behind one may end alike
            kind = self._kind(index, False)
            for later in answers(self.turns):
                if later > index and kind not in self._known:
                    self._tail(later + 1, generation_prompt=False)
            if kind not in self._known or index not in self._ends:
                raise
            return _Tail(index + 1, index, "", self._known[kind])

    def _appended(self, tail: _Tail) -> _Tail:
        """The tail, of turns that the template writes alike with and without those that follow."""
        if not self.text.startswith(tail.before):
            raise InputError(
                f"{self.origin}: the tokenizer's chat template renders the prompt differently once an answer follows, "
                "so the completion's place is unknown; use a template that only appends (chat_template_path)"
            )
        return tail

    def _agreed(self, tail: _Tail) -> tuple[int, bool]:
        """Up to where the text goes on as the tail does, and whether it is all of the tail."""
        behind = self._place(tail)
        length = self.template.agreement(tail.text, self.text[behind : behind + len(tail.text) + 64])
        last = tail.size - 1
        if last != tail.turn and said(self.turns[last]) not in tail.text[:length]:
            raise self._rewritten(last)
        return behind + length, length == len(tail.text)

    def _place(self, tail: _Tail) -> int:
        if tail.turn is None:
            return 0
        if tail.turn not in self._ends:
            raise self._rewritten(tail.turn)
        return self._ends[tail.turn]

    def _tail(self, size: int, *, generation_prompt: bool, known: bool = False) -> _Tail:
        """How the text of the first `size` turns ends.

        Args:
            known: take it from an earlier turn of the same kind, if there is one.
        """
        kind = self._kind(size - 1, generation_prompt)
        if known and kind in self._known and size - 1 in self._ends:
            tail = _Tail(size, size - 1, "", self._known[kind])
            if not self.turns[size - 1].get("tool_calls") or self._agreed(tail)[1]:
                return tail
        every, turns = self._found[0], self.turns[:size]
        turns = turns if every is None else self._marks.put(turns, every=every)
        text, places = self._marks.find(
            self.template.render(turns, self.origin, self.settings, generation_prompt=generation_prompt)
        )
        if not places:
            return _Tail(size, None, "", text)
        if places[-1].turn == size - 1:
            self._known[kind] = text[places[-1].at :]
        return _Tail(size, places[-1].turn, text[: places[-1].at], text[places[-1].at :])

    def _kind(self, index: int, generation_prompt: bool) -> _Kind:
        turn = self.turns[index]
        space = turn["content"][len(turn["content"].rstrip()) :]
        return turn["role"], bool(turn.get("tool_calls")), space, generation_prompt

    @cached_property
    def _marks(self) -> Marks:
        return Marks(self.text)

    @cached_property
    def _found(self) -> tuple[bool | None, list[Place]]:
        """Whether every turn is marked, or the assistant's alone, or (None) none; and where the marks are.

        A template may read what a turn says, and write another text where a mark is in it.
        """
        for every in (True, False):
            try:
                marked = self.template.render(self._marks.put(self.turns, every=every), self.origin, self.settings)
            except InputError:
                continue
            text, places = self._marks.find(marked)
            if text == self.text:
                return every, places
        return None, []

    @cached_property
    def _ends(self) -> dict[int, int]:
        """Where the last mark of each turn stands that the template writes."""
        return {place.turn: place.at for place in self._found[1]}

    @cached_property
    def _text_ends(self) -> dict[int, int]:
        """Where the text of each turn ends that the template writes."""
        return {place.turn: place.at for place in self._found[1] if place.ends_text}

    def _text_start(self, index: int) -> int | None:
        """Where the turn's text begins, without the space around it; None if it was not found."""
        return self._text_ends[index] - len(said(self.turns[index])) if index in self._text_ends else None

    def _require_text(self, index: int, span: Span, *, alone: bool) -> None:
        """Raises unless all that the turn says stands in the span, and nothing of other turns if it is `alone`."""
        if any(place.turn != index and span[0] < place.at < span[1] for place in self._found[1] if alone):
            raise self._rewritten(index)
        turn, text = self.turns[index], self.text[slice(*span)]
        own, core = self._text_start(index), said(turn)
        stands = core in text if own is None else self.text[own : own + len(core)] == core and own < span[1]
        if core and not stands:
            raise self._rewritten(index)
        for thought in thoughts(turn):
            if thought not in text and not self._is_written_last(thought, index):
                raise self._left_out(index, "reasoning", thought)
        for word in called(turn):
            if not any(form in text for form in written(word)):
                raise self._left_out(index, "tool_calls", word)

    def _is_written_last(self, thought: str, index: int) -> bool:
        """Whether the template writes the thought where its turn is the last: of two, or else of the conversation."""
        for turns in ([{"role": "user", "content": "a"}, self.turns[index]], self.turns[: index + 1]):
            try:
                if thought in self.template.render(turns, self.origin, self.settings):
                    return True
            except InputError:  # many templates refuse a turn out of its place
                continue
        return False

    def _left_out(self, index: int, key: str, what: str) -> InputError:
        return InputError(
            f"{self.origin}: turn {index + 1}: the tokenizer's chat template leaves {key} out: {what[:40]!r} does not "
            "stand in what it writes, so it would not be learned; use a template that writes it (chat_template_path), "
            "or remove it"
        )

    def _rewritten(self, index: int) -> InputError:
        return InputError(
            f"{self.origin}: turn {index + 1}: the tokenizer's chat template rewrites content: the turn's text does "
            "not stand in what it writes, or not where an answer is; use another template (chat_template_path), rows "
            "of prompt and completion, or train on every token (--no_assistant_only_loss)"
        )
