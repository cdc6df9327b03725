"""Forms of rows: each is read as exactly one of the four that are rendered, or refused with file, line and key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from training_fixtures import make_model, make_options, make_tokenizer, preference_rows, write_jsonl

from logitless.training import InputError, train
from logitless.training.config import options_from_mapping
from logitless.training.data import Row, read_rows
from logitless.training.examples import IGNORED
from logitless.training.forms import canonical, canonical_pair, prompts_are_repeated, renamed, unpaired
from logitless.training.metrics import read_metrics
from logitless.training.mixture import components_of
from logitless.training.render import Renderer

LINE = "rows.jsonl, line 7"


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def said(speaker: str, text: Any) -> dict[str, Any]:
    return {"from": speaker, "value": text}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def form(values: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return dict(canonical(Row(values, LINE), **changes).values)


def pair(values: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return dict(canonical_pair(Row(values, LINE), **changes).values)


# One sequence a row

TALK = [user("q"), assistant("a")]
ASKED = {"prompt": [user("q")], "completion": [assistant("a")]}
SHAREGPT = [said("human", "q"), said("gpt", "a")]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"text": "t"}, {"text": "t"}),
        ({"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": "a"}),
        ({"messages": TALK}, {"messages": TALK}),
        ({"prompt": [user("q")], "completion": [assistant("a")]}, ASKED),
        # a string beside turns is the text of a turn, and the prompt's turns stand once
        ({"prompt": "q", "completion": [assistant("a")]}, ASKED),
        ({"prompt": [user("q")], "completion": "a"}, ASKED),
        ({"prompt": [user("q")], "completion": assistant("a")}, ASKED),
        ({"prompt": [user("q")], "completion": TALK}, ASKED),
        ({"prompt": "q", "completion": TALK}, ASKED),
        ({"prompt": [], "completion": [assistant("a")]}, {"prompt": [], "completion": [assistant("a")]}),
        ({"prompt": [], "completion": "a"}, {"prompt": [], "completion": [assistant("a")]}),
        # ShareGPT and its neighbours
        ({"conversations": SHAREGPT}, {"messages": TALK}),
        ({"conversations": TALK}, {"messages": TALK}),
        ({"messages": SHAREGPT}, {"messages": TALK}),
        ({"conversation": TALK}, {"messages": TALK}),
        ({"dialog": TALK}, {"messages": TALK}),
        ({"chat": TALK}, {"messages": TALK}),
        ({"conversations": SHAREGPT, "messages": TALK}, {"messages": TALK}),
        ({"conversations": SHAREGPT, "system": "s"}, {"messages": [system("s"), *TALK]}),
        ({"conversations": SHAREGPT, "system": ""}, {"messages": TALK}),
        ({"messages": [system("s"), *TALK], "system": "s"}, {"messages": [system("s"), *TALK]}),
        ({"prompt": [said("human", "q")], "completion": [said("gpt", "a")]}, ASKED),
        ({"conversations": {"from": ["human", "gpt"], "value": ["q", "a"], "weight": [None, 1]}}, {"messages": TALK}),
        # JSON text
        ({"messages": json.dumps(TALK)}, {"messages": TALK}),
        ({"conversations": json.dumps(SHAREGPT)}, {"messages": TALK}),
        ({"prompt": json.dumps([user("q")]), "completion": json.dumps([assistant("a")])}, ASKED),
        ({"messages": [json.dumps(turn) for turn in TALK]}, {"messages": TALK}),
        ({"prompt": "[1, 2]", "completion": '{"a": 1}'}, {"prompt": "[1, 2]", "completion": '{"a": 1}'}),
        *(
            ({"prompt": "q", "completion": text}, {"prompt": "q", "completion": text})
            for text in ('{"from": "Oslo", "to": "Rome"}', '[{"role": "admin", "name": "x"}]', "[]", "{}")
        ),
        # a question and its answer
        ({"question": "q", "answer": "a"}, ASKED),
        ({"question": "q", "answers": ["a"]}, ASKED),
        ({"question": "q", "response": "a", "system_prompt": "s"}, ASKED | {"prompt": [system("s"), user("q")]}),
        ({"prompt": "q", "response": "a"}, ASKED),
        ({"prompt": [user("q")], "response": "a"}, ASKED),
        ({"query": "q", "response": "a"}, ASKED),
        ({"problem": "q", "solution": "a", "answer": "4"}, ASKED | {"other": None}),
        ({"input": "q", "output": "a"}, ASKED),
        ({"input": "q", "target": "a"}, ASKED),
        # Alpaca, and Dolly's context
        ({"instruction": "q", "input": "", "output": "a"}, ASKED),
        ({"instruction": "q", "output": "a", "input": None}, ASKED),
        ({"instruction": "q", "input": "i", "output": "a"}, ASKED | {"prompt": [user("q\ni")]}),
        ({"instruction": "q", "context": "i", "response": "a"}, ASKED | {"prompt": [user("q\ni")]}),
        (
            {"instruction": "q", "output": "a", "history": [["h", "b"]], "system": "s"},
            ASKED | {"prompt": [system("s"), user("h"), assistant("b"), user("q")]},
        ),
        # forms of TRL come before those of others, and turns before text
        ({"messages": TALK, "text": "t"}, {"messages": TALK}),
        ({"prompt": "q", "completion": "a", "text": "t"}, {"prompt": "q", "completion": "a"}),
        ({"messages": TALK, "question": "x", "answer": "y"}, {"messages": TALK}),
        ({"text": "t", "instruction": "q", "output": "a"}, {"text": "t"}),
        ({"text": "t", "conversation": TALK}, {"text": "t"}),
        # an empty cell of a table is no form, and a talk may be other things
        ({"text": "", "instruction": "q", "output": "a"}, ASKED),
        ({"text": "", "messages": TALK}, {"messages": TALK}),
        ({"messages": "", "prompt": "q", "completion": "a"}, {"prompt": "q", "completion": "a"}),
        ({"dialogue": "once", "question": "q", "answer": "a"}, ASKED),
        ({"text": "t", "dialog": ["once", "more"]}, {"text": "t"}),
        ({"messages": TALK, "prompt": "q", "chosen": TALK, "rejected": TALK}, {"messages": TALK}),
    ],
)
def test_every_form_is_one_of_three(values: dict[str, Any], expected: dict[str, Any]) -> None:
    assert form(values) == {key: value for key, value in expected.items() if value is not None}
    assert form(form(values)) == form(values)  # what is read is read again as it is


def test_an_instruction_without_a_chat_template_is_alpaca_s_text() -> None:
    values = {"instruction": "Add.", "input": "2 + 2", "output": "4"}
    prompt = (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n2 + 2\n\n"
        "### Response:"
    )
    assert form(values, chat=False) == {"prompt": prompt, "completion": "4"}
    prompt = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd.\n\n### Response:"
    )
    assert form(values | {"input": ""}, chat=False) == {"prompt": prompt, "completion": "4"}
    assert form({"question": "q", "answer": "a"}, chat=False) == ASKED


def test_the_text_column_that_is_named_comes_before_every_form() -> None:
    values = {"content": "t", "messages": TALK}
    assert form(values, text_field="content") == {"content": "t"}
    assert form({"messages": TALK}, text_field="content") == {"messages": TALK}


def test_columns_of_the_loss_stay() -> None:
    values = {"question": "q", "answer": "a", "advantages": 0.5, "group": 3, "system": None}
    assert form(values) == ASKED | {"advantages": 0.5, "group": 3}


# Pairs

PAIR = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
WHOLE = {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}
STRINGS = {"prompt": "q ", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (STRINGS, STRINGS),
        (PAIR, PAIR),
        (WHOLE, PAIR),
        ({"chosen": "x a", "rejected": "x b"}, {"prompt": "x", "chosen": " a", "rejected": " b"}),
        (PAIR | {"chosen": assistant("a"), "rejected": assistant("b")}, PAIR),
        (PAIR | {"chosen": said("gpt", "a"), "rejected": said("gpt", "b")}, PAIR),
        (PAIR | {"chosen": json.dumps(PAIR["chosen"]), "rejected": json.dumps(PAIR["rejected"])}, PAIR),
        # the prompt stands once
        (PAIR | WHOLE, PAIR),
        (WHOLE | {"prompt": "q"}, PAIR),
        (PAIR | {"chosen": [user("q") | {"weight": 0}, assistant("a")], "rejected": WHOLE["rejected"]}, PAIR),
        (
            {
                side: [user("p"), assistant("h", weight=n), *WHOLE[side]]
                for n, side in enumerate(("chosen", "rejected"))
            },
            PAIR | {"prompt": [user("p"), assistant("h"), user("q")]},
        ),
        (PAIR | {"prompt": "q"}, PAIR),
        (PAIR | {"chosen": "a", "rejected": "b"}, PAIR),
        # UltraFeedback: whole conversations beside the prompt's text, and messages that are one of them
        (WHOLE | {"prompt": "q", "messages": WHOLE["chosen"], "score_chosen": 2.0}, PAIR | {"score_chosen": 2.0}),
        # a question under another name
        ({"question": "q", "chosen": "a", "rejected": "b"}, PAIR),
        ({"question": "q", "chosen": "a", "rejected": "b", "system": "s"}, PAIR | {"prompt": [system("s"), user("q")]}),
        ({"question": "q"} | WHOLE, PAIR),
        ({"instruction": "q", "input": "i", "chosen": "a", "rejected": "b"}, PAIR | {"prompt": [user("q\ni")]}),
        ({"conversations": [said("human", "q")], "chosen": said("gpt", "a"), "rejected": said("gpt", "b")}, PAIR),
        # an answer that goes on after the other one's end still begins with the assistant
        (
            {"chosen": WHOLE["chosen"], "rejected": [*WHOLE["chosen"], user("r"), assistant("b")]},
            PAIR | {"rejected": [assistant("a"), user("r"), assistant("b")]},
        ),
    ],
)
def test_every_form_of_a_pair_is_one(values: dict[str, Any], expected: dict[str, Any]) -> None:
    assert pair(values) == expected
    assert pair(pair(values)) == expected


def test_strings_that_repeat_the_prompt_lose_it_where_most_rows_do() -> None:
    repeating = [{"prompt": "q ", "chosen": "q a", "rejected": "q b"}] * 2
    by_chance = [{"prompt": "Hi", "chosen": "Hi!", "rejected": "Hi there"}]
    plain = [{"prompt": "q", "chosen": "a", "rejected": "b"}] * 2
    assert prompts_are_repeated([Row(row, LINE) for row in repeating])
    assert not prompts_are_repeated([Row(row, LINE) for row in by_chance + plain])
    assert pair(repeating[0], repeats=True) == STRINGS
    assert pair({"prompt": "q ", "chosen": "q\na", "rejected": "q\nb"}, repeats=True) == {
        "prompt": "q",
        "chosen": "\na",
        "rejected": "\nb",
    }
    assert pair(by_chance[0]) == by_chance[0]
    assert pair({"question": "q", "chosen": "q a", "rejected": "q b"}, repeats=True) == PAIR
    tokens = Renderer(make_tokenizer(), 64)
    once, twice = (tokens.pairs([Row(row, LINE)], "x").fingerprint() for row in (STRINGS, repeating[0]))
    assert once == twice


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": "q", "chosen": "a"}, r"rejected missing; the columns are \['chosen', 'prompt'\]; column_map"),
        (PAIR | {"chosen": 4}, "chosen must be a string or a list of turns, got int"),
        (PAIR | {"chosen": "a"}, "chosen and rejected must both be strings or both lists of turns"),
        (PAIR | {"chosen": WHOLE["chosen"]}, "chosen repeats the turns of prompt, and the other answer does not"),
        (PAIR | {"chosen": [user("q")], "rejected": WHOLE["rejected"]}, "chosen has no turn behind those of prompt"),
        (
            WHOLE | {"prompt": [system("s"), user("q")]},
            "chosen begins with the turn of a user behind a prompt that ends",
        ),
        (WHOLE | {"prompt": "another"}, "prompt is text that no turn has with which the answers begin"),
        (
            WHOLE | {"chosen": [user("x"), assistant("a")]},
            "no prompt, and chosen and rejected do not begin with the same turn",
        ),
        (STRINGS | {"system": "s"}, "system belongs to turns, but prompt and answer are strings"),
        ({"question": "q", "query": "q", "chosen": "a", "rejected": "b"}, "query and question are two forms"),
        ({"messages": TALK, "chosen": "a", "rejected": "b"}, "messages ends with an answer"),
        (PAIR | {"images": ["x"]}, "images: only text is trained on"),
    ],
)
def test_a_malformed_pair_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{LINE}: {message}"):
        pair(values)


# Turns

CALLED = assistant("", tool_calls=[call("find", city="Oslo")])
NESTED = {"name": "find", "arguments": {"city": "Oslo"}}
TEXTUAL = {"name": "find", "arguments": '{"city": "Oslo"}'}


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        (user("q"), user("q")),
        ({"role": "User", "content": "q"}, user("q")),
        ({"role": "human", "content": "q"}, user("q")),
        (said("chatgpt", "a"), assistant("a")),
        (said("bard", "a"), assistant("a")),
        *((said(role, "a"), assistant("a")) for role in ("ai", "AI", "bot", "chatbot", "output")),
        (said("input", "q"), user("q")),
        (said("observation", "r"), {"role": "tool", "content": "r"}),
        ({"role": "function", "name": "f", "content": "r"}, {"role": "tool", "name": "f", "content": "r"}),
        ({"role": "ipython", "content": "r"}, {"role": "ipython", "content": "r"}),
        ({"role": "Critic", "content": "r"}, {"role": "Critic", "content": "r"}),
        (user("q") | {"name": None, "tool_calls": None, "from": None}, user("q")),
        # content
        (user("") | {"content": [{"type": "text", "text": "a"}, "b", {"text": "c"}]}, user("abc")),
        (user("") | {"content": [{"type": "text", "text": "a", "image_url": None}]}, user("a")),
        (user("") | {"content": [{"type": "input_text", "text": "a"}]}, user("a")),
        (user("") | {"content": []}, user("")),
        (user('[{"type": "text", "text": "a"}]'), user('[{"type": "text", "text": "a"}]')),
        (user("[1, 2]"), user("[1, 2]")),
        (assistant("a", tool_calls=[]), assistant("a")),
        (assistant("a", reasoning_content="r"), assistant("a", reasoning_content="r")),
        ({"role": "assistant", "thinking": "r"}, assistant("", thinking="r")),
        ({"role": "tool", "content": "r", "tool_call_id": "1"}, {"role": "tool", "content": "r", "tool_call_id": "1"}),
        # calls of tools
        (CALLED, CALLED),
        ({"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": TEXTUAL}]}, CALLED),
        ({"role": "assistant", "tool_calls": [{"function": NESTED}]}, CALLED),
        (assistant("", tool_calls=[NESTED]), CALLED),
        (assistant("", tool_calls=NESTED), CALLED),
        (assistant("", tool_calls=[json.dumps(TEXTUAL)]), CALLED),
        (assistant("", tool_calls=json.dumps([{"function": TEXTUAL}])), CALLED),
        ({"role": "assistant", "content": None, "function_call": TEXTUAL}, CALLED),
        (said("function_call", json.dumps(NESTED)), CALLED),
        (said("tool_call", json.dumps([TEXTUAL])), CALLED),
        (
            assistant("a", tool_calls=[{"id": "1", "type": "function", "function": {"name": "now"}}]),
            assistant("a", tool_calls=[call("now") | {"id": "1"}]),
        ),
        # Arrow's nulls are dropped, a list's and those of JSON text stay
        (
            assistant("", tool_calls=[call("f", x=None, y={"z": None}, w=[None, {"v": None}])]),
            assistant("", tool_calls=[call("f", y={}, w=[None, {}])]),
        ),
        (
            assistant("", tool_calls=[{"name": "f", "arguments": '{"x": null}'}]),
            assistant("", tool_calls=[call("f", x=None)]),
        ),
        # what is not to be learned
        *(
            (assistant("a") | {key: value}, assistant("a", train=False))
            for key in ("train", "trainable", "training", "loss", "loss_mask", "train_on_turn", "weight")
            for value in (0, False, 0.0)
        ),
        (assistant("a", weight=1, train=True), assistant("a")),
        (assistant("a", weight=None), assistant("a")),
        (assistant("a", weight=0, train=False), assistant("a", train=False)),
        (user("q") | {"weight": 0, "train": False}, user("q")),
        *(
            (assistant("a", **{key: 0.0}), assistant("a", train=False))
            for key in ("step_loss_mask", "loss_weight", "loss_scale")
        ),
        (assistant("a", masked=True, weight=0), assistant("a", train=False)),
        (assistant("a", masked=False), assistant("a")),
        (user("q") | {"masked": True, "mask": None}, user("q")),
    ],
)
def test_every_form_of_a_turn_is_one(turn: dict[str, Any], expected: dict[str, Any]) -> None:
    assert form({"messages": [turn]}) == {"messages": [expected]}
    assert form({"messages": json.dumps([turn])})["messages"][0].keys() == expected.keys()


def test_marks_mean_nothing_in_a_prompt() -> None:
    prompt = [user("p"), assistant("h", weight=0), user("q")]
    expected = [user("p"), assistant("h"), user("q")]
    assert form({"prompt": prompt, "completion": [assistant("a", weight=0)]}) == {
        "prompt": expected,
        "completion": [assistant("a", train=False)],
    }


def test_a_turn_that_is_marked_is_not_learned() -> None:
    tokenizer = make_tokenizer()
    turns = [user("q"), assistant("wrong", weight=0), user("r"), assistant("right")]
    ((example,),) = Renderer(tokenizer, 128).sequences([Row({"messages": turns}, LINE)], "x").items
    assert tokenizer.decode(example.input_ids[example.labels != IGNORED]) == "right<|im_end|>\n"
    assert "wrong" in tokenizer.decode(example.input_ids) and "weight" not in tokenizer.decode(example.input_ids)


SCHEMA = {"name": "find", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
TOOL = {"type": "function", "function": SCHEMA}


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"tools": [TOOL]}, [TOOL]),
        ({"tools": json.dumps([TOOL])}, [TOOL]),
        ({"tools": [json.dumps(TOOL)]}, [TOOL]),
        ({"tools": [SCHEMA]}, [TOOL]),
        ({"tools": [{"type": "function"} | SCHEMA]}, [TOOL]),
        ({"tools": [SCHEMA | {"parameters": json.dumps(SCHEMA["parameters"])}]}, [TOOL]),
        ({"functions": [SCHEMA]}, [TOOL]),
        ({"tools": [TOOL | {"function": SCHEMA | {"description": None, "strict": None}}]}, [TOOL]),
        ({"tools": [SCHEMA | {"enum": [None, 1]}]}, [TOOL | {"function": SCHEMA | {"enum": [None, 1]}}]),
        ({"tools": []}, None),
        ({"tools": "[]"}, None),
        ({"tools": ""}, None),
        ({"tools": None}, None),
    ],
)
def test_every_form_of_tools_is_one(columns: dict[str, Any], expected: list[Any] | None) -> None:
    assert form({"messages": TALK} | columns) == {"messages": TALK} | ({"tools": expected} if expected else {})


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ("hello", "expected role and content, got str 'hello'"),
        ({"content": "x"}, "expected role and content"),
        ({"role": 3, "content": "x"}, "expected role and content"),
        ({"role": "user", "from": "gpt", "content": "x"}, "role and from are both given and differ"),
        ({"role": "user", "content": "x", "value": "y"}, "content and value are both given and differ"),
        ({"role": "user"}, "content is missing"),
        ({"role": "user", "content": None}, "content is missing"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "content is missing"),
        *(({"role": "assistant", "content": value}, "content: expected text or a list of parts with text, got " + kind)
          for value, kind in (({"text": "x"}, "dict"), (7, "int"), (True, "bool"), (1.5, "float"))),
        (user("") | {"content": ["a", {"type": "image_url", "image_url": {"url": "u"}}]}, r"content\[1\]: expected"),
        (user("") | {"content": [{"type": "image"}]}, r"content\[0\]: expected .* got dict {'type': 'image'}"),
        (assistant("") | {"content": [{"type": "refusal", "refusal": "no"}]}, r"content\[0\]: expected"),
        (user("") | {"content": [{"type": "text", "text": None}]}, r"content\[0\]: expected"),
        (user("") | {"content": [{"type": "text", "text": "x", "image": "u"}]}, r"content\[0\]: expected"),
        (user("") | {"content": [None]}, r"content\[0\]: expected"),
        (assistant("a", refusal="no"), "refusal: only text is trained on, got str 'no'"),
        (user("q") | {"images": ["u"]}, "images: only text is trained on"),
        (assistant("", tool_calls=[{"function": {"name": "f", "arguments": "{'x': 1}"}}]),
         r"tool_calls\[0\].function.arguments: expected a JSON object or its JSON text, got str"),
        (assistant("", tool_calls=[{"function": {"name": "f", "arguments": "[1]"}}]),
         r"tool_calls\[0\].function.arguments: expected a JSON object, got str"),
        (assistant("", tool_calls=[{"function": {"name": "f", "arguments": '{"x": NaN}'}}]),
         r"tool_calls\[0\].function.arguments: .* NaN is no value of JSON"),
        (assistant("", tool_calls=[NESTED, {"name": "f", "arguments": 3}]), r"tool_calls\[1\].arguments: expected"),
        (assistant("", tool_calls=[{"arguments": {}}]), r"tool_calls\[0\].name: expected the name of a function"),
        (assistant("", tool_calls=[{"name": "f", "parameters": {}}]), r"tool_calls\[0\].parameters: expected name and"),
        (assistant("", tool_calls="f(x)"), "tool_calls: expected a list of calls or its JSON text"),
        (assistant("", tool_calls=3), "tool_calls: expected calls with name and arguments, got int 3"),
        (assistant("", tool_calls=[NESTED], function_call=NESTED), "tool_calls and function_call are both given"),
        (assistant("", function_call=TEXTUAL | {"arguments": "x"}), "function_call.arguments: expected a JSON object"),
        (said("function_call", "find(Oslo)"), "content: expected a call or its JSON text"),
        (said("function_call", {"name": "f"}), "content: expected the JSON text of a call, got dict"),
        (assistant("a", weight=0.5), "weight: expected 0 or 1, or false or true, got float 0.5"),
        (assistant("a", train="false"), "train: expected 0 or 1, or false or true, got str 'false'"),
        (assistant("a", weight=0, train=True), "train and weight contradict each other"),
        (user("q") | {"train": True}, "train: the loss counts on the assistant's turns"),
        (user("q") | {"weight": 1}, "weight: the loss counts on the assistant's turns"),
        (user("q") | {"masked": False}, "masked: .* expected 1 or true, or none, at a turn of the role user, got bool"),
        (assistant("a", masked=True, train=True), "train and masked contradict each other"),
        (assistant("a", loss_scale=0.3), "loss_scale: expected 0 or 1, or false or true, got float 0.3"),
        (assistant("a", mask=True), "mask: expected the key train, false for a turn that is not learned as a whole"),
        (assistant("a", train_detail=[{"begin_offset": 0, "end_offset": 0, "train": False}]), "train_detail: expected"),
        ({"role": "user", "text": "q"}, r"content is missing or null; the keys are \['role', 'text'\]"),
    ],
)  # fmt: skip
def test_a_malformed_turn_is_refused_with_line_turn_and_key(turn: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"^{LINE}: messages, turn 3(, |: ){message}"):
        form({"messages": [*TALK, turn]})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"messages": "hello"}, "messages must be a non-empty list of turns, got text that is no JSON of one"),
        (
            {"messages": str(TALK)},
            "messages must be a non-empty list of turns, got text that is no JSON of one: Expecting property name",
        ),
        ({"prompt": "q", "response": None}, r"expected .*the columns are .* \(without a value in this row: response"),
        ({"messages": {"messages": TALK}}, "messages, turn 1: expected role and content, got dict"),
        ({"conversations": []}, "conversations must be a non-empty list of turns, got list"),
        (
            {"messages": {"role": ["user"], "content": ["q", "a"]}},
            "messages, turn 1: expected role and content, got dict",
        ),
        ({"text": 3}, "text must be a string, got int"),
        ({"prompt": "q", "completion": 4}, "completion must be a string or a list of turns, got int"),
        ({"question": "q", "answer": 4}, "answer must be a string or a list of turns, got int"),
        ({"question": "q", "answers": ["a", "b"]}, r"answers must be a string, or a list of one, got \['a', 'b'\]"),
        ({"question": "q", "answers": {"text": ["a"]}}, "answers must be a string, or a list of one"),
        ({"messages": TALK, "prompt": "q", "completion": "a"}, "messages and prompt and completion are two forms of"),
        ({"messages": TALK, "conversations": [user("x")]}, "messages and conversations are two forms of a row"),
        ({"question": "q", "answer": "a", "response": "b"}, "question and response and question and answer are two"),
        ({"conversation": TALK, "question": "q", "answer": "a"}, "conversation and question and answer are two forms"),
        ({"problem": "q", "instruction": "r", "output": "a"}, "instruction and problem are two forms of a row"),
        ({"question": "q", "answer": "a", "context": "c"}, "question stands beside context, which it may refer to"),
        ({"question": "q", "answer": "a", "input": "c"}, "question stands beside input, which it may refer to"),
        ({"instruction": "q", "output": "a", "history": ["h"]}, "history must be a list of"),
        ({"messages": TALK, "system": 3}, "system must be a string, got int"),
        ({"messages": TALK, "system": "a", "system_prompt": "b"}, "system and system_prompt are both given and differ"),
        ({"messages": [system("a"), *TALK], "system": "b"}, "a column and the first turn give system"),
        ({"prompt": "q", "completion": "a", "system": "b"}, "system belongs to turns, but prompt and answer are str"),
        ({"messages": TALK, "tools": "[not json"}, "tools: expected a list of tools or its JSON text, got str"),
        ({"messages": TALK, "tools": {"name": "f"}}, "tools: expected a list of tools, got dict"),
        ({"messages": TALK, "tools": "0"}, "tools: expected a list of tools, got str '0'"),
        ({"messages": TALK, "tools": [3]}, r"tools\[0\]: expected a JSON object, got int 3"),
        ({"messages": TALK, "tools": [{"type": "function", "function": {}}]}, r"tools\[0\]: expected the name of"),
        (
            {"messages": TALK, "tools": [SCHEMA | {"parameters": "none"}]},
            r"tools\[0\].function.parameters: expected a JSON object or its JSON text",
        ),
        ({"messages": TALK, "tools": [TOOL], "functions": [SCHEMA]}, "tools and functions are both given"),
        ({"messages": TALK, "images": ["x.png"]}, "images: only text is trained on"),
        ({"reply": "x"}, r"expected messages, or prompt and completion, or text, .* the columns are \['reply'\]"),
        ({"prompt": "x"}, r"expected messages, .* column_map \(new=old\) reads one under another name"),
        ({"chosen": "x", "rejected": "y"}, "expected messages, .* --method dpo"),
    ],
)
def test_a_malformed_row_is_refused_with_line_and_key(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{LINE}: {message}"):
        form(values)


def test_a_value_that_is_nested_too_deeply_is_refused() -> None:
    deep: Any = {}
    for _ in range(5000):
        deep = {"x": deep}
    with pytest.raises(InputError, match=f"^{LINE}: messages: nested too deeply"):
        form({"messages": [assistant("", tool_calls=[call("f", **deep)])]})
    text = '{"x": ' * 100_000
    with pytest.raises(InputError, match=rf"^{LINE}: messages, turn 1, tool_calls\[0\].arguments: .*nested too deeply"):
        form({"messages": [assistant("", tool_calls=[{"name": "f", "arguments": text}])]})


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(0, 2), st.just(0.5), st.sampled_from(["", "q", "user", "gpt"])
)
KEYS = st.sampled_from([
    "role", "from", "content", "value", "tool_calls", "function_call", "function", "name", "arguments", "weight",
    "train", "text", "type", "parameters",
])  # fmt: skip
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(KEYS, inner, max_size=4),
        st.dictionaries(KEYS, inner, max_size=4).map(json.dumps),
        st.lists(
            st.builds(
                lambda role, rest: {"role": role, "content": "c"} | rest,
                st.sampled_from(["user", "assistant"]),
                st.dictionaries(KEYS, inner, max_size=2),
            ),
            max_size=3,
        ),
    ),
    max_leaves=12,
)
COLUMNS = st.sampled_from([
    "messages", "conversations", "dialog", "prompt", "completion", "chosen", "rejected", "text", "tools", "functions",
    "question", "answer", "answers", "instruction", "input", "output", "history", "context", "system", "images",
])  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(COLUMNS, ANYTHING, max_size=5), st.booleans())
def test_whatever_a_row_holds_is_read_or_refused_by_line(values: dict[str, Any], chat: bool) -> None:
    """Nothing else is raised, and what is read has the types that the form promises."""
    for read in (canonical, canonical_pair):
        try:
            row = read(Row(values, LINE), chat=chat)
        except InputError as error:
            assert str(error).startswith(LINE)
            continue
        assert_canonical(row.values)
        assert read(row, chat=chat) is row


def assert_canonical(values: Mapping[str, Any]) -> None:
    found = [
        values[name] for name in ("messages", "prompt", "completion", "chosen", "rejected", "text") if name in values
    ]
    assert all(isinstance(value, str) for value in found) or all(isinstance(value, list) for value in found)
    for turn in (turn for value in found if isinstance(value, list) for turn in value):
        assert isinstance(turn["role"], str) and isinstance(turn["content"], str)
        assert turn.get("train", False) is False and not turn.keys() & {"weight", "from", "value", "function_call"}
        assert None not in turn.values()
        for each in turn.get("tool_calls", []):
            assert isinstance(each["function"]["name"], str) and isinstance(each["function"]["arguments"], dict)
    for tool in values.get("tools", []):
        assert isinstance(tool["function"]["name"], str)


# Files

VALUES = st.one_of(st.integers(-9, 9), st.text("ab", max_size=2), st.booleans())
NAMES = st.sampled_from(["f", "g", "h"])


@st.composite
def tool_rows(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Rows of which each key has values of one type in the whole file, as a table's columns must."""
    kinds = {"x": st.integers(-9, 9), "y": st.text("ab", max_size=2), "z": st.lists(st.booleans(), max_size=2)}
    arguments = st.fixed_dictionaries({}, optional={**kinds, "n": st.fixed_dictionaries({}, optional=kinds)})
    properties = st.fixed_dictionaries(
        {"x": st.just({"type": "integer"})},
        optional={"y": st.fixed_dictionaries({"type": st.just("string")}, optional={"enum": st.just(["a", None])})},
    )
    tool = st.builds(lambda name, given: {"name": name, "parameters": {"properties": given}}, NAMES, properties)
    calls = st.lists(st.builds(lambda name, given: call(name, **given), NAMES, arguments), max_size=2)
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        turns = [user("q"), assistant(draw(st.text("ab", max_size=3))), user("r"), assistant("last", weight=1)]
        if called := draw(calls):
            turns[1] |= {"tool_calls": called, "content": draw(st.sampled_from(["", "calling"]))}
        turns[1] |= draw(st.sampled_from([{}, {"weight": 0}, {"weight": 1}, {"name": "me"}]))
        rows.append({"messages": turns} | draw(st.sampled_from([{}, {"tools": draw(st.lists(tool, max_size=2))}])))
    return rows


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tool_rows())
def test_parquet_and_jsonl_give_the_same_rows(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({key: [row.get(key) for row in rows] for key in ("messages", "tools")})
    lines = tmp_path / "rows.jsonl"
    write_jsonl(lines, rows)
    try:
        parquet.write_table(table, tmp_path / "rows.parquet")
    except pyarrow.ArrowNotImplementedError:  # a file of which all arguments are empty has a type without fields
        return
    read = [
        [dict(canonical(row).values) for row in read_rows(str(tmp_path / f"rows.{end}"))]
        for end in ("jsonl", "parquet")
    ]
    assert read[0] == read[1]


@pytest.mark.parametrize("way", ["load", "from_list"])
def test_every_file_that_datasets_writes_gives_the_same_rows(tmp_path: Path, way: str) -> None:
    """Values of no one shape are JSON in its tables, and text in its Parquet; other tables fill each other's keys."""
    datasets = pytest.importorskip("datasets")
    calls = [[call("f", x=1, y=[{"z": 1}, {"w": None}])], [call("g", city="me"), call("f")], None]
    rows = [
        {
            "messages": [
                user("q"),
                {"role": "assistant", "content": None if made else "a", "tool_calls": made},
                user("r"),
            ]
        }
        | {"tools": [SCHEMA] if made else None, "score": 0.5}
        for made in calls
    ]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    table = (
        datasets.load_dataset("json", data_files=data, split="train", cache_dir=str(tmp_path / "cache"))
        if way == "load"
        else datasets.Dataset.from_list(rows)
    )
    table.save_to_disk(tmp_path / "saved")
    table.to_parquet(tmp_path / "rows.parquet")
    table.to_json(tmp_path / "again.jsonl")
    expected = [dict(canonical(row).values) for row in read_rows(data)]
    assert expected[1]["messages"][1]["tool_calls"] == calls[1] and expected[2]["messages"][1] == assistant("a")
    for name in ("saved", "rows.parquet", "again.jsonl"):
        assert [dict(canonical(row).values) for row in read_rows(str(tmp_path / name))] == expected, name


# column_map


def test_column_map_reads_columns_under_other_names() -> None:
    rows = [Row({"a": "q", "b": "a", "c": 0.5}, LINE)]
    (row,) = renamed(rows, {"question": "a", "answer": "b", "advantages": "c"})
    assert dict(row.values) == {"question": "q", "answer": "a", "advantages": 0.5} and row.origin == LINE
    assert form(dict(row.values)) == ASKED | {"advantages": 0.5}
    (swapped,) = renamed(rows, {"a": "b", "b": "a"})
    assert dict(swapped.values) == {"a": "a", "b": "q", "c": 0.5} and len(swapped.values) == 3
    assert renamed(rows, None) == rows


@pytest.mark.parametrize(
    ("column_map", "message"),
    [
        ({"prompt": "anser"}, r"column_map: expected a column anser, .* the columns are .* \(nearest: answer\)"),
        ({"answer": "question"}, "column_map: question is to be read as answer, but the row has a column answer"),
    ],
)
def test_a_column_map_that_does_not_fit_is_refused(column_map: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=f"^{LINE}: {message}"):
        renamed([Row({"question": "q", "answer": "a"}, LINE)], column_map)


@pytest.mark.parametrize(
    "value", ["prompt=a, completion=b", {"prompt": "a", "completion": "b"}, "{prompt: a, completion: b}"]
)
def test_column_map_is_text_or_a_mapping(value: Any) -> None:
    assert options_from_mapping({"column_map": value}, "x")[0].column_map == {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    "value", ["prompt", "prompt=a=b", "prompt=a,prompt=b", "prompt=a,text=a", "prompt=", 3, {"a": 1}]
)
def test_a_broken_column_map_is_named(value: Any) -> None:
    with pytest.raises(InputError, match=r"x: column_map must be a list new=old,\.\.\. or a mapping"):
        options_from_mapping({"column_map": value}, "x")


def test_a_component_of_a_mixture_has_a_column_map_of_its_own() -> None:
    mixture = [
        {"method": "sft", "dataset_name": "a.jsonl", "column_map": "question=ask,answer=reply"},
        {"method": "dpo", "dataset_name": "b.jsonl"},
    ]
    first, second = components_of(options_from_mapping({"mixture": mixture}, "x")[0])
    assert first.options.column_map == {"question": "ask", "answer": "reply"} and second.options.column_map is None


def test_a_run_reads_mapped_columns_for_training_and_evaluation(tmp_path: Path) -> None:
    rows = [{"human": f"{i} + 1", "bot": str(i + 1)} for i in range(8)]
    data, named = tmp_path / "data.jsonl", tmp_path / "named.jsonl"
    write_jsonl(data, rows)
    write_jsonl(named, [{"question": row["human"], "answer": row["bot"]} for row in rows])
    model = make_model(tmp_path / "model")
    losses = []
    for path, column_map in ((data, {"question": "human", "answer": "bot"}), (named, None)):
        options = make_options(
            tmp_path / path.stem, model, str(path), eval_dataset_name=str(path), column_map=column_map, max_steps=2
        )
        losses.append((train(options).train_loss, read_metrics(tmp_path / path.stem)[-1]["eval_loss"]))
    assert losses[0] == losses[1]


# Marked completions

#: As in TRL's documentation of unpaired preference.
UNPAIRED = [
    {"prompt": "The sky is", "completion": " blue.", "label": True},
    {"prompt": [user("What color is the sky?")], "completion": [assistant("It is green.")], "label": False},
]


def test_a_null_of_json_text_stays_in_an_unpaired_row() -> None:
    """Rows that are made from a pair have been read, and are not read again."""
    calls = {
        side: [assistant("", tool_calls=[{"name": side, "arguments": '{"x": null}'}])]
        for side in ("chosen", "rejected")
    }
    chosen, rejected = unpaired([Row(PAIR | calls, LINE)])
    assert canonical(chosen).values["completion"] == [assistant("", tool_calls=[call("chosen", x=None)])]
    assert canonical(rejected).values["completion"] == [assistant("", tool_calls=[call("rejected", x=None)])]


def test_a_pair_is_two_marked_completions() -> None:
    rows = [
        Row(PAIR | {"group": 1, "chosen_ref_logprob": -1.0, "rejected_ref_logprob": -2.0}, LINE),
        Row(UNPAIRED[0], LINE),
    ]
    chosen, rejected, given = (dict(row.values) for row in unpaired(rows))
    asked = {"prompt": [user("q")], "group": 1}
    assert chosen == asked | {"completion": [assistant("a")], "label": True, "ref_logprob": -1.0}
    assert rejected == asked | {"completion": [assistant("b")], "label": False, "ref_logprob": -2.0}
    assert given == UNPAIRED[0]
    assert form(chosen) == chosen


@pytest.mark.parametrize("method", ["kto", "bco"])
def test_files_of_trl_s_unpaired_trainers_run(tmp_path: Path, method: str) -> None:
    """Neither has a column of the reference point or of the reward's shift, and a file of pairs does as well."""
    model = make_model(tmp_path / "model")
    pairs = preference_rows(4)
    marked = [
        {"prompt": row["prompt"], "completion": row[side], "label": label}
        for row in pairs for side, label in (("chosen", True), ("rejected", 0))
    ]  # fmt: skip
    results = []
    for name, rows in (("pairs", pairs), ("marked", marked), ("published", UNPAIRED * 4)):
        data = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        results.append(train(make_options(tmp_path / name, model, data, method=method, max_steps=2)))
    assert results[0].train_loss == results[1].train_loss
    assert results[2].step == 2


@pytest.mark.parametrize("label", [2, 0.5, -1, None, "good"])
def test_a_label_is_true_or_false(label: Any) -> None:
    tokens = Renderer(make_tokenizer(), 64, columns=("desirable",))
    with pytest.raises(InputError, match=f"^{LINE}: .*the column label.* true or false"):
        tokens.sequences([Row(UNPAIRED[0] | {"label": label}, LINE)], "x")
