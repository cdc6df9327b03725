r"""The final answer of a text: what the text marks as its answer, or else its last line.

Four marks are known: `\boxed{...}` (or `\fbox`), `<answer>...</answer>`, a line that begins with `####`, and the words
"answer:" or "answer is". The last mark counts, so that a text which names many answers has named one. What a model
thinks, up to `</think>`, holds no answer.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

#: Columns that hold the right answer, in the order in which they are looked for.
GOLD_COLUMNS = ("answer", "solution")

#: Lists that a reward gets beside the columns of the data.
_GIVEN = ("prompts", "completions", "completion_ids")

_MARK = re.compile(
    r"(?P<box>\\(?:boxed|fbox)\s*\{)|(?P<tag><answer>)|(?P<line>^[ \t]*####|\banswer\b[ \t]*(?:\*\*)?[ \t]*:)"
    r"|(?P<sentence>\banswer[ \t]+is\b[ \t]*:?)",
    re.IGNORECASE | re.MULTILINE,
)
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_LINE = re.compile(r"(?:\s|\*\*)*(?P<text>.*)")
_BOLD_ENDS = re.compile(r"(?:\s|\*\*)+\Z")
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")
_BETWEEN_BOXES = re.compile(r"[\s$,;.*()\[\]\\]*(?:and|or)?[\s$,;.*()\[\]\\]*", re.IGNORECASE)
_EDGES = " .,;:!?$*`\"'\u201c\u201d\u2018\u2019"
_MINUS = str.maketrans("\u2212\u2013", "--")


def final_answer(text: str) -> str:
    """The answer that the text marks, or without a mark its last line; empty where thinking or the mark is cut off."""
    marked = marked_answer(text)
    if marked is not None:
        return marked
    lines = [line.strip() for line in _said(text).splitlines() if line.strip()]
    return lines[-1] if lines else ""


def marked_answer(text: str) -> str | None:
    r"""The last answer that the text marks, without the mark; None where it marks none.

    Boxes that follow one another with at most "and" or "or" between them are one answer of several values, joined by
    commas. A box or a tag that is not closed was cut off: the answer is empty.
    """
    text = _said(text)
    marks = list(_MARK.finditer(text))
    if not marks:
        return None
    last = marks[-1]
    boxes = [mark for mark in marks if mark["box"]]
    around = boxes and not last["box"] and _inside_of(text, boxes[-1])
    if last["box"] or (around and around[1] > last.start()):
        return _boxed(text, boxes)
    if last["tag"]:
        inside, closed, _ = text[last.end() :].partition("</answer>")
        return inside.strip() if closed else ""
    return _on_the_line(text, last)


def _said(text: str) -> str:
    """What the model says after it has thought; nothing where its thinking does not end."""
    _, ended, said = text.rpartition("</think>")
    return said if ended or "<think>" not in text else ""


def _on_the_line(text: str, mark: re.Match[str]) -> str:
    """The rest of the mark's line, or the line below where the rest is empty."""
    found = _LINE.match(text, mark.end())
    assert found is not None
    line = found["text"].split("</answer>")[0]
    return _BOLD_ENDS.sub("", _SENTENCE_END.split(line)[0] if mark["sentence"] else line)


def _boxed(text: str, boxes: Sequence[re.Match[str]]) -> str:
    """The content of the last box, after those of the boxes that lead up to it."""
    found: list[str] = []
    begin = len(text)
    for box in reversed(boxes):
        inside = _inside_of(text, box)
        if inside is None:
            break
        content, end = inside
        if found and (end > begin or not _BETWEEN_BOXES.fullmatch(text, end, begin)):
            break
        if not found or found[-1] != content:
            found.append(content)
        begin = box.start()
    return ", ".join(reversed(found))


def _inside_of(text: str, box: re.Match[str]) -> tuple[str, int] | None:
    """What stands between a box's braces, and where it ends; None where it is not closed."""
    depth = 1
    for brace in _BRACE.finditer(text, box.end()):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[box.end() : brace.start()].strip(), brace.end()
    return None


def normalized(answer: str) -> str:
    """An answer as exact matches compare it.

    Unicode's compatible forms, letters' case, runs of white space, commas between groups of three digits, and
    punctuation, quotes and `$` at both ends make no difference.
    """
    text = unicodedata.normalize("NFKC", answer).translate(_MINUS).casefold()
    text = " ".join(re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text).split())
    return text.strip(_EDGES) or text


def completion_text(completion: Any) -> str:
    """The text of a completion: itself, or the content of its last turn.

    Raises:
        TypeError: it is neither a text nor a list of turns with a content.
    """
    if isinstance(completion, str):
        return completion
    if isinstance(completion, Sequence) and completion and isinstance(completion[-1], Mapping):
        content = completion[-1].get("content")
        if content is None or isinstance(content, str):
            return content or ""
        if isinstance(content, Sequence):
            return "".join(str(part.get("text") or "") for part in content)
    raise TypeError(f"completions: expected texts, or lists of turns with a content, got {completion!r:.200}")


def gold_answers(reward: str, columns: Mapping[str, Any], name: str | None) -> list[str | None]:
    """The right answers, as the data marks them or whole; None for rows that have none.

    Args:
        reward: the reward's name, for the message.
        columns: columns of the data by name.
        name: the column; None takes the first of `GOLD_COLUMNS` that there is.

    Raises:
        ValueError: there is no such column.
    """
    wanted = GOLD_COLUMNS if name is None else (name,)
    found = next((columns[each] for each in wanted if columns.get(each) is not None), None)
    if found is None:
        lists = sorted(each for each, values in columns.items() if isinstance(values, list) and each not in _GIVEN)
        raise ValueError(
            f"{reward}: expected a column of right answers named {' or '.join(wanted)}, got the columns "
            f"{', '.join(lists) or 'none'}; gold_column names another"
        )
    return [None if value is None or not str(value).strip() else _gold(str(value)) for value in found]


def _gold(text: str) -> str:
    return marked_answer(text) or text.strip()
