"""Where a model is: a folder on this machine or a repository on the hub; and, in a sentence, what is wrong there.

A name that can only be a path is never asked of the hub, whose answer would be about the form of repository names.
"""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

from logitless.training.config import TrainOptions
from logitless.training.errors import InputError, nearest

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]*\w)?")
_NOT_FOUND = "it was not found: there is no such folder here"
_LFS_POINTER = b"version https://git-lfs"
_WEIGHTS = ("*.safetensors", "*.bin")
_TOKENIZERS = ("tokenizer*.json", "*.model", "vocab.*")
MODEL_CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
MODEL_FILES = (MODEL_CONFIG, ADAPTER_CONFIG)


def require_places(options: TrainOptions) -> None:
    """Raises InputError where the model or the teacher of the options is none; nothing is downloaded."""
    for option in ("model_name_or_path", "teacher_model_name_or_path"):
        if name := getattr(options, option):
            _require_place(name, option, options.gguf_file)


def _require_place(name: str, option: str, gguf_file: str | None) -> None:
    """Raises where a model's name stands for no folder with a model, and cannot be a hub id either."""
    path = Path(name)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise InputError(f"{option}: model file not found: {name}")
    elif path.is_dir():
        _require_model(path, option, gguf_file)
    elif path.is_file():
        raise InputError(f"{option}: expected a model's folder, a hub id or a .gguf file, got the file {name}")
    elif not is_hub_id(name):
        raise InputError(f"{option}: model folder not found: {name}{_siblings(path)}")


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a repository's: NAME or OWNER/NAME."""
    return _HUB_ID.fullmatch(name) is not None


def _require_model(folder: Path, option: str, gguf_file: str | None) -> None:
    if gguf_file is not None:
        if not (folder / gguf_file).is_file():
            raise InputError(f"gguf_file: {gguf_file} is no file in {folder}")
        return
    if any((folder / name).is_file() for name in MODEL_FILES):
        return
    inside = sorted(path.parent.name for path in folder.glob("*/*") if path.name in MODEL_FILES)
    converted = sorted(path.name for path in folder.glob("*.gguf"))
    hint = f"; there are models in {', '.join(inside[:5])}" if inside else ""
    hint += f"; gguf_file can name {', '.join(converted[:5])}" if converted else ""
    raise InputError(f"{option}: {folder} is not a model folder, it has no {MODEL_CONFIG}{hint}")


def require_folder(name: str, option: str) -> Path:
    """The folder of this name. Raises InputError where there is none."""
    path = Path(name)
    if not path.is_dir():
        raise InputError(f"{option}: folder not found: {name}{_siblings(path)}")
    return path


def _siblings(path: Path) -> str:
    """What lies beside a path that is not there and is called almost the same."""
    others = [] if not path.parent.is_dir() else [other.name for other in path.parent.iterdir() if other.is_dir()]
    return nearest(path.name, others)


def unreadable(name: str, what: str, error: Exception) -> InputError:
    """The error to raise where Transformers could not load something of a model, with the reason in a sentence.

    Args:
        name: folder or hub id.
        what: what was to be loaded, such as "tokenizer".
        error: what Transformers raised.
    """
    reason = _damage(Path(name), what) if Path(name).is_dir() else _hub_reason(name, error)
    kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
    text = " ".join(str(error).split()).replace("trust_remote_code=True", "--trust_remote_code")
    return InputError(f"{name}: no {what} could be loaded from there: {reason or _refusal(error) or kind + text}")


def _hub_reason(name: str, error: BaseException) -> str | None:
    from huggingface_hub import constants, errors

    found: BaseException | None = error
    while found is not None:
        if isinstance(found, errors.GatedRepoError):
            return (
                f"the repository is gated: accept its terms at https://huggingface.co/{name}, and run `hf auth login`"
            )
        if isinstance(found, errors.RepositoryNotFoundError):
            return f"{_NOT_FOUND}, and no such repository on the hub (a private one needs `hf auth login`)"
        if isinstance(found, errors.RevisionNotFoundError):
            return "the repository has no such model_revision"
        if isinstance(found, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError | ConnectionError):
            why = "was not asked, as HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "could not be reached"
            return f"{_NOT_FOUND}, no download in the cache, and the hub {why}"
        found = found.__cause__ or found.__context__
    return None


def _damage(folder: Path, what: str) -> str | None:
    """What the files of a folder lack; None where they look whole."""
    patterns = _TOKENIZERS if what == "tokenizer" else _WEIGHTS
    found = sorted(file for pattern in patterns for file in folder.glob(pattern))
    if not found:
        return f"the folder has none of the files {', '.join(patterns)}"
    return next((reason for file in found if (reason := _broken(file)) is not None), None)


def _broken(file: Path) -> str | None:
    """Why a file of weights or of a tokenizer is not whole, as its first bytes tell."""
    from safetensors import SafetensorError, safe_open

    with file.open("rb") as content:
        if content.read(len(_LFS_POINTER)) == _LFS_POINTER:
            return f"{file.name} is a pointer of Git LFS, without the content (`git lfs pull` brings it)"
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt"):
                pass
        elif file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
    except (SafetensorError, ValueError) as error:
        return f"{file.name} is damaged or not whole: {error}"
    return None


def _refusal(error: Exception) -> str | None:
    """What Transformers' message asks for and this command has not, in other words."""
    if isinstance(error, pickle.UnpicklingError):
        return "its pickled weights hold more than tensors, and are not loaded because they could run any code"
    if "ignore_mismatched_sizes" in str(error):
        return "its weights have other shapes than its config.json says; the report above lists them"
    return None
