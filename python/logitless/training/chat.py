"""Chat templates: the text of a conversation, and where in it each answer stands.

A template is a program that turns a whole conversation into one text, and it says nothing of which part came from which
turn. Many write a turn otherwise once later ones follow: Qwen 3 leaves the thinking of earlier answers out, Phi 3 ends
every text with an end token, GPT-OSS ends the last answer with a mark of its own. So an answer is looked for where it
stands in the text of the whole conversation, which is what the model reads:

1. The conversation is rendered once more with a mark behind the text of every turn. Without the marks it must be the
   same text; with them it tells where the text of each turn ends.
2. The conversation before an answer is rendered with the generation prompt. What then follows the last mark is how an
   answer begins; as far as the whole text agrees with it, it is prompt and not answer.
3. The conversation up to the answer is rendered. What then follows the last mark is how an answer ends.

Steps 2 and 3 are the same for most turns of a conversation, so they are made once a kind of turn: the cost grows with
the length of the conversation. Nothing is tokenised on the way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from logitless.training.errors import InputError
from logitless.training.tokens import common_prefix

Turn = Mapping[str, Any]
Span = tuple[int, int]  # of characters

REASONING = ("reasoning_content", "reasoning", "thinking")  # the keys under which templates look for it
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_NO_THINKING = re.compile(r"\s*(<think>)?\s*</think>\s*")
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # Unicode gives them no meaning, so texts lack them


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: a Transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def render(
        self, turns: Sequence[Turn], origin: str, settings: Mapping[str, Any], *, generation_prompt: bool = False
    ) -> str:
        """The text of a conversation, with the beginning of an answer behind it if `generation_prompt`.

        Args:
            turns: the conversation; every content is a string.
            origin: where the row stands, for messages.
            settings: further variables of the template, such as tools.

        Raises:
            InputError: there is no template, or it refuses the conversation.
        """
        if not self.tokenizer.chat_template:
            raise InputError(
                f"{origin}: a chat row, but the tokenizer has no chat template; use the model's instruction-tuned "
                "variant, set chat_template in its tokenizer, or give prompt and completion as strings"
            )
        try:
            return self._text(self._form(turns), settings, generation_prompt)
        except Exception as error:  # a template is a program: it raises what its author or Jinja likes
            raise InputError(f"{origin}: the tokenizer's chat template refuses this row: {error}") from error

    def _text(self, turns: Sequence[Turn], settings: Mapping[str, Any], generation_prompt: bool = False) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                list(turns), tokenize=False, add_generation_prompt=generation_prompt, **settings
            )
        )

    def generated(self, turns: Sequence[Turn], settings: Mapping[str, Any]) -> list[bool] | None:
        """Which tokens the template marks as generated, by `{% generation %}`; None if it marks nothing."""
        if not self.tokenizer.is_fast or not _GENERATION.search(self.tokenizer.get_chat_template()):
            return None
        found = self.tokenizer.apply_chat_template(
            self._form(turns),
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"verbose": False},
            **settings,
        )
        return [bool(x) for x in found["assistant_masks"]]

    def generation_prompt(self, settings: Mapping[str, Any]) -> str:
        """What the template writes between a user's turn and the answer; "" if it refuses to tell."""
        turns = [{"role": "user", "content": "a"}]
        try:
            plain, prompt = (self.render(turns, "", settings, generation_prompt=asked) for asked in (False, True))
        except InputError:
            return ""
        return prompt[self.agreement(plain, prompt) :]

    def _form(self, turns: Sequence[Turn]) -> list[Turn]:
        """The turns in the form that this template reads."""
        return [change(turn) for turn in turns] if (change := self._change) is not None else list(turns)

    @cached_property
    def _change(self) -> Callable[[Turn], Turn] | None:
        """How turns are given to a template that finds their text nowhere else; None for most.

        Templates of models that see images may read lists of parts alone, and a few read arguments as JSON text.
        """
        call = {"type": "function", "function": {"name": "alpha", "arguments": {"alpha": "omega"}}}
        asked = {"role": "user", "content": "alpha"}
        for answer, change in (
            ({"role": "assistant", "content": "omega"}, _in_parts),
            ({"role": "assistant", "content": "", "tool_calls": [call]}, _with_text_arguments),
        ):
            if not self._finds([asked, answer]) and self._finds([change(asked), change(answer)]):
                return change
        return None

    def _finds(self, turns: Sequence[Turn]) -> bool:
        try:
            text = self._text(turns, {})
        except Exception:  # as in `render`
            return False
        return "alpha" in text and "omega" in text

    def agreement(self, a: str, b: str) -> int:
        """Length of the longest common start that cuts through no special token of either text."""
        length = common_prefix(a, b)
        if self._special is None or length == min(len(a), len(b)) == max(len(a), len(b)):
            return length
        for text in (a, b):
            for match in self._special.finditer(text):
                if match.start() < length < match.end():
                    length = match.start()
        return length

    @cached_property
    def _special(self) -> re.Pattern[str] | None:
        words = sorted(filter(str.strip, self.tokenizer.get_added_vocab()), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, words))) if words else None

    def first_special(self, text: str) -> int:
        """Length of the special token that the text begins with, or 0."""
        match = self._special.match(text) if self._special is not None else None
        return match.end() if match else 0


class _Tail(NamedTuple):
    """The end of a rendering, behind the mark of its last marked turn."""

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
        InputError: the template refuses the conversation.
    """

    def __init__(
        self, template: ChatTemplate, turns: Sequence[Turn], origin: str, settings: Mapping[str, Any] | None = None
    ) -> None:
        self.template, self.turns, self.origin, self.settings = template, turns, origin, settings or {}
        self.text = template.render(turns, origin, self.settings)
        self._known: dict[tuple[str, bool], str] = {}  # how texts end behind a plain turn of a role

    def answer(self, index: int) -> Span:
        """Where an assistant's turn stands: behind the prompt for it, up to what ends it.

        Raises:
            InputError: the place cannot be told, or the turn's text does not stand there.
        """
        start = self._start(index)
        span = start, max(start, self._end(index))
        self._require_text(index, span)
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
                self._require_text(number, span)
        return span

    def _start(self, index: int, appended: bool = False) -> int:
        """Behind the prompt for an answer, which has the empty thinking of a turn that does not think."""
        place = self._behind_prompt(index, appended)
        thinks = _thoughts(self.turns[index]) or "</think>" in self.turns[index]["content"]
        empty = None if thinks else _NO_THINKING.match(self.text, place)
        return empty.end() if empty else place

    def _behind_prompt(self, index: int, appended: bool) -> int:
        appended = appended or index == len(self.turns) - 1
        try:
            if not index:
                raise InputError("there is no conversation before the first turn")
            tail = self._tail(index, generation_prompt=True, known=not appended)
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
        low = max((end for turn, end in self._marked.items() if turn < index), default=0)
        prompt = self.template.generation_prompt(self.settings)
        for length in range(len(prompt), 0, -1):
            place = self.text.rfind(prompt[:length], low, own)
            if place >= 0:
                return place + self.template.agreement(prompt, self.text[place:own])
        return own

    def _end(self, index: int) -> int:
        if index == len(self.turns) - 1:
            return len(self.text)
        tail = self._answered(index)
        place, _ = self._agreed(tail)
        behind = self._place(tail)
        if place == behind and tail.text:  # the last answer of all is ended otherwise than an earlier one
            place += self.template.first_special(self.text[behind:])
        return place

    def _answered(self, index: int) -> _Tail:
        """How the text ends behind an answer."""
        try:
            return self._tail(index + 1, generation_prompt=False, known=True)
        except InputError:
            # the template refuses a conversation without a user; answers behind one may end alike
            kind = ("assistant", False)
            for later in range(index + 1, len(self.turns)):
                if kind not in self._known and self.turns[later]["role"] == "assistant":
                    self._tail(later + 1, generation_prompt=False, known=True)
            if kind not in self._known or index not in self._marked or _has_more(self.turns[index]):
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
        if last != tail.turn and _core(self.turns[last]) not in tail.text[:length]:
            raise self._rewritten(last)
        return behind + length, length == len(tail.text)

    def _place(self, tail: _Tail) -> int:
        if tail.turn is None:
            return 0
        if tail.turn not in self._marked:
            raise self._rewritten(tail.turn)
        return self._marked[tail.turn]

    def _tail(self, count: int, *, generation_prompt: bool, known: bool = False) -> _Tail:
        """How the text of the first `count` turns ends.

        Args:
            known: take it from an earlier turn of the same role, if there is nothing but a text in both.
        """
        last = self.turns[count - 1]
        kind = (last["role"], generation_prompt)
        plain = known and count - 1 in self._marked and not _has_more(last)
        if plain and kind in self._known:
            return _Tail(count, count - 1, "", self._known[kind])
        marked = self.template.render(
            self._with_marks(count), self.origin, self.settings, generation_prompt=generation_prompt
        )
        places = list(self._pattern.finditer(marked))
        if not places:
            return _Tail(count, None, "", marked)
        turn, text = int(places[-1][1]), marked[places[-1].end() :]
        if plain and turn == count - 1:
            self._known[kind] = text
        return _Tail(count, turn, self._pattern.sub("", marked[: places[-1].start()]), text)

    @cached_property
    def _mark(self) -> str:
        return next(character for character in _NONCHARACTERS if character not in self.text)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(f"{self._mark}(\\d+){self._mark}")

    @cached_property
    def _marks_all(self) -> bool | None:
        """Whether every turn can be marked, or (False) the assistant's alone, or (None) none without changing more."""
        for every in (True, False):
            if self._pattern.sub("", self._render_marked(every)) == self.text:
                return every
        return None

    def _render_marked(self, every: bool) -> str:
        try:
            turns = _marked(self.turns, self._mark, every)
            return self.template.render(turns, self.origin, self.settings)
        except InputError:
            return ""

    def _with_marks(self, count: int) -> Sequence[Turn]:
        every = self._marks_all
        return self.turns[:count] if every is None else _marked(self.turns[:count], self._mark, every)

    @cached_property
    def _marked(self) -> dict[int, int]:
        """Where the text of each turn ends that could be marked and was written."""
        if self._marks_all is None:
            return {}
        found, taken = {}, 0
        for match in self._pattern.finditer(self._render_marked(self._marks_all)):
            found[int(match[1])] = match.start() - taken
            taken += match.end() - match.start()
        return found

    def _text_start(self, index: int) -> int | None:
        """Where the turn's text begins, without the space around it; None if it was not found."""
        core = _core(self.turns[index])
        return self._marked[index] - len(core) if core and index in self._marked else None

    def _require_text(self, index: int, span: Span) -> None:
        """Raises unless all that the turn says stands in the span."""
        turn, text = self.turns[index], self.text[slice(*span)]
        own, core = self._text_start(index), _core(turn)
        stands = core in text if own is None else self.text[own : own + len(core)] == core and own < span[1]
        if core and not stands:
            raise self._rewritten(index)
        for said in _thoughts(turn):
            if said not in text and said not in self._as_last(index):
                raise self._left_out(index, "reasoning", said)
        for said in _calls(turn):
            if not any(form in text for form in _written(said)):
                raise self._left_out(index, "tool_calls", said)

    def _as_last(self, index: int) -> str:
        """The text of the conversation if it ended with this turn."""
        return self.template.render(self.turns[: index + 1], self.origin, self.settings)

    def _left_out(self, index: int, key: str, said: str) -> InputError:
        return InputError(
            f"{self.origin}: turn {index + 1}: the tokenizer's chat template leaves {key} out: {said[:40]!r} does not "
            "stand in what it writes, so it would not be learned; use a template that writes it (chat_template_path), "
            "or remove it"
        )

    def _rewritten(self, index: int) -> InputError:
        return InputError(
            f"{self.origin}: turn {index + 1}: the tokenizer's chat template rewrites content: the turn's text does "
            "not stand in what it writes, or not where an answer is; use another template (chat_template_path), rows "
            "of prompt and completion, or train on every token (--no_assistant_only_loss)"
        )


def _marked(turns: Sequence[Turn], mark: str, every: bool) -> list[Turn]:
    """The turns with a mark around their number behind their text."""
    return [
        _with_mark(turn, f"{mark}{index}{mark}") if every or turn["role"] == "assistant" else turn
        for index, turn in enumerate(turns)
    ]


def _with_mark(turn: Turn, mark: str) -> Turn:
    """The turn with a mark behind its text, or without one behind the last string of its calls, if there is any."""
    if _core(turn):
        content = turn["content"]
        end = len(content.rstrip())
        return {**turn, "content": content[:end] + mark + content[end:]}
    return _with_arguments(turn, lambda arguments: _behind_last(arguments, mark), last=True)


def _behind_last(value: Any, mark: str) -> Any:
    """The JSON value with a mark behind the last of the strings that end it."""
    if isinstance(value, str):
        return value + mark
    if isinstance(value, list) and value:
        return [*value[:-1], _behind_last(value[-1], mark)]
    if isinstance(value, Mapping) and value:
        *before, last = value.items()
        return {**dict(before), last[0]: _behind_last(last[1], mark)}
    return value


def _with_arguments(turn: Turn, change: Callable[[Any], Any], last: bool = False) -> Turn:
    """The turn with other arguments in all of its calls, or in the last."""
    calls = list(turn.get("tool_calls") or ())
    for number in range(len(calls))[-1 if last else 0 :]:
        call = calls[number]
        inner = call.get("function", call)
        inner = {**inner, "arguments": change(inner.get("arguments"))}
        calls[number] = {**call, "function": inner} if "function" in call else inner
    return {**turn, "tool_calls": calls} if calls else turn


def _core(turn: Turn) -> str:
    """The turn's text without the space around it, and without thinking that stands in front of it."""
    return str(turn.get("content") or "").rpartition("</think>")[2].strip()


def _has_more(turn: Turn) -> bool:
    """Whether the turn has more than a text."""
    return bool(turn.get("tool_calls")) or bool(_thoughts(turn))


def _thoughts(turn: Turn) -> list[str]:
    """What the turn thinks, as a key of its own or within its content."""
    inside, closed, _ = str(turn.get("content") or "").rpartition("</think>")
    said = [inside.rpartition("<think>")[2]] if closed else []
    said += [str(turn[key]) for key in REASONING if turn.get(key)][:1]
    return [text.strip() for text in said if text.strip()]


def _calls(turn: Turn) -> list[str]:
    """The names and values that the turn's tool calls consist of."""
    functions = [call.get("function", call) for call in turn.get("tool_calls") or ()]
    return [leaf for function in functions for leaf in [*_leaves(function.get("name")),
                                                        *_leaves(function.get("arguments"))]]  # fmt: skip


def _leaves(value: Any) -> list[str]:
    """The keys and the values, as text, that a JSON value consists of; true, false, null and numbers apart."""
    if isinstance(value, Mapping):
        return [leaf for key, part in value.items() for leaf in (str(key), *_leaves(part))]
    if isinstance(value, (list, tuple)):
        return [leaf for part in value for leaf in _leaves(part)]
    return [value] if isinstance(value, str) else []


def _written(value: str) -> tuple[str, ...]:
    """The forms in which templates write a string of a tool call."""
    return value, value.strip(), json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1], repr(value)[1:-1]


def _in_parts(turn: Turn) -> Turn:
    """The turn with its content as a list of one part."""
    return {**turn, "content": [{"type": "text", "text": turn["content"]}]}


def _with_text_arguments(turn: Turn) -> Turn:
    """The turn with the arguments of its calls as JSON text."""
    return _with_arguments(turn, lambda arguments: json.dumps(arguments, ensure_ascii=False))
