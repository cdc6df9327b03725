"""Turns of a conversation as people write them, made into one form.

    {"role": str, "content": str, "tool_calls": [...], "train": False, ...}

Nulls inside a turn are what Arrow adds where another row has a key: a mapping's null is as if its key were absent. A
list's null stays, and so does one inside JSON text, which only its author can have written. Whatever is not understood
is an InputError that names file, line, turn and key.
"""

from __future__ import annotations

import json
from typing import Any

from logitless.training.errors import InputError
from logitless.training.formats import unique_names

Turn = dict[str, Any]

#: Names of roles in the files of other trainers; a role that is not here is the template's to know.
ROLES = {
    "human": "user",
    "prompter": "user",
    "input": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "output": "assistant",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
} | {name: name for name in ("system", "user", "assistant", "tool", "developer")}
#: Roles whose content is the call of a tool, as JSON text.
CALLING = ("function_call", "tool_call")
#: The key of a read turn that says whether it is learned: False, or absent.
LEARNED = "train"
#: Keys of a turn as people write it that say whether it is learned, in the order in which errors name them.
FLAGS = (
    *(LEARNED, "weight", "trainable", "training", "loss", "loss_mask", "step_loss_mask", "loss_weight", "loss_scale"),
    "train_on_turn",
)
#: The key of a turn that says whether it is hidden from the loss.
MASKED = "masked"
#: Keys that say what is learned within a turn, or do so in two senses.
_UNREAD = ("train_detail", "training_detail", "mask")
#: Keys of a turn, and columns of a row, for what is not text.
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
#: Keys that say more than text, which no template writes down.
_LOST = ("refusal", *MEDIA)
#: Keys of an assistant's turn for what it thinks before it answers.
REASONING = ("reasoning_content", "reasoning", "thinking")
#: Keys of which a turn has one at least. JSON text without them is an answer, such as {"from": "Oslo", "to": "Rome"}.
_SAYING = {"content", "value", "tool_calls", "function_call", *REASONING}
#: Types of the parts of a list of content that are text.
_TEXT_PARTS = (None, "text", "input_text", "output_text")


def read_turns(value: Any, name: str, origin: str) -> list[Turn]:
    """The turns of a list, of its JSON text, or of one turn alone, each with a role and a string as content.

    Args:
        value: the column's value.
        name: the column, for errors.
        origin: where the row stands.

    Raises:
        InputError: no list of turns, or a turn that cannot be read.
    """
    turns = turns_of_text(value) if isinstance(value, str) else _cleaned(value, f"{origin}: {name}")
    turns = _turns_of_lists(turns) if isinstance(turns, dict) else turns
    if not isinstance(turns, list) or not turns:
        got = f"text that is no JSON of one{_reason(value)}" if isinstance(value, str) else _described(value)
        raise InputError(f"{origin}: {name} must be a non-empty list of turns, got {got}")
    return [_turn(turn, f"{origin}: {name}, turn {number}") for number, turn in enumerate(turns, 1)]


def turns_of_text(text: str) -> list[Any] | None:
    """The turns of which the text is JSON, or None where it is any other text."""
    if not text.lstrip().startswith(("[", "{")):
        return None
    try:
        value = _parsed(text)
    except ValueError:
        return None
    turns = value if isinstance(value, list) else [value]
    named = all(isinstance(turn, dict) and turn.keys() & {"role", "from"} for turn in turns)
    return turns if named and any(turn.keys() & _SAYING for turn in turns) else None


def _turns_of_lists(turn: Turn) -> list[Turn]:
    """One turn alone, or the turns of lists of the same length, as a `Sequence` of `datasets` keeps them."""
    columns = list(turn.values())
    if not turn.keys() & {"role", "from"} or not all(isinstance(column, list) for column in columns):
        return [turn]
    if len({len(column) for column in columns}) > 1:
        return [turn]
    return [dict(zip(turn, values, strict=True)) for values in zip(*columns, strict=True)]


def _reason(text: str) -> str:
    """Why a text is no JSON, where it seems to be meant as such."""
    try:
        if text.lstrip().startswith(("[", "{")):
            _parsed(text)
    except ValueError as error:
        return f": {error}"
    return ""


def is_list_of_turns(value: Any) -> bool:
    """Whether the value, or what it is the JSON text of, is a list of mappings."""
    turns = turns_of_text(value) if isinstance(value, str) else value
    return isinstance(turns, list) and any(isinstance(turn, dict) for turn in turns)


def read_tools(value: Any, name: str, origin: str) -> list[dict[str, Any]] | None:
    """The schemas of a list of tools or of its JSON text, each under "function"; None where there are none.

    Args:
        value, name, origin: as in `read_turns`.

    Raises:
        InputError: no list, or a tool without the name of a function.
    """
    where = f"{origin}: {name}"
    tools = _from_json(value, where, "a list of tools") if isinstance(value, str) else _cleaned(value, where)
    if _is_empty(tools):
        return None
    if not isinstance(tools, list):
        raise InputError(f"{where}: expected a list of tools, got {_described(value)}")
    return [_tool(tool, f"{where}[{index}]") for index, tool in enumerate(tools)]


def read_variables(value: Any, name: str, origin: str) -> dict[str, Any]:
    """The variables of a chat template in a mapping or its JSON text; empty where there are none.

    Args:
        value, name, origin: as in `read_turns`.

    Raises:
        InputError: anything else.
    """
    where = f"{origin}: {name}"
    found = _from_json(value, where, "a JSON object") if isinstance(value, str) else _cleaned(value, where)
    return {} if _is_empty(found) else _object(found, where)


def _tool(value: Any, where: str) -> dict[str, Any]:
    tool = _object(value, where)
    flat = {key: item for key, item in tool.items() if key != "type"}
    function = _object(tool.get("function", flat), f"{where}.function")
    if not isinstance(function.get("name"), str):
        raise InputError(f"{where}: expected the name of a function, got {_described(tool)}")
    if "parameters" in function:
        function["parameters"] = _object(function["parameters"], f"{where}.function.parameters")
    outer = tool if "function" in tool else {}
    return {"type": "function"} | outer | {"function": function}


def _turn(value: Any, where: str) -> Turn:
    if isinstance(value, str):
        value = next(iter(turns_of_text(value) or ()), value)
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected role and content, got {_described(value)}")
    turn = _present(value)
    _require_readable(turn, where)
    role = _one_of(turn, ("role", "from"), where)
    if not isinstance(role, str):
        raise InputError(f"{where}: expected role and content, got {_described(value)}")
    content = _one_of(turn, ("content", "value"), where)
    if role.lower() in CALLING:
        if not isinstance(content, str) or "tool_calls" in turn:
            raise InputError(f"{where}, content: expected the JSON text of a call, got {_described(content)}")
        turn["tool_calls"] = _from_json(content, f"{where}, content", "a call")
        role, content = "assistant", None
    role = ROLES.get(role.lower(), role)
    calls = _calls(turn, where)
    reasons = any(turn.get(key) for key in REASONING)
    learned = _learned(turn, role, where)
    if content is None and not calls and not reasons:
        raise InputError(f"{where}: content is missing or null; the keys are {sorted(map(str, value))}")
    return {"role": role, "content": _content(content, where)} | turn | calls | learned


def _require_readable(turn: Turn, where: str) -> None:
    """Raises for a key that says what is not text, or what is learned of a part of the turn."""
    for key in _LOST:
        if turn.get(key):
            raise InputError(f"{where}, {key}: only text is trained on, got {_described(turn[key])}")
    for key in _UNREAD:
        if not _is_empty(turn.get(key)):
            raise InputError(
                f"{where}, {key}: expected the key {LEARNED}, false for a turn that is not learned as a whole, got "
                f"{_described(turn[key])}"
            )


def _one_of(turn: Turn, keys: tuple[str, str], where: str) -> Any:
    """Takes the value of either key off the turn; both must agree."""
    given = [turn.pop(key) for key in keys if key in turn]
    if len(given) > 1 and given[0] != given[1]:
        raise InputError(f"{where}: {keys[0]} and {keys[1]} are both given and differ")
    return given[0] if given else None


def _content(value: Any, where: str) -> str:
    """A turn's text; parts are joined, and calls of tools without content have the empty one."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise InputError(f"{where}, content: expected text or a list of parts with text, got {_described(value)}")
    return "".join(_part(part, f"{where}, content[{index}]") for index, part in enumerate(value))


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    given = _present(part) if isinstance(part, dict) else {}
    text = given.get("text")
    if not isinstance(text, str) or given.get("type") not in _TEXT_PARTS or not given.keys() <= {"type", "text"}:
        expected = '{"type": "text", "text": ...}'
        raise InputError(f"{where}: expected {expected}, got {_described(part)}; only text is trained on")
    return text


def _calls(turn: Turn, where: str) -> Turn:
    """Takes the calls of tools off the turn, as {"tool_calls": [...]}, or nothing where there are none."""
    calls = turn.pop("tool_calls", None)
    if isinstance(calls, str):
        calls = _from_json(calls, f"{where}, tool_calls", "a list of calls")
    legacy = turn.pop("function_call", None)
    if not _is_empty(calls) and not _is_empty(legacy):
        raise InputError(f"{where}: tool_calls and function_call are both given; expected one of them")
    key, given = ("tool_calls", calls) if _is_empty(legacy) else ("function_call", legacy)
    if _is_empty(given):
        return {}
    if not isinstance(given, (list, dict)):
        raise InputError(f"{where}, {key}: expected calls with name and arguments, got {_described(given)}")
    if isinstance(given, dict):
        return {"tool_calls": [_call(given, f"{where}, {key}")]}
    return {"tool_calls": [_call(call, f"{where}, {key}[{index}]") for index, call in enumerate(given)]}


def _call(value: Any, where: str) -> dict[str, Any]:
    """A call with name and arguments under "function", as templates read it."""
    call = _present(_object(value, where))
    nested = "function" in call
    function = _present(_object(call["function"], f"{where}.function")) if nested else call
    place = f"{where}.function" if nested else where
    name, arguments = function.get("name"), function.get("arguments", {})
    if not isinstance(name, str):
        raise InputError(f"{place}.name: expected the name of a function, got {_described(function)}")
    extra = function.keys() - {"name", "arguments", *(() if nested else ("id", "type", "index"))}
    if extra:
        raise InputError(f"{place}.{min(extra)}: expected name and arguments alone")
    outer = {key: item for key, item in call.items() if key not in ("function", "name", "arguments")}
    given = {"name": name, "arguments": _object(arguments, f"{place}.arguments")}
    return {"type": "function"} | outer | {"function": given}


def _learned(turn: Turn, role: str, where: str) -> Turn:
    """Takes the marks of what is learned off the turn, as {"train": False} where an assistant's is not."""
    given = {key: turn.pop(key) for key in (*FLAGS, MASKED) if key in turn}
    for key, value in given.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise InputError(f"{where}, {key}: expected 0 or 1, or false or true, got {_described(value)}")
    says = {key: bool(value) != (key == MASKED) for key, value in given.items()}
    for key, learned in says.items():
        if learned != next(iter(says.values())):
            raise InputError(f"{where}: {next(iter(says))} and {key} contradict each other")
        if learned and role != "assistant":
            expected = "1 or true" if key == MASKED else "0 or false"
            raise InputError(f"{where}, {key}: the loss counts on the assistant's turns; expected {expected}, or none, "
                             f"at a turn of the role {role}, got {_described(given[key])}")  # fmt: skip
    return {LEARNED: False} if role == "assistant" and says and not next(iter(says.values())) else {}


def _object(value: Any, where: str) -> dict[str, Any]:
    """A copy of the mapping, or the one of which the value is the JSON text."""
    found = _from_json(value, where, "a JSON object") if isinstance(value, str) else value
    if not isinstance(found, dict):
        raise InputError(f"{where}: expected a JSON object, got {_described(value)}")
    return dict(found)


def _from_json(text: str, where: str, expected: str) -> Any:
    try:
        return _parsed(text) if text else None  # an empty cell of a table
    except ValueError as error:
        raise InputError(f"{where}: expected {expected} or its JSON text, got {_described(text)}: {error}") from error


def _parsed(text: str) -> Any:
    """The value of JSON text; raises ValueError for whatever else it is."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no value of JSON")

    try:
        value = json.loads(text, parse_constant=refuse, object_pairs_hook=unique_names)
        if "\\u" in text:  # half of a character can only be written so
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return value


def _is_empty(value: Any) -> bool:
    return value is None or value in ([], {})


def _present(mapping: dict[str, Any]) -> dict[str, Any]:
    """The mapping without its own keys whose value is null."""
    return {key: item for key, item in mapping.items() if item is not None}


def _cleaned(value: Any, where: str) -> Any:
    try:
        return _without_nulls(value)
    except RecursionError as error:
        raise InputError(f"{where}: nested too deeply") from error


def _without_nulls(value: Any) -> Any:
    """The value without the keys of its mappings, at any depth, whose value is null."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _described(value: Any) -> str:
    """The value for an error: its type, and as much of it as fits into a line."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"
