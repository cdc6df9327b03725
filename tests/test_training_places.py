"""A model that is not there, or not whole, is a sentence that says so; never one about the form of repository names."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file
from training_fixtures import completion_rows, make_model, make_options, write_gguf, write_jsonl

from logitless.training import InputError, TrainOptions, train
from logitless.training.places import unreadable
from logitless.training.teach import write_teacher_columns


def options(folder: Path, model: str | Path, **changes: Any) -> TrainOptions:
    data = write_jsonl(folder / "rows.jsonl", completion_rows(2))
    return make_options(folder / "run", str(model), data, **{"max_steps": 1} | changes)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(make_model(tmp_path / "model"))


@pytest.mark.parametrize(
    "name",
    ["/no/such/model", "./typo", "../typo/checkpoint-3", "~/typo-of-a-model", "models/typo/checkpoint-3",
     "models/typo/", "my model", r"C:\models\typo", "https://huggingface.co/owner/name"],
)  # fmt: skip
def test_a_path_that_is_not_there_is_called_missing(tmp_path: Path, model: Path, name: str) -> None:
    for given, message in [
        (options(tmp_path, name), "^model_name_or_path: model folder not found: "),
        (
            options(tmp_path, model, teacher_model_name_or_path=name),
            "^teacher_model_name_or_path: model folder not found",
        ),
    ]:
        with pytest.raises(InputError, match=message):
            train(given)
        with pytest.raises(InputError, match=message):
            write_teacher_columns(given, str(tmp_path / "taught.jsonl"))
    with pytest.raises(InputError, match=r"^resume_from_checkpoint: folder not found: "):
        train(options(tmp_path, model, resume_from_checkpoint=name))


def test_a_component_of_a_mixture_is_named(tmp_path: Path, model: Path) -> None:
    part = {"method": "distillation", "dataset_name": str(tmp_path / "rows.jsonl")}
    parts = [part | {"name": "near"}, part | {"name": "far", "teacher_model_name_or_path": "./typo"}]
    given = TrainOptions(model_name_or_path=str(model), mixture=parts, output_dir=str(tmp_path / "run"), use_cpu=True)
    with pytest.raises(
        InputError, match=r"^mixture, far: teacher_model_name_or_path: model folder not found: \./typo$"
    ):
        train(given)


def test_what_lies_beside_a_missing_folder_is_named(tmp_path: Path, model: Path) -> None:
    with pytest.raises(InputError, match=r"not found: .*modle \(nearest: model\)"):
        train(options(tmp_path, tmp_path / "modle"))
    with pytest.raises(InputError, match=r"has no config\.json; there are models in model$"):
        train(options(tmp_path, tmp_path))
    with pytest.raises(
        InputError, match=r"expected a model's folder, a hub id or a \.gguf file, got the file .*config"
    ):
        train(options(tmp_path, model / "config.json"))


def test_a_gguf_file_that_is_not_in_the_folder_is_named(tmp_path: Path, model: Path) -> None:
    with pytest.raises(InputError, match=r"^gguf_file: none\.gguf is no file in .*model$"):
        train(options(tmp_path, model, gguf_file="none.gguf"))
    pytest.importorskip("gguf")
    folder = tmp_path / "converted"
    folder.mkdir()
    write_gguf(folder / "own.gguf", str(model))
    with pytest.raises(InputError, match=r"it has no config\.json; gguf_file can name own\.gguf$"):
        train(options(tmp_path, folder))
    assert train(options(tmp_path, folder, gguf_file="own.gguf")).step == 1


def test_a_home_folder_is_found(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    result = train(options(tmp_path, "~/model", output_dir="~/trained"))
    assert result.output_dir == tmp_path / "trained" and (tmp_path / "trained" / "model.safetensors").is_file()


def test_a_run_that_is_given_for_its_checkpoint_is_told_apart(tmp_path: Path, model: Path) -> None:
    run = train(options(tmp_path, model, save_strategy="steps", save_steps=1)).output_dir
    with pytest.raises(InputError, match=r"it has no trainer_state\.json; there are checkpoints in it: checkpoint-1$"):
        train(options(tmp_path, model, resume_from_checkpoint=str(run)))


def test_a_hub_id_without_a_hub_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.is_offline_mode", lambda: True)
    for name in ("nobody/no-such-model", "no-such-model"):
        message = f"{name}: no tokenizer could be loaded from there: it was not found: .* HF_HUB_OFFLINE is set"
        with pytest.raises(InputError, match=message):
            train(options(tmp_path, name))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (errors.GatedRepoError, r"the repository is gated: accept its terms at https://huggingface\.co/owner/name"),
        (errors.RepositoryNotFoundError, "not found: there is no such folder here, and no such repository on the hub"),
        (errors.RevisionNotFoundError, "the repository has no such model_revision"),
        (
            errors.LocalEntryNotFoundError,
            "no such folder here, no download in the cache, and the hub could not be reached",
        ),
    ],
)
def test_the_hubs_answers_are_sentences(monkeypatch: pytest.MonkeyPatch, kind: type[Exception], message: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    try:
        raise OSError("what Transformers says") from kind.__new__(kind)  # theirs are made of an answer's headers
    except OSError as error:
        assert message.replace("\\", "") in str(unreadable("owner/name", "tokenizer", error))


# Folders with something amiss


class Evil:
    """Pickled, it runs a command when it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


def changed_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, size)


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def as_pointer(name: str) -> Callable[[Path], None]:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    return lambda folder: (folder / name).write_text(text) and None


def as_list(folder: Path) -> None:
    (folder / "config.json").write_text("[1]")


def lost_shard(folder: Path) -> None:
    names = dict.fromkeys(load_file(folder / "model.safetensors"), "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (folder / "model.safetensors").rename(folder / "model-00002-of-00002.safetensors")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without("model.safetensors"), "no causal language model .* has none of the files"),
        (cut("model.safetensors", 3000), r"model\.safetensors is damaged or not whole"),
        (cut("model.safetensors", 0), r"model\.safetensors is damaged or not whole"),
        (as_pointer("model.safetensors"), r"model\.safetensors is a pointer of Git LFS"),
        (lost_shard, r"model-00001-of-00002\.safetensors"),
        (cut("config.json", 5), "not a valid JSON file"),
        (as_list, "no tokenizer could be loaded from there: TypeError"),
        (cut("tokenizer.json", 100), r"no tokenizer .* tokenizer\.json is damaged or not whole"),
        (as_pointer("tokenizer.json"), r"no tokenizer .* tokenizer\.json is a pointer of Git LFS"),
        (changed_config(model_type="none"), "model type `none`"),
        (changed_config(hidden_size=64), r"its weights have other shapes than its config\.json says"),
        (changed_config(num_hidden_layers=3), r"no weights for model\.layers\.2.* and 6 more, which would be random"),
    ],
)
def test_a_folder_that_is_not_whole_says_what_is_amiss(
    tmp_path: Path, model: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(model)
    with pytest.raises(InputError, match=message) as caught:
        train(options(tmp_path, model))
    assert str(caught.value).startswith(str(model)) and "\n" not in str(caught.value)


def test_pickled_weights_are_read_as_tensors_alone(tmp_path: Path, model: Path) -> None:
    whole = shutil.copytree(model, tmp_path / "pickled")
    weights = load_file(whole / "model.safetensors")
    (whole / "model.safetensors").unlink()
    torch.save(weights, whole / "pytorch_model.bin")
    assert (
        train(options(tmp_path, whole)).train_loss
        == train(options(tmp_path, model, output_dir=str(tmp_path / "other"))).train_loss
    )
    torch.save({**weights, "own": Evil(tmp_path / "ran")}, whole / "pytorch_model.bin")
    with pytest.raises(InputError, match="its pickled weights hold more than tensors") as caught:
        train(options(tmp_path, whole, output_dir=str(tmp_path / "third")))
    assert isinstance(caught.value.__cause__, pickle.UnpicklingError) and not (tmp_path / "ran").exists()
