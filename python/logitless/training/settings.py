"""What a model folder holds besides weights, read as it came and saved as it came.

Transformers writes these files in the words of its own version: it drops keys that it does not know, renames others,
and some releases refuse to write generation settings that they would warn about. Training changes none of them. So the
files are kept when the model is loaded, and put back beside the trained weights.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from logitless.training.config import TrainOptions
from logitless.training.places import MODEL_CONFIG

GENERATION_CONFIG = "generation_config.json"
TOKENIZER_CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
NAMED_TEMPLATES = "additional_chat_templates"
_TEMPLATES = (TEMPLATE, "chat_template.json")
#: Files that may belong to a tokenizer, besides those that its class names, or to the processor around it.
TOKENIZER_FILES = (
    *(TOKENIZER_CONFIG, *_TEMPLATES, "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
)
#: Keys of config.json for the precision of the weights, and those that merging an adapter may change.
PRECISION = ("dtype", "torch_dtype")
_SHAPE = ("vocab_size", "tie_word_embeddings")


@dataclass(frozen=True)
class Settings:
    """The files of a model and of its tokenizer as they came, by name.

    Args:
        model: config.json and generation_config.json, where there are such.
        tokenizer: the tokenizer's files; none where they were not found, and then the tokenizer writes its own.
    """

    model: Mapping[str, bytes] = field(default_factory=dict)
    tokenizer: Mapping[str, bytes] = field(default_factory=dict)

    def save(self, folder: Path, model: Any, tokenizer: Any, weights: Any = None) -> None:
        """Writes the trained weights (or adapter) and, beside them, everything else as it came.

        What was trained stays true: config.json names the precision of the weights and the class that has them.

        Args:
            weights: the model's tensors by name, where the model holds a part of each only; by default its own.
        """
        with without_generation(model):
            model.save_pretrained(folder, **({} if weights is None else {"state_dict": weights}))
        tokenizer.save_pretrained(folder)
        for name, content in self.tokenizer.items():
            (folder / name).write_bytes(content)
        if TEMPLATE not in self.tokenizer and b'"chat_template"' in self.tokenizer.get(TOKENIZER_CONFIG, b""):
            (folder / TEMPLATE).unlink(missing_ok=True)  # the configuration has it, as it came
            shutil.rmtree(folder / NAMED_TEMPLATES, ignore_errors=True)
        if (folder / MODEL_CONFIG).is_file():
            self._put_back(folder)

    def _put_back(self, folder: Path) -> None:
        if MODEL_CONFIG in self.model:
            written = json.loads((folder / MODEL_CONFIG).read_text(encoding="utf-8"))
            came = json.loads(self.model[MODEL_CONFIG])
            if came.get("model_type") == written.get("model_type"):  # else only a part of the model was loaded
                text = json.dumps(_as_trained(came, written), indent=2, ensure_ascii=False) + "\n"
                (folder / MODEL_CONFIG).write_text(text, encoding="utf-8")
        if GENERATION_CONFIG in self.model:
            (folder / GENERATION_CONFIG).write_bytes(self.model[GENERATION_CONFIG])
        else:
            (folder / GENERATION_CONFIG).unlink(missing_ok=True)


def read_settings(model: Any, tokenizer: Any, options: TrainOptions) -> Settings:
    """The settings in the places that a model and its tokenizer were loaded from.

    Nothing is downloaded, because loading them left the files here. A `chat_template_path` of the options replaces the
    template that came. An adapter that was merged into the model may have changed its vocabulary or untied its head.
    """
    own = tuple(getattr(tokenizer, "vocab_files_names", {}).values())
    names, revision = tuple(dict.fromkeys((*TOKENIZER_FILES, *own))), options.model_revision
    tokenizer_files = _saved_files(tokenizer.name_or_path, names, revision)
    if options.chat_template_path is not None:
        tokenizer_files = _without_template(tokenizer_files)
    commit = getattr(model.config, "_commit_hash", None) or revision  # the base of an adapter has a revision of its own
    model_files = _saved_files(model.config.name_or_path, (MODEL_CONFIG, GENERATION_CONFIG), commit)
    if MODEL_CONFIG in model_files:
        model_files[MODEL_CONFIG] = _as_loaded(model_files[MODEL_CONFIG], model.config)
    return Settings(model_files, tokenizer_files)


def _as_loaded(content: bytes, config: Any) -> bytes:
    """A configuration as it came, but for what was done to the model's shape on loading it."""
    came = json.loads(content)
    own = came.get("text_config") if config.get_text_config() is not config else None
    plain = type(config).from_dict(json.loads(content))
    for kept, now, before in ((came, config, plain), (own, config.get_text_config(), plain.get_text_config())):
        if kept is not None and type(now) is type(before):
            kept |= {name: value for name in _SHAPE if (value := _get(now, name)) != _get(before, name)}
    return json.dumps(came).encode() if came != json.loads(content) else content


def _get(config: Any, name: str) -> Any:
    return getattr(config, name, None)


def _without_template(tokenizer_files: Mapping[str, bytes]) -> dict[str, bytes]:
    """A tokenizer's files without its chat template, so that the one it writes itself stays."""
    kept = {name: content for name, content in tokenizer_files.items() if name not in _TEMPLATES}
    if TOKENIZER_CONFIG in kept and b'"chat_template"' in kept[TOKENIZER_CONFIG]:
        values = json.loads(kept[TOKENIZER_CONFIG])
        values.pop("chat_template")
        kept[TOKENIZER_CONFIG] = (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
    return kept


def _saved_files(place: str, names: Iterable[str], revision: str) -> dict[str, bytes]:
    from huggingface_hub import try_to_load_from_cache

    found: dict[str, bytes] = {}
    for name in names:
        here = Path(place, name)
        path = here if Path(place).is_dir() else try_to_load_from_cache(place, name, revision=revision)
        if isinstance(path, str | Path) and Path(path).is_file():
            found[name] = Path(path).read_bytes()
    return found


def _as_trained(came: Mapping[str, Any], written: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as it came, of weights whose class and precision are those of `written`."""
    kept = _in_precision(came, written["dtype"])
    return kept | {"architectures": written["architectures"]} if "architectures" in came else kept


def _in_precision(came: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The configuration, and those of its parts, with another precision wherever it names one."""
    kept = {key: dtype if key in PRECISION else value for key, value in came.items()}
    for key, part in came.items():
        if key.endswith("_config") and key != "quantization_config" and isinstance(part, Mapping):
            kept[key] = _in_precision(part, dtype)
    return kept


@contextmanager
def without_generation(model: Any) -> Iterator[None]:
    """Holds back what is about generation while the model is saved: a refusal of it would end a run at its end."""
    from transformers import GenerationConfig

    settings, config = getattr(model, "generation_config", None), getattr(model, "config", None)
    if settings is None:
        yield
        return
    declared = {each.name for each in dataclasses.fields(config)} if dataclasses.is_dataclass(config) else vars(config)
    held = {name: value for name, value in vars(config).items() if name in vars(settings).keys() - set(declared)}
    for name in held:
        delattr(config, name)
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = settings
        for name, value in held.items():
            setattr(config, name, value)
