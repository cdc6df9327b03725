"""What a turn of a conversation says, and marks that find it again in what a chat template makes of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from logitless.training.turns import REASONING, Turn

_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # Unicode gives them no meaning, so texts lack them


def answers(turns: Sequence[Turn]) -> list[int]:
    """The numbers of the assistant's turns."""
    return [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]


def said(turn: Turn) -> str:
    """The turn's text without the space around it, and without thinking that stands in front of it."""
    return str(turn.get("content", "")).rpartition("</think>")[2].strip()


def says_something(turn: Turn) -> bool:
    """Whether the turn has a text or calls a tool."""
    return bool(said(turn) or turn.get("tool_calls"))


def thoughts(turn: Turn) -> list[str]:
    """What the turn thinks, as a key of its own or within its content, with what stands before that."""
    inside, closed, _ = str(turn["content"]).rpartition("</think>")
    found = re.split("</?think>", inside) if closed else []
    found += [str(turn[key]) for key in REASONING if turn.get(key)][:1]
    return [text.strip() for text in found if text.strip()]


def called(turn: Turn) -> list[str]:
    """The names, keys and texts that the turn's tool calls consist of."""
    functions = [call["function"] for call in turn.get("tool_calls") or ()]
    return [leaf for function in functions for leaf in _leaves([function.get("name"), function.get("arguments")])]


def written(value: str) -> tuple[str, ...]:
    """The forms in which templates write a string of a tool's call or answer."""
    return value, value.strip(), json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1], repr(value)[1:-1]


def in_parts(turn: Turn) -> Turn:
    """The turn with its content as a list of one part."""
    return {**turn, "content": [{"type": "text", "text": turn["content"]}]}


def with_text_arguments(turn: Turn) -> Turn:
    """The turn with the arguments of its calls as JSON text."""
    calls = [
        {**call, "function": inner | {"arguments": json.dumps(inner.get("arguments"), ensure_ascii=False)}}
        for call in turn.get("tool_calls") or ()
        for inner in (call["function"],)
    ]
    return {**turn, "tool_calls": calls} if calls else turn


class Place(NamedTuple):
    """Where a mark stood in a text without marks."""

    turn: int
    ends_text: bool  # behind the turn's text; else behind the last string of its tool calls
    at: int


class Marks:
    """Marks for the turns of a conversation: behind its text, and behind the last string of its tool calls.

    Args:
        text: a text that the marks must not be part of.
    """

    def __init__(self, text: str) -> None:
        self.behind_text, self.behind_calls = [c for c in _NONCHARACTERS if c not in text][:2]
        self.pattern = re.compile(f"([{self.behind_text}{self.behind_calls}])(\\d+)\\1")

    def put(self, turns: Sequence[Turn], *, every: bool) -> list[Turn]:
        """The turns with their marks; those of the assistant alone unless `every`."""
        return [
            self._marked(turn, index) if every or turn["role"] == "assistant" else turn
            for index, turn in enumerate(turns)
        ]

    def find(self, marked: str) -> tuple[str, list[Place]]:
        """The text without its marks, and where they stood."""
        places, taken = [], 0
        for match in self.pattern.finditer(marked):
            places.append(Place(int(match[2]), match[1] == self.behind_text, match.start() - taken))
            taken += match.end() - match.start()
        return self.pattern.sub("", marked), places

    def _marked(self, turn: Turn, index: int) -> Turn:
        content, mark = turn["content"], f"{self.behind_calls}{index}{self.behind_calls}"
        turn = _with_mark(turn, mark)
        if not said(turn):  # a mark would be its first text, which templates may ask for
            return turn
        end = len(content.rstrip())
        return {**turn, "content": f"{content[:end]}{self.behind_text}{index}{self.behind_text}{content[end:]}"}


def _leaves(value: Any) -> list[str]:
    """The keys and the strings that a JSON value consists of."""
    if isinstance(value, Mapping):
        return [leaf for key, part in value.items() for leaf in (str(key), *_leaves(part))]
    if isinstance(value, (list, tuple)):
        return [leaf for part in value for leaf in _leaves(part)]
    return [value] if isinstance(value, str) else []


def _behind_last(value: Any, mark: str) -> Any:
    """The JSON value with a mark behind the last string or name in it; without either it stays as it is."""
    if isinstance(value, str):
        return value + mark
    if isinstance(value, list) and value:
        return [*value[:-1], _behind_last(value[-1], mark)]
    if isinstance(value, Mapping) and value:
        *before, (key, last) = value.items()
        marked = _behind_last(last, mark)
        return {**dict(before), (key + mark if marked == last else key): marked}
    return value


def _with_mark(turn: Turn, mark: str) -> Turn:
    """The turn with a mark in the last of its calls: in its arguments, or in its name if there are none."""
    if not (calls := turn.get("tool_calls")):
        return turn
    inner = calls[-1]["function"]
    arguments = _behind_last(inner.get("arguments"), mark)
    name = inner["name"] + (mark if arguments == inner.get("arguments") else "")
    marked = {**calls[-1], "function": {**inner, "name": name, "arguments": arguments}}
    return {**turn, "tool_calls": [*calls[:-1], marked]}
