"""From rows to tokens: the chat template, the labels that say where the loss counts, truncation.

Four forms of row, named as in TRL's documentation:

    {"text": "..."}                                                every token counts
    {"prompt": ..., "completion": ...}                             the completion counts; strings or lists of turns
    {"messages": [{"role", "content"}, ...]}                       the assistant's turns count
    {"prompt": ..., "chosen": ..., "rejected": ...}                two completions of one prompt; without "prompt" it
                                                                   is what the two have in common at their start

A token counts where its label is not -100. Where a completion begins is found on the tokens of the whole text: it is
the first token in which prompt alone and prompt with completion differ, so a token that spans the boundary belongs to
the completion and the model reads the same tokens in training as in a later conversation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from logitless.training.columns import TARGET_IDS, read_columns
from logitless.training.data import Row, require_text
from logitless.training.errors import InputError

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
        notes += [f"{self.dropped} dropped: no completion left within max_length"] if self.dropped else []
        return f"{line} ({'; '.join(notes)})" if notes else line


@dataclass(frozen=True)
class RowTokenizer:
    """Turns rows into token sequences with one tokenizer.

    Args:
        tokenizer: a Transformers tokenizer; chat rows need its chat template.
        max_length: longest sequence, in tokens; longer ones lose their end or their start.
        truncation_mode: "keep_start" or "keep_end".
        completion_only: False makes every token count, prompts too (preference rows excepted).
        text_field: column of plain text.
        columns: columns that are inputs of the loss, which every row must have.
        single: those of them that have one value a row.
    """

    tokenizer: Any
    max_length: int
    truncation_mode: str = "keep_start"
    completion_only: bool = True
    text_field: str = "text"
    columns: tuple[str, ...] = ()
    single: tuple[str, ...] = ()

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
            require_text(row)
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
            return self._conversation(_turns(values["messages"], "messages", row), row)
        if values.get("prompt") is not None and values.get("completion") is not None:
            return self._completion(values["prompt"], values["completion"], "completion", row)
        if values.get(self.text_field) is not None:
            text = self._ended(_string(values[self.text_field], self.text_field, row))
            return self._example(self._encode(text), [])
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
            self._with_columns(self._completion(prompt, answer, side, row, always_masked=True), row, side)
            for side, answer in sides.items()
        )

    def _completion(self, prompt: Any, completion: Any, name: str, row: Row, always_masked: bool = False) -> Example:
        """Prompt and completion, both strings or both lists of turns; the completion counts."""
        if isinstance(prompt, str) and isinstance(completion, str):
            prefix, full = self._encode(prompt), self._encode(self._ended(prompt + completion))
        elif isinstance(prompt, str) or isinstance(completion, str):
            kinds = f"prompt is a {type(prompt).__name__} and {name} a {type(completion).__name__}"
            raise InputError(f"{row.origin}: {kinds}; give both as strings or both as lists of turns")
        else:
            turns = _turns(prompt, "prompt", row)
            prefix, full = self._chat_ids(turns, _turns(completion, name, row), row)
        masked = [(0, _common_prefix(prefix, full))] if always_masked or self.completion_only else []
        return self._example(full, masked)

    def _chat_ids(self, prompt: list[Any], completion: list[Any], row: Row) -> tuple[list[int], list[int]]:
        full = self._chat(prompt + completion, row)
        if not full.startswith(self._chat(prompt, row)):
            raise InputError(
                f"{row.origin}: the tokenizer's chat template renders the prompt differently once an answer follows, "
                "so the completion's place is unknown; use a template that only appends"
            )
        prefix = self._chat(prompt, row, add_generation_prompt=True)
        return self._encode(prefix, template=True), self._encode(full, template=True)

    def _conversation(self, turns: list[Any], row: Row) -> Example:
        """A whole conversation; the assistant's turns count, all of it where completion_only is off."""
        if not self.completion_only:
            return self._example(self._encode(self._chat(turns, row), template=True), [])
        if not any(turn["role"] == "assistant" for turn in turns):
            raise InputError(f"{row.origin}: messages has no assistant turn to learn from")
        full, start, masked = self._encode(self._chat(turns, row), template=True), 0, []
        for index, turn in enumerate(turns):
            if turn["role"] == "assistant":
                prefix, upto = self._chat_ids(turns[:index], [turn], row)
                masked.append((start, _common_prefix(prefix, full)))
                start = _common_prefix(upto, full)
                if start < len(upto) - 1:  # one token may merge with what follows
                    raise InputError(
                        f"{row.origin}: the tokenizer's chat template rewrites assistant turns that are not the last; "
                        "use rows of prompt and completion, or --no-completion_only_loss"
                    )
        return self._example(full, [*masked, (start, len(full))])

    def _example(self, ids: list[int], masked: Sequence[tuple[int, int]]) -> Example:
        input_ids = torch.tensor(ids, dtype=torch.int32)
        labels = input_ids.clone()
        for start, end in masked:
            labels[start:end] = IGNORED
        return Example(input_ids, labels)

    def _chat(self, turns: list[Any], row: Row, add_generation_prompt: bool = False) -> str:
        if not self.tokenizer.chat_template:
            raise InputError(
                f"{row.origin}: a chat row, but the tokenizer has no chat template; use the model's instruction-tuned "
                "variant, set chat_template in its tokenizer, or give prompt and completion as strings"
            )
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    turns, tokenize=False, tools=row.values.get("tools"), add_generation_prompt=add_generation_prompt
                )
            )
        except Exception as error:  # a template is a program: it raises what its author or Jinja likes
            raise InputError(f"{row.origin}: the tokenizer's chat template refuses this row: {error}") from error

    def _encode(self, text: str, template: bool = False) -> list[int]:
        """Token ids; a template writes its special tokens itself."""
        return list(self.tokenizer(text, add_special_tokens=not template, return_attention_mask=False)["input_ids"])

    def _ended(self, text: str) -> str:
        """Plain text with the end-of-text token, so that the model learns to stop."""
        end = self.tokenizer.eos_token or ""
        return text if text.endswith(end) else text + end


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
        shared = _common_prefix(chosen, rejected)
        shared -= shared > 0 and chosen[shared - 1] == " "  # the space belongs to the word that follows
    else:
        chosen, rejected = _turns(chosen, "chosen", row), _turns(rejected, "rejected", row)
        shared = _common_prefix(chosen, rejected)
        if shared == 0:
            raise InputError(f"{row.origin}: no prompt, and chosen and rejected do not begin with the same turn")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of the longest common start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _preference_hint(values: Mapping[str, Any]) -> str:
    return " (chosen and rejected belong to a preference loss: --method dpo)" if "chosen" in values else ""
