"""`chat_template_path`: another chat template renders the rows and is saved, or a sentence says why it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from training_fixtures import CHATML, make_model, make_options, make_tokenizer, write_jsonl
from transformers import AutoTokenizer

from logitless.training import InputError, TrainOptions, train
from logitless.training.metrics import read_metrics
from logitless.training.teach import write_teacher_columns

PLAIN = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TURNS = [{"role": "user", "content": "one and one?"}, {"role": "assistant", "content": "two"}]


def options(folder: Path, template: str | Path | None, own: str | None = CHATML, **changes: Any) -> TrainOptions:
    model = folder / "model"
    if not model.exists():
        make_model(model, chat_template=own)
    data = write_jsonl(folder / "rows.jsonl", [{"messages": TURNS}])
    shape = {"max_steps": 2, "chat_template_path": None if template is None else str(template)}
    return make_options(folder / "run", str(model), data, **shape | changes)


def written(folder: Path, text: str | bytes, name: str = "own.jinja") -> Path:
    file = folder / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def length(template: str) -> int:
    return len(make_tokenizer().apply_chat_template(TURNS, chat_template=template)["input_ids"])


@pytest.mark.parametrize("own", [None, CHATML], ids=["no template", "another"])
@pytest.mark.parametrize("source", ["file", "folder", "folder of a template"])
def test_rows_are_rendered_with_it_and_it_is_saved(tmp_path: Path, own: str | None, source: str) -> None:
    template = written(tmp_path, PLAIN)
    if source == "folder":
        template = tmp_path / "other"
        make_tokenizer(PLAIN).save_pretrained(template)
    elif source == "folder of a template":
        (tmp_path / "other").mkdir()
        template = template.rename(tmp_path / "other" / "chat_template.jinja").parent
    run = train(options(tmp_path, template, own, save_strategy="steps", save_steps=1)).output_dir
    assert read_metrics(run)[0]["num_tokens"] == length(PLAIN) != length(CHATML)
    for folder in (run, run / "checkpoint-1"):
        assert AutoTokenizer.from_pretrained(folder).chat_template == PLAIN


def test_a_template_inside_the_tokenizers_settings_is_replaced(tmp_path: Path) -> None:
    given = options(tmp_path, written(tmp_path, PLAIN))
    (tmp_path / "model" / "chat_template.jinja").unlink()
    file = tmp_path / "model" / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"chat_template": CHATML}))
    run = train(given).output_dir
    assert AutoTokenizer.from_pretrained(run).chat_template == PLAIN
    assert json.loads((run / "tokenizer_config.json").read_text()) == settings


def test_named_templates_stay_named(tmp_path: Path) -> None:
    other = make_tokenizer()
    other.chat_template = {"default": PLAIN, "tool_use": CHATML}
    other.save_pretrained(tmp_path / "other")
    run = train(options(tmp_path, tmp_path / "other", save_strategy="steps", save_steps=2)).output_dir
    assert read_metrics(run)[0]["num_tokens"] == length(PLAIN)
    train(options(tmp_path, tmp_path / "other", max_steps=3, resume=True))  # writes over the folder of templates
    assert AutoTokenizer.from_pretrained(run).chat_template == other.chat_template


def test_a_resumed_run_has_the_same_template(tmp_path: Path) -> None:
    template = written(tmp_path, PLAIN)
    train(options(tmp_path, template, save_strategy="steps", save_steps=1))
    train(options(tmp_path, template, resume=True))
    with pytest.raises(InputError, match=r"data was '\w+' and is"):
        train(options(tmp_path, None, resume=True))


def test_a_teacher_reads_rows_in_the_template(tmp_path: Path) -> None:
    lists = {}
    for name, template in (("own", None), ("plain", written(tmp_path, PLAIN))):
        file = tmp_path / f"{name}.jsonl"
        write_teacher_columns(options(tmp_path, template), str(file), k=2)
        lists[name] = json.loads(file.read_text())["teacher_logprob"]
    assert len(lists["own"]) > 0 and lists["own"] != lists["plain"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "{% for m in messages %}\n\n{{ m.content }\n{% endfor %}",
            r"own\.jinja, line 3: no Jinja template: unexpected",
        ),
        ("{% for m in messages %}", r"own\.jinja, line 1: no Jinja template"),
        ("", r"own\.jinja is no chat template, it does not read `messages`"),
        ("hello", r"own\.jinja is no chat template, it does not read `messages`"),
        (b"\xff\xfe{{ messages }}", r"own\.jinja is not text in UTF-8"),
    ],
)
def test_what_is_no_template_is_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=f"^chat_template_path: .*{message}"):
        train(options(tmp_path, written(tmp_path, text)))


def test_a_template_that_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    make_tokenizer(None).save_pretrained(tmp_path / "mute")
    named = make_tokenizer()
    named.chat_template = {"rag": PLAIN, "tool_use": PLAIN}
    named.save_pretrained(tmp_path / "named")
    other = make_tokenizer("{{ messages }}<|end|>")
    other.add_tokens(["<|end|>"], special_tokens=True)
    other.save_pretrained(tmp_path / "marked")
    for name, message in [
        ("no/", "chat_template_path: file or folder not found"),
        ("no.jinja", "chat_template_path: file or folder not found"),
        ("./no.jinja", "chat_template_path: file or folder not found"),
        ("empty", "no tokenizer could be loaded from there: the folder has none of the files tokenizer"),
        ("mute", "chat_template_path: the tokenizer of .*mute has no chat template"),
        ("named", "has no template called 'default', it has rag, tool_use"),
        ("marked", r"writes '<\|end\|>', which is no token of the model's tokenizer"),
    ]:
        given = name if name.startswith(".") else f"{tmp_path}/{name}"
        with pytest.raises(InputError, match=message):
            train(options(tmp_path, given))
