"""Another chat template for the model's tokenizer: `chat_template_path`, a Jinja file or a tokenizer that has one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from logitless.training.config import TrainOptions
from logitless.training.errors import InputError
from logitless.training.places import is_hub_id, unreadable
from logitless.training.settings import TEMPLATE, TOKENIZER_CONFIG

_OPTION = "chat_template_path"
_ENDINGS = (".jinja", ".jinja2", ".j2")


def set_template(tokenizer: Any, options: TrainOptions) -> None:
    """Gives the tokenizer the template that the options name, and none of the other tokenizer's tokens.

    A tokenizer has one template, or several by name, of which Transformers takes "tool_use" for rows with tools and
    "default" for others.

    Raises:
        InputError: nothing there; no Jinja; no template in that tokenizer, none called "default", or one that writes
            tokens which the model's tokenizer does not have.
    """
    name = options.chat_template_path
    if name is None:
        return
    path = Path(name)
    alone = (path / TEMPLATE).is_file() and not (path / TOKENIZER_CONFIG).is_file()
    file = path / TEMPLATE if alone else path
    if file.is_file():
        template: str | dict[str, str] = _text(file)
    elif path.is_dir() or (is_hub_id(name) and path.suffix not in _ENDINGS):
        template = _of_tokenizer(name, tokenizer, options)
    else:
        raise InputError(f"{_OPTION}: file or folder not found: {name}")
    for part in _variants(template):
        _require_template(part, tokenizer, str(file))
    tokenizer.chat_template = template


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{_OPTION}: {file} is not text in UTF-8: {error}") from error


def _of_tokenizer(name: str, tokenizer: Any, options: TrainOptions) -> str | dict[str, str]:
    """The template or the named templates of another tokenizer, whose special tokens `tokenizer` must know."""
    from transformers import AutoTokenizer

    try:
        other = AutoTokenizer.from_pretrained(name, trust_remote_code=options.trust_remote_code)
    except Exception as error:  # a damaged file can break the reader anywhere
        raise unreadable(name, "tokenizer", error) from error
    template: str | dict[str, str] | None = other.chat_template
    if not template:
        raise InputError(f"{_OPTION}: the tokenizer of {name} has no chat template")
    if isinstance(template, dict) and "default" not in template:
        names = ", ".join(sorted(template))
        raise InputError(f"{_OPTION}: the tokenizer of {name} has no template called 'default', it has {names}")
    written, known = "".join(_variants(template)), tokenizer.get_vocab()
    if absent := [token for token in other.added_tokens_encoder if token in written and token not in known]:
        raise InputError(
            f"{_OPTION}: the template of {name} writes {absent[0]!r}, which is no token of the model's tokenizer; add "
            "it to the model first, or give the template as a .jinja file to have it read as text"
        )
    return template


def _variants(template: str | dict[str, str]) -> list[str]:
    return list(template.values()) if isinstance(template, dict) else [template]


def _require_template(template: str, tokenizer: Any, source: str) -> None:
    """Raises InputError where a text is no Jinja, or renders no conversation."""
    from jinja2 import TemplateSyntaxError

    try:
        tokenizer.apply_chat_template([{"role": "user", "content": ""}], chat_template=template, tokenize=False)
    except TemplateSyntaxError as error:
        raise InputError(f"{_OPTION}: {source}, line {error.lineno}: no Jinja template: {error.message}") from error
    except Exception:  # it compiles; whether it takes a conversation is for the rows to show
        pass
    if not re.search(r"\bmessages\b", template):
        raise InputError(f"{_OPTION}: {source} is no chat template, it does not read `messages`")
