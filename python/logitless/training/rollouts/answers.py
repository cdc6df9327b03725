"""Answers of a vLLM server to requests for completions, checked field by field.

What cannot be used is named, with the place in the answer: a wrong count or order, ids that are missing or no tokens of
the model, log-probs that are missing, NaN (JSON's null) or none of a drawn token, and another prompt.

Source: vLLM 0.32.0, `entrypoints/openai/completion/protocol.py` and `serving.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from logitless.training.errors import InputError

CUT = -9999.0  # what vLLM writes for a log-prob of -inf
ROUNDING = 0.02  # of log-probs of probability 1, from logits in bfloat16; as for the lists of teachers


class Choice(NamedTuple):
    """One completion of an answer."""

    ids: list[int]
    logprob: list[float]
    reason: str  # finish_reason
    stop: Any  # stop_reason: the id that ended it, where the server says


def choices_of(answer: Any, n: int, prompt: list[int], vocabulary: int, wrong: str) -> list[Choice]:
    """The n completions of an answer, in their order.

    Args:
        prompt: ids that were sent.
        vocabulary: ids from there on are refused.
        wrong: where the answer comes from, for errors.

    Raises:
        InputError: an answer that cannot be used.
    """
    found = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(found, list) or len(found) != n or not all(isinstance(each, dict) for each in found):
        got = len(found) if isinstance(found, list) else repr(found)
        raise InputError(f"{wrong}choices: expected {n} for {n} completions, got {got}")
    indices = [each.get("index") for each in found]
    if set(map(str, indices)) != set(map(str, range(n))):
        raise InputError(f"{wrong}choices: expected the indices 0 to {n - 1}, got {indices}")
    ordered = sorted(found, key=lambda each: int(each["index"]))
    return [_choice(each, prompt, vocabulary, f"{wrong}choices[{place}]: ") for place, each in enumerate(ordered)]


def mass_of_listed(answer: Any, wrong: str) -> tuple[float, bool]:
    """The logarithm of the probability listed at an answer's first token, and whether ids with none are listed.

    Raises:
        InputError: an answer without log-probs.
    """
    try:
        listed = [float(value) for value in answer["choices"][0]["logprobs"]["top_logprobs"][0].values()]
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{wrong}the answer has no log-probs (choices[0].logprobs.top_logprobs), as vLLM's "
                         "has") from error  # fmt: skip
    kept = torch.tensor([value for value in listed if value > CUT], dtype=torch.float64)
    return float(kept.logsumexp(0)) if len(kept) else math.nan, len(kept) < len(listed)


def _choice(choice: Mapping[str, Any], prompt: list[int], vocabulary: int, wrong: str) -> Choice:
    ids, logprob = _ids(choice, wrong), _values_of(choice, wrong)
    if len(ids) != len(logprob):
        raise InputError(f"{wrong}expected a log-prob for each of {len(ids)} token ids, got {len(logprob)}")
    if choice.get("prompt_token_ids") not in (None, prompt):
        raise InputError(f"{wrong}the server read another prompt than it was sent: its prompt_token_ids differ")
    if ids and not 0 <= min(ids) <= max(ids) < vocabulary:
        raise InputError(f"{wrong}expected token ids from 0 to {vocabulary - 1}, got {min(ids)} to {max(ids)}: the "
                         "server has another model")  # fmt: skip
    return Choice(ids, logprob, str(choice.get("finish_reason")), choice.get("stop_reason"))


def _ids(choice: Mapping[str, Any], wrong: str) -> list[int]:
    """The drawn ids: `token_ids`, or the names `token_id:5` that older servers give tokens."""
    ids = choice.get("token_ids")
    try:
        if ids is None:
            names = [str(name).partition("token_id:") for name in choice["logprobs"]["tokens"]]
            ids = [int(number) for _, _, number in names]
        if not all(type(token) is int for token in ids):
            raise TypeError
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{wrong}the answer has no token ids (token_ids, or token_id:... in logprobs.tokens), as "
                         "vLLM's has") from error  # fmt: skip
    return list(ids)


def _values_of(choice: Mapping[str, Any], wrong: str) -> list[float]:
    """The log-probs of the drawn ids, each finite and of a probability of 1 at most."""
    try:
        found = [math.nan if value is None else float(value) for value in choice["logprobs"]["token_logprobs"]]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{wrong}the answer has no log-probs (logprobs.token_logprobs), as vLLM's has") from error
    for place, value in enumerate(found):
        if not CUT < value <= ROUNDING:
            got = "null, which is NaN" if math.isnan(value) else repr(value)
            raise InputError(f"{wrong}logprobs.token_logprobs[{place}]: expected the log-prob of a drawn token, got "
                             f"{got}")  # fmt: skip
    return found
