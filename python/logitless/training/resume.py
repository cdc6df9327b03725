"""Where a run starts: at step 0, or at a checkpoint of a run that it continues exactly."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from logitless.training import checkpoint
from logitless.training.adapters import Adapter
from logitless.training.config import UPDATED_SHARES, TrainOptions
from logitless.training.errors import InputError
from logitless.training.mixture import ComponentOptions
from logitless.training.parallel import World
from logitless.training.places import MODEL_CONFIG, require_folder

TEACHER = "teacher_model_name_or_path"
#: Whose product is the rows of a step, which processes share out in one way or another.
SPLIT = ("processes", "per_device_train_batch_size", "gradient_accumulation_steps")
#: Options that a resumed run must share with the one that wrote the checkpoint, or its data position means nothing.
FIXED = (
    *SPLIT[1:],
    "seed",
    "packing",
    "max_length",
    "use_peft",
    TEACHER,
)
#: Those of a run that samples, whose rounds are numbered by them.
FIXED_ROUNDS = ("num_generations", "steps_per_generation", "num_iterations", "max_completion_length", "temperature",
          "advantage_estimator")  # fmt: skip
#: Options of other groups that decide which tokens the rows have.
_OF_TOKENS = ("model_name_or_path", "model_revision", "gguf_file", "method", "loss", "mixture")
#: Settings of a model's config.json that change none of its values.
IDLE_SETTINGS = ("_name_or_path", "transformers_version", "use_cache")
_SAMPLES = 16  # places of a file of weights that are read to recognise it


class Origin(NamedTuple):
    """A model that a run begins with: where it is, and what tells it from another, of `parts_of`."""

    place: str
    parts: dict[str, str]


def seed_generators(value: int) -> None:
    """Seeds every global generator."""
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


def find_checkpoint(options: TrainOptions) -> Path | None:
    """The checkpoint to resume from, or None for a fresh run.

    Raises:
        InputError: the named checkpoint is absent or incomplete, or a fresh run would mix with an older one's
            checkpoints.
    """
    if options.resume_from_checkpoint is not None:
        folder = require_folder(options.resume_from_checkpoint, "resume_from_checkpoint")
        checkpoint.load_state(folder)
        return folder
    present = checkpoint.checkpoints(Path(options.output_dir))
    if present and not options.resume:
        raise InputError(
            f"output_dir {options.output_dir} already holds {present[-1].name}: continue it with --resume, or choose "
            "another --output_dir"
        )
    return present[-1] if present else None


def first_state(resumed: Path | None, world: World) -> dict[str, Any]:
    """Step, counters, open log window and the date of the start: a checkpoint's, or those of a fresh run."""
    state = {"step": 0, "num_tokens": 0, "window": []} if resumed is None else checkpoint.load_state(resumed)
    return {"date": _today(world)} | state


def _today(world: World) -> str:
    """Date and time of the main process, which all of them write into their texts."""
    now = datetime.now().isoformat(timespec="seconds")
    return bytes(world.gather({"now": torch.tensor(list(now.encode()))})[0]["now"].tolist()).decode()


def identity_of(components: Sequence[ComponentOptions], fingerprints: Sequence[str], world: World) -> dict[str, Any]:
    """The values that `require_same` compares, those of a mixture's components under their names."""
    names = [component.name for component in components if component.name]
    identity: dict[str, Any] = {"processes": world.size, "mixture": names or None}
    for component, fingerprint in zip(components, fingerprints, strict=True):
        fixed = (*FIXED, *FIXED_ROUNDS) if component.options.samples else FIXED
        own = {name: getattr(component.options, name) for name in fixed}
        identity |= component.named(own | {"data": fingerprint})
    return identity


def tokenizer_parts(tokenizer: Any) -> dict[str, str]:
    """Hashes of what a tokenizer makes tokens with, which a checkpoint keeps to say why a later run has others."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    whole = backend.to_str() if hasattr(backend, "to_str") else json.dumps(sorted(tokenizer.get_vocab().items()))
    parts = {"chat template": str(getattr(tokenizer, "chat_template", None)), "tokenizer": whole}
    return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in parts.items()}


def weights_named(source: str, revision: str) -> str:
    """What tells one model's weights from another's: a hash of samples of a folder's files, or the hub's name."""
    if not Path(source).is_dir():
        return f"{source}@{revision}"
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(source).iterdir() if path.suffix in (".safetensors", ".bin")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for part in range(_SAMPLES):
                file.seek(size * part // _SAMPLES)
                digest.update(file.read(1 << 16))
    return digest.hexdigest()[:16]


def parts_of(source: str, revision: str, adapter: Adapter | None) -> dict[str, str]:
    """Hashes of what tells one model from another: its weights and settings, or an adapter and those of its base."""
    if adapter is not None:
        base = parts_of(adapter.base, adapter.base_revision, None)
        own = {"weights or settings of the adapter": adapter.digest()}
        return own | {f"{name} of the adapter's base": value for name, value in base.items()}
    parts = {"weights": weights_named(source, revision)}
    file = Path(source) / MODEL_CONFIG
    if file.is_file():
        parts["settings (config.json)"] = _settings_hash(file)
    return parts


def _settings_hash(file: Path) -> str:
    try:
        settings = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(f"{file}: no JSON object can be read from it: {error}") from error
    kept = {name: value for name, value in sorted(settings.items()) if name not in IDLE_SETTINGS}
    return hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:16]


def require_same_models(state: dict[str, Any], models: Mapping[str, Origin], source: Path) -> None:
    """Raises InputError where a model that a run began with is another than the checkpoint's run had.

    An adapter is trained over it, or a reference is it, so that another one would be trained or compared with.

    Args:
        state: the checkpoint's.
        models: the run's own, by the option that names them.
        source: the checkpoint's folder.
    """
    for option, (place, parts) in models.items():
        was = state.get("models", {}).get(option, parts)
        if changed := [name for name in parts if was.get(name) != parts[name]]:
            given = "model that the run started from, which its adapter or its reference belongs to"
            given = "teacher of the run" if option.endswith(TEACHER) else given
            found = " and ".join(changed)
            raise InputError(f"{source} cannot be continued: {place} has other {found} than the {given}")


def require_same(
    state: dict[str, Any],
    identity: dict[str, Any],
    options: TrainOptions,
    tokenizer: Any,
    source: Path,
    *,
    same_split: bool,
) -> None:
    """Raises InputError naming what a resumed run may not change and did.

    The rows of a step may be shared out among more or fewer processes, as long as a step has as many of them.

    Args:
        state: the checkpoint's.
        identity: the run's own, of `identity_of`.
        options: the run's own, and
        tokenizer: its tokenizer, by which other tokens are explained.
        source: the checkpoint's folder.
        same_split: whether each process must have the rows that it had, because the run keeps values of them.
    """
    saved = state["identity"]
    if not same_split and _rows_of_step(saved) == _rows_of_step(identity):
        identity = {name: value for name, value in identity.items() if name.rpartition("/")[2] not in SPLIT}
    changed = [name for name in identity if saved.get(name) != identity[name]]
    if not changed:
        return
    named = [f"{name} was {saved.get(name)!r} and is {identity[name]!r}" for name in changed]
    if any(name.rpartition("/")[2] == "data" for name in changed):
        named += _other_tokens(state, options, tokenizer, changed)
    raise InputError(f"{source} cannot be continued, its data position would mean nothing: {'; '.join(named)}")


def require_same_subset(state: dict[str, Any], options: TrainOptions, source: Path) -> None:
    """Raises InputError where the checkpoint's run moved another part of the model, whose moments it has.

    Args:
        state: the checkpoint's.
        options: the run's own.
        source: the checkpoint's folder.
    """
    was, now = _subset_of(state.get("options", {})), _subset_of(options.to_dict())
    for name, before in was.items():
        if before != now[name]:
            raise InputError(f"{source} cannot be continued: {name} was {before!r} and is {now[name]!r}, so that other "
                             "weights would be trained than it has moments of")  # fmt: skip


def _subset_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options that say what an update moves, with the default of a share that is left open."""
    kind = values.get("finetuning_type", "full")
    ratio = values.get("update_ratio")
    return {
        "finetuning_type": kind,
        "update_ratio": UPDATED_SHARES[kind] if ratio is None else ratio,
        "hft_round_steps": values.get("hft_round_steps"),
    }


def _rows_of_step(identity: Mapping[str, Any]) -> dict[str, int]:
    """The rows of a step, by the prefix of the component that reads them."""
    found: dict[str, int] = {}
    for name, value in identity.items():
        prefix, _, option = name.rpartition("/")
        if option in SPLIT[1:]:
            found[prefix] = found.get(prefix, identity[SPLIT[0]]) * value
    return found


def _other_tokens(state: dict[str, Any], options: TrainOptions, tokenizer: Any, known: Sequence[str]) -> list[str]:
    """What has changed of that on which the data's tokens depend, besides the options that are `known` to have.

    Nothing is said where these explain it.
    """
    was, now = state.get("options", {}), options.to_dict()
    names = [spec.name for spec in dataclasses.fields(options)
             if spec.metadata["group"] == "Data" or spec.name in _OF_TOKENS]  # fmt: skip
    reasons = [
        f"{name} was {was[name]!r} and is {now[name]!r}"
        for name in names
        if name in was and name not in known and was[name] != json.loads(json.dumps(now[name]))
    ]
    parts = tokenizer_parts(tokenizer)
    reasons += [f"the {name} is another" for name in parts if state.get("tokenizer", parts).get(name) != parts[name]]
    if not reasons and any(name.rpartition("/")[2] in names for name in known):
        return []
    if not reasons:
        dated = "strftime_now" in str(tokenizer.chat_template)
        reasons = [
            "no option says why, so the rows of dataset_name are" + dated * ", or the date that its template writes"
        ]
    return [f"the tokens are others: {'; '.join(reasons)}"]
