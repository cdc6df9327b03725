"""Checkpoints: a resumed run goes on bit for bit, whatever killed the first one and whenever."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_fixtures import (
    CHATML,
    completion_rows,
    make_model,
    make_options,
    make_tokenizer,
    preference_rows,
    write_jsonl,
)
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import chat_template_utils

from logitless.training import InputError, TrainOptions, resume, train, trainer
from logitless.training.checkpoint import STATE, checkpoints
from logitless.training.files import clean, new_folder, write_json
from logitless.training.metrics import read_metrics
from logitless.training.run import Run
from logitless.training.template_date import with_date

TIMES = ("tokens_per_second", "peak_memory", "eval_runtime")


class Killed(Exception):
    """Stands for a process that ends between two steps."""


class Runs:
    """Runs of one model and dataset; dropout makes them depend on the random state."""

    def __init__(self, folder: Path, method: str) -> None:
        self.folder, self.method = folder, method
        self.model = make_model(folder / "model", dropout=0.1)
        columns = [{"desirable": i % 2 == 0, "group": i // 3, "negative": i % 3 > 0} for i in range(12)]
        answers = [row | own for row, own in zip(completion_rows(), columns, strict=True)]
        rows = preference_rows() if method == "dpo" else answers
        self.data = write_jsonl(folder / "rows.jsonl", rows)

    def options(self, name: str, **changes: Any) -> TrainOptions:
        same = {
            "method": self.method,
            "max_steps": 6,
            "save_strategy": "steps",
            "save_steps": 2,
            "gradient_accumulation_steps": 2,
            "disable_dropout": False,
            "logging_steps": 3,  # the window is open when a checkpoint is written
        }
        return make_options(self.folder / name, self.model, self.data, **same | changes)

    def interrupted(self, name: str, monkeypatch: pytest.MonkeyPatch, after: int, **changes: Any) -> None:
        """A run that ends after so many steps."""
        take_step = trainer.take_step

        def limited(run: Run, number: int) -> Any:
            if number == after:
                raise Killed
            return take_step(run, number)

        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(trainer, "take_step", limited)
            train(self.options(name, **changes))

    def assert_same(self, a: str, b: str) -> None:
        """Every logged number but times, and every weight, to the last bit."""
        first, second = (untimed(self.folder / name) for name in (a, b))
        assert first == second
        weights = list((self.folder / a).glob("*.safetensors"))
        assert weights
        for file in weights:
            ours, theirs = load_file(file), load_file(self.folder / b / file.name)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def untimed(folder: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key not in TIMES} for record in read_metrics(folder)]


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("sft", {}),
        ("sft", {"use_peft": True, "lora_dropout": 0.2}),
        ("sft", {"packing": True, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 1}),
        ("dft", {"optim": "adamw_torch_fused", "lr_scheduler_type": "cosine", "warmup_steps": 0.5}),
        ("dpo", {}),
        ("dpo", {"precompute_ref_log_probs": True}),
        ("psft", {"old_policy_steps": 4}),  # a checkpoint stands between two renewals
        ("kto", {}),
        ("bco", {}),
        ("discriminative_sft", {"per_device_train_batch_size": 1, "learning_rate": 1e-5}),
        ("dpo", {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.3}),
    ],
)
def test_resuming_is_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, changes: dict[str, Any]
) -> None:
    runs = Runs(tmp_path, method)
    train(runs.options("whole", **changes))
    runs.interrupted("parts", monkeypatch, 3, **changes)
    assert [path.name for path in checkpoints(tmp_path / "parts")] == ["checkpoint-2"]
    runs.interrupted("parts", monkeypatch, 5, resume=True, **changes)
    train(runs.options("parts", resume=True, **changes))
    runs.assert_same("whole", "parts")


def test_a_checkpoint_is_a_model_folder_without_pickles(tmp_path: Path) -> None:
    runs = Runs(tmp_path, "sft")
    train(runs.options("run", save_total_limit=2))
    found = checkpoints(tmp_path / "run")
    assert [path.name for path in found] == ["checkpoint-4", "checkpoint-6"]
    names = {path.name for path in found[-1].iterdir()}
    assert {"model.safetensors", "config.json", "optimizer.safetensors", "rng_state.safetensors", STATE} <= names
    assert {Path(name).suffix for name in names} <= {".safetensors", ".json", ".jinja", ".txt"}
    loaded, final = (AutoModelForCausalLM.from_pretrained(path) for path in (found[-1], tmp_path / "run"))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), final.parameters(), strict=True))


def test_saving_once_per_epoch(tmp_path: Path) -> None:
    runs = Runs(tmp_path, "sft")
    train(runs.options("run", save_strategy="epoch", max_steps=-1, num_train_epochs=2))
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-3", "checkpoint-6"]


def test_resume_from_a_named_checkpoint(tmp_path: Path) -> None:
    runs = Runs(tmp_path, "sft")
    train(runs.options("whole"))
    train(runs.options("parts"))
    train(runs.options("parts", resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2")))
    runs.assert_same("whole", "parts")


def test_resume_without_a_checkpoint_begins(tmp_path: Path) -> None:
    runs = Runs(tmp_path, "sft")
    train(runs.options("whole"))
    train(runs.options("parts", resume=True))
    runs.assert_same("whole", "parts")


def test_an_older_run_is_not_overwritten(tmp_path: Path) -> None:
    runs = Runs(tmp_path, "sft")
    train(runs.options("run"))
    with pytest.raises(InputError, match="already holds checkpoint-6: continue it with --resume, or choose another"):
        train(runs.options("run"))


def test_what_may_not_change_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(tmp_path, "sft")
    runs.interrupted("run", monkeypatch, 3)
    with pytest.raises(InputError, match=r"cannot be continued.*: seed was 42 and is 7"):
        train(runs.options("run", resume=True, seed=7))
    write_jsonl(tmp_path / "rows.jsonl", completion_rows(11))
    with pytest.raises(InputError, match=r"data was '\w+' and is"):
        train(runs.options("run", resume=True))
    with pytest.raises(InputError, match=r"not a complete checkpoint, it has no trainer_state\.json"):
        train(runs.options("run", resume_from_checkpoint=str(tmp_path / "model")))


@pytest.mark.parametrize(
    ("method", "changes", "refused"),
    [("sft", {"use_peft": True}, True), ("dpo", {}, True), ("sft", {}, False)],
)
def test_another_model_under_an_adapter_or_as_the_reference_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, changes: dict[str, Any], refused: bool
) -> None:
    """A moved folder is the same model; a full fine-tune reads its own weights alone."""
    runs = Runs(tmp_path, method)
    runs.interrupted("run", monkeypatch, 3, **changes)
    runs.model = str(Path(runs.model).rename(tmp_path / "moved"))
    runs.interrupted("run", monkeypatch, 5, resume=True, **changes)
    model = AutoModelForCausalLM.from_pretrained(runs.model)
    model.model.layers[0].mlp.up_proj.weight.data.mul_(1.5)
    model.save_pretrained(runs.model)
    if refused:
        with pytest.raises(InputError, match="moved has other weights than the model that the run started from"):
            train(runs.options("run", resume=True, **changes))
    else:
        assert train(runs.options("run", resume=True, **changes)).step == 6


@pytest.mark.parametrize("use_peft", [False, True])
@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_parameters"])
def test_other_settings_of_the_model_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, use_peft: bool
) -> None:
    """Other settings make another reference, and another model under an adapter, of the same weights."""
    runs = Runs(tmp_path, "dpo")
    runs.interrupted("run", monkeypatch, 3, use_peft=use_peft)
    edit_config(runs.model, use_cache=False)
    runs.interrupted("run", monkeypatch, 4, resume=True, use_peft=use_peft)
    edit_config(runs.model, **{key: {"rms_norm_eps": 0.1, "rope_parameters": {"rope_theta": 500.0}}[key]})
    with pytest.raises(
        InputError, match=r"model has other settings \(config\.json\) than the model that the run started"
    ):
        train(runs.options("run", resume=True, use_peft=use_peft))


def edit_config(folder: str, **values: Any) -> None:
    file = Path(folder) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("part", ["weights", "settings"])
def test_another_teacher_at_the_same_place_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    runs, teacher = Runs(tmp_path, "distillation"), make_model(tmp_path / "teacher")
    runs.interrupted("run", monkeypatch, 3, teacher_model_name_or_path=teacher)
    if part == "settings":
        edit_config(teacher, rms_norm_eps=0.1)
    else:
        model = AutoModelForCausalLM.from_pretrained(teacher)
        model.model.norm.weight.data.mul_(1.5)
        model.save_pretrained(teacher)
    with pytest.raises(InputError, match=f"teacher has other {part}.* than the teacher of the run"):
        train(runs.options("run", resume=True, teacher_model_name_or_path=teacher))


def test_a_checkpoint_beyond_the_end_of_the_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result would be called the model of an earlier step than its weights are of."""
    runs = Runs(tmp_path, "sft")
    runs.interrupted("run", monkeypatch, 5)
    with pytest.raises(InputError, match=r"checkpoint-4 is at step 4, and the run ends at step 3"):
        train(runs.options("run", resume=True, max_steps=3))


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_the_precision_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtypes: tuple[str, str]) -> None:
    runs = Runs(tmp_path, "sft")
    runs.interrupted("run", monkeypatch, 3, dtype=dtypes[0])
    assert train(runs.options("run", resume=True, dtype=dtypes[1])).step == 6
    saved = load_file(tmp_path / "run" / "checkpoint-6" / "optimizer.safetensors")
    moments = {str(tensor.dtype) for name, tensor in saved.items() if name.startswith("exp_avg.")}
    assert moments == {f"torch.{dtypes[1]}"}


@pytest.mark.parametrize("name", [STATE, "optimizer.safetensors", "rng_state.safetensors", "rng_state.json"])
@pytest.mark.parametrize("left", [0, 40])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, left: int) -> None:
    runs = Runs(tmp_path, "sft")
    runs.interrupted("run", monkeypatch, 3)
    file = tmp_path / "run" / "checkpoint-2" / name
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(InputError, match=f"checkpoint-2/{name}: the checkpoint is damaged: .*delete its folder"):
        train(runs.options("run", resume=True))


def test_a_checkpoint_with_weights_that_are_not_finite_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Runs(tmp_path, "sft")
    runs.interrupted("run", monkeypatch, 3)
    file = tmp_path / "run" / "checkpoint-2" / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"checkpoint-2: the weight model\.norm\.weight has values that are not"):
        train(runs.options("run", resume=True))


@pytest.mark.parametrize("content", ["{}", "[]", '{"step": 2}'])
def test_a_state_without_its_entries_is_a_damaged_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    runs = Runs(tmp_path, "sft")
    runs.interrupted("run", monkeypatch, 3)
    (tmp_path / "run" / "checkpoint-2" / STATE).write_text(content)
    with pytest.raises(InputError, match="the checkpoint is damaged: it lacks entries"):
        train(runs.options("run", resume=True))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"truncation_mode": "keep_end"}, "truncation_mode was 'keep_start' and is 'keep_end'"),
        ({"completion_only_loss": False}, "completion_only_loss was None and is False"),
        ({"max_length": 30}, r"max_length was 40 and is 30; data was '\w+' and is '\w+'$"),
        ("template", "the chat template is another"),
        ("rows", "no option says why, so the rows of dataset_name are$"),
    ],
)
def test_why_the_tokens_are_others_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: Any, reason: str
) -> None:
    runs = Runs(tmp_path, "sft")
    rows = [
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!" * 5 * i}]}
        for i in range(1, 9)
    ]
    runs.data = write_jsonl(tmp_path / "rows.jsonl", rows)
    runs.interrupted("run", monkeypatch, 3, max_length=40)
    if changes == "template":
        make_tokenizer(CHATML.replace("assistant", "Assistant")).save_pretrained(runs.model)
    if changes == "rows":
        write_jsonl(tmp_path / "rows.jsonl", rows[1:])
    given = {"max_length": 40} | (changes if isinstance(changes, dict) else {})
    with pytest.raises(InputError, match=f"cannot be continued.*{reason}"):
        train(runs.options("run", resume=True, **given))


# ---------------------------------------------------------------------------------------------------------------------
# A template that writes the date

DATED = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}\n{% endif %}" + CHATML


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A clock in place of Transformers' and the runs', with a `day` to set."""

    class Clock(datetime):
        day = 1

        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(2026, 5, cls.day)

    for module in (chat_template_utils, resume):
        monkeypatch.setattr(module, "datetime", Clock)
    return Clock


def test_a_run_keeps_the_date_of_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Any) -> None:
    runs = Runs(tmp_path, "sft")
    rows = [{"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]}
            for i in range(6)]  # fmt: skip
    runs.data = write_jsonl(tmp_path / "rows.jsonl", rows)
    tokenizer = make_tokenizer(DATED)
    tokenizer.save_pretrained(runs.model)
    day = [tokenizer.apply_chat_template(rows[0]["messages"], tokenize=False)]
    same = {"eval_fraction": 0.2, "eval_strategy": "steps", "eval_steps": 2}
    train(runs.options("whole", **same))
    runs.interrupted("parts", monkeypatch, 3, **same)
    clock.day = 2
    assert tokenizer.apply_chat_template(rows[0]["messages"], tokenize=False) != day[0]
    train(runs.options("parts", resume=True, **same))
    runs.assert_same("whole", "parts")
    assert AutoTokenizer.from_pretrained(tmp_path / "parts").chat_template == DATED
    train(runs.options("later", **same))
    assert untimed(tmp_path / "later") != untimed(tmp_path / "whole")


def test_a_dated_tokenizer_writes_what_the_template_would(clock: Any) -> None:
    """Every call with a format in quotation marks; also of a template among several."""
    turns = [{"role": "user", "content": "q"}]
    for template in (DATED, 'It is {{ strftime_now( "%H:%M" ) }}, {{ strftime_now("%Y-%m-%d") }}'):
        for given in (template, {"default": template, "tool_use": "{{ 1 }}"}):
            tokenizer = make_tokenizer(given)  # type: ignore[arg-type]
            clock.day = 3
            dated, today = with_date(tokenizer, clock.now()), tokenizer.apply_chat_template(turns, tokenize=False)
            clock.day = 4
            assert dated.apply_chat_template(turns, tokenize=False) == today
            assert tokenizer.apply_chat_template(turns, tokenize=False) != today
    plain = make_tokenizer()
    assert with_date(plain, clock.now()) is plain


def test_a_checkpoint_without_a_date_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(tmp_path, "sft")
    runs.interrupted("run", monkeypatch, 3)
    path = tmp_path / "run" / "checkpoint-2" / STATE
    state = json.loads(path.read_text())
    del state["date"], state["tokenizer"], state["models"]
    write_json(path, state)
    assert train(runs.options("run", resume=True)).step == 6


def test_a_checkpoint_without_a_date_names_the_template_that_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Any
) -> None:
    runs = Runs(tmp_path, "sft")
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    runs.data = write_jsonl(tmp_path / "rows.jsonl", [{"messages": turns}] * 6)
    make_tokenizer(DATED).save_pretrained(runs.model)
    runs.interrupted("run", monkeypatch, 3)
    path = tmp_path / "run" / "checkpoint-2" / STATE
    state = json.loads(path.read_text())
    del state["date"]
    write_json(path, state)
    clock.day = 2
    with pytest.raises(InputError, match="or the date that its template writes"):
        train(runs.options("run", resume=True))


def test_stored_values_of_dated_texts_are_noted(tmp_path: Path, clock: Any, capsys: pytest.CaptureFixture[str]) -> None:
    runs = Runs(tmp_path, "dpo")
    make_tokenizer(DATED).save_pretrained(runs.model)
    for clock.day, files in ((1, 1), (2, 2)):
        train(runs.options(f"run-{clock.day}", precompute_ref_log_probs=True, max_steps=1))
        assert f"the date of the run's start, 2026-05-0{clock.day}" in capsys.readouterr().out
        assert len(list((tmp_path / "cache" / "reference").iterdir())) == files


# ---------------------------------------------------------------------------------------------------------------------
# kill -9

KILL_IN_STEP = """
import os, signal, torch
take = torch.optim.AdamW.step
def step(self, *args, **kwargs):
    take(self, *args, **kwargs)
    step.count += 1
    if step.count == 5:
        os.kill(os.getpid(), signal.SIGKILL)
step.count = 0
torch.optim.AdamW.step = step
"""
KILL_IN_CHECKPOINT = """
import os, signal
from logitless.training import checkpoint
save_file = checkpoint.save_file
def save(tensors, path):
    save_file(tensors, path)
    if "checkpoint-4" in str(path):
        with open(path, "r+b") as file:
            file.truncate(100)
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save_file = save
"""


@pytest.mark.parametrize(
    ("script", "kept", "leftovers"),
    [(KILL_IN_STEP, [2, 4], 0), (KILL_IN_CHECKPOINT, [2], 1)],
    ids=["step", "checkpoint"],
)
def test_kill_9_then_resume(tmp_path: Path, script: str, kept: list[int], leftovers: int) -> None:
    runs = Runs(tmp_path, "sft")
    train(runs.options("whole"))
    write_json(tmp_path / "options.json", runs.options("parts").to_dict())
    run = "import json\nfrom logitless.training import TrainOptions, train\n" + (
        f"train(TrainOptions(**json.load(open({str(tmp_path / 'options.json')!r}))))\n"
    )
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = subprocess.run([sys.executable, "-c", script + run], env=os.environ | threads, check=False)
    assert killed.returncode == -signal.SIGKILL
    parts = tmp_path / "parts"
    assert [path.name for path in checkpoints(parts)] == [f"checkpoint-{step}" for step in kept]
    assert len(list(parts.glob(".unfinished-*"))) == leftovers
    with (parts / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # and a line that was being written
    train(runs.options("parts", resume=True))
    assert not list(parts.glob(".unfinished-*"))
    runs.assert_same("whole", "parts")


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with pytest.raises(Killed), new_folder(target) as unfinished:
        (unfinished / "a").write_text("half")
        raise Killed
    assert not target.exists() and not list(tmp_path.iterdir())
    for text in ("old", "new"):
        with new_folder(target) as unfinished:
            (unfinished / "a").write_text(text)
            assert not target.exists() or (target / "a").read_text() == "old"
    assert (target / "a").read_text() == "new" and [path.name for path in tmp_path.iterdir()] == ["folder"]
    (tmp_path / ".unfinished-checkpoint-3-1").mkdir()
    assert clean(tmp_path) == [".unfinished-checkpoint-3-1"]


def test_state_is_readable_json(tmp_path: Path) -> None:
    runs = Runs(tmp_path, "sft")
    train(runs.options("run"))
    state = json.loads((tmp_path / "run" / "checkpoint-4" / STATE).read_text())
    assert state["step"] == 4 and state["num_tokens"] > 0 and len(state["window"]) == 1
    assert state["options"]["learning_rate"] == 1e-3 and state["identity"]["processes"] == 1
