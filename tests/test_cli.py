"""The command line: flags and YAML are `TrainOptions`, errors are one line, and the output suits where it goes."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from training_fixtures import completion_rows, make_model, preference_rows, write_jsonl
from typer.testing import CliRunner

import logitless
from logitless import losses
from logitless.cli import app
from logitless.training import InputError, TrainOptions
from logitless.training.config import options_from_mapping, read_yaml
from logitless.training.metrics import read_metrics
from logitless.training.other_names import ALIASES, INERT_KEYS, LOSS_SETTINGS, UNSUPPORTED_KEYS

TRL_YAML = """
# what a TRL user has lying around
model_name_or_path: {model}
torch_dtype: float32
dataset_name: {data}
learning_rate: 2e-4
num_train_epochs: 1
packing: true
max_length: 64
per_device_train_batch_size: 1
gradient_accumulation_steps: 2
gradient_checkpointing: true
gradient_checkpointing_kwargs:
  use_reentrant: false
eval_strategy: no
logging_steps: 1
loss_type: dft
lr_scheduler_type: cosine
warmup_ratio: 0.1
use_peft: true
lora_r: 4
lora_alpha: 8
lora_target_modules: [q_proj, v_proj]
lora_task_type: CAUSAL_LM
dataset_num_proc: 4
push_to_hub: false
report_to: none
output_dir: {output}
seed: 1
"""


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))  # type: ignore[return-value]


def text(result: Result) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", result.output)


@pytest.fixture
def small(tmp_path: Path) -> dict[str, str]:
    """Flags of a run that takes a moment."""
    return {
        "model_name_or_path": make_model(tmp_path / "model"),
        "dataset_name": write_jsonl(tmp_path / "rows.jsonl", completion_rows()),
        "output_dir": str(tmp_path / "run"),
        "max_steps": "2",
        "logging_steps": "1",
        "save_strategy": "no",
    }


def flags(values: dict[str, str]) -> list[str]:
    return [part for name, value in values.items() for part in (f"--{name}", value)]


# Options


def test_every_option_is_a_flag_and_nothing_else_is() -> None:
    shown = set(re.findall(r"--([a-z][a-z0-9_]*)", text(CliRunner().invoke(app, ["train", "--help"], env=WIDE))))
    names = {spec.name for spec in dataclasses.fields(TrainOptions)}
    assert names <= shown
    assert shown - names - {"config", "help", "seeds"} <= {f"no_{name}" for name in names}
    assert not names & {*ALIASES, *INERT_KEYS, *UNSUPPORTED_KEYS, *LOSS_SETTINGS}


WIDE = {"COLUMNS": "300", "TERMINAL_WIDTH": "300"}


def documented(spec: dataclasses.Field[Any]) -> str:
    """The option's row in the documentation."""
    default = (
        ""
        if spec.default in (None, "")
        else f"`{str(spec.default).lower() if spec.default in (True, False) else spec.default}`"
    )
    choices = f" One of {', '.join(spec.metadata['choices'])}." if spec.metadata["choices"] else ""
    return f"| `{spec.name}` | {default} | {spec.metadata['help']}{choices} |"


def test_every_option_is_documented() -> None:
    lines = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8").splitlines()
    missing = [row for row in map(documented, dataclasses.fields(TrainOptions)) if row not in lines]
    assert not missing, "\n".join(missing)
    for name in (*ALIASES, *INERT_KEYS, *UNSUPPORTED_KEYS, *LOSS_SETTINGS):
        assert any(f"`{name}`" in line for line in lines), name


def test_flags_are_the_options(small: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[TrainOptions] = []
    monkeypatch.setattr("logitless.training.train", seen.append)
    result = run("train", *flags(small), "--learning-rate", "1e-4", "--use_peft", "--no-packing", "--beta=0.3")
    assert result.exit_code == 0, result.output
    (options,) = seen
    assert options.learning_rate == 1e-4 and options.use_peft and not options.packing and options.beta == 0.3
    assert options.max_steps == 2 and options.model_name_or_path == small["model_name_or_path"]


def test_a_trl_file_runs_unchanged(tmp_path: Path, small: dict[str, str]) -> None:
    pytest.importorskip("peft")
    file = tmp_path / "trl.yaml"
    output = tmp_path / "from-yaml"
    content = TRL_YAML.format(model=small["model_name_or_path"], data=small["dataset_name"], output=output)
    file.write_text(content)
    result = run("train", "--config", str(file), "--max_steps", "2")
    assert result.exit_code == 0, result.output
    records = read_metrics(output)
    assert [record["step"] for record in records] == [1, 2]
    assert records[0]["learning_rate"] == 0 and records[1]["learning_rate"] == pytest.approx(2e-4)
    assert "dataset_num_proc changes nothing here: rows are tokenised in one process" in result.output


@pytest.mark.parametrize("name", ["SFTConfig", "DPOConfig", "KTOConfig"])
@pytest.mark.parametrize("saved", [True, False])
def test_a_whole_configuration_of_trl_is_read(tmp_path: Path, name: str, saved: bool) -> None:
    trl = pytest.importorskip("trl")
    cls = getattr(trl, name)
    if saved:
        values = json.loads(cls(output_dir=str(tmp_path), bf16=False, use_cpu=True, seed=7).to_json_string())
    else:
        given = [trl.ModelConfig, trl.ScriptArguments, cls]
        values = {s.name: s.default for each in given for s in dataclasses.fields(each)}
        values = {key: None if value is dataclasses.MISSING else value for key, value in values.items()}
        values |= {"output_dir": str(tmp_path), "seed": 7}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(values))
    options, notes = options_from_mapping(read_yaml(tmp_path / "a.yaml"), "a.yaml")
    assert options.seed == 7 and options.output_dir == str(tmp_path) and options.report_to == "none"
    assert options.max_length == 1024 and options.attn_implementation == "auto"
    assert len(notes) == len({note.split("here: ")[1] for note in notes})


def test_keys_of_older_releases_are_read_at_their_defaults() -> None:
    values = {"fp16_opt_level": "O1", "half_precision_backend": "auto", "past_index": -1, "adafactor": False}
    values |= {"fsdp": [], "fsdp_config": {"min_num_params": 0, "xla": False}, "per_gpu_train_batch_size": None}
    values |= {"evaluation_strategy": "no", "no_cuda": True, "max_seq_length": 64, "save_safetensors": True}
    options, _ = options_from_mapping(values, "a.yaml")
    assert (options.eval_strategy, options.use_cpu, options.max_length) == ("no", True, 64)
    with pytest.raises(InputError, match="adafactor can only be false, got True"):
        options_from_mapping({"adafactor": True}, "a.yaml")


def test_a_note_names_the_keys_of_one_reason_together() -> None:
    values = {"hub_model_id": "a/b", "hub_strategy": "end", "hub_token": None, "run_name": "x"}
    assert options_from_mapping(values, "a.yaml")[1] == [
        "a.yaml: hub_model_id, hub_strategy change nothing here: nothing is pushed to the hub",
        "a.yaml: run_name changes nothing here: runs are named by their output_dir",
    ]


def test_flags_win_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[TrainOptions] = []
    monkeypatch.setattr("logitless.training.train", seen.append)
    file = tmp_path / "a.yaml"
    file.write_text("seed: 3\nmax_length: 99\ntorch_dtype: bfloat16\nloss: {name: dpo, beta: 5e-1}\n")
    assert run("train", "-c", str(file), "--seed", "4", "--dtype", "float16").exit_code == 0
    (options,) = seen
    assert (options.seed, options.max_length, options.dtype) == (4, 99, "float16")
    assert options.make_loss() == losses.DPO(beta=0.5)


@pytest.mark.parametrize(
    ("values", "loss"),
    [
        ({"method": "sft"}, losses.NLL()),
        ({"method": "sft", "loss_type": ["dft"]}, losses.DFT()),
        ({"method": "dft", "loss_type": "dft"}, losses.DFT()),
        ({"method": "dft", "loss": "{power: 0.5}"}, losses.DFT(power=0.5)),
        ({"method": "f-divergence", "divergence": "js", "beta": "0.5"}, losses.FDivergenceSFT("js", beta=0.5)),
        ({"method": "f-divergence", "loss": {"value": "lse"}}, losses.FDivergenceSFT(value="lse")),
        ({"method": "dpo", "loss_type": "ipo", "beta": 1}, losses.DPO(loss_type="ipo", beta=1)),
        ({"method": "dpo", "f_divergence_type": "js_divergence"}, losses.DPO(divergence="js")),
        ({"method": "dpo", "loss": {"beta": 0.7}, "beta": 0.2}, losses.DPO(beta=0.2)),
        ({"method": "nll", "label_smoothing": 0.1}, losses.NLL(label_smoothing=0.1)),
        ({"loss": "dft"}, losses.DFT()),
        (
            {"method": "kto", "desirable_weight": "1.3", "loss": {"undesirable_weight": 2.0}},
            losses.KTO(desirable_weight=1.3, undesirable_weight=2.0),
        ),
        ({"method": "dpo", "ld_alpha": 0.3, "use_weighting": True}, losses.DPO(tail_weight=0.3, use_weighting=True)),
        (
            {"method": "dpo", "loss_type": ["discopop"], "discopop_tau": 0.1},
            losses.DPO(loss_type="discopop", discopop_tau=0.1),
        ),
        (
            {"method": "dpo", "use_weighting": "true", "ld_alpha": "3e-1"},
            losses.DPO(tail_weight=0.3, use_weighting=True),
        ),
        ({"method": "dft", "use_weighting": "false", "discopop_tau": "0.05"}, losses.DFT()),
        ({"method": "simpo", "use_weighting": False, "discopop_tau": 0.05, "ld_alpha": None}, losses.SimPO()),
    ],
)
def test_loss_of_the_options(values: dict[str, Any], loss: losses.Loss) -> None:
    assert options_from_mapping(values, "test")[0].make_loss() == loss


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rte": 1}, r"unknown option 'learning_rte' \(nearest: learning_rate"),
        ({"method": "dpoo"}, r"method must be one of sft, .* \(nearest: dpo"),
        ({"dtype": "float8"}, "dtype must be one of auto, float32"),
        ({"seed": "many"}, "seed must be a int, got 'many'"),
        ({"seed": 1.5}, "seed must be a int, got 1.5"),
        ({"packing": "perhaps"}, "packing must be a bool, got 'perhaps'"),
        ({"learning_rate": -1}, "learning_rate must be at least 0, got -1.0"),
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1, got 0"),
        ({"eval_fraction": 1.0}, r"eval_fraction must be in \[0, 1\), got 1.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number, got nan"),
        ({"learning_rate": "inf"}, "learning_rate must be a finite number, got 'inf'"),
        ({"seed": 2**32}, "seed must be a number of at most 32 bits"),
        ({"method": "DPO"}, r"\(nearest: dpo"),
        ({"num_train_epochs": 0}, "num_train_epochs must be above 0"),
        ({"warmup_steps": 3, "warmup_ratio": 0.1}, "two names of one setting"),
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, "dtype is given twice with different values"),
        ({"output_dir": None}, "output_dir cannot be empty"),
        ({"lora_target_modules": 3}, "lora_target_modules must be a tuple"),
        ({"loss": 3}, "loss must be a Mapping"),
        ({"push_to_hub": True}, "push_to_hub can only be false, got True"),
        ({"max_length": None}, "max_length cannot be empty"),
        ({"neftune_noise_alpha": 5}, "neftune_noise_alpha can only be left out, got 5"),
        ({"label_smoothing_factor": 0.1}, "can only be 0, got 0.1; label_smoothing is the loss's"),
        ({"deepspeed": "zero3.json"}, "deepspeed can only be left out, got 'zero3.json'; accelerate"),
        ({"eos_token": "<|im_end|>"}, "eos_token can only be left out, got"),
        ({"accelerator_config": {"split_batches": True}}, "accelerator_config can only be left out"),
        ({"activation_checkpointing": True, "gradient_checkpointing": False}, "is given twice"),
    ],
)
def test_bad_options_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        options_from_mapping(values, "a.yaml")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "dpo", "beta": -0.1}, "beta must be a finite number"),
        ({"method": "dpo", "loss_type": "sigmoidd"}, "'sigmoid'"),
        ({"method": "kto", "desirable_weight": "[much"}, r"desirable_weight .*\[much"),
        ({"method": "kto", "ld_alpha": 0.3}, "tail_weight is no setting of the loss 'kto'"),
        ({"method": "dft", "loss_type": "nll"}, r"loss_type is no setting of the loss 'dft'"),
        ({"method": "dft", "beta": 0.1}, r"beta is no setting of the loss 'dft', which has \['power'\]"),
        ({"loss": {"name": "dtf"}}, "did you mean 'dft'"),
        ({"method": "f-divergence", "divergence": "chi"}, "divergence must be one of"),
    ],
)
def test_bad_losses_are_named(values: dict[str, Any], message: str) -> None:
    options, _ = options_from_mapping(values, "a.yaml")
    with pytest.raises(InputError, match=message):
        options.make_loss()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "not valid YAML"),
        ("- a\n", "expected a mapping"),
        ("", "expected a mapping"),
        ("1: 2", "expected a map"),
        ("seed: 1\nmax_steps: 2\nseed: 3\n", r"not valid YAML: seed is given twice\s+in .*line 3"),
        ("loss: {beta: 1, beta: 2}", "beta is given twice"),
        ("? [a, b]\n: 1", "not valid YAML"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(content)
    with pytest.raises(InputError, match=message):
        read_yaml(file)
    with pytest.raises(InputError, match="config file not found"):
        read_yaml(tmp_path / "none.yaml")


def test_options_survive_a_round_trip() -> None:
    options = TrainOptions(method="dpo", loss={"beta": 0.3}, lora_target_modules=("q_proj",), learning_rate=1e-5)
    assert options_from_mapping(options.to_dict(), "state")[0] == options


# Commands


@pytest.mark.parametrize("method", ["sft", "dft", "f-divergence", "dpo"])
def test_train(tmp_path: Path, small: dict[str, str], method: str) -> None:
    data = write_jsonl(tmp_path / "pairs.jsonl", preference_rows()) if method == "dpo" else small["dataset_name"]
    result = run("train", *flags(small | {"method": method, "dataset_name": data, "eval_fraction": "0.2"}))
    assert result.exit_code == 0, result.output
    assert len(re.findall(r"^step \d+  epoch .*  loss .*  peak_memory \d+ MiB$", result.output, re.M)) == 2
    assert re.search(r"^done: 2 steps in .* s, model in .*run$", result.output, re.M)
    assert "eval_loss" in read_metrics(tmp_path / "run")[-1]


def test_errors_are_one_line_and_a_status(tmp_path: Path, small: dict[str, str]) -> None:
    for change, message in [
        ({"dataset_name": str(tmp_path / "none.jsonl")}, "error: data file not found: "),
        ({"method": "spo"}, "error: method must be one of"),
        ({"model_name_or_path": str(tmp_path)}, "error: "),
    ]:
        result = run("train", *flags(small | change))
        assert result.exit_code == 2 and message in result.output and "Traceback" not in result.output
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    result = run("train", *flags(small | {"dataset_name": str(bad)}))
    assert result.exit_code == 2 and f"error: {bad}, line 2: expected messages" in result.output
    result = run("train", *flags(small | {"learning_rate": "1e30", "lr_scheduler_type": "constant"}))
    assert result.exit_code == 1 and "error: step 2: the " in result.output
    assert "--model_name_or_path is required" in run("train").output
    assert run("train", "--learning_rte", "1").exit_code == 2


def test_info_says_what_was_found() -> None:
    result = run("info")
    assert result.exit_code == 0
    for name, value in logitless.info().items():
        assert re.search(rf"^{re.escape(name)} +{re.escape(value)}$", result.output, re.M)


@pytest.mark.parametrize("name", losses.names())
def test_losses_lists_them(name: str) -> None:
    loss = losses.get(name)
    (line,) = [line for line in text(run("losses")).splitlines() if line.split()[0] == name]
    shown = line.removeprefix(name).split(maxsplit=1)
    assert shown[0] == loss.level and all(each in line for each in (*loss.inputs, *loss.optional_inputs))
    assert line.endswith(".") and shown[1].rstrip(".")
    whole = text(run("losses", name))
    assert repr(loss) in whole and inspect.cleandoc(type(loss).__doc__ or "") in whole


def test_an_unknown_loss_is_named() -> None:
    result = run("losses", "dtf")
    assert result.exit_code == 2 and "error: no loss is named 'dtf' (did you mean 'dft'" in result.output


def test_version() -> None:
    assert run("--version").output == f"logitless {logitless.info()['logitless']}\n"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--learning_rte", "1"], "unknown option --learning_rte (nearest: --learning_rate, --critic_learning_rate)"),
        (["--learning-rte=1"], "unknown option --learning_rte (nearest: --learning_rate, --critic_learning_rate)"),
        (["--model", "x"], "unknown option --model (nearest: --model_revision, --model_name_or_path, "),
        (["--dataset", "x"], "unknown option --dataset (nearest: --dataset_name, "),
        (
            ["--batch_size", "3"],
            "(nearest: --per_device_eval_batch_size, --per_device_train_batch_size, --per_device_generation",
        ),
        (["--epochs", "3"], "(nearest: --num_train_epochs)"),
        (["--lr", "1"], "unknown option --lr (nearest: --lr_scheduler_type, --lora_r, --learning_rate)"),
        (["--confg", "a.yaml"], "(nearest: --config"),
        (["--zzz"], "error: command line: unknown option --zzz\n"),
        (["rows.jsonl"], "expected an option (--name), got 'rows.jsonl'"),
        (["--lora_target_modules", "q_proj", "v_proj"], "expected an option (--name), got 'v_proj'"),
        (["--torch_dtype", "float8"], "error: dtype must be one of auto, float32"),
        (["--torch_dtype", "float32", "--dtype", "bfloat16"], "dtype is given twice with different values"),
        (["--fp16"], "fp16 can only be false, got 'true'"),
    ],
)
def test_unknown_flags_name_the_nearest(given: list[str], message: str) -> None:
    result = run("train", *given)
    assert result.exit_code == 2 and message in result.output


def test_names_of_other_tools_are_flags_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[TrainOptions] = []
    monkeypatch.setattr("logitless.training.train", seen.append)
    file = tmp_path / "a.yaml"
    file.write_text("dtype: float16\ndivergence: js\n")
    given = ["--torch-dtype=bfloat16", "--f_divergence_type", "alpha", "--fp16", "false", "--logging_first_step"]
    result = run("train", "--config", str(file), *given, "--seed", "-1")
    assert result.exit_code == 0 and "logging_first_step changes nothing here" in result.output
    (options,) = seen
    assert (options.dtype, options.divergence, options.seed) == ("bfloat16", "alpha", -1)


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, small: dict[str, str]) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = run("train", *flags(small))
    assert result.exit_code == 1
    assert "error: the package transformers is missing: pip install 'logitless[train]'" in result.output


@pytest.mark.parametrize("word", ["true", "True", "1", "false", "False", "no"])
@pytest.mark.parametrize("form", ["--{}={}", "--{} {}"])
def test_switches_take_a_value_too(monkeypatch: pytest.MonkeyPatch, form: str, word: str) -> None:
    seen: list[TrainOptions] = []
    monkeypatch.setattr("logitless.training.train", seen.append)
    names = ("bf16", "use_peft", "gradient-checkpointing", "completion_only_loss")
    given = [part for name in names for part in form.format(name, word).split()]
    result = run("train", *given, "--seed", "1", "--column_map=bf16=false")
    assert result.exit_code == 0, result.output
    (options,) = seen
    held = (options.bf16, options.use_peft, options.gradient_checkpointing, options.completion_only_loss)
    assert held == (word in ("true", "True", "1"),) * 4
    assert options.seed == 1 and options.column_map == {"bf16": "false"}


def test_a_switch_takes_no_other_value() -> None:
    result = run("train", "--packing", "perhaps")
    assert result.exit_code == 2 and "expected an option (--name), got 'perhaps'" in result.output


def test_an_output_folder_that_cannot_be_made_is_named(small: dict[str, str]) -> None:
    result = run("train", *flags(small | {"output_dir": small["dataset_name"]}))
    assert result.exit_code == 2 and f"output_dir: nothing can be written into {small['dataset_name']}" in result.output


def test_teach_refuses_the_options_of_training(tmp_path: Path) -> None:
    result = run("teach", "--output", str(tmp_path / "a.jsonl"), "--learning_rate", "1")
    assert result.exit_code == 2 and "--learning_rate is an option of train, and of no use to this" in result.output


@pytest.mark.parametrize("given", [["trian"], ["info", "more"], ["--versoin"], ["losses", "dft", "nll"]])
def test_unknown_commands_are_errors(given: list[str]) -> None:
    result = run(*given)
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert given != ["trian"] or "Did you mean 'train'" in text(result)


def test_python_m_logitless() -> None:
    shown = subprocess.run([sys.executable, "-m", "logitless", "--help"], capture_output=True, text=True, check=True)
    assert all(name in shown.stdout for name in ("train", "teach", "info", "losses", "--version"))
