"""Forms of rows: whatever columns people have, made into one of the four that are rendered.

    {"text"}    {"messages"}    {"prompt", "completion"}    {"prompt", "chosen", "rejected"}

A prompt and its answers are all strings or all lists of turns (`turns.py`). Columns under the names of TRL come first;
the names of other trainers are read where none of those is there. Two forms in one row that count different tokens are
an error. Columns that belong to no form stay as they are, for the loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from logitless.training.data import Row
from logitless.training.errors import InputError, nearest
from logitless.training.tokens import common_prefix
from logitless.training.turns import LEARNED, MEDIA, Turn, is_list_of_turns, read_tools, read_turns, turns_of_text

#: Columns that hold a conversation, and others that may hold one.
CONVERSATIONS = ("messages", "conversations")
TALKS = ("conversation", "dialog", "dialogue", "chat")
#: The column of a question and that of its answer, which become a user's and an assistant's turn.
QUESTIONS = (
    *(("instruction", "output"), ("instruction", "response"), ("instruction", "completion"), ("prompt", "response")),
    *(("query", "response"), ("question", "response"), ("question", "answer"), ("question", "answers")),
    *(("problem", "solution"), ("input", "output"), ("input", "target")),
)
#: Columns that may hold a question, and those that may hold the first turn.
_ASKING = tuple(dict.fromkeys(question for question, _ in QUESTIONS))
_SYSTEM = ("system", "system_prompt")
#: Columns that a question may refer to.
_MORE = ("input", "context", "history")
#: Columns that forms are made of, which the row that is made does not keep.
_READ = frozenset((
    *CONVERSATIONS, *TALKS, *(name for pair in QUESTIONS for name in pair), *_SYSTEM, *_MORE,
    "chosen", "rejected", "tools", "functions",
))  # fmt: skip

#: Columns whose words a row of prompt and completion has in its prompt, and those of other forms.
_REDUNDANT = frozenset((*CONVERSATIONS, *TALKS, *_SYSTEM, "text", "chosen", "rejected"))

# The text on which the authors of Stanford's Alpaca trained.
_ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n{more}### Response:"
)
_PAIRED = ", paired with an input that provides further context"

Text = str | list[Turn]


class Columns(Mapping[str, Any]):
    """A row's columns under other names, or without some, with values of its own before them.

    Args:
        given: the row's columns, of which a value is read when it is asked for.
        names: the names in use, each with the one that the column has in `given`.
        own: values that stand before those of `given`.
    """

    def __init__(self, given: Mapping[str, Any], names: dict[str, str], own: dict[str, Any]) -> None:
        self._given, self._names, self._own = given, names, own

    def __getitem__(self, name: str) -> Any:
        return self._own[name] if name in self._own else self._given[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._own | self._names)

    def __len__(self) -> int:
        return len(self._own | self._names)


class ReadColumns(Columns):
    """Columns of a row that has one of the four forms, so that it is not read again."""


def renamed(rows: Sequence[Row], column_map: Mapping[str, str] | None) -> list[Row]:
    """The rows with columns under the names that `column_map` gives them: the new name to the file's.

    Raises:
        InputError: a row that lacks a column of the file, or has another one of the new name.
    """
    return [_renamed(row, column_map) for row in rows] if column_map else list(rows)


def _renamed(row: Row, column_map: Mapping[str, str]) -> Row:
    taken = set(column_map.values())
    for new, old in column_map.items():
        if old not in row.values:
            raise InputError(
                f"{row.origin}: column_map: expected a column {old}, to be read as {new}; "
                f"the columns are {sorted(row.values)}{nearest(old, row.values)}"
            )
        if new in row.values and new not in taken:
            raise InputError(f"{row.origin}: column_map: {old} is to be read as {new}, but the row has a column {new}")
    names = {name: name for name in row.values if name not in taken} | dict(column_map)
    return Row(Columns(row.values, names, {}), row.origin)


def canonical(row: Row, *, text_field: str = "text", chat: bool = True) -> Row:
    """The row as `messages`, as `prompt` and `completion`, or as `text_field`; `tools` are a list, or absent.

    Args:
        row: columns of any of the forms of docs/training.md, "Forms of rows".
        text_field: column of plain text; a name other than "text" is read before all other forms.
        chat: whether there is a chat template. Without one, an instruction becomes the text of Stanford's Alpaca.

    Raises:
        InputError: no form, two forms, or a value that is not what its form has.
    """
    values = row.values
    if isinstance(values, ReadColumns):
        return row
    text = values.get(text_field)
    if text is not None and text_field != "text":
        return _made(row, {text_field: _string(text, text_field, row)}, text_field)
    talk = _conversation(row)
    if _has(row, "prompt") and _has(row, "completion"):
        if talk:
            raise _two_forms(row, talk[0], "prompt and completion")
        return _made(row, _completed(row, _read("prompt", row), {"completion": _read("completion", row)}), text_field)
    if talk:
        return _made(row, {"messages": _with_system(talk[1], row)}, text_field)
    if text in (None, "") and (form := _of_other_trainers(row, chat)):
        return _made(row, form, text_field)
    if text is None:
        raise _no_form(row, text_field)
    return _made(row, {text_field: _string(text, text_field, row)}, text_field)


def canonical_prompt(row: Row, *, chat: bool = True) -> Row:
    """The row as `prompt`, a string or turns, and with `completion` where the row has an answer.

    A conversation that ends with the assistant's turn has it as the answer; any other one is the prompt. A question
    under another name is a user's turn, as in `canonical`. Beside `chosen` and `rejected` the prompt stands alone.

    Raises:
        InputError: no prompt, or a value that is not what its form has.
    """
    alone = _lone_question(row)
    if alone is not None:
        prompt = _read(alone, row)
        if alone != "prompt" and isinstance(prompt, str):
            prompt = _with_answers(row, alone, {}, chat)[0]
        turns = isinstance(prompt, list)
        return _made(row, {"prompt": _with_system(prompt, row) if turns else prompt}, "text")  # type: ignore[arg-type]
    made = canonical(row, chat=chat)
    if "prompt" in made.values:
        return made
    if "messages" not in made.values:
        raise InputError(f"{row.origin}: expected a prompt to be continued; {_column_names(row)}")
    turns = made.values["messages"]
    answered = turns[-1]["role"] == "assistant"
    form = {"prompt": turns[:-1], "completion": turns[-1:]} if answered and len(turns) > 1 else {"prompt": turns}
    return Row(ReadColumns(row.values, {n: n for n in made.values if n not in ("messages", "tools")},
                           form | {n: v for n, v in made.values.items() if n == "tools"}), row.origin)  # fmt: skip


def with_completion(columns: Mapping[str, Any], prompt: Text, completion: Text) -> dict[str, Any]:
    """A row's columns as those of a row of prompt and completion, which training reads as it stands.

    Columns that hold a conversation or a system text are left out: the prompt has their words, and a row may have one
    form only. Others stay, such as an answer that a reward compares with.

    Args:
        columns: of the row as its file has it.
        prompt: of `canonical_prompt`.
        completion: a string behind a string, turns behind turns.
    """
    kept = {name: value for name, value in columns.items() if name not in _REDUNDANT}
    return {**kept, "prompt": prompt, "completion": completion}


def _lone_question(row: Row) -> str | None:
    """The column of a question that the row answers nowhere; None where it has an answer, or no such column."""
    answers = {answer for _, answer in QUESTIONS} | {"completion"}
    if _has(row, "prompt") and not any(_has(row, name) for name in ("completion", "response")):
        return "prompt"
    if any(_has(row, name) for name in (*answers, *CONVERSATIONS, *TALKS)):
        return None
    return _question(row)


def canonical_pair(row: Row, *, chat: bool = True, repeats: bool = False) -> Row:
    """The row as `prompt`, `chosen` and `rejected`, all strings or all lists of turns.

    Without a prompt it is what the two have in common at their start. A prompt of turns that both repeat is taken off.

    Args:
        row: columns of any of the forms of docs/training.md, "Forms of rows".
        chat: as in `canonical`.
        repeats: whether strings that begin with the prompt repeat it, as `prompts_are_repeated` finds.

    Raises:
        InputError: an answer is missing, or a value is not what its form has.
    """
    if isinstance(row.values, ReadColumns):
        return row
    missing = [name for name in ("chosen", "rejected") if not _has(row, name)]
    if missing:
        raise InputError(f"{row.origin}: {' and '.join(missing)} missing; {_column_names(row)}")
    answers = {name: _read(name, row) for name in ("chosen", "rejected")}
    if isinstance(answers["chosen"], str) != isinstance(answers["rejected"], str):
        came = {name: "a string" if isinstance(each, str) else "turns" for name, each in answers.items()}
        raise InputError(
            f"{row.origin}: chosen and rejected must both be strings or both lists of turns, got {came['chosen']} and "
            f"{came['rejected']}"
        )
    if _has(row, "prompt"):
        found: tuple[Text | None, dict[str, Text]] = _read("prompt", row), answers
    else:
        found = _asked(row, answers, chat, repeats)
    prompt, chosen, rejected = _divided(row, *found, repeats)
    return _made(row, {"prompt": prompt, "chosen": chosen, "rejected": rejected}, "text")


def prompts_are_repeated(rows: Sequence[Row]) -> bool:
    """Whether the strings chosen and rejected of most rows begin with the prompt, which has a column of its own.

    An answer may begin like its prompt by chance, so a row alone does not tell.
    """
    return 2 * sum(_repeats(row.values) for row in rows) > len(rows)


def _repeats(values: Mapping[str, Any]) -> bool:
    prompt = next((value for name in _ASKING if (value := values.get(name)) is not None), None)
    if not isinstance(prompt, str) or not prompt.strip():
        return False
    answers = (values.get(name) for name in ("chosen", "rejected"))
    return all(isinstance(answer, str) and answer.startswith(prompt.rstrip()) for answer in answers)


def unpaired(rows: Sequence[Row], *, chat: bool = True) -> list[Row]:
    """The rows, of which each with `chosen` and `rejected` becomes two, with `completion` and a `label`.

    A column `chosen_<name>` or `rejected_<name>` becomes the `<name>` of its row.
    """
    repeats = prompts_are_repeated(rows)
    return [single for row in rows for single in _sides(row, chat, repeats)]


def _sides(row: Row, chat: bool, repeats: bool) -> list[Row]:
    if _has(row, "completion") or not (_has(row, "chosen") and _has(row, "rejected")):
        return [row]
    pair = canonical_pair(row, chat=chat, repeats=repeats)
    return [_one_answer(pair, side) for side in ("chosen", "rejected")]


def _one_answer(pair: Row, side: str) -> Row:
    """One answer of a pair as a row of its own, with the columns of both answers and its own without "chosen_"."""
    both = {name: name for name in pair.values if not name.startswith(("chosen", "rejected"))}
    own = {name.removeprefix(f"{side}_"): name for name in pair.values if name.startswith(f"{side}_")}
    form = {name: pair.values[name] for name in ("prompt", "tools") if name in pair.values}
    form |= {"completion": pair.values[side], "label": side == "chosen"}
    return Row(ReadColumns(pair.values, both | own, form), pair.origin)


# ---------------------------------------------------------------------------------------------------------------------
# Values


def _made(row: Row, form: dict[str, Any], text_field: str) -> Row:
    """The row with these columns in place of all that forms are made of."""
    for name in MEDIA:
        if row.values.get(name):
            raise InputError(f"{row.origin}: {name}: only text is trained on; leave the column out to train without it")
    tools = _tools(row)
    names = {name: name for name in row.values if name not in _READ and name != text_field}
    return Row(ReadColumns(row.values, names, form | ({"tools": tools} if tools else {})), row.origin)


def _has(row: Row, name: str) -> bool:
    return row.values.get(name) is not None


def _tools(row: Row) -> list[dict[str, Any]] | None:
    given = {name: row.values.get(name) for name in ("tools", "functions")}
    if all(given.values()):
        raise InputError(f"{row.origin}: tools and functions are both given; expected one of them")
    return next((found for name in given if (found := read_tools(given[name], name, row.origin))), None)


def _string(value: Any, name: str, row: Row) -> str:
    if not isinstance(value, str):
        raise InputError(f"{row.origin}: {name} must be a string, got {type(value).__name__}")
    return value


def _read(name: str, row: Row) -> Text:
    """A column of text, or of turns, which may come as their JSON text."""
    value = row.values[name]
    if isinstance(value, str) and turns_of_text(value) is None:
        return value
    if not isinstance(value, (str, list, dict)):
        raise InputError(f"{row.origin}: {name} must be a string or a list of turns, got {type(value).__name__}")
    return [] if name == "prompt" and value == [] else read_turns(value, name, row.origin)


def _conversation(row: Row, names: Sequence[str] = CONVERSATIONS) -> tuple[str, list[Turn]] | None:
    """The name and the turns of the row's conversation; a second column must have the same."""
    given = [name for name in names if row.values.get(name) not in (None, "")]
    found = [(name, read_turns(row.values[name], name, row.origin)) for name in given]
    for name, turns in found[1:]:
        if turns != found[0][1]:
            raise _two_forms(row, found[0][0], name)
    return found[0] if found else None


def _system(row: Row) -> str:
    given = {name: _string(value, name, row) for name in _SYSTEM if (value := row.values.get(name)) is not None}
    texts = list(dict.fromkeys(text for text in given.values() if text.strip()))
    if len(texts) > 1:
        raise InputError(f"{row.origin}: {' and '.join(given)} are both given and differ")
    return texts[0] if texts else ""


def _with_system(turns: list[Turn], row: Row) -> list[Turn]:
    """The turns with the text of a column `system` as the first, unless it is that already."""
    text = _system(row)
    if not text:
        return turns
    if turns and turns[0]["role"] == "system":
        if turns[0]["content"].strip() != text.strip():
            raise InputError(f"{row.origin}: a column and the first turn give system, and they differ")
        return turns
    return [{"role": "system", "content": text}, *turns]


# ---------------------------------------------------------------------------------------------------------------------
# A prompt and its answers


def _divided(row: Row, prompt: Text | None, answers: Mapping[str, Text], repeats: bool = False) -> list[Text]:
    """The prompt and the answers behind it, all strings or, where one of them is turns, all turns."""
    if all(isinstance(each, str) for each in ("" if prompt is None else prompt, *answers.values())):
        return _divided_strings(row, prompt, list(answers.values()), repeats)  # type: ignore[arg-type]
    talks = {name: _as_turns(answer, "assistant") for name, answer in answers.items()}
    opens = all(talk[0]["role"] == "assistant" for talk in talks.values())
    if isinstance(prompt, str) and opens:
        prompt = _as_turns(prompt, "user")
    if isinstance(prompt, list):
        start = _repeated_turns(row, prompt, talks)
    else:
        start = _shared_turns(row, prompt, list(talks.values()))
        prompt = next(iter(talks.values()))[:start]
    return [_with_system(_unmarked(prompt), row), *(talk[start:] for talk in talks.values())]


def _divided_strings(row: Row, prompt: str | None, answers: list[str], repeats: bool) -> list[Text]:
    if _system(row):
        raise InputError(
            f"{row.origin}: system belongs to turns, but prompt and answer are strings that are joined as they stand; "
            "column_map with question=prompt has them read as turns"
        )
    if prompt is None:
        shared = common_prefix(*answers)
        shared -= shared > 0 and answers[0][shared - 1] == " "  # the space belongs to the word that follows
        return [answers[0][:shared], *(answer[shared:] for answer in answers)]
    for start in (prompt, prompt.rstrip()) if repeats else ():
        if all(answer.startswith(start) for answer in answers):
            return [start, *(answer[len(start) :] for answer in answers)]
    return [prompt, *answers]


def _as_turns(text: Text, role: str) -> list[Turn]:
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def _repeated_turns(row: Row, prompt: list[Turn], talks: Mapping[str, list[Turn]]) -> int:
    """How many turns of the prompt the answers repeat: all of them or none."""
    texts = _unmarked(prompt)
    repeating = [name for name, talk in talks.items() if prompt and _unmarked(talk)[: len(prompt)] == texts]
    if 0 < len(repeating) < len(talks):
        raise InputError(f"{row.origin}: {repeating[0]} repeats the turns of prompt, and the other answer does not")
    for name, talk in talks.items():
        if repeating and len(talk) == len(prompt):
            raise InputError(f"{row.origin}: {name} has no turn behind those of prompt")
        if not repeating and prompt and prompt[-1]["role"] == "user" and talk[0]["role"] in ("system", "user"):
            raise InputError(
                f"{row.origin}: {name} begins with the turn of a {talk[0]['role']} behind a prompt that ends with the "
                "user's; expected the assistant's turn, or the turns of prompt again"
            )
    return len(prompt) if repeating else 0


def _unmarked(turns: list[Turn]) -> list[Turn]:
    """The turns without their marks of what is learned."""
    return [{key: value for key, value in turn.items() if key != LEARNED} for turn in turns]


def _shared_turns(row: Row, prompt: str | None, talks: list[list[Turn]]) -> int:
    """How many turns at the start of whole conversations are their prompt, of which `prompt` is a turn's text."""
    texts = [turn["content"].strip() for turn in talks[0]]
    if len(talks) > 1:
        shared = min(common_prefix(*map(_unmarked, talks)), *(len(talk) - 1 for talk in talks))
    else:
        shared = texts.index(prompt.strip()) + 1 if prompt is not None and prompt.strip() in texts else 0
    if shared == 0:
        raise InputError(
            f"{row.origin}: no prompt, and chosen and rejected do not begin with the same turn"
            if prompt is None
            else f"{row.origin}: no answer begins with the assistant's turn, or with one of the text of prompt"
        )
    if prompt is not None and prompt.strip() not in texts[:shared]:
        raise InputError(
            f"{row.origin}: prompt is text that no turn has with which the answers begin; {_column_names(row)}"
        )
    return shared


# ---------------------------------------------------------------------------------------------------------------------
# Questions and answers under other names


def _of_other_trainers(row: Row, chat: bool) -> dict[str, Any] | None:
    """The row as `messages`, or as `prompt` and `completion`, where it has a form that is not TRL's."""
    held = [name for name in TALKS if _has(row, name) and is_list_of_turns(row.values[name])]
    fitting = [pair for pair in QUESTIONS if all(_has(row, name) for name in pair)]
    question = _question(row) if fitting else None
    fitting = [pair for pair in fitting if pair[0] == question]
    if len(held) + len(fitting) > 1:
        raise _two_forms(row, *[*held, *(" and ".join(pair) for pair in fitting)][:2])
    if held:
        return {"messages": _with_system(read_turns(row.values[held[0]], held[0], row.origin), row)}
    if not fitting or question is None:
        return None
    name = fitting[0][1]
    answer = _only(row) if name == "answers" else _read(name, row)
    return _completed(row, *_with_answers(row, question, {name: answer}, chat))


def _completed(row: Row, asked: Text, answers: dict[str, Text]) -> dict[str, Any]:
    prompt, completion = _divided(row, asked, answers)
    return {"prompt": prompt, "completion": completion}


def _asked(row: Row, answers: dict[str, Text], chat: bool, repeats: bool) -> tuple[Text | None, dict[str, Text]]:
    """The prompt of two answers where no column `prompt` has it, and the answers, as turns if it is."""
    if question := _question(row):
        return _with_answers(row, question, answers, chat, repeats)
    opens = all(isinstance(answer, str) or answer[0]["role"] == "assistant" for answer in answers.values())
    talk = _conversation(row) if opens else None
    if talk and talk[1][-1]["role"] == "assistant":
        raise InputError(f"{row.origin}: {talk[0]} ends with an answer; expected what chosen and rejected answer")
    return talk and talk[1], answers


def _question(row: Row) -> str | None:
    """The column that asks; `input` does where no other one does."""
    given = [name for name in _ASKING if _has(row, name)]
    given = [name for name in given if name != "input"] or given
    if len(given) > 1:
        raise _two_forms(row, *given[:2])
    return given[0] if given else None


def _with_answers(
    row: Row, question: str, answers: dict[str, Text], chat: bool, repeats: bool = False
) -> tuple[Text, dict[str, Text]]:
    """The question and its answers: turns, or the text of Alpaca where an instruction meets no chat template."""
    asked, more, history = _read(question, row), _more(row, question), _history(row)
    if isinstance(asked, list):
        if more or history:
            raise InputError(f"{row.origin}: {question} is a list of turns; expected text beside input or history")
        return asked, answers
    start = asked.rstrip()
    if repeats and all(isinstance(each, str) and each.startswith(start) for each in answers.values()):
        answers = {name: each[len(start) :].lstrip() for name, each in answers.items() if isinstance(each, str)}
    strings = all(isinstance(each, str) for each in answers.values())
    if question == "instruction" and strings and not chat and not history:
        more_text = f"### Input:\n{more}\n\n" if more else ""
        return _ALPACA.format(paired=_PAIRED if more else "", instruction=asked, more=more_text), answers
    text = "\n".join(part for part in (asked, more) if part)
    if not strings and not history:
        return text, answers  # which may be whole conversations
    turns = {name: _as_turns(each, "assistant") for name, each in answers.items()}
    return [*history, {"role": "user", "content": text}], {**turns}


def _more(row: Row, question: str) -> str:
    """The text of `input` or `context` that belongs to an instruction."""
    given = {name: row.values.get(name) for name in ("input", "context") if name != question}
    texts = {name: _string(value, name, row) for name, value in given.items() if value}
    if texts and question != "instruction":
        raise InputError(
            f"{row.origin}: {question} stands beside {next(iter(texts))}, which it may refer to; join them in one "
            f"column, or rename the other; {_column_names(row)}"
        )
    if len(texts) > 1:
        raise _two_forms(row, *texts)
    return next(iter(texts.values()), "")


def _history(row: Row) -> list[Turn]:
    """Earlier turns of a column of [question, answer]; they belong to the prompt."""
    pairs = row.values.get("history") or []
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in pairs
    ):
        raise InputError(f"{row.origin}: history must be a list of [question, answer], got {pairs!r:.80}")
    return [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _only(row: Row) -> str:
    """The one answer of a column `answers`."""
    value = row.values["answers"]
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or len(texts) != 1 or not isinstance(texts[0], str):
        raise InputError(f"{row.origin}: answers must be a string, or a list of one, got {value!r:.80}")
    return texts[0]


def _column_names(row: Row) -> str:
    names = sorted(row.values)
    empty = [name for name in names if not _has(row, name)]
    without = f" (without a value in this row: {', '.join(empty)})" if empty else ""
    return f"the columns are {names}{without}; column_map (new=old) reads one under another name"


def _two_forms(row: Row, one: str, other: str) -> InputError:
    return InputError(f"{row.origin}: {one} and {other} are two forms of a row; keep one of them; {_column_names(row)}")


def _no_form(row: Row, text_field: str) -> InputError:
    others = ", ".join(" and ".join(pair) for pair in QUESTIONS)
    hint = " (chosen and rejected belong to a preference loss: --method dpo)" if "chosen" in row.values else ""
    return InputError(
        f"{row.origin}: expected messages, or prompt and completion, or {text_field}, or a form of other trainers "
        f"({', '.join((*CONVERSATIONS[1:], *TALKS))}; {others}); {_column_names(row)}{hint}"
    )
