"""The shape of a model from the `config.json` of Transformers, read as JSON, so that Transformers is not needed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Our names, and those that model families have for them, the usual one first.
KEYS = {
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "vocabulary": ("vocab_size",),
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "intermediate": ("intermediate_size", "n_inner", "ffn_dim", "d_ff"),
    "heads": ("num_attention_heads", "n_head", "num_heads"),
}


@dataclass(frozen=True)
class Body:
    """The layers below the head, as far as the rough terms need them.

    Args:
        queries, keys: width of all queries of a layer together, and of its keys (its values have the same).
        experts, routed: feed-forward networks of a layer, and how many of them a token passes.
    """

    layers: int
    intermediate: int
    queries: int
    keys: int
    experts: int = 1
    routed: int = 1


@dataclass(frozen=True)
class Shape:
    """A model's sizes. `missing` says why there is no body."""

    hidden: int
    vocabulary: int
    softcap: float | None = None
    tied: bool = False
    body: Body | None = None
    missing: str = "only the sizes of the head were given"


def read_shape(model: str) -> Shape:
    """The shape of a model in a folder, or of one on the hub, whose `config.json` alone is fetched.

    Raises:
        ValueError: there is no such file, or it lacks the size of the hidden states or of the vocabulary.
    """
    path = Path(model) / "config.json" if Path(model).is_dir() else _fetched(model)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        expected = "a folder with a config.json in JSON, or a hub id"
        raise ValueError(f"model: expected {expected}, got {model!r}: {error}") from error
    return shape_from(config, str(path))


def shape_from(config: Mapping[str, Any], source: str) -> Shape:
    """The shape that a configuration describes; `source` is its name in messages."""
    text = {**config, **(config.get("text_config") or {})}
    hidden, vocabulary = (_required(text, name, source) for name in ("hidden", "vocabulary"))
    softcap = text.get("final_logit_softcapping")
    tied = bool(text.get("tie_word_embeddings", False))
    absent = [KEYS[name][0] for name in ("layers", "intermediate", "heads") if _first_of(text, name) is None]
    if absent:
        return Shape(hidden, vocabulary, softcap, tied, missing=f"{source} has no {', '.join(absent)}")
    return Shape(hidden, vocabulary, softcap, tied, _body(text, hidden, source), missing="")


def _body(text: Mapping[str, Any], hidden: int, source: str) -> Body:
    layers, intermediate, heads = (_required(text, name, source) for name in ("layers", "intermediate", "heads"))
    width = text.get("head_dim") or hidden // heads
    experts = text.get("num_local_experts") or text.get("num_experts") or 1
    return Body(
        layers,
        text.get("moe_intermediate_size") or intermediate if experts > 1 else intermediate,
        heads * width,
        (text.get("num_key_value_heads") or heads) * width,
        experts,
        text.get("num_experts_per_tok") or 1 if experts > 1 else 1,
    )


def _first_of(text: Mapping[str, Any], name: str) -> Any:
    return next((text[key] for key in KEYS[name] if text.get(key) is not None), None)


def _required(text: Mapping[str, Any], name: str, source: str) -> int:
    value = _first_of(text, name)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        expected = " or ".join(KEYS[name])
        raise ValueError(f"model: expected a positive {expected} in {source}, got {value!r}")
    return value


def _fetched(model: str) -> Path:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HFValidationError
    except ModuleNotFoundError as error:
        raise ValueError(f"model: {model!r} is no folder, and a hub id needs the package {error.name}") from error
    try:
        return Path(hf_hub_download(model, "config.json"))
    except (HFValidationError, OSError) as error:  # what the hub raises is an OSError
        raise ValueError(f"model: {model!r} is no folder, and the hub did not give its config.json: {error}") from error
