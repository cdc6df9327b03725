"""Where the loss counts in conversations: the templates that TRL ships, and templates made to mislead."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import processors
from training_fixtures import make_tokenizer

from logitless.training import InputError
from logitless.training.data import Row
from logitless.training.examples import IGNORED, Example
from logitless.training.marks import said
from logitless.training.render import Renderer

trl = pytest.importorskip("trl")
FOLDER = Path(trl.__file__).parent / "chat_templates"
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja"))

# How the templates of a family end an answer; the last of a conversation may have more behind it.
ENDS = {
    "cohere2": "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "deepseek": "<\uff5cend▁of▁sentence\uff5c>",
    "diffusion_gemma": "<turn|>\n",
    "gemma4": "<turn|>\n",
    "gemma": "<end_of_turn>\n",
    "glm4moe_training": "<|user|>",
    "glm4moe": "",  # its models stop at the next turn's token, which only TRL's training template writes
    "gptoss": "<|end|>",
    "idefics3": "<end_of_utterance>\n",
    "llama3": "<|eot_id|>",
    "llava": "</s>",
    "muse": "<|eot|>",
    "phi3": "<|end|>\n",
    "smolvlm": "<end_of_utterance>\n",
}
CHATML_END = "<|im_end|>\n"  # of all others: Qwen, LFM, Nemotron
LAST_ENDS = {"gptoss": "<|return|>", "phi3": "<|end|>\n<|im_end|>"}
OPENINGS = {"gptoss": "<|channel|>final<|message|>", "muse": " to=user<|message|>"}  # learned with the answer


def of_family(table: dict[str, str], name: str, otherwise: str) -> str:
    return next((value for family, value in table.items() if name.startswith(family)), otherwise)


@cache
def template(name: str) -> Any:
    """A published template on the byte tokenizer, which gets its markers as single tokens."""
    text = (FOLDER / f"{name}.jinja").read_text()
    marks = set(
        re.findall(r"<[|\uff5c][^'\"\s|\uff5c{}]+[|\uff5c]>|</?think>|</?tool_call>|<(?:start|end)_of_turn>", text)
    )
    tokenizer = make_tokenizer(text)
    tokenizer.add_tokens(sorted(marks - set(tokenizer.get_vocab())), special_tokens=True)
    return tokenizer


def one(turns: list[dict[str, Any]], tokenizer: Any, row: dict[str, Any] | None = None, **options: Any) -> Example:
    renderer = Renderer(tokenizer, 100_000, **options)
    ((example,),) = renderer.sequences([Row({"messages": turns} | (row or {}), "data.jsonl, line 7")], "x").items
    return example


def counted(example: Example, tokenizer: Any) -> str:
    return str(tokenizer.decode(example.input_ids[example.labels != IGNORED]))


def user(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": text} | more


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text} | more


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"id": "call12345", "type": "function", "function": {"name": name, "arguments": arguments}}


def in_parts(turn: dict[str, Any]) -> dict[str, Any]:
    """The turn with its text in two parts."""
    texts = turn["content"][:3], turn["content"][3:]
    return turn | {"content": [{"type": "text", "text": text} for text in texts]}


def expected(name: str, turns: list[dict[str, Any]]) -> str:
    """A pattern for exactly the answers and what ends them; templates may trim the space around an answer."""
    answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    opening, end = re.escape(of_family(OPENINGS, name, "")), re.escape(of_family(ENDS, name, CHATML_END))
    last = re.escape(of_family(LAST_ENDS, name, "")) if turns[-1]["role"] == "assistant" else ""
    ends = [end] * (len(answers) - 1) + [last or end]
    return r"\s*".join(
        rf"{opening}\s*{re.escape(text.strip())}\s*{stop}" for text, stop in zip(answers, ends, strict=True)
    )


@pytest.mark.parametrize("name", NAMES)
def test_answers_of_every_template_count_with_what_ends_them_and_nothing_else(name: str) -> None:
    tokenizer = template(name)
    for turns in (
        [user("q1"), assistant("A1")],
        [user("q1"), assistant("A1"), user("q2"), assistant(" A2\n"), user("q3"), assistant("A3")],
        [user("q1"), assistant("A1"), user("q2")],
    ):
        found = counted(one(turns, tokenizer), tokenizer)
        assert re.fullmatch(rf"\s*{expected(name, turns)}\s*", found), (found, expected(name, turns))


# Each role has letters of its own, so that a single character of another turn would be seen. All have spaces, line
# feeds and letters outside of ASCII; none has the braces or angle brackets that templates write.
WORDS = {"system": "012é", "user": "345ß", "assistant": "678 ü漢🙂", "tool": "9ñ"}


def text_of(role: str, least: int = 0, most: int = 30) -> st.SearchStrategy[str]:
    short = st.text(WORDS[role] + " \n", min_size=least, max_size=most)
    return short | st.text(WORDS[role], min_size=1, max_size=3).map(lambda word: word * 200)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Turns of user and assistant, with a system turn before them or not, and with calls of tools or not."""
    turns: list[dict[str, Any]] = []
    if draw(st.booleans()):
        turns.append({"role": "system", "content": draw(text_of("system"))})
    tools = draw(st.booleans())
    for _ in range(draw(st.integers(1, 4))):
        turns.append(user(draw(text_of("user", 1).filter(str.strip))))
        if tools and draw(st.booleans()):
            value = st.text("678", min_size=1, max_size=5) | st.sampled_from([67, [], ["8", 7], {"key_7": 8}, True])
            arguments = draw(st.dictionaries(st.sampled_from(["key_6", "key_8"]), value))
            turns.append(assistant(draw(text_of("assistant")), tool_calls=[call("get_678", **arguments)]))
            turns.append({"role": "tool", "name": "get", "tool_call_id": "call12345", "content": draw(text_of("tool"))})
        turns.append(assistant(draw(text_of("assistant"))))
    return turns


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(turns=conversations(), keeps=st.booleans(), parts=st.booleans())
@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_another_turn_counts_whatever_the_conversation(
    name: str, turns: list[dict[str, Any]], keeps: bool, parts: bool
) -> None:
    tokenizer = template(name)
    if not keeps:  # a conversation that stops at a question
        turns = turns[: next(i for i, turn in reversed(list(enumerate(turns))) if turn["role"] == "user") + 1]
    assume(any(turn["role"] == "assistant" for turn in turns))
    try:
        example = one([in_parts(turn) for turn in turns] if parts else turns, tokenizer)
    except InputError as error:  # a role that the template does not know, or a text that it would leave out
        assert re.search(
            r"refuses this row|leaves \w+ out|rewrites content|once an answer|token that counts", str(error)
        ), error
        return
    found = counted(example, tokenizer)
    other = set("0123é45ß9ñ") & set(re.sub(r"<[^<>]*>", "", found))
    assert not other, (other, found)
    empty = any(turn["role"] == "assistant" and not said(turn) for turn in turns)  # nothing shows how GPT-OSS ends it
    if not any("tool_calls" in turn for turn in turns) and not (empty and name.startswith("gptoss")):
        assert re.fullmatch(rf"\s*{expected(name, turns)}\s*", found), (found, expected(name, turns))
    place = 0
    for turn in (turn for turn in turns if turn["role"] == "assistant"):
        place = found.find(said(turn), place)
        assert place >= 0, (turn, found)
        place += len(said(turn))


WEATHER = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {}}}


@pytest.mark.parametrize(
    "name", ["qwen3", "qwen3_6", "qwen2_5_training", "glm4moe", "llama3_1", "gptoss", "deepseekv3"]
)
def test_calls_count_and_what_tools_say_does_not(name: str) -> None:
    tokenizer = template(name)
    turns = [user("q"), assistant("", tool_calls=[call("weather", city="Oslo")]),
             {"role": "tool", "content": "sunny"}, assistant("It is fine.")]  # fmt: skip
    columns = {} if name == "deepseekv3" else {"tools": [WEATHER]}  # which writes none
    found = counted(one(turns, tokenizer, columns), tokenizer)
    assert "weather" in found and "Oslo" in found and "It is fine." in found and "sunny" not in found


@pytest.mark.parametrize("name", ["deepseekv3", "llama3", "gemma3", "phi3"])
def test_tools_that_the_template_does_not_write_are_not_left_out_in_silence(name: str) -> None:
    with pytest.raises(InputError, match=r"line 7: tools: .* writes none of them"):
        one([user("q"), assistant("weather")], template(name), {"tools": [WEATHER]})


def test_thinking_counts_where_the_template_writes_it_and_empty_thinking_is_prompt() -> None:
    tokenizer = template("qwen3")
    turns = [user("q1"), assistant("A1", reasoning_content="first"), user("q2"), assistant("A2", reasoning_content="R")]
    assert counted(one(turns, tokenizer), tokenizer) == "A1<|im_end|>\n<think>\nR\n</think>\n\nA2<|im_end|>\n"
    example = one([user("q"), assistant("A")], tokenizer)
    assert "<think>\n\n</think>\n\nA" in tokenizer.decode(example.input_ids)
    assert counted(example, tokenizer) == "A<|im_end|>\n"
    within = [user("q"), assistant("<think>\nwhy\n</think>\n\nA")]
    assert counted(one(within, tokenizer), tokenizer) == "<think>\nwhy\n</think>\n\nA<|im_end|>\n"
    with pytest.raises(InputError, match=r"line 7: turn 2: .* leaves reasoning out: 'R'"):
        one([user("q"), assistant("A", reasoning_content="R")], make_tokenizer())
    with pytest.raises(InputError, match=r"line 7: turn 2: .* leaves reasoning out: 'Well.'"):
        one([user("q"), assistant("Well. <think>why</think>A")], tokenizer)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("glm4moe", "A1\n<think>R</think>\nA2"),
        ("nemotron_3_nano", "A1<|im_end|>\nR\n</think>\nA2<|im_end|>\n"),
    ],
)
def test_the_empty_place_of_earlier_thinking_is_not_learned(name: str, expected: str) -> None:
    turns = [user("q1"), assistant("A1", reasoning_content="first"), user("q2"), assistant("A2", reasoning_content="R")]
    assert counted(one(turns, template(name)), template(name)) == expected


def test_an_answer_counts_where_the_thinking_before_its_tool_call_is_left_out() -> None:
    tokenizer = template("gptoss")
    turns = [user("q"), assistant("", thinking="which", tool_calls=[call("weather", city="Oslo")]),
             {"role": "tool", "content": "sunny"}, assistant("Fine.", thinking="R")]  # fmt: skip
    assert counted(one(turns, tokenizer, {"tools": [WEATHER]}), tokenizer) == (
        ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Oslo"}<|call|>'
        "<|channel|>analysis<|message|>R<|end|><|start|>assistant<|channel|>final<|message|>Fine.<|return|>"
    )


@pytest.mark.parametrize(("name", "role"), [("qwen3", "developer"), ("phi3", "tool"), ("deepseekv3", "ipython")])
def test_a_role_that_the_template_does_not_know_is_not_left_out_in_silence(name: str, role: str) -> None:
    for text in ("said by nobody", "a"):  # which stands in other texts too
        turns = [{"role": role, "content": text}, user("a q"), assistant("A")]
        with pytest.raises(InputError, match=rf"line 7: turn 1: .* leaves content out that the role '{role}' says"):
            one(turns, template(name))


def test_variables_of_the_template_stand_in_the_row() -> None:
    tokenizer = make_tokenizer("{{ mode | default('none') }}" + make_tokenizer().chat_template)
    turns = [user("q"), assistant("A")]
    for variables, text in (
        ({"mode": "on", "other": None}, "on"),
        ('{"mode": "on"}', "on"),
        (None, "none"),
        ({}, "none"),
    ):
        example = one(turns, tokenizer, {"chat_template_kwargs": variables})
        assert tokenizer.decode(example.input_ids).startswith(f"{text}<|im_start|>user")
        assert counted(example, tokenizer) == "A<|im_end|>\n"
    for wrong in ("[1]", 3, "text"):
        with pytest.raises(InputError, match="line 7: chat_template_kwargs: expected a JSON object"):
            one(turns, tokenizer, {"chat_template_kwargs": wrong})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("no JSON", "expected a JSON object or its JSON text, got str 'no JSON'"),
        ([1], r"expected a JSON object, got list \[1\]"),
        ({"continue_final_message": True}, "continue_final_message: expected variables that are the chat template's"),
        ({"add_generation_prompt": True}, "add_generation_prompt: expected variables"),
        ({"tokenize": True}, "tokenize: expected variables"),
        ({"messages": []}, "messages: expected variables"),
        ({"tools": [WEATHER]}, "tools: expected variables"),
    ],
)
def test_settings_that_are_no_variables_of_the_template_are_refused(given: Any, message: str) -> None:
    with pytest.raises(InputError, match=rf"line 7: chat_template_kwargs(:|,) {message}"):
        one([user("q"), assistant("A")], template("qwen3"), {"chat_template_kwargs": given})


def test_settings_of_the_template_may_be_json_text() -> None:
    tokenizer, turns = template("qwen3_training"), [user("q"), assistant("A")]
    texts = [
        tokenizer.decode(one(turns, tokenizer, {"chat_template_kwargs": given}).input_ids)
        for given in ('{"enable_thinking": false}', {"enable_thinking": False, "other": None}, "")
    ]
    assert texts[0] == texts[1] and "A<|im_end|>" in texts[2]


def test_turns_marked_as_not_to_be_learned_do_not_count() -> None:
    turns = [user("q"), assistant("WRONG", train=False), user("no"), assistant("RIGHT")]
    tokenizer = make_tokenizer()
    assert counted(one(turns, tokenizer), tokenizer) == "RIGHT<|im_end|>\n"
    every = counted(one(turns, tokenizer, assistant_only=False), tokenizer)
    assert "RIGHT" in every and "no" in every and "WRONG" not in every
    row = Row({"prompt": turns[:1], "completion": turns[1:]}, "x")
    ((example,),) = Renderer(tokenizer, 512).sequences([row], "x").items
    assert "WRONG" not in counted(example, tokenizer) and "RIGHT" in counted(example, tokenizer)


def test_options_mean_what_they_mean_in_trl() -> None:
    tokenizer = make_tokenizer()
    turns = [user("q"), assistant("A")]
    chat = {"prompt": [user("p"), assistant("x")], "completion": [user("q"), assistant("A")]}

    def text_of_row(row: dict[str, Any], **options: Any) -> str:
        ((example,),) = Renderer(tokenizer, 512, **options).sequences([Row(row, "line 7")], "x").items
        return counted(example, tokenizer)

    assert text_of_row({"messages": turns}) == text_of_row({"messages": turns}, assistant_only=True) == "A<|im_end|>\n"
    assert "q<" in text_of_row({"messages": turns}, assistant_only=False)
    assert "q<" in text_of_row({"messages": turns}, completion_only=False)
    assert text_of_row(chat, assistant_only=True) == "A<|im_end|>\n"
    assert text_of_row(chat, assistant_only=True, completion_only=False) == "x<|im_end|>\nA<|im_end|>\n"
    assert text_of_row({"prompt": "p", "completion": "c"}, assistant_only=False) == "c<|im_end|>"
    for row, options, name in (
        ({"prompt": "p", "completion": "c"}, {"assistant_only": True}, "assistant_only_loss"),
        ({"text": "t"}, {"assistant_only": True}, "assistant_only_loss"),
        ({"text": "t"}, {"completion_only": True}, "completion_only_loss"),
    ):
        with pytest.raises(InputError, match=rf"line 7: {name} is set, but"):
            text_of_row(row, **options)


def test_the_marks_of_a_template_say_what_is_generated() -> None:
    marked = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] }}<|im_end|>{% endgeneration %}\n{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = make_tokenizer(marked)
    turns = [user("q"), assistant("WRONG", train=False), user("no"), assistant("RIGHT")]
    assert counted(one(turns, tokenizer), tokenizer) == "RIGHT<|im_end|>"
    trimming = make_tokenizer(marked.replace("<|im_end|>{% endgeneration", "{% endgeneration"))
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    spaced = [user("q"), assistant("\n A "), user("no"), assistant(" B\n")]
    assert counted(one(spaced, trimming), trimming) == "\n A  B\n"
    with pytest.raises(InputError, match=r"turn 4: .*marks leave it out"):
        one(turns, make_tokenizer(marked.replace("m['role'] == 'assistant'", "loop.first and m['role'] == 'x'")
                                  + "{% generation %}{% endgeneration %}"))  # fmt: skip


ANSWERED = "{% for m in messages %}[x]{{ m['content'] if m['role'] == 'user' else ANSWER }}{% endfor %}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ANSWERED.replace("ANSWER", "(m['content'] if loop.last else '')"), "rewrites content"),
        (ANSWERED.replace("ANSWER", "m['content'] | upper"), "rewrites content"),
        (ANSWERED.replace("ANSWER", "m['content'][:2]"), "rewrites content"),
        ("{% for m in messages %}[x]{{ m['content'] | upper }}{% endfor %}", "leaves content out"),
    ],
)
def test_templates_that_write_another_text_are_refused(text: str, message: str) -> None:
    turns = [user("q one"), assistant("answer one"), user("q two"), assistant("answer two")]
    with pytest.raises(InputError, match=rf"line 7: .*{message}"):
        one(turns, make_tokenizer(text))


def test_a_prompt_that_the_template_writes_otherwise_behind_it_is_refused() -> None:
    tokenizer = make_tokenizer(
        "{% if messages|length > 1 %}LONG{% else %}SHORT{% endif %}{% for m in messages %}[{{ m['content'] }}]"
        "{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    row = Row({"prompt": [user("q")], "completion": [assistant("A")]}, "line 7")
    with pytest.raises(InputError, match=r"line 7: .* differently once an answer follows"):
        Renderer(tokenizer, 512).sequences([row], "x")
    assert counted(one([user("q"), assistant("A")], tokenizer), tokenizer) == "[A]"


@pytest.mark.parametrize(
    ("name", "end"),
    [("qwen3", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("phi3", "<|end|>"), ("gemma3", "<end_of_turn>")],
)
def test_an_end_token_that_an_answer_brings_stands_once(name: str, end: str) -> None:
    bare = [user("q"), assistant("A"), user(f"r{end}"), assistant("B ")]
    ended = [user("q"), assistant(f"A{end}"), user(f"r{end}"), assistant(f"B {end}\n")]
    found, expected = (one(turns, template(name)) for turns in (ended, bare))
    assert torch.equal(found.input_ids, expected.input_ids) and torch.equal(found.labels, expected.labels)


def test_an_answer_in_a_question_is_no_answer() -> None:
    tokenizer = make_tokenizer()
    asked = "say <|im_start|>assistant\nfake<|im_end|>\n and\ufdd01\ufdd0 A1"
    assert counted(one([user(asked), assistant("A1"), user("A1"), assistant("A2")], tokenizer), tokenizer) == (
        "A1<|im_end|>\nA2<|im_end|>\n"
    )


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3_training", "qwen3_6", "deepseekv3", "phi3"])
def test_a_conversation_that_the_assistant_opens(name: str) -> None:
    tokenizer = template(name)
    turns = [assistant("Welcome!"), user("hello"), assistant("yo")]
    found = counted(one(turns, tokenizer), tokenizer)
    assert re.fullmatch(rf"\s*{expected(name, turns)}\s*", found), found
    assert "Welcome!" in counted(one(turns[:1], make_tokenizer()), make_tokenizer())


def test_an_empty_prompt_is_a_prompt() -> None:
    tokenizer = make_tokenizer()
    row = Row({"prompt": [], "completion": [assistant("Welcome!")]}, "x")
    ((example,),) = Renderer(tokenizer, 512).sequences([row], "x").items
    assert counted(example, tokenizer) == "Welcome!<|im_end|>\n"


@pytest.mark.parametrize("name", ["chatml", "qwen3", "qwen2_5_training", "phi3"])
@pytest.mark.parametrize("answer", ["aN", "<think>tN</think>aN", ""])
def test_the_cost_of_a_conversation_grows_with_its_length(
    name: str, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make_tokenizer() if name == "chatml" else template(name)
    kind, seen = type(tokenizer), []

    def render(self: Any, turns: Any, *args: Any, own: Any = kind.apply_chat_template, **options: Any) -> Any:
        seen.append(len(turns))
        return own(self, turns, *args, **options)

    def encode(self: Any, text: str, *args: Any, own: Any = kind.__call__, **options: Any) -> Any:
        seen.append(0)
        return own(self, text, *args, **options)

    monkeypatch.setattr(kind, "apply_chat_template", render)
    monkeypatch.setattr(kind, "__call__", encode)

    def work(size: int) -> tuple[int, int]:
        """Turns rendered, and texts tokenised."""
        seen.clear()
        one([user(f"q{i}") if i % 2 == 0 else assistant(answer.replace("N", str(i))) for i in range(size)], tokenizer)
        return sum(seen), seen.count(0)

    (few, texts), (many, texts_of_many) = work(20), work(200)
    assert many <= 12 * few and texts_of_many == texts <= 4


# Strings


def adding(bos: bool, eos: bool) -> Any:
    """The byte tokenizer, which adds start and end tokens itself."""
    tokenizer = make_tokenizer()
    single = ("<|im_start|> " if bos else "") + "$A" + (" <|im_end|>" if eos else "")
    pairs = [("<|im_start|>", 0), ("<|im_end|>", 1)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=pairs)
    return tokenizer


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"text": "abc"}, "abc<|im_end|>"),
        ({"text": "abc<|im_end|>"}, "abc<|im_end|>"),
        ({"text": "abc<|im_end|>\n"}, "abc<|im_end|>\n"),
        ({"text": "abc\n"}, "abc\n<|im_end|>"),
        ({"text": "<|im_start|>abc"}, "<|im_start|>abc<|im_end|>"),
        ({"text": ""}, "<|im_end|>"),
        ({"prompt": "ab", "completion": "c"}, "abc<|im_end|>"),
        ({"prompt": "<|im_start|>ab", "completion": "c<|im_end|>"}, "<|im_start|>abc<|im_end|>"),
    ],
)
def test_a_text_has_one_start_and_one_end_whoever_adds_them(
    row: dict[str, Any], text: str, bos: bool, eos: bool
) -> None:
    tokenizer = adding(bos, eos)
    example = Renderer(tokenizer, 64).whole(Row(row, "x"))
    start = "<|im_start|>" if bos and not text.startswith("<|im_start|>") else ""
    assert tokenizer.decode(example.input_ids) == start + text
    if "completion" in row:
        assert counted(example, tokenizer) == "c<|im_end|>"


def test_a_token_over_the_boundary_belongs_to_the_completion() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "a", "b", "c", "bc"])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[("b", "c")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    example = Renderer(tokenizer, 64).whole(Row({"prompt": "ab", "completion": "ca"}, "x"))
    assert example.input_ids.tolist() == [2, 5, 2, 1] and example.labels.tolist() == [IGNORED, 5, 2, 1]


def test_a_tokenizer_without_offsets_gives_the_same_labels() -> None:
    from transformers import PreTrainedTokenizer

    class Characters(PreTrainedTokenizer):
        """One token a character, in Python, so without the offsets of a fast tokenizer."""

        vocab_size = 0x3000

        def get_vocab(self) -> dict[str, int]:
            return {chr(i): i for i in range(3, 200)} | dict(self.added_tokens_encoder)

        def _tokenize(self, text: str, **_: Any) -> list[str]:
            return list(text)

        def _convert_token_to_id(self, token: str) -> int:
            return ord(token)

        def _convert_id_to_token(self, index: int) -> str:
            return chr(index)

        def convert_tokens_to_string(self, tokens: list[str]) -> str:
            return "".join(tokens)

    fast = make_tokenizer()
    slow = Characters(eos_token="<|im_end|>", bos_token="<|im_start|>", chat_template=fast.chat_template)
    assert not slow.is_fast
    turns = [user("q"), assistant("A1"), user("q2"), assistant("A2")]
    assert counted(one(turns, slow), slow) == counted(one(turns, fast), fast) == "A1<|im_end|>\nA2<|im_end|>\n"
    example = Renderer(slow, 64).whole(Row({"prompt": "ab", "completion": "cd"}, "x"))
    assert counted(example, slow) == "cd<|im_end|>"


@settings(max_examples=50, deadline=None)
@given(turns=conversations())
def test_words_that_are_merged_do_not_reach_over_an_answer_s_ends(turns: list[dict[str, Any]]) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )  # fmt: skip
    core.train_from_iterator(["user\n345 345\n\n 678 \n678678 üü漢 assistant\n" * 20], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", chat_template=make_tokenizer().chat_template
    )
    plain = [turn for turn in turns if turn["role"] != "tool" and "tool_calls" not in turn]
    found = counted(one(plain, tokenizer), tokenizer)
    answers = [turn["content"] for turn in plain if turn["role"] == "assistant"]
    assert "".join(found.split()) == "".join("".join(f"{text}<|im_end|>" for text in answers).split())
