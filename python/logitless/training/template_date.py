"""The date that a chat template writes, fixed for a run.

Some templates (Llama 3.2, GPT-OSS) write today's date into every text, by a call `strftime_now("<format>")`. A run that
is resumed on another day, or that goes on over midnight, would read other tokens. So the calls are replaced by what
they give at the start of the run. Transformers lets no function through to a template, else that would do.
"""

from __future__ import annotations

import copy
import re
from datetime import datetime
from typing import Any

Template = str | dict[str, str] | None  # as a tokenizer has it

_CALL = re.compile(r"""strftime_now\(\s*(?P<quote>['"])(?P<format>.*?)(?P=quote)\s*\)""")


def with_date(tokenizer: Any, date: datetime) -> Any:
    """A tokenizer whose chat templates write this date; the one that was given where they write none."""
    given = getattr(tokenizer, "chat_template", None)
    fixed = _fixed(given, date)
    if fixed == given:
        return tokenizer
    dated = copy.copy(tokenizer)
    dated.chat_template = fixed
    return dated


def _fixed(template: Template, date: datetime) -> Template:
    if isinstance(template, dict):  # several by name
        return {name: _dated(text, date) for name, text in template.items()}
    return template if template is None else _dated(template, date)


def _dated(template: str, date: datetime) -> str:
    return _CALL.sub(lambda call: call["quote"] + date.strftime(call["format"]) + call["quote"], template)
