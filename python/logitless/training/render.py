"""From rows to tokens: the text of a row, the labels that say where the loss counts, truncation.

`forms.py` makes one of four forms of every row, named as in TRL's documentation:

    {"text": "..."}                                                every token counts
    {"prompt": ..., "completion": ...}                             the completion counts; strings or lists of turns
    {"messages": [{"role", "content"}, ...]}                       the assistant's turns count
    {"prompt": ..., "chosen": ..., "rejected": ...}                two completions of one prompt

A token counts where its label is not -100. The whole text is tokenised once, so that the model reads the same tokens in
training as in a later conversation. A token that spans the start of an answer belongs to the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

from logitless.training.chat import ChatTemplate
from logitless.training.columns import ABSENT, TARGET_IDS, TOKEN_WEIGHT, read_columns
from logitless.training.conversation import Conversation
from logitless.training.data import Row, require_text
from logitless.training.errors import InputError
from logitless.training.examples import IGNORED, Example, Item, TokenizedData
from logitless.training.forms import canonical, canonical_pair, prompts_are_repeated
from logitless.training.marks import answers, says_something
from logitless.training.tokens import Encoded, TextEncoder
from logitless.training.turns import LEARNED, Turn, read_variables

VARIABLES = "chat_template_kwargs"  # the column of further variables of the template, as in TRL


class _Talk(NamedTuple):
    """A conversation and its tokens."""

    conversation: Conversation
    encoded: Encoded
    unlearned: frozenset[int]  # turns that say that they are not to be learned

    def without_unlearned(self, example: Example) -> Example:
        """The example, of which the turns do not count that are not to be learned."""
        for index in sorted(self.unlearned):
            example.labels[self.encoded.between(self.conversation.answer(index))] = IGNORED
        return example


@dataclass(frozen=True)
class Renderer:
    """Turns rows into token sequences with one tokenizer.

    Args:
        tokenizer: a Transformers tokenizer; chat rows need its chat template.
        max_length: longest sequence, in tokens; longer ones lose their end or their start.
        truncation_mode: "keep_start" or "keep_end".
        assistant_only: whether only the assistant's turns count. None: in rows of messages, unless `completion_only` is
            False; in a completion every turn counts. Preference rows always are completions.
        completion_only: whether only the completion of a prompt counts. None: yes.
        text_field: column of plain text.
        columns: columns that are inputs of the loss, which every row must have.
        single: those of them that have one value a row.
    """

    tokenizer: Any
    max_length: int
    truncation_mode: str = "keep_start"
    assistant_only: bool | None = None
    completion_only: bool | None = None
    text_field: str = "text"
    columns: tuple[str, ...] = ()
    single: tuple[str, ...] = ()

    @cached_property
    def _encoder(self) -> TextEncoder:
        return TextEncoder(self.tokenizer)

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer)

    def sequences(self, rows: Iterable[Row], origin: str) -> TokenizedData:
        """Rows of text, prompt-completion or messages, as one example each."""
        return self._collect(rows, origin, lambda row: (self._with_columns(self.whole(row), row),))

    def pairs(self, rows: Iterable[Row], origin: str) -> TokenizedData:
        """Preference rows, as (chosen, rejected)."""
        rows = list(rows)
        repeats = prompts_are_repeated(rows)
        return self._collect(rows, origin, lambda row: self._pair(row, repeats))

    def _collect(self, rows: Iterable[Row], origin: str, tokenize: Callable[[Row], Item]) -> TokenizedData:
        """Tokenises and cuts every row.

        A row of which an example has nothing left that counts is dropped whole, and so is a pair of equal tokens.
        """
        items, kept, total, truncated, ties = [], [], 0, 0, 0
        for row in rows:
            require_text(row)
            whole = tokenize(row)
            item = tuple(self._cut(example) for example in whole)
            total += 1
            truncated += any(len(a.labels) != len(b.labels) for a, b in zip(item, whole, strict=True))
            counts = all((example.labels != IGNORED).any() for example in item)
            tied = counts and len(item) == 2 and item[0].input_ids.equal(item[1].input_ids)
            ties += tied
            if counts and not tied:
                items.append(item)
                kept.append(total - 1)
                _require_ids(item, row)
        if not items:
            same = f", or chosen and rejected that differ ({ties} are the same tokens)" if ties else ""
            raise InputError(
                f"{origin}: none of {total} rows has a token that counts within max_length={self.max_length}{same}"
            )
        return TokenizedData(items, total, total - len(items) - ties, truncated, tuple(kept), ties)

    def _cut(self, example: Example) -> Example:
        keep = slice(self.max_length) if self.truncation_mode == "keep_start" else slice(-self.max_length, None)
        labels = example.labels[keep].clone()
        labels[:1] = IGNORED  # nothing comes before the first token to predict it from
        inputs = {name: values[keep] for name, values in example.inputs.items()}
        return Example(example.input_ids[keep], labels, inputs)

    def _with_columns(self, example: Example, row: Row, side: str = "") -> Example:
        counts = example.labels != IGNORED
        inputs = read_columns(self.columns, row, counts, single=self.single, side=side)
        labels = example.labels
        if TOKEN_WEIGHT in inputs:
            labels = labels.clone()
            labels[1:][inputs[TOKEN_WEIGHT][:-1] == 0] = IGNORED
        return example._replace(labels=labels, inputs=inputs)

    def whole(self, row: Row) -> Example:
        """A row of text, prompt-completion or messages, before it is cut to `max_length`."""
        row = canonical(row, text_field=self.text_field, chat=bool(self.tokenizer.chat_template))
        values = row.values
        if "messages" in values:
            return self._messages(values["messages"], row)
        if "prompt" in values:
            return self._completion(values["prompt"], values["completion"], row)
        self._refuse_masks(row, assistant_only=self.assistant_only, completion_only=self.completion_only)
        return _example(self._encoder.plain(values[self.text_field]), [slice(None)])

    def opening(self, row: Row) -> torch.Tensor:
        """A row of `canonical_prompt`, up to where an answer begins: `[T]` int32 ids."""
        prompt = row.values["prompt"]
        if isinstance(prompt, str):
            return torch.tensor(self._encoder.opened(prompt), dtype=torch.int32)
        text = self._template.render(self._plain(prompt), row.origin, self._settings(row), generation_prompt=True)
        return torch.tensor(self._encoder.rendered(text).ids, dtype=torch.int32)

    @property
    def answer_end(self) -> str:
        """The special token with which the chat template ends an answer; "" if there is none."""
        return self._template.end if self.tokenizer.chat_template else ""

    def _pair(self, row: Row, repeats: bool) -> Item:
        row = canonical_pair(row, chat=bool(self.tokenizer.chat_template), repeats=repeats)
        return tuple(
            self._with_columns(self._completion(row.values["prompt"], row.values[side], row, pair=True), row, side)
            for side in ("chosen", "rejected")
        )

    def _completion(self, prompt: Any, completion: Any, row: Row, pair: bool = False) -> Example:
        """Prompt and completion, both strings or both lists of turns; the completion counts, and all of a pair's."""
        whole = self.completion_only is False and not pair
        if isinstance(prompt, str):
            self._refuse_masks(row, assistant_only=self.assistant_only)
            encoded = self._encoder.plain(prompt + completion)
            return _example(encoded, [slice(0 if whole else encoded.token_at(len(prompt)), None)])
        talk = self._talk([*prompt, *completion], row)
        counted = talk.encoded.between(talk.conversation.completion(len(prompt)))
        if self.assistant_only and not pair:
            return self._answers(talk, 0 if whole else len(prompt))
        return talk.without_unlearned(_example(talk.encoded, [slice(None) if whole else counted]))

    def _messages(self, turns: list[Any], row: Row) -> Example:
        """A whole conversation; the assistant's turns count, or all of it."""
        every = not self.assistant_only and (self.assistant_only is False or self.completion_only is False)
        if not every and not answers(turns):
            roles = ", ".join(dict.fromkeys(turn["role"] for turn in turns))
            raise InputError(f"{row.origin}: messages has no assistant turn to learn from; the roles are {roles}")
        talk = self._talk(turns, row)
        return talk.without_unlearned(_example(talk.encoded, [slice(None)])) if every else self._answers(talk)

    def _talk(self, turns: Sequence[Turn], row: Row) -> _Talk:
        conversation = Conversation(self._template, self._plain(turns), row.origin, self._settings(row))
        unlearned = frozenset(index for index, turn in enumerate(turns) if not turn.get(LEARNED, True))
        return _Talk(conversation, self._encoder.rendered(conversation.text), unlearned)

    def _plain(self, turns: Sequence[Turn]) -> list[Turn]:
        """The turns as a template reads them, without our marks."""
        plain = [{"content": "", **{key: value for key, value in turn.items() if key != LEARNED}} for turn in turns]
        return list(map(self._ended_once, plain))

    def _settings(self, row: Row) -> dict[str, Any]:
        """The variables that the row gives its template."""
        settings: dict[str, Any] = read_variables(row.values.get(VARIABLES), VARIABLES, row.origin)
        if taken := self._template.reserved & settings.keys():
            raise InputError(
                f"{row.origin}: {VARIABLES}, {min(taken)}: expected variables that are the chat template's own"
            )
        return settings | {"tools": row.values.get("tools")}

    def _ended_once(self, turn: Turn) -> Turn:
        """An assistant's turn without an end token of its own behind its text, where the template writes it."""
        text, end = turn["content"].rstrip(), self._template.end
        if turn["role"] != "assistant" or not end or not text.endswith(end):
            return turn
        return {**turn, "content": text.removesuffix(end)}

    def _answers(self, talk: _Talk, first: int = 0) -> Example:
        """The assistant's turns from `first` on count, as far as the template marks anything as generated."""
        conversation, encoded, unlearned = talk
        learned = [i for i in answers(conversation.turns) if i >= first and i not in unlearned]
        spans = [encoded.between(conversation.answer(i)) for i in learned]
        example = _example(encoded, spans)
        marked = self._template.generated(conversation.turns, conversation.settings)
        if marked is None:
            return example
        marks = torch.zeros_like(example.labels, dtype=torch.bool)
        for span in marked:
            marks[encoded.touching(span)] = True
        for i, tokens in zip(learned, spans, strict=True):
            if says_something(conversation.turns[i]) and not marks[tokens].any():
                raise InputError(
                    f"{conversation.origin}: turn {i + 1}: the chat template's generation marks leave it out"
                )
        return example._replace(labels=example.labels.masked_fill(~marks, IGNORED))

    def _refuse_masks(self, row: Row, **asked: bool | None) -> None:
        """Raises where options ask for parts that a row of strings does not have."""
        for name, value in asked.items():
            if value:
                raise InputError(
                    f"{row.origin}: {name}_loss is set, but the row is a text without "
                    + ("turns" if name == "assistant_only" else "prompt and completion")
                )


def _example(encoded: Encoded, counted: Sequence[slice]) -> Example:
    input_ids = torch.tensor(encoded.ids, dtype=torch.int32)
    labels = torch.full_like(input_ids, IGNORED)
    for tokens in counted:
        labels[tokens] = input_ids[tokens]
    return Example(input_ids, labels)


def _require_ids(item: Item, row: Row) -> None:
    """Raises where an id is negative, and where a token counts that lists none.

    The mean would count such a token, and nothing would be learnt from it.
    """
    for example in item:
        listed = example.inputs.get(TARGET_IDS)
        if listed is None:
            continue
        if (negative := listed[(listed < 0) & (listed != ABSENT)]).numel():
            raise InputError(
                f"{row.origin}: {TARGET_IDS} lists {int(negative.min())}; expected ids from 0 on, or {ABSENT} where "
                "there is none"
            )
        without = (listed[:-1] < 0).flatten(1).all(1) & (example.labels[1:] != IGNORED)
        if without.any():
            raise InputError(
                f"{row.origin}: {int(without.sum())} tokens that count list no {TARGET_IDS}; expected one id at least "
                "(a file of `logitless teach` has them where its own max_length and truncation_mode left the token)"
            )
