"""What a request is where the command line leaves it open: by device, by model, and in a quick run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from logitless.plan.shape import read_shape
from logitless.plan.sizes import read_bytes
from logitless.training.errors import InputError

from .machine import available_memory
from .request import PARTS, Request

T = TypeVar("T")

#: Sizes where none are given: those of SmolLM2-135M.
HIDDEN, VOCABULARY = 576, 49152
#: What depends on the device where it is not given, in a whole run and in a quick one.
TOKENS, QUICK_TOKENS = {"cpu": 2048, "cuda": 8192}, {"cpu": 1024, "cuda": 4096}
ROUNDS, QUICK_ROUNDS = {"cpu": 5, "cuda": 20}, {"cpu": 3, "cuda": 10}
DTYPE = {"cpu": "float32", "cuda": "bfloat16"}
MINUTES, QUICK_MINUTES = 14.0, 1.8
#: Who is compared: in a quick run those that compile nothing on a processor.
AGAINST, QUICK_AGAINST = "materialised,compiled,torch,trl,liger,cce,quack", "materialised,torch,trl,liger"
QUICK_PARTS = "step"
#: Losses of a model's step, beside the one that is asked for.
LOSSES = ("nll", "dft", "dpo", "grpo")
#: Tokens of a model's step on a processor, where none are given: its layers take longer than its head.
MODEL_TOKENS = 512
#: Bytes of the limits on a processor, beside the head and its gradient; on a GPU, the share of its free memory.
MEMORY, SHARE = 2**28, 0.9


def completed(**given: Any) -> Request:
    """The request of a command line's options, None where they were not given.

    Raises:
        InputError: an option's value cannot be used, or two of them contradict each other.
    """
    quick, model = given.pop("quick"), given["model"]
    device = _device(given.pop("device"))
    tokens, rounds = (QUICK_TOKENS, QUICK_ROUNDS) if quick else (TOKENS, ROUNDS)
    hidden, vocabulary = _sizes(model, given.pop("hidden"), given.pop("vocab"))
    every = [name for name in PARTS if name != "model" or model is not None]
    memory = given.pop("memory")
    open_: dict[str, Any] = {
        "tokens": tokens[device],
        "rounds": rounds[device],
        "dtype": DTYPE[device],
        "minutes": QUICK_MINUTES if quick else MINUTES,
        "against": QUICK_AGAINST if quick else AGAINST,
        "parts": QUICK_PARTS if quick else ",".join(every),
    }
    model_tokens = given["tokens"] or (MODEL_TOKENS if device == "cpu" else tokens[device])
    chosen: dict[str, Any] = {name: open_.get(name) if x is None else x for name, x in given.items()}
    chosen["losses"] = chosen["losses"] or ",".join((given["loss"], *LOSSES))
    for name in ("against", "backward", "losses", "parts"):
        chosen[name] = _listed(chosen[name])
    chosen["backward"] = tuple(name.replace("-", "_") for name in chosen["backward"])
    chosen |= {"hidden": hidden, "vocabulary": vocabulary, "device": device, "model_tokens": model_tokens}
    chosen["memory"] = 1 if memory is None else _given(read_bytes, memory)
    result = Request(**chosen, memory_given=memory is not None)
    return result if result.memory_given else replace(result, memory=_default_memory(result))


def folder_of(request: Request, *, quick: bool) -> Path:
    """A folder of the request's own, under the current one."""
    model = Path(request.model).name if request.model else ""
    sizes = f"n{request.tokens}-h{request.hidden}-v{request.vocabulary}"
    words = (model, request.loss, request.dtype, sizes, "frozen" * request.frozen_head, "quick" * quick)
    return Path("logitless-bench") / "-".join(filter(None, words))


def _device(name: str | None) -> str:
    if name not in (None, "cpu", "cuda"):
        raise InputError(f"device: expected cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device: got cuda, and PyTorch finds no GPU here (python -m logitless info)")
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def _sizes(model: str | None, hidden: int | None, vocabulary: int | None) -> tuple[int, int]:
    """H and V, of the model if there is one."""
    if model is None:
        return hidden or HIDDEN, vocabulary or VOCABULARY
    if hidden is not None or vocabulary is not None:
        raise InputError("model: it has a hidden size and a vocabulary of its own; leave --hidden and --vocab out")
    shape = _given(read_shape, _folder(model) if model.endswith(".gguf") else model)
    return shape.hidden, shape.vocabulary


def _folder(file: str) -> str:
    """The folder that Transformers loads in place of a GGUF file."""
    from logitless.training.config import TrainOptions
    from logitless.training.model import locate

    return locate(TrainOptions(model_name_or_path=file))


def _given(read: Callable[[str], T], text: str) -> T:
    """What a function reads from an option's text."""
    try:
        return read(text)
    except ValueError as error:
        raise InputError(str(error)) from error


def _default_memory(request: Request) -> int:
    if request.gpu:
        return int(SHARE * available_memory(gpu=True))
    held = request.sequence(2)  # hardly more than the head and its gradient
    return held.input_bytes + held.gradient_bytes + MEMORY


def _listed(text: str) -> tuple[str, ...]:
    """The words of a comma-separated list, each once."""
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
