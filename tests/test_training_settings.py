"""What is saved beside the trained weights is what came: configuration, generation settings, tokenizer, model code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from training_fixtures import (
    CHATML,
    completion_rows,
    make_model,
    make_options,
    make_tokenizer,
    preference_rows,
    write_gguf,
    write_jsonl,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from logitless.training import train
from logitless.training.settings import read_settings

SIZES: dict[str, Any] = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SIZES | {"attention_dropout": 0.1}),
    "qwen3": ("Qwen3Config", SIZES | {"use_cache": False}),
    "gemma2": ("Gemma2Config", SIZES | {"query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3TextConfig", SIZES | {"query_pre_attn_scalar": 8}),
    "gpt2": ("GPT2Config", {"vocab_size": 258, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "mixtral": ("MixtralConfig", SIZES | {"num_local_experts": 4, "output_router_logits": True}),
}
SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja")


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(read(file) | changes), encoding="utf-8")


def make_family(folder: Path, family: str) -> Path:
    """A tiny model of a family, with settings as other versions of Transformers and people write them."""
    name, sizes = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**sizes))
    model.to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    edit(folder / "config.json", transformers_version="4.40.0", own_key={"a": 1}, temperature=0.3)
    edit(folder / "generation_config.json", temperature=0.6, own_key=3)  # no do_sample: some releases refuse to save it
    edit(folder / "tokenizer_config.json", padding_side="left", add_bos_token=False, own_key=[1])
    return folder


def make_model_with_images(folder: Path) -> Path:
    """A tiny Gemma 3 that reads images too."""
    text = SIZES | {"query_pre_attn_scalar": 8, "vocab_size": 270}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    shape: dict[str, Any] = {"text_config": text, "vision_config": vision}
    config = transformers.Gemma3Config(**shape, mm_tokens_per_image=1, image_token_index=269)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def trained(folder: Path, model: Path, **changes: Any) -> Path:
    data = write_jsonl(folder / "rows.jsonl", completion_rows(4))
    shape = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    return train(make_options(folder / "run", str(model), data, **shape | changes)).output_dir


@pytest.mark.parametrize("family", FAMILIES)
def test_settings_are_saved_as_they_came(tmp_path: Path, family: str) -> None:
    came = make_family(tmp_path / "model", family)
    run = trained(tmp_path, came, gradient_checkpointing=True, disable_dropout=True)
    for folder in (run, run / "checkpoint-1"):
        for name in SETTINGS:
            if name == "config.json":  # the weights are float32 now
                assert read(folder / name) == read(came / name) | {"dtype": "float32"}
            else:
                assert (folder / name).read_bytes() == (came / name).read_bytes(), name
    loaded = AutoModelForCausalLM.from_pretrained(run)
    assert loaded.config.use_cache == read(came / "config.json").get("use_cache", True)
    assert AutoTokenizer.from_pretrained(run).padding_side == "left"


@pytest.mark.parametrize("backend", ["auto", "materialised"])
@pytest.mark.parametrize("method", ["sft", "dpo", "psft"])
def test_no_cache_is_made_although_the_configuration_asks_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, backend: str
) -> None:
    def refused(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a cache of keys and values was made")

    monkeypatch.setattr("transformers.models.llama.modeling_llama.DynamicCache", refused)
    came = make_model(tmp_path / "model")
    with pytest.raises(AssertionError, match="a cache"):
        AutoModelForCausalLM.from_pretrained(came)(torch.tensor([[5]]))
    data = write_jsonl(tmp_path / "rows.jsonl", preference_rows() if method == "dpo" else completion_rows())
    shape = {"method": method, "backend": backend, "eval_fraction": 0.25, "max_steps": 2}
    train(make_options(tmp_path / "run", came, data, **shape, use_peft=method == "sft"))


@pytest.mark.parametrize("named", [False, True])
def test_a_template_within_the_tokenizers_configuration_stays_there(tmp_path: Path, named: bool) -> None:
    came = Path(make_model(tmp_path / "model"))
    text = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (came / "chat_template.jinja").unlink(missing_ok=True)
    several = [{"name": name, "template": text + name} for name in ("default", "tool_use")]
    edit(came / "tokenizer_config.json", chat_template=several if named else text)
    run = trained(tmp_path, came)
    for folder in (run, run / "checkpoint-1"):
        assert (folder / "tokenizer_config.json").read_bytes() == (came / "tokenizer_config.json").read_bytes()
        assert not [path for path in folder.iterdir() if "template" in path.name]
    expected = AutoTokenizer.from_pretrained(came).chat_template
    assert AutoTokenizer.from_pretrained(run).chat_template == expected != text * named


def test_nothing_changes_where_the_precision_stays(tmp_path: Path) -> None:
    came = make_family(tmp_path / "model", "llama")
    run = trained(tmp_path, came, dtype="auto")
    assert all(read(run / name) == read(came / name) for name in SETTINGS[:-1])


def test_an_older_name_of_the_precision_stays(tmp_path: Path) -> None:
    came = make_family(tmp_path / "model", "llama")
    settings = read(came / "config.json")
    settings["torch_dtype"] = settings.pop("dtype")
    (came / "config.json").write_text(json.dumps(settings))
    assert read(trained(tmp_path, came) / "config.json") == settings | {"torch_dtype": "float32"}


def test_a_model_without_generation_settings_gets_none(tmp_path: Path) -> None:
    came = make_family(tmp_path / "model", "llama")
    (came / "generation_config.json").unlink()
    run = trained(tmp_path, came)
    assert not (run / "generation_config.json").exists()
    assert AutoModelForCausalLM.from_pretrained(run).generation_config.eos_token_id == 1


def test_a_release_that_refuses_generation_settings_does_not_end_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = GenerationConfig.save_pretrained

    def strict(self: GenerationConfig, *args: Any, **kwargs: Any) -> None:
        self.validate(strict=True)
        save(self, *args, **kwargs)

    monkeypatch.setattr(GenerationConfig, "save_pretrained", strict)
    came = make_family(tmp_path / "model", "llama")
    with pytest.raises(ValueError, match="temperature"):
        GenerationConfig.from_pretrained(came).save_pretrained(tmp_path / "refused")
    assert read(trained(tmp_path, came) / "generation_config.json") == read(came / "generation_config.json")


def test_the_tokenizer_beside_an_adapter_is_the_one_that_came(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    came = make_family(tmp_path / "model", "llama")
    run = trained(tmp_path, came, use_peft=True)
    for folder in (run, run / "checkpoint-1"):
        assert not (folder / "config.json").exists()
        assert all((folder / name).read_bytes() == (came / name).read_bytes() for name in SETTINGS[2:])


def test_a_model_of_several_parts_names_its_precision_in_each(tmp_path: Path) -> None:
    came = make_model_with_images(tmp_path / "model")
    settings = read(came / "config.json")
    settings["text_config"]["torch_dtype"] = "bfloat16"  # as published ones have it
    edit(came / "config.json", **settings)
    settings["text_config"]["torch_dtype"] = settings["dtype"] = "float32"
    (came / "preprocessor_config.json").write_text('{"size": 28}')
    run = trained(tmp_path, came)
    assert read(run / "config.json") == settings and read(run / "preprocessor_config.json") == {"size": 28}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3 with images"])
def test_a_shape_that_changed_on_loading_is_saved(tmp_path: Path, family: str) -> None:
    """A merged adapter may bring rows of the vocabulary, and a head of its own where the base has none."""
    if family in FAMILIES:
        came = make_family(tmp_path / "model", family)
    else:
        came = make_model_with_images(tmp_path / "model")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(came), AutoTokenizer.from_pretrained(came)
    options = make_options(tmp_path / "run", str(came), "")
    assert read_settings(model, tokenizer, options).model["config.json"] == (came / "config.json").read_bytes()
    model.resize_token_embeddings(300)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach() + 1)
    model.config.tie_word_embeddings = False
    read_settings(model, tokenizer, options).save(tmp_path / "run", model, tokenizer)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert torch.equal(loaded.get_output_embeddings().weight, head.weight)
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert len(head.weight) == 300


def test_code_that_comes_with_a_model_is_saved_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)  # another test's, from another folder
    came = Path(make_model(tmp_path / "model"))
    (came / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n\n"
        "    def __init__(self, max_length=100, **settings):\n        super().__init__(**settings)\n"
        "        self.max_length = max_length  # which Transformers refuses to save\n"
    )
    (came / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_own import OwnConfig\n\n\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    classes = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    edit(came / "config.json", model_type="own", architectures=["OwnForCausalLM"], auto_map=classes, max_length=50)
    run = trained(tmp_path, came, trust_remote_code=True)
    assert read(run / "config.json") == read(came / "config.json")
    assert all((run / name).read_bytes() == (came / name).read_bytes() for name in ("configuration_own.py",
                                                                                   "modeling_own.py"))  # fmt: skip
    assert type(AutoModelForCausalLM.from_pretrained(run, trust_remote_code=True)).__name__ == "OwnForCausalLM"


RUN = """
import json, sys
from logitless.training import TrainOptions, train
train(TrainOptions(**json.loads(sys.argv[1])))
"""


def test_a_download_is_saved_as_it_came(tmp_path: Path) -> None:
    """The hub's cache, as a download leaves it, and no network."""
    repository = tmp_path / "home" / "hub" / "models--owner--name"
    came = make_family(repository / "snapshots" / ("0" * 40), "llama")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    data = write_jsonl(tmp_path / "rows.jsonl", completion_rows(4))
    options = make_options(tmp_path / "run", "owner/name", data, max_steps=1).to_dict()
    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_CACHE": str(tmp_path / "home" / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", RUN, json.dumps(options)], env=os.environ | home, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert read(tmp_path / "run" / "config.json") == read(came / "config.json") | {"dtype": "float32"}
    assert all((tmp_path / "run" / name).read_bytes() == (came / name).read_bytes() for name in SETTINGS[1:])


def test_a_gguf_model_is_saved_as_an_ordinary_one(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    file = write_gguf(tmp_path / "model.gguf", make_model(tmp_path / "model"))
    settings = read(trained(tmp_path, Path(file)) / "config.json")
    assert "quantization_config" not in settings and settings["use_cache"] and settings["dtype"] == "float32"
    assert AutoTokenizer.from_pretrained(tmp_path / "run").chat_template == CHATML
