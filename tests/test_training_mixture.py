"""Several losses in one run, each over data of its own: the gradient is the weighted sum of theirs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from training_fixtures import (
    completion_rows,
    make_model,
    make_options,
    make_tokenizer,
    preference_rows,
    train_in_two_processes,
    write_jsonl,
)
from transformers import AutoModelForCausalLM

from logitless import linear_logprobs, linear_loss, losses
from logitless.training import InputError, TrainOptions, parallel, train, trainer
from logitless.training.checkpoint import checkpoints
from logitless.training.config import options_from_mapping
from logitless.training.metrics import Record, read_metrics
from logitless.training.mixture import OWN, components_of
from logitless.training.run import Run, prepare
from logitless.training.trainer import take_step

BETA, WEIGHTS = 0.3, {"sft": 0.7, "dpo": 2.5}
TIMES = ("tokens_per_second", "peak_memory", "eval_runtime")


class Mixed:
    """A folder with a tiny model and two files, and runs on both or on one of them."""

    def __init__(self, folder: Path, **model: Any) -> None:
        self.folder, self.runs = folder, 0
        self.model = make_model(folder / "model", **model)
        self.rows = write_jsonl(folder / "rows.jsonl", completion_rows())
        self.pairs = write_jsonl(folder / "pairs.jsonl", preference_rows())

    def components(self, **changes: dict[str, Any]) -> list[dict[str, Any]]:
        """The SFT and the DPO component, with changes by name."""
        sft: dict[str, Any] = {"method": "sft", "dataset_name": self.rows, "weight": WEIGHTS["sft"]}
        dpo: dict[str, Any] = {"method": "dpo", "dataset_name": self.pairs, "weight": WEIGHTS["dpo"], "beta": BETA}
        return [sft | changes.get("sft", {}), dpo | changes.get("dpo", {})]

    def options(self, name: str, components: list[dict[str, Any]] | None = None, **changes: Any) -> TrainOptions:
        mixture = self.components() if components is None else components
        return make_options(self.folder / name, self.model, "", **{"mixture": mixture} | changes)

    def records(self, components: list[dict[str, Any]] | None = None, **changes: Any) -> list[Record]:
        self.runs += 1
        return read_metrics(train(self.options(f"run-{self.runs}", components, **changes)).output_dir)

    def curve(self, components: list[dict[str, Any]] | None = None, **changes: Any) -> torch.Tensor:
        """[steps, 2] losses and gradient norms."""
        found = [record for record in self.records(components, **changes) if "loss" in record]
        return torch.tensor([[record["loss"], record["grad_norm"]] for record in found], dtype=torch.float64)


@pytest.fixture
def mixed(tmp_path: Path) -> Mixed:
    return Mixed(tmp_path)


def gradient_of_a_step(options: TrainOptions, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], Record]:
    """The gradients that the optimizer is given in a run's first step, and the step's metrics."""
    run = prepare(options, parallel.start(use_cpu=True))
    found: dict[str, Any] = {}

    def keep() -> None:
        found.update({name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None})

    monkeypatch.setattr(run.optimizer, "step", keep)
    return found, take_step(run, 0)


def hidden_and_targets(model: Any, prompt: str, answer: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states `[T, H]` of the positions that predict an answer's tokens, and these tokens."""
    ids = make_tokenizer()(prompt + answer, return_tensors="pt")["input_ids"]
    start = len(make_tokenizer()(prompt)["input_ids"])
    return model.model(ids).last_hidden_state[0, start - 1 : -1], ids[0, start:]


def own_sft_loss(model: Any) -> torch.Tensor:
    parts = [hidden_and_targets(model, row["prompt"], row["completion"] + "<|im_end|>") for row in completion_rows()]
    hidden, targets = (torch.cat(part) for part in zip(*parts, strict=True))
    return linear_loss("nll", hidden, model.lm_head.weight, targets)


def own_dpo_loss(model: Any) -> torch.Tensor:
    """The model is its own reference in a first step."""
    template = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    parts = [
        hidden_and_targets(
            model, template.format(row["prompt"][0]["content"]), row[side][0]["content"] + "<|im_end|>\n"
        )
        for side in ("chosen", "rejected")
        for row in preference_rows()
    ]
    bounds = torch.tensor([0, *(len(targets) for _, targets in parts)]).cumsum(0).int()
    hidden, targets = (torch.cat(part) for part in zip(*parts, strict=True))
    ref = linear_logprobs(hidden.detach(), model.lm_head.weight.detach(), targets).logprob
    loss = losses.DPO(beta=BETA)
    out = linear_loss(loss, hidden, model.lm_head.weight, targets, ref_logprob=ref, cu_seqlens=bounds)
    return out.loss


@pytest.mark.parametrize("shape", [{}, {"padding_free": True}, {"backend": "materialised"}], ids=str)
@pytest.mark.parametrize("batch", ["whole", "parts"])
def test_the_gradient_is_the_weighted_sum_of_the_losses_own(
    mixed: Mixed, monkeypatch: pytest.MonkeyPatch, batch: str, shape: dict[str, Any]
) -> None:
    """Over all rows of both files at once, in one micro-batch of each or in several of other sizes and numbers."""
    sizes: dict[str, dict[str, Any]] = {
        "whole": {"sft": {"per_device_train_batch_size": 12}, "dpo": {"per_device_train_batch_size": 8}},
        "parts": {
            "sft": {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 3},
            "dpo": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        },
    }
    options = mixed.options("run", mixed.components(**sizes[batch]), max_grad_norm=0.0, **shape)
    found, record = gradient_of_a_step(options, monkeypatch)

    model = AutoModelForCausalLM.from_pretrained(mixed.model)
    own = {"sft": own_sft_loss(model), "dpo": own_dpo_loss(model)}
    expected: dict[str, torch.Tensor] = {}
    for name, loss in own.items():
        model.zero_grad()
        loss.backward()
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None
            expected[key] = expected.get(key, torch.zeros(())) + WEIGHTS[name] * parameter.grad
    assert found.keys() == expected.keys()
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-6, msg=key)
    for name, loss in own.items():
        assert record[f"{name}/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert record["loss"] == pytest.approx(sum(WEIGHTS[name] * loss.item() for name, loss in own.items()), rel=1e-5)


def test_a_mixture_of_one_is_the_plain_run(mixed: Mixed) -> None:
    sft, dpo = mixed.components(sft={"weight": 1}, dpo={"weight": 1})
    plain = make_options(mixed.folder / "plain", mixed.model, mixed.rows)
    for component, changes in ((sft, {}), (dpo, {"method": "dpo", "dataset_name": mixed.pairs, "beta": BETA})):
        options = dataclasses.replace(plain, output_dir=str(mixed.folder / component["method"]), **changes)
        alone = read_metrics(train(options).output_dir)
        expected = torch.tensor([[record["loss"], record["grad_norm"]] for record in alone], dtype=torch.float64)
        assert torch.equal(mixed.curve([component]), expected)


def test_a_weight_scales_the_gradient_of_its_loss(mixed: Mixed, monkeypatch: pytest.MonkeyPatch) -> None:
    sft, _ = mixed.components()
    one, four = (
        gradient_of_a_step(mixed.options(f"run-{w}", [sft | {"weight": w}], max_grad_norm=0.0), monkeypatch)
        for w in (1.0, 4.0)
    )
    assert all(torch.equal(4 * gradient, four[0][name]) for name, gradient in one[0].items())
    assert (four[1]["loss"], four[1]["sft/loss"]) == (4 * one[1]["loss"], one[1]["loss"])


def test_the_order_of_the_components_does_not_matter(mixed: Mixed) -> None:
    there = mixed.curve()
    torch.testing.assert_close(mixed.curve(mixed.components()[::-1]), there, rtol=1e-5, atol=1e-5)


def test_every_component_has_a_reference_a_length_and_a_shape_of_its_own(mixed: Mixed) -> None:
    """The reference models are one, stored or not; a packed SFT is the padded one."""
    own: dict[str, dict[str, Any]] = {"sft": {"method": "f-divergence", "name": "sft"}, "dpo": {}}
    on_the_fly = mixed.curve(mixed.components(**own))
    stored = mixed.components(sft=own["sft"], dpo={"precompute_ref_log_probs": True})
    torch.testing.assert_close(mixed.curve(stored), on_the_fly, rtol=3e-5, atol=3e-5)
    run = prepare(mixed.options("shared", mixed.components(**own)), parallel.start(use_cpu=True))
    first, second = (component.reference for component in run.components)
    assert first is not None and second is not None and first.model is second.model and first.model is not run.model

    whole = {"per_device_train_batch_size": 12}
    padded = mixed.curve(mixed.components(sft=whole))
    packed = mixed.curve(mixed.components(sft=whole | {"packing": True, "max_length": 40}))
    torch.testing.assert_close(packed, padded, rtol=3e-5, atol=3e-5)
    short = prepare(mixed.options("short", mixed.components(sft={"max_length": 12})), parallel.start(use_cpu=True))
    longest = [max(len(e.input_ids) for item in c.loader.data.items for e in item) for c in short.components]
    assert longest[0] == 12 < longest[1]


def test_metrics_are_reported_by_name(mixed: Mixed) -> None:
    held_out = mixed.components(sft={"eval_dataset_name": mixed.rows}, dpo={"eval_fraction": 0.25})
    first, last = (mixed.records(held_out, eval_on_start=True, logging_steps=4)[at] for at in (0, -1))
    assert first["eval_dpo/loss"] == pytest.approx(0.693147, abs=1e-5) and first["eval_dpo/rewards/margins"] == 0
    assert {"eval_sft/loss", "eval_sft/nll", "eval_sft/mean_token_accuracy", "eval_dpo/logps/chosen"} <= last.keys()
    total = sum(weight * last[f"eval_{name}/loss"] for name, weight in WEIGHTS.items())
    assert last["eval_loss"] == pytest.approx(total) and last["eval_sft/loss"] < first["eval_sft/loss"]

    records = mixed.records(mixed.components(sft={"eval_dataset_name": mixed.rows, "name": "answers"}), logging_steps=2)
    logged = [record for record in records if "loss" in record]
    assert [record["step"] for record in logged] == [1, 2, 4]
    for record in logged:
        total = WEIGHTS["sft"] * record["answers/loss"] + WEIGHTS["dpo"] * record["dpo/loss"]
        assert record["loss"] == pytest.approx(total)
        assert "dpo/rewards/accuracies" in record and "sft/loss" not in record
    assert "eval_answers/loss" in records[-1] and "eval_loss" not in records[-1]  # of one component of two


def test_an_epoch_reads_the_longest_data_once(mixed: Mixed) -> None:
    """12 rows and 8 pairs by 2: six steps, in which two steps read pairs of a second epoch."""
    options = mixed.options("run", max_steps=-1, num_train_epochs=2, save_strategy="epoch")
    run = prepare(options, parallel.start(use_cpu=True))
    assert (run.steps_per_epoch, run.total_steps) == (6, 12)
    rows, pairs = (component.sampler for component in run.components)
    read = [unit for step in range(6) for batch in rows.micro_batches(step) for unit in batch]
    assert sorted(read) == list(range(12))
    first = [unit for step in range(4) for batch in pairs.micro_batches(step) for unit in batch]
    again = [unit for step in range(4, 8) for batch in pairs.micro_batches(step) for unit in batch]
    assert sorted(first) == sorted(again) == list(range(8)) and first != again


def test_the_default_learning_rate_is_that_of_preference_losses(mixed: Mixed) -> None:
    assert mixed.records(learning_rate=None, max_steps=1)[0]["learning_rate"] == 1e-6


# Resumption


class Killed(Exception):
    """Stands for a process that ends between two steps."""


def resume_equals_whole(
    mixed: Mixed, monkeypatch: pytest.MonkeyPatch, components: list[dict[str, Any]], **options: Any
) -> None:
    """A run killed in its sixth step and continued logs what a whole one logs, to the last bit."""

    def limited(run: Run, number: int) -> Record:
        if number == 5:
            raise Killed
        return take_step(run, number)

    train(mixed.options("whole", components, **options))
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(trainer, "take_step", limited)
        train(mixed.options("parts", components, **options))
    assert [path.name for path in checkpoints(mixed.folder / "parts")] == ["checkpoint-2", "checkpoint-4"]
    train(mixed.options("parts", components, resume=True, **options))
    whole, parts = (
        [{key: value for key, value in record.items() if key not in TIMES} for record in read_metrics(folder)]
        for folder in (mixed.folder / "whole", mixed.folder / "parts")
    )
    assert whole == parts and whole[-1]["step"] == 8
    names = [component.get("name", component["method"]) for component in components]
    assert all(f"{name}/loss" in record for record in whole for name in names)


@pytest.mark.parametrize("changes", [{}, {"use_peft": True}, {"precompute_ref_log_probs": True}], ids=str)
def test_resuming_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    """Dropout makes the runs depend on the random state, and the log window is open at the checkpoint.

    The run is killed in the pairs' second epoch.
    """
    mixed = Mixed(tmp_path, dropout=0.1)
    same = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "logging_steps": 3, "disable_dropout": False}
    resume_equals_whole(mixed, monkeypatch, mixed.components(), **same | changes)


def test_resuming_is_exact_for_what_components_estimate(mixed: Mixed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two estimates of one kind and one of another; the old policy of four steps is in use at the checkpoint."""
    labelled = [row | {"label": number % 3 > 0} for number, row in enumerate(completion_rows())]
    rows = write_jsonl(mixed.folder / "labelled.jsonl", labelled)
    components = [
        {"method": "bco", "dataset_name": rows, "per_device_train_batch_size": 3},
        {"method": "bco", "name": "sharp", "dataset_name": rows, "beta": 0.5},
        {"method": "psft", "dataset_name": mixed.rows, "old_policy_steps": 4},
    ]
    same: dict[str, Any] = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2}
    resume_equals_whole(mixed, monkeypatch, components, **same)


def test_a_reference_that_follows_is_its_component_s_own(mixed: Mixed, monkeypatch: pytest.MonkeyPatch) -> None:
    """A component that follows stands beside one that stays and one that follows otherwise; a checkpoint has them."""
    stays = {"method": "dpo", "name": "stays", "dataset_name": mixed.pairs, "beta": 1.0}
    follows = stays | {"name": "follows", "sync_ref_model": True, "ref_model_sync_steps": 3}
    slowly = follows | {"name": "slowly", "ref_model_mixup_alpha": 0.1, "ref_model_sync_steps": 1}
    same: dict[str, Any] = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2}
    resume_equals_whole(mixed, monkeypatch, [stays, follows, slowly], **same)
    at = {record["step"]: record for record in read_metrics(mixed.folder / "whole") if "loss" in record}
    assert at[3]["follows/loss"] == at[3]["stays/loss"] != at[3]["slowly/loss"]
    assert len({at[4][f"{name}/loss"] for name in ("follows", "slowly", "stays")}) == 3
    with pytest.raises(InputError, match=r"sync_ref_model: in .* the reference followed the trained model"):
        train(mixed.options("whole", [stays, follows | {"sync_ref_model": False}, slowly], resume=True, **same))
    with pytest.raises(InputError, match="mixture, sft: sync_ref_model: nll compares with no reference"):
        train(mixed.options("run", sync_ref_model=True))


def test_what_may_not_change_is_named(mixed: Mixed) -> None:
    saved: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    train(mixed.options("run", **saved))
    again = saved | {"resume": True}
    with pytest.raises(InputError, match="dpo/per_device_train_batch_size was 2 and is 3"):
        train(mixed.options("run", mixed.components(dpo={"per_device_train_batch_size": 3}), **again))
    with pytest.raises(InputError, match=r"mixture was \['sft', 'dpo'\] and is \['sft'\]"):
        train(mixed.options("run", mixed.components()[:1], **again))
    write_jsonl(Path(mixed.pairs), preference_rows(7))
    with pytest.raises(InputError, match=r"dpo/data was '\w+' and is"):
        train(mixed.options("run", **again))


# What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": 0}, r"component 2: weight must be above 0, got 0\.0"),
        ({"weight": -1}, "component 2: weight must be above 0, got -1"),
        ({"weight": float("inf")}, "component 2: weight must be a finite number, got inf"),
        ({"weight": "much"}, "component 2: weight must be a finite number, got 'much'"),
        ({"method": None}, "component 2: method cannot be empty"),
        ({"dataset_name": ""}, "component 2: dataset_name is required"),
        ({"learning_rate": 1e-3}, "component 2: learning_rate is no option of a component"),
        ({"wieght": 2}, r"component 2: wieght is no option of a component \(nearest: weight"),
        ({"method": "dpoo"}, r"mixture, dpoo: method must be one of .* \(nearest: dpo"),
        ({"name": ["a", "b"]}, r"component 2: name must be a str, got \['a', 'b'\]"),
        ({"method": "sft", "beta": None}, "2 components are named 'sft'"),
        ({"power": 2}, "power is no option of a component"),
        ({"loss": {"power": 2}}, "mixture, dpo: power is no setting of the loss 'dpo'"),
        ({"per_device_train_batch_size": 0}, "mixture, dpo: per_device_train_batch_size must be at least 1, got 0"),
        ({"packing": True}, "mixture, dpo: packing: dpo looks at whole sequences"),
        ({"eval_dataset_name": "none.jsonl"}, "mixture, dpo: data file not found: none.jsonl"),
    ],
)
def test_a_bad_component_is_named(mixed: Mixed, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        train(mixed.options("run", mixed.components(dpo=change)))


@pytest.mark.parametrize(
    ("component", "rows", "message"),
    [
        ("sft", [{"prompt": "a", "completion": 3}], r"mixture, sft: .*rows\.jsonl, line 1: "),
        ("dpo", [*preference_rows(2), {"chosen": "a"}], r"mixture, dpo: .*pairs\.jsonl, line 3: "),
    ],
)
def test_a_bad_row_is_named_with_its_file_and_line(mixed: Mixed, component: str, rows: Any, message: str) -> None:
    write_jsonl(Path(mixed.rows if component == "sft" else mixed.pairs), rows)
    with pytest.raises(InputError, match=message):
        train(mixed.options("run"))


def test_options_that_no_component_would_read_are_refused(mixed: Mixed) -> None:
    for name, value in (("dataset_name", mixed.rows), ("method", "dpo"), ("beta", 0.1), ("loss", {"name": "dft"})):
        with pytest.raises(InputError, match=f"{name} and mixture are both given"):
            train(mixed.options("run", **{name: value}))
    with pytest.raises(InputError, match="at least one component, got none"):
        train(mixed.options("run", []))
    with pytest.raises(InputError, match="component 1: expected a mapping of option names to values, got 'sft'"):
        components_of(TrainOptions(mixture=["sft", "dpo"]))  # type: ignore[list-item]


def test_a_mixture_is_read_as_text_and_as_yaml(mixed: Mixed) -> None:
    """Numbers as text, other names of options, and the run's own options where a component names none."""
    sft, dpo = mixed.components(dpo={"weight": "5e-1", "f_divergence_type": "js_divergence"})
    for value in ([sft, dpo], json.dumps([sft, dpo])):
        options, _ = options_from_mapping({"mixture": value, "max_length": 99}, "run.yaml")
        first, second = components_of(options)
        assert (first.name, first.weight, second.name, second.weight) == ("sft", 0.7, "dpo", 0.5)
        assert second.options.divergence == "js_divergence" and second.options.max_length == 99
        assert first.options.mixture is None and first.options.beta is None
    for wrong in ("sft", {"method": "sft"}, ["sft"], 3):
        with pytest.raises(InputError, match="mixture must be a Sequence"):
            options_from_mapping({"mixture": wrong}, "run.yaml")
    assert {"method", "max_length", "packing", "teacher_model_name_or_path"} <= set(OWN)
    assert not {"backend", "mixture", "learning_rate", "seed", "output_dir"} & set(OWN)


@pytest.mark.slow
def test_two_processes_take_the_same_steps(mixed: Mixed) -> None:
    """Gradients are exchanged at the last micro-batch of the last component; the components have unlike numbers."""
    sizes: dict[str, dict[str, Any]] = {"sft": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}}
    double = {"sft": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}}
    alone = mixed.curve(mixed.components(**sizes), gradient_accumulation_steps=2, max_steps=3)
    options = mixed.options("together", mixed.components(**double), max_steps=3)
    train_in_two_processes(mixed.folder, options)
    records = [record for record in read_metrics(mixed.folder / "together") if "loss" in record]
    together = torch.tensor([[record["loss"], record["grad_norm"]] for record in records], dtype=torch.float64)
    torch.testing.assert_close(together, alone, rtol=3e-5, atol=3e-5)
