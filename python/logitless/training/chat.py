"""The chat template of a tokenizer, given conversations in the form that it reads."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from logitless.training.errors import InputError
from logitless.training.marks import in_parts, with_text_arguments
from logitless.training.tokens import common_prefix
from logitless.training.turns import Turn

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


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
                f"{origin}: a chat row, but the tokenizer has no chat template; name one by chat_template_path, use "
                "the model's instruction-tuned variant, or give prompt and completion as strings"
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

    def generated(self, turns: Sequence[Turn], settings: Mapping[str, Any]) -> list[tuple[int, int]] | None:
        """The spans of the text that the template marks as generated, by `{% generation %}`; None without such marks.

        Transformers' own mask is one of tokens, in which white space that a tokenizer trims is missing.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self.tokenizer.get_chat_template(tools=settings.get("tools"))
        if not _GENERATION.search(template):
            return None
        _, spans = render_jinja_template(
            conversations=[self._form(turns)],
            chat_template=template,
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **settings},
        )
        return [(begin, end) for begin, end in spans[0] if begin < end]

    @cached_property
    def reserved(self) -> frozenset[str]:
        """Names that no further variable can have, because they say what is rendered and how."""
        own = inspect.signature(self.tokenizer.apply_chat_template).parameters
        return frozenset(own) - {"documents", "kwargs"} | {"messages"}

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
            ({"role": "assistant", "content": "omega"}, in_parts),
            ({"role": "assistant", "content": "", "tool_calls": [call]}, with_text_arguments),
        ):
            if not self._finds([asked, answer]) and self._finds([change(asked), change(answer)]):
                return change
        return None

    @cached_property
    def end(self) -> str:
        """The special token that the template writes right behind an answer's text; "" if there is none."""
        turns = [{"role": "user", "content": "alpha"}, {"role": "assistant", "content": "omega"}]
        try:
            behind = self._text(self._form(turns), {}).rpartition("omega")[2]
        except Exception:  # as in `render`
            return ""
        return behind[: self.first_special(behind)]

    def _finds(self, turns: Sequence[Turn]) -> bool:
        try:
            text = self._text(turns, {})
        except Exception:  # as in `render`
            return False
        return "alpha" in text and "omega" in text and "'text'" not in text  # else it wrote a list as Python does

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

    def has_special(self, text: str) -> bool:
        """Whether a special token stands in the text."""
        return self._special is not None and self._special.search(text) is not None

    def first_special(self, text: str) -> int:
        """Length of the special token that the text begins with, or 0."""
        match = self._special.match(text) if self._special is not None else None
        return match.end() if match else 0
