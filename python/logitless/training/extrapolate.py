"""ExPO: a model beyond an aligned one, on the line from where its alignment started.

    theta = aligned + alpha (aligned - start)

Weights are read from safetensors files, which are mapped, and are combined and written tensor by tensor, so that memory
need hold one tensor of each model. The result has the aligned model's files: its shards, its precision, its
configuration, its tokenizer. Nothing is pickled and no code of a model is run.

Source: arXiv 2404.16792; its authors' code (chujiezheng/LLM-Extrapolation) computes the same in bfloat16.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from logitless.training import files
from logitless.training.checks import tokens_by_id
from logitless.training.errors import InputError
from logitless.training.places import ADAPTER_CONFIG, MODEL_CONFIG, is_hub_id, require_folder, unreadable
from logitless.training.resume import IDLE_SETTINGS
from logitless.training.settings import GENERATION_CONFIG, NAMED_TEMPLATES, PRECISION, TOKENIZER_FILES

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
#: What is copied beside the weights: settings, the tokenizer, templates, and code that comes with a model.
_BESIDE = (
    *(MODEL_CONFIG, GENERATION_CONFIG, *TOKENIZER_FILES),
    *("*.model", "*.tiktoken", "*.jinja", "*.py", "vocab*", "merges*"),
)
#: Settings in which two models of one architecture may differ: they are about generation, or say nothing of the values.
_MAY_DIFFER = (
    *(*IDLE_SETTINGS, *PRECISION, "architectures", "auto_map"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)


class Weights(NamedTuple):
    """Where a model's tensors are on the disk, and their shapes."""

    folder: Path
    files: Mapping[str, str]  # by tensor
    shapes: Mapping[str, list[int]]


def write_extrapolated(start: str, aligned: str, output: str, *, alpha: float) -> list[str]:
    """Writes the model `aligned + alpha (aligned - start)`, computed in float32, in the aligned model's precision.

    Args:
        start: folder or hub id of the model that the alignment started from, such as an SFT model.
        aligned: folder or hub id of the model that came of it, such as a DPO model.
        output: the folder to write, which must not be there. It appears when it is whole.
        alpha: how far beyond, as a share of the way from start to aligned; the authors advise 0.3 or 0.5. Between -1
            and 0 the result lies between the two.

    Returns:
        Notes on what could not be compared.

    Raises:
        InputError: an alpha of 0, of -1 or less, or that is not finite; a model that is not there, has no safetensors,
            is an adapter, or is quantised; two models that differ in more than the values of their weights, or not even
            in these; a result that is not finite; an output that is there, or that cannot be written.
    """
    if not (math.isfinite(alpha) and alpha > -1 and alpha):
        raise InputError(f"alpha must be above -1 and not 0 (-1 is the start itself, 0 the aligned model), got {alpha}")
    if Path(output).exists():
        raise InputError(f"output: {output} is there already; expected the name of a new folder")
    first, second = _model(start, "start"), _model(aligned, "aligned")
    _require_same_settings(first.folder, second.folder)
    _require_same_tensors(first, second)
    notes = _compare_tokenizers(first.folder, second.folder)
    try:
        with files.new_folder(Path(output)) as unfinished:
            _write_weights(first, second, unfinished, alpha)
            _copy_beside(second.folder, unfinished)
    except OSError as error:
        raise InputError(f"output: {output} cannot be written: {error}") from error
    return notes


# ---------------------------------------------------------------------------------------------------------------------
# Models on the disk


def _model(name: str, option: str) -> Weights:
    """The tensors of a folder, or of a repository that is downloaded; raises InputError where they cannot be used."""
    folder = require_folder(name, option) if Path(name).is_dir() or not is_hub_id(name) else _download(name, option)
    if (folder / ADAPTER_CONFIG).is_file():
        raise InputError(f"{option}: {name} is an adapter, whose matrices are factors of what it adds; merge it into "
                         "its base (peft's merge_and_unload), and save that")  # fmt: skip
    if not (folder / MODEL_CONFIG).is_file():
        raise InputError(f"{option}: {name} is not a model folder, it has no {MODEL_CONFIG}")
    if "quantization_config" in _json_of(folder / MODEL_CONFIG):
        raise InputError(f"{option}: {name} is quantised, and quantised weights cannot be added")
    return _weights_of(folder, option)


def _download(name: str, option: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[*_BESIDE, WEIGHTS, INDEX, "model-*.safetensors"]))
    except Exception as error:  # of the hub, of the network, of the disk
        raise unreadable(name, f"model ({option})", error) from error


def _weights_of(folder: Path, option: str) -> Weights:
    """A folder's tensors, in the files that the index says where there is one."""
    if (folder / INDEX).is_file():
        return _sharded_weights(folder)
    if not (folder / WEIGHTS).is_file():
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        hint = f"; {pickled[0]} may hold code, and is not read: save the model as safetensors" if pickled else ""
        raise InputError(f"{option}: {folder} has neither {WEIGHTS} nor {INDEX}{hint}")
    shapes = _shapes(folder / WEIGHTS)
    return Weights(folder, dict.fromkeys(shapes, WEIGHTS), shapes)


def _sharded_weights(folder: Path) -> Weights:
    index = _json_of(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise InputError(f"{folder / INDEX}: expected a weight_map, of names to files")
    shapes: dict[str, list[int]] = {}
    for file in sorted(set(index.values())):
        if Path(file).name != file:
            raise InputError(f"{folder / INDEX}: expected names of files in the folder, got {file!r}")
        own = _shapes(folder / file)
        if other := own.keys() ^ {name for name, where in index.items() if where == file}:
            raise InputError(f"{folder / file}: its tensors are not those that {INDEX} says, such as {min(other)}")
        shapes |= own
    return Weights(folder, index, shapes)


def _shapes(file: Path) -> dict[str, list[int]]:
    """The shapes of a file's tensors, which are not read."""
    try:
        with safe_open(file, "pt") as content:
            return {name: content.get_slice(name).get_shape() for name in content.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: no safetensors can be read from it: {error}") from error


def _json_of(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: no JSON can be read from it: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{file}: expected a JSON object, got {type(found).__name__}")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Whether two models are two points of one space


def _require_same_settings(start: Path, aligned: Path) -> None:
    """Raises InputError where a value that both configurations name differs, and is about more than generation.

    A key that only one of them has is passed over: releases of Transformers write different defaults.
    """
    first, second = (_json_of(folder / MODEL_CONFIG) for folder in (start, aligned))
    for key, (ours, theirs) in _differences(first, second):
        raise InputError(f"aligned: its {MODEL_CONFIG} has {key} = {theirs!r}, and that of start has {ours!r}; "
                         "expected two trainings of one model")  # fmt: skip


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for key in first.keys() & second.keys() - set(_MAY_DIFFER):
        ours, theirs = first[key], second[key]
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            yield from ((f"{key}.{inner}", pair) for inner, pair in _differences(ours, theirs))
        elif ours != theirs:
            yield key, (ours, theirs)


def _require_same_tensors(start: Weights, aligned: Weights) -> None:
    for one, other, option, beside in ((start, aligned, "aligned", "start"), (aligned, start, "start", "aligned")):
        if missing := sorted(one.files.keys() - other.files.keys()):
            raise InputError(f"{option}: {other.folder} lacks {len(missing)} of the tensors of {beside}, such as "
                             f"{missing[0]}; expected two trainings of one model, saved alike")  # fmt: skip
    for name, theirs in aligned.shapes.items():
        ours = start.shapes[name]
        if ours != theirs:
            raise InputError(f"aligned: the tensor {name} has the shape {theirs}, and that of start {ours}")


def _compare_tokenizers(start: Path, aligned: Path) -> list[str]:
    """Notes where tokens could not be compared. Raises InputError where an id is another token to each.

    The aligned model may have more tokens: training adds them in rows that were padding.
    """
    from transformers import AutoTokenizer

    known = []
    for folder in (start, aligned):
        try:
            known.append(tokens_by_id(AutoTokenizer.from_pretrained(str(folder)).get_vocab()))
        except Exception as error:  # a damaged file can break the reader anywhere
            return [f"the tokens are not compared: {unreadable(str(folder), 'tokenizer', error)}"]
    first, second = known
    for number in sorted(first.keys() & second.keys()):
        if first[number] != second[number]:
            raise InputError(f"aligned: the id {number} is {second[number]!r} to its tokenizer and {first[number]!r} "
                             "to that of start; expected one vocabulary")  # fmt: skip
    return []


# ---------------------------------------------------------------------------------------------------------------------
# What is written


def extrapolated(name: str, start: torch.Tensor, aligned: torch.Tensor, alpha: float) -> torch.Tensor:
    """The tensor `aligned + alpha (aligned - start)` in the aligned one's dtype, computed in float32 or wider.

    Integers and truth values are the aligned model's, and must be equal in both.

    Raises:
        InputError: integers that differ, a dtype that is not added in, or a result that is not finite.
    """
    if not aligned.is_floating_point():
        if not torch.equal(start, aligned):
            raise InputError(f"the tensor {name} holds {str(aligned.dtype)[6:]}, and other ones in start than in "
                             "aligned; only numbers with a fraction can be extrapolated")  # fmt: skip
        return aligned
    if aligned.element_size() < 2 or not start.is_floating_point() or start.element_size() < 2:
        raise InputError(f"the tensor {name} is {str(start.dtype)[6:]} in start and {str(aligned.dtype)[6:]} in "
                         "aligned; expected float16, bfloat16, float32 or float64")  # fmt: skip
    wide = torch.promote_types(aligned.dtype, torch.float32)
    ours, theirs = aligned.to(wide), start.to(wide)
    found = torch.add(ours, ours - theirs, alpha=alpha).to(aligned.dtype)
    if not found.isfinite().all():
        raise InputError(f"the tensor {name} has values that are not finite (NaN, infinite) at alpha={alpha}: they are "
                         f"so in start or aligned, or too large for {str(aligned.dtype)[6:]}")  # fmt: skip
    return found


def _write_weights(start: Weights, aligned: Weights, folder: Path, alpha: float) -> None:
    moved = False
    for file in sorted(set(aligned.files.values())):
        moved |= _write_file(start, aligned, folder, file, alpha)
    if not moved:
        raise InputError(f"aligned: {aligned.folder} and {start.folder} have the same weights, to the last bit")
    if (aligned.folder / INDEX).is_file():
        shutil.copyfile(aligned.folder / INDEX, folder / INDEX)


def _write_file(start: Weights, aligned: Weights, folder: Path, file: str, alpha: float) -> bool:
    """Writes one file of the aligned model with other values; returns whether any value is another.

    A safetensors file is a header of names, shapes and offsets, and then the bytes of the tensors without a gap. Shapes
    and dtypes are the same, so the header is, and a tensor at a time can follow it. `save_file` would hold all of them.
    """
    moved = False
    with ExitStack() as opened:
        source = opened.enter_context((aligned.folder / file).open("rb"))
        target = opened.enter_context((folder / file).open("wb"))
        size = source.read(8)
        header = source.read(int.from_bytes(size, "little"))
        target.write(size + header)
        spans = {name: span["data_offsets"] for name, span in json.loads(header).items() if name != "__metadata__"}
        after = opened.enter_context(safe_open(aligned.folder / file, "pt"))
        parts = sorted({start.files[name] for name in spans})
        before = {part: opened.enter_context(safe_open(start.folder / part, "pt")) for part in parts}
        for name in sorted(spans, key=spans.__getitem__):
            own = after.get_tensor(name)
            found = extrapolated(name, before[start.files[name]].get_tensor(name), own, alpha)
            moved |= not torch.equal(found, own)
            target.write(found.contiguous().flatten().view(torch.uint8).numpy().data)
    return moved


def _copy_beside(source: Path, folder: Path) -> None:
    """Copies what the aligned model has beside its weights, as it came."""
    for path in sorted({path for pattern in _BESIDE for path in source.glob(pattern) if path.is_file()}):
        shutil.copyfile(path, folder / path.name)
    if (source / NAMED_TEMPLATES).is_dir():
        shutil.copytree(source / NAMED_TEMPLATES, folder / NAMED_TEMPLATES)
