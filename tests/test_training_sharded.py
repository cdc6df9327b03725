"""`logitless train` with a part of the model in each process: FSDP2 and ZeRO-3 through `accelerate launch`."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_training import assert_same_curves
from training_fixtures import (
    completion_rows,
    make_model,
    make_options,
    preference_rows,
    train_in_processes,
    write_jsonl,
)
from transformers import AutoModelForCausalLM

from logitless.training import InputError, TrainOptions, train
from logitless.training.checkpoint import checkpoints
from logitless.training.metrics import read_metrics
from logitless.training.parallel import World
from logitless.training.sharding import strategy_of_launch

RECIPES = Path(__file__).parents[1] / "recipes"
CONFIGS = {"fsdp2": RECIPES / "fsdp2.yaml", "zero3": RECIPES / "zero3.yaml", "ddp": None}
ROWS = 4  # of a step, whatever the number of processes

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the processes of these tests share the CPU")
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="ZeRO-3 needs the deepspeed package"
)
strategies = pytest.mark.parametrize("strategy", ["fsdp2", pytest.param("zero3", marks=needs_deepspeed)])


class Bench:
    """Runs of one tiny model, whose vocabulary of 259 ids no number of processes here divides."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tied = make_model(folder / "tied", vocabulary=259)
        self.untied = make_model(folder / "untied", vocabulary=259, tied=False)
        self.rows = write_jsonl(folder / "rows.jsonl", completion_rows())
        self.pairs = write_jsonl(folder / "pairs.jsonl", preference_rows())
        marked = [{**row, "desirable": i % 2 == 0} for i, row in enumerate(completion_rows(13))]
        self.marked = write_jsonl(folder / "marked.jsonl", marked)

    def options(self, name: str, processes: int, **changes: Any) -> TrainOptions:
        """Options with which a step reads the same rows in any number of processes, in two micro-batches or more."""
        data = {"dpo": self.pairs, "kto": self.marked}.get(changes.get("method", "sft"), self.rows)
        same = {
            "per_device_train_batch_size": 1,
            "per_device_eval_batch_size": 2,
            "gradient_accumulation_steps": ROWS // processes,
            "lora_dropout": 0.0 if changes.get("use_peft") else None,
        }
        return make_options(self.folder / name, self.tied, data, **same | changes)

    def alone(self, name: str = "alone", **changes: Any) -> torch.Tensor:
        """The curve of a run in this process."""
        train(self.options(name, 1, **changes))
        return self.curve(name)

    def together(self, name: str, strategy: str, processes: int = 2, **changes: Any) -> torch.Tensor:
        """The curve of a run in several processes."""
        options = self.options(name, processes, **changes)
        done = train_in_processes(self.folder, options, processes, CONFIGS[strategy])
        assert done.returncode == 0, done.stderr
        named = {"fsdp2": "FSDP2", "zero3": "ZeRO-3", "ddp": "copies"}[strategy]
        assert f"{named} in {processes} processes" in done.stdout
        return self.curve(name)

    def curve(self, name: str) -> torch.Tensor:
        """Every number that a run has recorded of its losses, `[records, numbers]`."""
        records = read_metrics(self.folder / name)
        kept = ("loss", "grad_norm", "eval_loss", "rewards/margins")
        return torch.tensor([[record.get(key, 0.0) for key in kept] for record in records], dtype=torch.float64)

    def assert_same_weights(self, a: str, b: str, **tolerance: float) -> None:
        """The two folders hold the same tensors."""
        files = sorted(path.name for path in (self.folder / a).glob("*.safetensors"))
        assert files == sorted(path.name for path in (self.folder / b).glob("*.safetensors"))
        assert files
        for file in files:
            ours, theirs = load_file(self.folder / a / file), load_file(self.folder / b / file)
            assert ours.keys() == theirs.keys()
            for name, value in ours.items():
                torch.testing.assert_close(value, theirs[name], **tolerance)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


# AdamW moves a weight by about the learning rate, 1e-3, even where its gradient is no more than rounding.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@on_cpu
def test_fsdp2_takes_the_steps_of_one_process(bench: Bench) -> None:
    changes = {"method": "dpo", "max_steps": 3, "gradient_checkpointing": True, "eval_fraction": 0.2}
    alone = bench.alone(**changes)
    together = bench.together("together", "fsdp2", **changes)
    assert_same_curves(alone, together)
    bench.assert_same_weights("alone", "together", **CLOSE)
    whole = json.loads((bench.folder / "alone" / "config.json").read_text())
    assert json.loads((bench.folder / "together" / "config.json").read_text()) == whole
    model = AutoModelForCausalLM.from_pretrained(bench.folder / "together")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


CASES: dict[str, dict[str, Any]] = {
    "sft": {},
    "untied": {"model_name_or_path": "untied"},
    "dft": {"method": "dft", "max_grad_norm": 0.5},
    "dpo": {"method": "dpo"},
    "evaluation": {"eval_fraction": 0.34, "eval_strategy": "steps", "eval_steps": 1},
    "lora": {"use_peft": True},
    "lora dpo": {"use_peft": True, "method": "dpo"},
    "checkpointing": {"gradient_checkpointing": True},
    "stored reference": {"method": "dpo", "precompute_ref_log_probs": True},
    "teacher": {"method": "gkd", "teacher_model_name_or_path": "untied"},
    "materialised": {"backend": "materialised"},
    "bf16": {"bf16": True},
}


@on_cpu
@pytest.mark.slow
@strategies
@pytest.mark.parametrize("case", CASES)
def test_sharded_runs_take_the_steps_of_one_process(bench: Bench, strategy: str, case: str) -> None:
    changes = {name: bench.untied if value == "untied" else value for name, value in CASES[case].items()}
    changes = {"max_steps": 2, **changes}
    alone = bench.alone(**changes)
    if "precompute_ref_log_probs" in changes:
        shutil.rmtree(bench.folder / "cache")  # so that the processes fill it
    assert_same_curves(alone, bench.together("together", strategy, **changes))
    # the sums of a bfloat16 forward pass are the same, so only the order of float32 sums of gradients differs
    bench.assert_same_weights("alone", "together", **CLOSE)


@on_cpu
@pytest.mark.slow
@strategies
def test_estimates_over_a_processs_rows_are_those_of_copies(bench: Bench, strategy: str) -> None:
    # 8 rows to train on, and 5 to evaluate on: three batches, of which the last is a single row
    changes = {"method": "kto", "eval_fraction": 0.39, "max_steps": 2, "per_device_train_batch_size": 2}
    changes["gradient_accumulation_steps"] = 1
    copies = bench.together("copies", "ddp", **changes)
    assert_same_curves(copies, bench.together("together", strategy, **changes))


@on_cpu
@pytest.mark.slow
def test_a_reference_that_follows_is_sharded_too(bench: Bench) -> None:
    changes = {"method": "dpo", "sync_ref_model": True, "ref_model_sync_steps": 1, "max_steps": 4}
    saving = {**changes, "save_strategy": "steps", "save_steps": 2}
    alone = bench.alone(**changes)
    assert_same_curves(alone, bench.together("together", "fsdp2", **saving))
    shutil.rmtree(bench.folder / "together" / "checkpoint-4")
    assert_same_curves(alone, bench.together("together", "fsdp2", resume=True, **saving))


@on_cpu
@pytest.mark.slow
def test_an_adapter_is_trained_on_and_compared_with_as_it_was_given(bench: Bench) -> None:
    bench.alone("adapter", use_peft=True)
    changes = {"model_name_or_path": str(bench.folder / "adapter"), "use_peft": True, "method": "dpo", "max_steps": 3}
    assert_same_curves(bench.alone(**changes), bench.together("together", "fsdp2", **changes))
    bench.assert_same_weights("alone", "together", **CLOSE)


@on_cpu
@pytest.mark.slow
@pytest.mark.parametrize("use_peft", [False, True])
def test_four_processes_take_the_steps_of_one(bench: Bench, use_peft: bool) -> None:
    changes = {"max_steps": 2, "eval_fraction": 0.2, "use_peft": use_peft}
    assert_same_curves(bench.alone(**changes), bench.together("together", "fsdp2", 4, **changes))


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints

#: Who wrote the checkpoint and who goes on from it, with how many processes.
HANDOVERS = {
    "fsdp2, 2 to 1": (("fsdp2", 2), ("alone", 1)),
    "1 to fsdp2, 2": (("alone", 1), ("fsdp2", 2)),
    "ddp to fsdp2": (("ddp", 2), ("fsdp2", 2)),
    "fsdp2 to ddp": (("fsdp2", 2), ("ddp", 2)),
    "fsdp2, 2 to 4": (("fsdp2", 2), ("fsdp2", 4)),
    "ddp, 2 to 4": (("ddp", 2), ("ddp", 4)),
    "zero3 to fsdp2": (("zero3", 2), ("fsdp2", 2)),
    "1 to zero3": (("alone", 1), ("zero3", 2)),
}


@on_cpu
@pytest.mark.slow
@pytest.mark.parametrize(
    "handover",
    [pytest.param(name, marks=needs_deepspeed if "zero3" in name else ()) for name in HANDOVERS],
)
def test_any_number_of_processes_goes_on_from_a_checkpoint(bench: Bench, handover: str) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "method": "dpo", "max_steps": 4}

    def run(who: tuple[str, int], **changes: Any) -> torch.Tensor:
        strategy, processes = who
        if strategy == "alone":
            return bench.alone("parts", **saving, **changes)
        return bench.together("parts", strategy, processes, **saving, **changes)

    first, second = HANDOVERS[handover]
    whole = bench.alone("whole", **saving)
    run(first)
    shutil.rmtree(bench.folder / "parts" / "checkpoint-4")
    assert_same_curves(whole, run(second, resume=True))
    bench.assert_same_weights("whole", "parts", **CLOSE)


@on_cpu
@pytest.mark.slow
@strategies
def test_resuming_with_as_many_processes_is_exact(bench: Bench, strategy: str) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "use_peft": True}
    whole = bench.together("whole", strategy, **saving)
    shutil.copytree(bench.folder / "whole", bench.folder / "parts")
    shutil.rmtree(bench.folder / "parts" / "checkpoint-4")
    parts = bench.together("parts", strategy, resume=True, **saving)
    assert torch.equal(whole, parts)
    bench.assert_same_weights("whole", "parts", rtol=0, atol=0)


KILLED = """
import os, signal
from logitless.training import trainer
take_step = trainer.take_step
def killed(run, step):
    if step == 3 and run.world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return take_step(run, step)
trainer.take_step = killed
"""


@on_cpu
@pytest.mark.slow
@strategies
def test_a_killed_run_goes_on_as_if_it_had_not_been(bench: Bench, strategy: str) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5, "method": "dpo"}
    whole = bench.together("whole", strategy, **saving)
    done = train_in_processes(bench.folder, bench.options("parts", 2, **saving), 2, CONFIGS[strategy], KILLED)
    assert done.returncode != 0
    assert [path.name for path in checkpoints(bench.folder / "parts")] == ["checkpoint-2"]
    assert torch.equal(whole, bench.together("parts", strategy, resume=True, **saving))
    bench.assert_same_weights("whole", "parts", rtol=0, atol=0)


def test_a_step_may_be_split_otherwise_after_resuming(bench: Bench) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = bench.alone("whole", **saving)
    shutil.copytree(bench.folder / "whole", bench.folder / "parts")
    shutil.rmtree(bench.folder / "parts" / "checkpoint-4")
    other = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert_same_curves(whole, bench.alone("parts", resume=True, **saving, **other))
    with pytest.raises(InputError, match="per_device_train_batch_size was 2 and is 3"):
        bench.alone("parts", resume=True, **saving, **{**other, "per_device_train_batch_size": 3})


def test_values_kept_for_the_rows_of_a_process_keep_the_split(bench: Bench) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "method": "psft"}
    bench.alone("parts", **saving)
    other = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2}
    with pytest.raises(InputError, match="gradient_accumulation_steps was 4 and is 2"):
        bench.alone("parts", resume=True, **{**saving, **other})


# ---------------------------------------------------------------------------------------------------------------------
# What is not served


def test_processes_read_equally_many_batches() -> None:
    batches = list("abcdefg")
    shares = [World(rank, 3, torch.device("cpu")).share(batches) for rank in range(3)]
    assert [len(share) for share in shares] == [3, 3, 3]
    counted = [batch for share in shares for batch, counts in share if counts]
    assert sorted(counted) == batches


REFUSED = {
    # what the launcher adds for FSDP1: Accelerate's plugin wants a GPU for it
    "fsdp_version: 1": {"FSDP_VERSION": "1", "FSDP_SYNC_MODULE_STATES": "true"},
    "fsdp_offload_params": {"FSDP_OFFLOAD_PARAMS": "true"},
    "fsdp_activation_checkpointing": {"FSDP_ACTIVATION_CHECKPOINTING": "true"},
    "fsdp_ignored_modules": {"FSDP_IGNORED_MODULES": "model.norm"},
    "parallelism_config": {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"},
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_ways_of_sharding_are_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for variable, value in ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} | REFUSED[name]).items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(InputError, match=f"accelerate's configuration: .*{name}"):
        strategy_of_launch(use_cpu=True)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="deepspeed is installed")
def test_a_missing_deepspeed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(InputError, match="asks for ZeRO-3: DeepSpeed is not installed"):
        strategy_of_launch(use_cpu=False)


@pytest.mark.parametrize(("asked", "bf16"), [("bf16", False), ("fp16", None), ("fp8", True)])
def test_the_launchers_precision_is_that_of_the_options(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, asked: str, bf16: bool | None
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    with pytest.raises(InputError, match=f"mixed_precision is {asked}"):
        bench.alone(bf16=bf16)


DEEPSPEED_REFUSED = {
    "zero_stage: 2": {"zero_stage": 2},
    "offload_optimizer": {"offload_optimizer_device": "cpu"},
    "gradient_clipping is 0.5": {"gradient_clipping": 0.5},
    "gradient_accumulation_steps is 8": {"gradient_accumulation_steps": 8},
}


@on_cpu
@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("name", DEEPSPEED_REFUSED)
def test_what_deepspeed_would_do_otherwise_is_refused_by_name(bench: Bench, name: str) -> None:
    import yaml

    config = yaml.safe_load(CONFIGS["zero3"].read_text())
    config["deepspeed_config"] |= DEEPSPEED_REFUSED[name]
    file = bench.folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    done = train_in_processes(bench.folder, bench.options("refused", 2), 2, file)
    assert done.returncode != 0
    assert f"DeepSpeed's configuration: {name}" in done.stderr
