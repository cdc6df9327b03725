"""ExPO: `logitless extrapolate` writes `aligned + alpha (aligned - start)`, or says by name why it cannot."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training_fixtures import SPECIAL, make_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM
from typer.testing import CliRunner

from logitless.cli import app
from logitless.training import InputError
from logitless.training.extrapolate import INDEX, WEIGHTS, extrapolated, write_extrapolated


class Pair:
    """A start, and what became of it by a few random steps."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.start = Path(make_model(folder / "start"))
        self.aligned = Path(shutil.copytree(self.start, folder / "aligned"))
        self.save(*self.moved())
        GenerationConfig(temperature=0.6, do_sample=True).save_pretrained(self.aligned)

    def moved(self) -> tuple[Any, dict[str, Any]]:
        model = LlamaForCausalLM.from_pretrained(self.start)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01 * torch.randn_like(parameter)
        return model, {}

    def save(self, model: Any, settings: dict[str, Any]) -> None:
        model.save_pretrained(self.aligned, **settings)

    def write(self, alpha: float = 0.3, name: str = "output") -> Path:
        self.notes = write_extrapolated(str(self.start), str(self.aligned), str(self.folder / name), alpha=alpha)
        return self.folder / name

    def refused(self, message: str, alpha: float = 0.3) -> None:
        """The pair is refused, and nothing is left behind."""
        before = sorted(self.folder.iterdir())
        with pytest.raises(InputError, match=message):
            self.write(alpha)
        assert sorted(self.folder.iterdir()) == before


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


def state(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def change_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("alpha", [0.3, 2.0, -0.5])
def test_the_model_is_on_the_line(pair: Pair, alpha: float) -> None:
    output = pair.write(alpha)
    ours, theirs, found = state(pair.aligned), state(pair.start), state(output)
    assert found.keys() == ours.keys() and not pair.notes
    for name, value in found.items():
        exact = ours[name].double() + alpha * (ours[name].double() - theirs[name].double())
        torch.testing.assert_close(value.double(), exact, rtol=3e-7, atol=1e-9)
        assert not torch.equal(value, ours[name])
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight  # tied, saved once


def test_everything_beside_the_weights_is_the_aligned_model_s(pair: Pair) -> None:
    tokenizer = make_tokenizer("{{ messages[0]['content'] }}")
    tokenizer.save_pretrained(pair.aligned)
    change_config(pair.aligned, eos_token_id=[1, 2], new_key="of a later release")
    (pair.aligned / "modeling_own.py").write_text("raise RuntimeError('run')\n")
    for name in ("metrics.jsonl", "trainer_state.json", "optimizer.pt", "pytorch_model.bin"):
        (pair.aligned / name).write_text("{}")
    (pair.aligned / "checkpoint-1").mkdir()
    output = pair.write()
    names = {path.name for path in output.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "modeling_own.py", WEIGHTS} <= names
    for name in names - {WEIGHTS}:
        assert (output / name).read_bytes() == (pair.aligned / name).read_bytes()
    assert not names & {"metrics.jsonl", "trainer_state.json", "optimizer.pt", "pytorch_model.bin", "checkpoint-1"}
    assert AutoTokenizer.from_pretrained(output).chat_template == tokenizer.chat_template


def test_shards_of_either_are_read_and_those_of_the_aligned_model_written(pair: Pair) -> None:
    whole = state(pair.write(name="whole"))
    for folder, size in ((pair.start, "20KB"), (pair.aligned, "12KB")):
        model = LlamaForCausalLM.from_pretrained(folder)
        (folder / WEIGHTS).unlink()
        model.save_pretrained(folder, max_shard_size=size)
    output = pair.write(name="sharded")
    shards = sorted(path.name for path in pair.aligned.glob("model-*.safetensors"))
    assert len(shards) > len(list(pair.start.glob("model-*.safetensors"))) > 1
    assert sorted(path.name for path in output.glob("*.safetensors")) == shards
    assert (output / INDEX).read_bytes() == (pair.aligned / INDEX).read_bytes()
    for shard in shards:
        with safe_open(output / shard, "pt") as ours, safe_open(pair.aligned / shard, "pt") as theirs:
            assert ours.metadata() == theirs.metadata() and list(ours.keys()) == list(theirs.keys())
    found = state(output)
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    AutoModelForCausalLM.from_pretrained(output)


def test_the_arithmetic_is_float32_and_the_result_in_the_aligned_model_s_precision(pair: Pair) -> None:
    """In bfloat16 the product alpha (aligned - start) would be rounded before it is added."""
    change_config(pair.aligned, dtype="bfloat16")
    change_weights(pair.aligned, lambda own: own.update({k: v.bfloat16() for k, v in own.items()}))
    output = pair.write(0.3)
    ours, theirs = state(pair.aligned), state(pair.start)
    for name, value in state(output).items():
        wide = ours[name].float()
        assert torch.equal(value, torch.add(wide, wide - theirs[name], alpha=0.3).bfloat16())
    with safe_open(output / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_scalar_and_an_empty_tensor() -> None:
    one = extrapolated("x", torch.tensor(1.0), torch.tensor(2.0), 0.5)
    assert one == 2.5 and one.shape == ()
    assert extrapolated("x", torch.empty(0, 3), torch.empty(0, 3), 0.5).shape == (0, 3)


def test_scalars_empty_tensors_and_integers_are_written(pair: Pair) -> None:
    more = {
        "a.scale": torch.tensor(2.0),
        "b.empty": torch.empty(0, 3),
        "c.ids": torch.arange(5),
        "d": torch.tensor([True]),
    }
    change_weights(pair.aligned, lambda own: own.update(more))
    change_weights(pair.start, lambda own: own.update(more | {"a.scale": torch.tensor(1.0)}))
    found = state(pair.write(0.5))
    assert found["a.scale"] == 2.5 and found["b.empty"].shape == (0, 3)
    assert torch.equal(found["c.ids"], torch.arange(5)) and found["d"].dtype == torch.bool


# What is refused


@pytest.mark.parametrize("alpha", [-1.0, -2.0, 0.0, float("nan"), float("inf")])
def test_alpha_s_that_are_one_of_the_two_or_no_number(pair: Pair, alpha: float) -> None:
    pair.refused("alpha must be above -1 and not 0", alpha)


def test_an_output_that_is_there(pair: Pair) -> None:
    with pytest.raises(InputError, match=r"output: .* is there already"):
        pair.write(name="aligned")


def test_an_output_that_cannot_be_written(pair: Pair) -> None:
    (pair.folder / "file").write_text("")
    with pytest.raises(InputError, match=r"output: .*file/output cannot be written"):
        pair.write(name="file/output")


def test_models_that_are_not_there(pair: Pair) -> None:
    with pytest.raises(InputError, match=r"start: folder not found: .*nearest: start"):
        write_extrapolated(f"{pair.folder}/strat", str(pair.aligned), str(pair.folder / "x"), alpha=0.3)
    (pair.folder / "empty").mkdir()
    with pytest.raises(InputError, match=r"aligned: .*empty is not a model folder, it has no config.json"):
        write_extrapolated(str(pair.start), str(pair.folder / "empty"), str(pair.folder / "x"), alpha=0.3)


def test_a_hub_id_is_downloaded_without_pickles(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        if name == "nobody/nothing":
            raise OSError("no such repository")
        return str(pair.start)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    write_extrapolated("some/sft", str(pair.aligned), str(pair.folder / "x"), alpha=0.3)
    ((name, patterns),) = asked
    assert name == "some/sft" and {WEIGHTS, INDEX, "config.json"} <= set(patterns) and "*.bin" not in patterns
    with pytest.raises(InputError, match="nobody/nothing: no model"):
        write_extrapolated("nobody/nothing", str(pair.aligned), str(pair.folder / "y"), alpha=0.3)


def test_pickled_weights_are_not_read(pair: Pair) -> None:
    (pair.start / WEIGHTS).rename(pair.start / "pytorch_model.bin")
    pair.refused("start: .* has neither model.safetensors nor .*pytorch_model.bin may hold code, and is not read")


def test_an_adapter_is_refused(pair: Pair) -> None:
    (pair.aligned / "adapter_config.json").write_text("{}")
    pair.refused("aligned: .* is an adapter.*merge it into its base")


def test_a_quantised_model_is_refused(pair: Pair) -> None:
    change_config(pair.start, quantization_config={"quant_method": "fp8"})
    pair.refused("start: .* is quantised")


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"model_type": "mistral"}, "model_type"),
        ({"rms_norm_eps": 0.1}, "rms_norm_eps"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, "rope_parameters.rope_theta"),
    ],
)
def test_another_configuration_is_refused(pair: Pair, values: dict[str, Any], key: str) -> None:
    change_config(pair.aligned, **values)
    pair.refused(f"aligned: its config.json has {key} = ")


def test_other_tensors_are_refused(pair: Pair) -> None:
    shutil.copy(pair.start / WEIGHTS, pair.folder / "kept")
    change_weights(pair.start, lambda own: own.pop("model.norm.weight"))
    pair.refused("start: .* lacks 1 of the tensors of aligned, such as model.norm.weight")
    change_weights(pair.start, lambda own: own.update({"model.norm.weight": torch.ones(31)}))
    pair.refused(r"aligned: the tensor model.norm.weight has the shape \[32\], and that of start \[31\]")
    shutil.copy(pair.folder / "kept", pair.start / WEIGHTS)
    change_weights(pair.aligned, lambda own: own.pop("model.norm.weight"))
    pair.refused("aligned: .* lacks 1 of the tensors of start, such as model.norm.weight")


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        (torch.tensor([1, 2]), torch.tensor([1, 3]), "the tensor extra holds int64, and other ones"),
        (torch.ones(2).to(torch.float8_e4m3fn), torch.ones(2).to(torch.float8_e4m3fn), "extra is float8_e4m3fn in"),
        (torch.ones(2), torch.ones(2, dtype=torch.int32), "extra is int32 in start and float32 in aligned"),
        (torch.tensor([1.0, float("nan")]), torch.ones(2), "extra has values that are not finite"),
        (torch.tensor([6e4, 1.0]).half(), torch.zeros(2).half(), "not finite .*too large for float16"),
    ],
)
def test_tensors_that_cannot_be_extrapolated(
    pair: Pair, ours: torch.Tensor, theirs: torch.Tensor, message: str
) -> None:
    change_weights(pair.aligned, lambda own: own.update(extra=ours))
    change_weights(pair.start, lambda own: own.update(extra=theirs))
    pair.refused(message)


def test_two_equal_models_are_refused(pair: Pair) -> None:
    shutil.copy(pair.start / WEIGHTS, pair.aligned / WEIGHTS)
    pair.refused("have the same weights, to the last bit")


def test_another_vocabulary_is_refused(pair: Pair) -> None:
    file = pair.aligned / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))
    pair.refused("aligned: the id [0-9]+ is '[ab]' to its tokenizer and '[ab]' to that of start")


def test_more_tokens_of_the_aligned_model_are_no_fault_and_a_missing_tokenizer_is_a_note(pair: Pair) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|more|>"])
    tokenizer.save_pretrained(pair.aligned)
    output = pair.write(name="more")
    assert "<|more|>" in AutoTokenizer.from_pretrained(output).get_vocab() and not pair.notes and SPECIAL
    for file in pair.start.glob("*token*"):
        file.unlink()
    pair.write(name="none")
    (note,) = pair.notes
    assert note.startswith("the tokens are not compared: ")


def test_damaged_files_are_named(pair: Pair) -> None:
    whole = (pair.start / WEIGHTS).read_bytes()
    (pair.start / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    pair.refused("start/model.safetensors: no safetensors can be read from it")
    (pair.start / WEIGHTS).write_bytes(whole)
    (pair.start / "config.json").write_text("[1]")
    pair.refused("start/config.json: expected a JSON object, got list")
    (pair.start / "config.json").write_text("{")
    pair.refused("start/config.json: no JSON can be read from it")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "expected a weight_map"),
        (
            {"weight_map": {"model.norm.weight": "../aligned/model.safetensors"}},
            "expected names of files in the folder",
        ),
        ({"weight_map": {"model.norm.weight": WEIGHTS}}, "its tensors are not those that .*index.json says, such as"),
        ({"weight_map": {"model.norm.weight": "model-2.safetensors"}}, "model-2.safetensors: no safetensors can be"),
    ],
)
def test_a_wrong_index_is_named(pair: Pair, index: dict[str, Any], message: str) -> None:
    (pair.aligned / INDEX).write_text(json.dumps(index))
    pair.refused(message)


# The command


def test_the_command(pair: Pair) -> None:
    given = ["--start", str(pair.start), "--aligned", str(pair.aligned), "--output", str(pair.folder / "by-command")]
    result = CliRunner().invoke(app, ["extrapolate", *given, "--alpha", "0.3"])
    assert result.exit_code == 0 and result.output == f"model in {pair.folder / 'by-command'}\n"
    ours, theirs = state(pair.folder / "by-command"), state(pair.write(0.3))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    again = CliRunner().invoke(app, ["extrapolate", *given, "--alpha", "-0.5"])
    assert again.exit_code == 2 and again.output.startswith("error: output: ") and "Traceback" not in again.output
