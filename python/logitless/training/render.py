"""From rows to tokens: the text of a row, the labels that say where the loss counts, truncation.

Four forms of row, named as in TRL's documentation:

    {"text": "..."}                                                every token counts
    {"prompt": ..., "completion": ...}                             the completion counts; strings or lists of turns
    {"messages": [{"role", "content"}, ...]}                       the assistant's turns count
    {"prompt": ..., "chosen": ..., "rejected": ...}                two completions of one prompt; without "prompt" it
                                                                   is what the two have in common at their start

A token counts where its label is not -100. The whole text is tokenised once, so that the model reads the same tokens in
training as in a later conversation. A token that spans the start of an answer belongs to the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from logitless.training.chat import ChatTemplate
from logitless.training.columns import TARGET_IDS, read_columns
from logitless.training.conversation import Conversation
from logitless.training.data import Row
from logitless.training.errors import InputError
from logitless.training.examples import IGNORED, Example, Item, TokenizedData
from logitless.training.marks import answers, says_something
from logitless.training.tokens import Encoded, TextEncoder, common_prefix

TRAINED = "train"  # the key of a turn that says whether it is learned


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
        return self._collect(rows, origin, self._pair)

    def _collect(self, rows: Iterable[Row], origin: str, tokenize: Callable[[Row], Item]) -> TokenizedData:
        """Tokenises and cuts every row; a row of which an example has nothing left that counts is dropped whole."""
        items, kept, total, truncated = [], [], 0, 0
        for row in rows:
            whole = tokenize(row)
            item = tuple(self._cut(example) for example in whole)
            total += 1
            truncated += any(len(a.labels) != len(b.labels) for a, b in zip(item, whole, strict=True))
            if all((example.labels != IGNORED).any() for example in item):
                items.append(item)
                kept.append(total - 1)
                _require_ids(item, row)
        if not items:
            raise InputError(
                f"{origin}: none of {total} rows has a completion left within max_length={self.max_length}"
            )
        return TokenizedData(items, total, total - len(items), truncated, tuple(kept))

    def _cut(self, example: Example) -> Example:
        keep = slice(self.max_length) if self.truncation_mode == "keep_start" else slice(-self.max_length, None)
        labels = example.labels[keep].clone()
        labels[:1] = IGNORED  # nothing comes before the first token to predict it from
        inputs = {name: values[keep] for name, values in example.inputs.items()}
        return Example(example.input_ids[keep], labels, inputs)

    def _with_columns(self, example: Example, row: Row, side: str = "") -> Example:
        counts = example.labels != IGNORED
        return example._replace(inputs=read_columns(self.columns, row, counts, single=self.single, side=side))

    def whole(self, row: Row) -> Example:
        """A row of text, prompt-completion or messages, before it is cut to `max_length`."""
        values = row.values
        if values.get("messages") is not None:
            return self._messages(_turns(values["messages"], "messages", row), row)
        if values.get("prompt") is not None and values.get("completion") is not None:
            return self._completion(values["prompt"], values["completion"], "completion", row)
        if values.get(self.text_field) is not None:
            text = _string(values[self.text_field], self.text_field, row)
            self._refuse_masks(row, assistant_only=self.assistant_only, completion_only=self.completion_only)
            encoded = self._encoder.plain(text)
            return _example(encoded, [slice(None)])
        raise InputError(
            f"{row.origin}: expected messages, or prompt and completion, or {self.text_field}; "
            f"the columns are {sorted(values)}{_preference_hint(values)}"
        )

    def _pair(self, row: Row) -> Item:
        values = row.values
        missing = [name for name in ("chosen", "rejected") if values.get(name) is None]
        if missing:
            raise InputError(f"{row.origin}: {' and '.join(missing)} missing; the columns are {sorted(values)}")
        prompt, chosen, rejected = _split_prompt(row)
        if chosen == rejected:
            raise InputError(f"{row.origin}: chosen and rejected are the same")
        sides = {"chosen": chosen, "rejected": rejected}
        return tuple(
            self._with_columns(self._completion(prompt, answer, side, row), row, side) for side, answer in sides.items()
        )

    def _completion(self, prompt: Any, completion: Any, name: str, row: Row) -> Example:
        """Prompt and completion, both strings or both lists of turns."""
        if isinstance(prompt, str) and isinstance(completion, str):
            self._refuse_masks(row, assistant_only=self.assistant_only)
            encoded = self._encoder.plain(prompt + completion)
            return _example(encoded, [self._counted(name, encoded.token_at(len(prompt)))])
        if isinstance(prompt, str) or isinstance(completion, str):
            kinds = f"prompt is a {type(prompt).__name__} and {name} a {type(completion).__name__}"
            raise InputError(f"{row.origin}: {kinds}; give both as strings or both as lists of turns")
        turns = _turns(prompt, "prompt", row) if prompt else []
        count = len(turns)
        turns += _turns(completion, name, row)
        conversation = self._conversation(turns, row)
        encoded = self._encoder.rendered(conversation.text)
        counted = self._counted(name, encoded.between(conversation.completion(count)).start)
        if self.assistant_only and name == "completion":
            first = count if self.completion_only is not False else 0
            return self._answers(conversation, encoded, turns, [i for i in answers(turns) if i >= first], row)
        return self._without_untrained(_example(encoded, [counted]), conversation, encoded, turns)

    def _counted(self, name: str, start: int) -> slice:
        """The tokens that count of a completion that begins at a token."""
        return slice(0 if name == "completion" and self.completion_only is False else start, None)

    def _messages(self, turns: list[Any], row: Row) -> Example:
        """A whole conversation; the assistant's turns count, or all of it."""
        every = not self.assistant_only and (self.assistant_only is False or self.completion_only is False)
        if not every and not answers(turns):
            raise InputError(f"{row.origin}: messages has no assistant turn to learn from")
        conversation = self._conversation(turns, row)
        encoded = self._encoder.rendered(conversation.text)
        if every:
            return self._without_untrained(_example(encoded, [slice(None)]), conversation, encoded, turns)
        return self._answers(conversation, encoded, turns, answers(turns), row)

    def _conversation(self, turns: list[Any], row: Row) -> Conversation:
        plain = [{"content": "", **{key: value for key, value in turn.items() if key != TRAINED}} for turn in turns]
        settings = {**(row.values.get("chat_template_kwargs") or {}), "tools": row.values.get("tools")}
        return Conversation(self._template, plain, row.origin, settings)

    def _answers(
        self, conversation: Conversation, encoded: Encoded, turns: list[Any], numbers: list[int], row: Row
    ) -> Example:
        """The assistant's turns count, as far as the template marks them as generated, if it marks anything."""
        learned = [i for i in numbers if turns[i].get(TRAINED, True)]
        spans = [encoded.between(conversation.answer(i)) for i in learned]
        example = _example(encoded, spans)
        marks = self._template.generated(conversation.turns, conversation.settings)
        if marks is None:
            return example
        for i, span in zip(learned, spans, strict=True):
            if says_something(turns[i]) and not any(marks[span]):
                raise InputError(f"{row.origin}: turn {i + 1}: the chat template's generation marks leave it out")
        return example._replace(labels=example.labels.where(torch.tensor(marks), torch.tensor(IGNORED).int()))

    def _without_untrained(
        self, example: Example, conversation: Conversation, encoded: Encoded, turns: list[Any]
    ) -> Example:
        """The example without the turns that say that they are not to be learned."""
        for i in answers(turns):
            if not turns[i].get(TRAINED, True):
                example.labels[encoded.between(conversation.answer(i))] = IGNORED
        return example

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
    """Raises where a token counts that lists no ids: the mean would count it, and nothing would be learnt from it."""
    for example in item:
        listed = example.inputs.get(TARGET_IDS)
        if listed is None:
            continue
        without = (listed[:-1] < 0).flatten(1).all(1) & (example.labels[1:] != IGNORED)
        if without.any():
            raise InputError(
                f"{row.origin}: {int(without.sum())} tokens that count list no {TARGET_IDS}; expected one id at least "
                "(a file of `logitless teach` has them where its own max_length and truncation_mode left the token)"
            )


def _string(value: Any, name: str, row: Row) -> str:
    if not isinstance(value, str):
        raise InputError(f"{row.origin}: {name} must be a string, got {type(value).__name__}")
    return value


def _turns(value: Any, name: str, row: Row) -> list[Any]:
    """A list of turns with a role, checked; None-valued keys (Arrow fills them in) are removed."""
    if not isinstance(value, list) or not value:
        raise InputError(f"{row.origin}: {name} must be a non-empty list of turns, got {type(value).__name__}")
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise InputError(f"{row.origin}: {name}, turn {number}: expected role and content, got {turn!r}")
        if turn.get("content") is None and not turn.get("tool_calls"):
            raise InputError(f"{row.origin}: {name}, turn {number}: content is missing")
    return [{key: item for key, item in turn.items() if item is not None} for turn in value]


def _split_prompt(row: Row) -> tuple[Any, Any, Any]:
    """(prompt, chosen, rejected), the prompt taken from the common start of the two where it is not given apart."""
    prompt, chosen, rejected = row.values.get("prompt"), row.values["chosen"], row.values["rejected"]
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise InputError(f"{row.origin}: chosen and rejected must both be strings or both lists of turns")
    if prompt is not None and isinstance(prompt, str) == isinstance(chosen, str):
        return prompt, chosen, rejected
    if isinstance(chosen, str):
        if prompt is not None:
            raise InputError(f"{row.origin}: prompt is a {type(prompt).__name__}, chosen and rejected are strings")
        shared = common_prefix(chosen, rejected)
        shared -= shared > 0 and chosen[shared - 1] == " "  # the space belongs to the word that follows
    else:
        chosen, rejected = _turns(chosen, "chosen", row), _turns(rejected, "rejected", row)
        shared = common_prefix(chosen, rejected)
        if shared == 0:
            raise InputError(f"{row.origin}: no prompt, and chosen and rejected do not begin with the same turn")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _preference_hint(values: Mapping[str, Any]) -> str:
    return " (chosen and rejected belong to a preference loss: --method dpo)" if "chosen" in values else ""
