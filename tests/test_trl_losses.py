"""Losses of the registry in TRL's trainers: TRL's own loss, weights and metrics where it has the loss, else by hand."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")
datasets = pytest.importorskip("datasets")

import transformers  # noqa: E402
from training_fixtures import make_model, make_tokenizer  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from trl_runs import STEPS, assert_same_run, lengths, settings, slowly  # noqa: E402

import logitless  # noqa: E402
from logitless import losses  # noqa: E402
from logitless.integrations.families import UnsupportedModelError  # noqa: E402
from logitless.integrations.trl.losses import LinearLossMixin, with_loss  # noqa: E402
from logitless.testing import watch_allocations  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    # logits that tell losses apart
    return make_model(tmp_path_factory.mktemp("trl") / "model", tied=False, sharpness=10)


def sft_rows() -> Any:
    texts = [
        "red",
        "a longer answer",
        "x",
        "blue or green",
        "four",
        "no",
        "maybe so",
        "7",
        "the end",
        "yes",
        "ok",
        "one",
    ]
    return datasets.Dataset.from_list([{"prompt": f"q{i} ", "completion": t} for i, t in enumerate(texts)])


def pair_rows() -> Any:
    pairs = [("good", "bad thing"), ("a long good answer", "no"), ("y", "n"), ("fine", "not so fine"), ("ab", "ba")]
    rows = [{"prompt": f"q{i} ", "chosen": c, "rejected": r} for i, (c, r) in enumerate(pairs * 3)]
    return datasets.Dataset.from_list(rows[:12])


def marked_rows() -> Any:
    texts = ["good", "bad thing", "a long good answer", "no", "y", "fine", "not so fine", "ab", "ba", "c", "dd", "e"]
    rows = [{"prompt": f"q{i} ", "completion": t, "label": i % 3 != 1} for i, t in enumerate(texts)]
    return datasets.Dataset.from_list(rows)


def run(cls: Any, folder: str, args: Any, rows: Any, **more: Any) -> tuple[Any, list[dict[str, float]]]:
    """Trains from the model in the folder; the trainer, and what it logged at every step."""
    torch.manual_seed(0)
    model = more.pop("model", None)
    model = AutoModelForCausalLM.from_pretrained(folder) if model is None else model
    trainer = cls(model=model, args=args, train_dataset=rows, processing_class=make_tokenizer(), **more)
    torch.manual_seed(0)
    trainer.train()
    return trainer, trainer.state.log_history


def same_run(one: tuple[Any, Any], two: tuple[Any, Any]) -> None:
    """Two results of `run` are the same."""
    assert_same_run(one[0], two[0])


def both(folder: str, tmp_path: Path, host: Any, config: Any, rows: Any, theirs: dict, loss: Any, **ours: Any) -> None:
    """TRL's own loss under its options against the registry's."""
    shared = ours.pop("shared", {})
    more = ours.pop("more", {})
    expected = run(host, folder, config(**settings(tmp_path, **shared, **theirs)), rows, **copy.copy(more))
    args = config(**settings(tmp_path, **shared, **ours.pop("args", {})))
    got = run(with_loss(host), folder, args, rows, loss=loss, **more)
    same_run(expected, got, **ours)


# ---------------------------------------------------------------------------------------------------------------------
# Equal to TRL's own loss


@pytest.mark.parametrize("loss", slowly(["nll", "dft"], "dft"))
def test_sft_is_trls_own(folder: str, tmp_path: Path, loss: str) -> None:
    both(folder, tmp_path, trl.SFTTrainer, trl.SFTConfig, sft_rows(), {"loss_type": loss}, loss)


@pytest.mark.slow
def test_packed_sft_is_trls_own(folder: str, tmp_path: Path) -> None:
    shared = {"packing": True, "max_length": 24}
    both(folder, tmp_path, trl.SFTTrainer, trl.SFTConfig, sft_rows(), {"loss_type": "dft"}, "dft", shared=shared)


DPO_CASES = {
    "dpo": ({}, "dpo"),
    "beta": ({"beta": 0.5}, losses.DPO(beta=0.5)),
    "ipo": ({"loss_type": ["ipo"]}, losses.DPO(loss_type="ipo")),
    "hinge": ({"loss_type": ["hinge"]}, losses.DPO(loss_type="hinge")),
    "robust": ({"loss_type": ["robust"], "label_smoothing": 0.1}, losses.DPO(loss_type="robust", label_smoothing=0.1)),
    "apo_zero": ({"loss_type": ["apo_zero"]}, losses.DPO(loss_type="apo_zero")),
}


@pytest.mark.parametrize("case", slowly(DPO_CASES, "robust"))
def test_dpo_is_trls_own(folder: str, tmp_path: Path, case: str) -> None:
    theirs, loss = DPO_CASES[case]
    both(folder, tmp_path, trl.DPOTrainer, trl.DPOConfig, pair_rows(), theirs, loss)


@pytest.mark.parametrize("loss", ["kto", losses.KTO(loss_type="apo_zero_unpaired", beta=0.3, undesirable_weight=2.0)])
def test_kto_is_trls_own(folder: str, tmp_path: Path, loss: Any) -> None:
    names = ("loss_type", "beta", "undesirable_weight")
    theirs = {name: getattr(losses.get(loss), name) for name in names}
    args = {"loss_type": theirs["loss_type"]}
    shared = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3}
    both(folder, tmp_path, trl.KTOTrainer, trl.KTOConfig, marked_rows(), theirs, loss, shared=shared, args=args)


GRPO_CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "dapo": ({"epsilon_high": losses.DAPO().epsilon_high}, "dapo"),
    "grpo": ({"loss_type": "grpo"}, "grpo"),
    "bnpo": ({"loss_type": "bnpo"}, "bnpo"),
    "dr_grpo": ({"loss_type": "dr_grpo"}, "dr_grpo"),
    "luspo": (
        {
            "loss_type": "luspo",
            "importance_sampling_level": "sequence",
            "epsilon": losses.LUSPO().epsilon_low,
            "epsilon_high": losses.LUSPO().epsilon_high,
        },
        "luspo",
    ),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 5.0}, losses.CISPO(ratio_cap=5.0)),
    "sapo": ({"loss_type": "sapo"}, "sapo"),
    "kl": ({"loss_type": "grpo", "beta": 0.1}, losses.GRPO(beta=0.1, kl_importance=True)),
    "gspo": (
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon": losses.GSPO().epsilon_low,
            "epsilon_high": losses.GSPO().epsilon_high,
        },
        "gspo",
    ),
}


@pytest.mark.parametrize("case", slowly(GRPO_CASES, "kl"))
def test_grpo_is_trls_own(folder: str, tmp_path: Path, case: str) -> None:
    """At a temperature, with samples of an older policy; only TRL's PPO-like losses have its clip ratios."""
    theirs, loss = GRPO_CASES[case]
    rows = datasets.Dataset.from_list([{"prompt": f"q{i} "} for i in range(12)])
    shared = {"max_completion_length": 6, "num_generations": 2, "temperature": 0.7}
    shared |= {"steps_per_generation": 4, "num_iterations": 2}
    args = [trl.GRPOConfig(**settings(tmp_path, **shared, **more)) for more in (theirs, {})]
    expected = run(trl.GRPOTrainer, folder, args[0], rows, reward_funcs=lengths)
    got = run(with_loss(trl.GRPOTrainer), folder, args[1], rows, loss=loss, reward_funcs=lengths)
    if case in ("cispo", "sapo"):
        for entry in (*expected[1], *got[1]):
            for name in [name for name in entry if "clip_ratio" in name]:
                del entry[name]
    same_run(expected, got)


# ---------------------------------------------------------------------------------------------------------------------
# A patched model


def plain(cls: Any, config: Any, rows: Any, model: Any, path: Path, **more: Any) -> Any:
    """A trainer of TRL's own around a model."""
    args = config(**settings(path))
    return cls(model=model, args=args, train_dataset=rows, processing_class=make_tokenizer(), **more)


HOSTS = {
    "sft": (trl.SFTTrainer, trl.SFTConfig, sft_rows, "dft"),
    "dpo": (trl.DPOTrainer, trl.DPOConfig, pair_rows, "simpo"),
    "kto": (trl.KTOTrainer, trl.KTOConfig, marked_rows, "kto"),
}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("adapted", [False, True])
def test_trls_own_trainer_refuses_the_loss_of_a_patched_model(
    folder: str, tmp_path: Path, host: str, adapted: bool
) -> None:
    cls, config, rows, loss = HOSTS[host]
    model = logitless.patch(AutoModelForCausalLM.from_pretrained(folder), loss=loss)
    if adapted:
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"would ignore .*with_loss"):
        plain(cls, config, rows(), model, tmp_path)


def test_trls_own_trainer_refuses_the_temperature_of_a_patched_model(folder: str, tmp_path: Path) -> None:
    model = logitless.patch(AutoModelForCausalLM.from_pretrained(folder), temperature=0.7)
    with pytest.raises(ValueError, match=r"temperature 0\.7"):
        plain(trl.SFTTrainer, trl.SFTConfig, sft_rows(), model, tmp_path)


def test_trls_own_trainer_says_that_it_does_not_run_the_patch(
    folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = logitless.patch(AutoModelForCausalLM.from_pretrained(folder))
    trainer = plain(trl.SFTTrainer, trl.SFTConfig, sft_rows(), model, tmp_path)
    assert "in place of this LlamaForCausalLM's patch" in caplog.text
    assert trainer.train().training_loss > 0


def test_the_loss_of_a_patched_model_is_trained(folder: str, tmp_path: Path) -> None:
    args = trl.SFTConfig(**settings(tmp_path))
    patched = logitless.patch(AutoModelForCausalLM.from_pretrained(folder), loss="dft")
    got = run(with_loss(trl.SFTTrainer), folder, args, sft_rows(), model=patched)
    expected = run(trl.SFTTrainer, folder, trl.SFTConfig(**settings(tmp_path, loss_type="dft")), sft_rows())
    same_run(expected, got)
    with pytest.raises(ValueError, match="pass one"):
        with_loss(trl.SFTTrainer)(
            model=logitless.patch(AutoModelForCausalLM.from_pretrained(folder), loss="dft"),
            args=args,
            train_dataset=sft_rows(),
            loss="eaft",
        )


def test_patching_behind_trls_head_names_the_adapter(folder: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    trainer = plain(trl.SFTTrainer, trl.SFTConfig, sft_rows(), model, tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"integrations\.trl\.with_loss"):
        logitless.patch(trainer.model)


def test_a_trainer_without_tags_is_refused_by_its_first_call(folder: str) -> None:
    """TRL's asynchronous trainers put their head on a model, and never tag it."""
    model = logitless.patch(AutoModelForCausalLM.from_pretrained(folder), loss="dft")
    trl.trainer.utils.add_fused_lm_head(model)
    ids = torch.arange(6)[None]
    with pytest.raises(ValueError, match=r"patch: a trainer of TRL computes a loss of its own.*with_loss"):
        model(input_ids=ids, labels=ids, fused_lm_head=True)
    assert model(input_ids=ids, labels=ids).loss is not None
    logitless.unpatch(model)
    assert not model._forward_pre_hooks


def test_tags_of_others_pass_and_unpatching_leaves_nothing(folder: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = set(vars(model))
    logitless.patch(model, loss="dft").add_model_tags("mine")
    assert model.model_tags == ["mine"]
    logitless.unpatch(model)
    assert set(vars(model)) - {"model_tags"} == before - {"model_tags"}


# ---------------------------------------------------------------------------------------------------------------------
# Equal to `linear_loss` where TRL has no such loss


def built(host: Any, config: Any, folder: str, path: Path, rows: Any, **more: Any) -> Any:
    """A trainer with a loss, and `args` of the batch sizes of these tests."""
    more.setdefault("model", AutoModelForCausalLM.from_pretrained(folder))
    args = config(**settings(path, **more.pop("options", {})))
    return with_loss(host)(args=args, train_dataset=rows, processing_class=make_tokenizer(), **more)


def gradient(trainer: Any, batch: Any, items: Any = None) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of one batch, and the gradient of every trained parameter."""
    trainer.model.zero_grad()
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items)
    loss.backward()
    found = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.item(), {name: g.clone() for name, g in found.items()}


def other_model(folder: str) -> Any:
    """A model near that of the folder: a reference."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model


def by_hand(loss: Any, model: Any, batch: Any, reference: Any, **more: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss by `linear_loss` on the hidden states of a plain model."""
    names, labels = ("input_ids", "attention_mask"), batch["labels"][:, 1:]
    states = [m.model(**{name: batch[name] for name in names}).last_hidden_state[:, :-1] for m in (model, reference)]
    if "ref_logprob" in loss.inputs or loss.compares_distributions:
        more |= {"ref_hidden": states[1], "ref_head": reference.lm_head.weight}
    value = logitless.linear_loss(loss, states[0], model.lm_head.weight, labels, **more)
    value.backward()
    return value.item(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "loss", slowly(["f_divergence_sft", "asft", "sft_kl", "distillation", "gem", "iw_sft", "poft", "ift"], "asft")
)
def test_sft_is_the_loss_by_hand(folder: str, tmp_path: Path, loss: str) -> None:
    chosen = losses.get(loss)
    reads = "ref_logprob" in chosen.inputs or chosen.compares_distributions
    more = {"ref_model": other_model(folder)} if reads else {}
    trainer = built(trl.SFTTrainer, trl.SFTConfig, folder, tmp_path, sft_rows(), loss=loss, **more)
    batch = next(iter(trainer.get_train_dataloader()))
    items = 37 if chosen.reduction == "mean" else None
    given = {} if items is None else {"normalizer": items}
    expected = by_hand(chosen, AutoModelForCausalLM.from_pretrained(folder), batch, other_model(folder), **given)
    got = gradient(trainer, batch, items)
    assert got[0] == pytest.approx(expected[0], rel=1e-5)
    for name, g in expected[1].items():
        torch.testing.assert_close(got[1][name], g, rtol=2e-4, atol=1e-6)
    assert trainer._metrics["train"].keys() >= {"entropy", "mean_token_accuracy", "num_tokens"}


def test_an_adapter_is_compared_with_its_base(folder: str, tmp_path: Path) -> None:
    """Without ref_model the reference is the model without its adapter, on the head too."""
    lora = peft.LoraConfig(target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM", init_lora_weights=False)
    loss = losses.FDivergenceSFT()
    trainer = built(trl.SFTTrainer, trl.SFTConfig, folder, tmp_path, sft_rows(), loss=loss, peft_config=lora)
    batch = next(iter(trainer.get_train_dataloader()))
    value, _ = gradient(trainer, batch)
    targets = batch["labels"][:, 1:]
    stats = []
    for context in (contextlib.nullcontext(), trainer.model.disable_adapter()):
        with context, torch.no_grad():
            logits = trainer.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        stats.append(-torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none"))
    tokens = loss(logitless.types.TokenStats(logprob=stats[0]), ref_logprob=stats[1])
    assert value == pytest.approx(tokens[targets != -100].mean().item(), rel=1e-5)
    assert value != pytest.approx(
        loss(logitless.types.TokenStats(logprob=stats[0]), ref_logprob=stats[0]).mean().item()
    )


@pytest.mark.parametrize("precomputed", [False, True])
def test_dpo_with_a_reference(folder: str, tmp_path: Path, precomputed: bool) -> None:
    """Known values of the reference give what its model gives: those of TRL, too."""
    shared = {"precompute_ref_log_probs": precomputed}
    theirs = {"loss_type": ["ipo"], "beta": 0.4}
    loss = losses.DPO(loss_type="ipo", beta=0.4)
    expected = run(
        trl.DPOTrainer,
        folder,
        trl.DPOConfig(**settings(tmp_path / "a", **shared, **theirs)),
        pair_rows(),
        ref_model=other_model(folder),
    )
    got = run(
        with_loss(trl.DPOTrainer),
        folder,
        trl.DPOConfig(**settings(tmp_path / "b", **shared)),
        pair_rows(),
        loss=loss,
        ref_model=other_model(folder),
    )
    same_run(expected, got)


@pytest.mark.slow
def test_kto_with_a_precomputed_reference(folder: str, tmp_path: Path) -> None:
    shared = {"precompute_ref_log_probs": True, "per_device_train_batch_size": 3}
    args = [trl.KTOConfig(**settings(tmp_path / name, **shared)) for name in ("a", "b")]
    expected = run(trl.KTOTrainer, folder, args[0], marked_rows(), ref_model=other_model(folder))
    got = run(with_loss(trl.KTOTrainer), folder, args[1], marked_rows(), loss="kto", ref_model=other_model(folder))
    same_run(expected, got)


FREE = {
    "simpo": losses.SimPO(beta=1.5, gamma=0.4),
    "cpo": losses.CPO(beta=0.2),
    "orpo": losses.ORPO(beta=0.3),
}


@pytest.mark.parametrize("name", slowly(FREE, "simpo"))
def test_dpo_without_a_reference_is_the_loss_by_hand(folder: str, tmp_path: Path, name: str) -> None:
    trainer = built(trl.DPOTrainer, trl.DPOConfig, folder, tmp_path, pair_rows(), loss=FREE[name])
    assert trainer.ref_model is None
    batch = next(iter(trainer.get_train_dataloader()))
    model = AutoModelForCausalLM.from_pretrained(folder)
    hidden = model.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state[:, :-1]
    targets = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)[:, 1:]
    expected = logitless.linear_loss(FREE[name], hidden, model.lm_head.weight, targets)
    expected.loss.backward()
    value, grads = gradient(trainer, batch)
    assert value == pytest.approx(expected.loss.item(), rel=1e-5)
    for key, p in model.named_parameters():
        torch.testing.assert_close(grads[key], p.grad, rtol=2e-4, atol=1e-6)
    metrics = trainer._metrics["train"]
    assert metrics["rewards/margins"][-1] == pytest.approx(expected.margin.mean().item(), rel=1e-5)
    assert metrics["rewards/chosen"][-1] == pytest.approx(expected.chosen_reward.mean().item(), rel=1e-5)
    assert trainer.train().training_loss > 0
    assert trainer.evaluate(pair_rows())["eval_loss"] > 0


# ---------------------------------------------------------------------------------------------------------------------
# Heads


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["q_proj"]])
@pytest.mark.parametrize("host", ["sft", "dpo"])
def test_an_adapter_trains_as_on_full_logits(folder: str, tmp_path: Path, targets: list[str], host: str) -> None:
    """LoRA on the head, which TRL refuses, and a frozen head: gradients of the loss on the merged model's logits."""
    cls, config, rows, _ = HOSTS[host]
    lora = peft.LoraConfig(target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False, r=4)
    trainer = built(cls, config, folder, tmp_path, rows(), loss="nll" if host == "sft" else "simpo", peft_config=lora)
    batch = next(iter(trainer.get_train_dataloader()))
    value, grads = gradient(trainer, batch)
    trainer.model.zero_grad()
    logits = trainer.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"] if host == "sft" else batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    labels = labels[:, 1:]
    logprob = -torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    if host == "sft":
        expected = -logprob.sum() / (labels != -100).sum()
    else:
        chosen, rejected = (logprob.sum(1) / (labels != -100).sum(1)).chunk(2)
        expected = losses.SimPO()(chosen, rejected).loss.mean()
    expected.backward()
    assert value == pytest.approx(expected.item(), rel=1e-5)
    wanted = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    assert wanted.keys() == grads.keys()
    assert any("lm_head" in name for name in wanted) == ("lm_head" in targets)
    for name, g in wanted.items():
        torch.testing.assert_close(grads[name], g, rtol=2e-4, atol=1e-6)


def test_a_frozen_head_keeps_its_two_products(folder: str, tmp_path: Path) -> None:
    """TRL's entropy and accuracy are metrics: the backward of an adapter's loss makes no logits again."""
    lora = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = built(trl.SFTTrainer, trl.SFTConfig, folder, tmp_path, sft_rows(), loss="dft", peft_config=lora)
    trainer.current_gradient_accumulation_steps = 1
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, batch)
    with torch.profiler.profile() as profile:
        loss.backward()
    assert "logitless::logprobs_backward" not in {event.key for event in profile.key_averages()}
    assert trainer._metrics["train"]["entropy"][-1] > 0


@pytest.mark.parametrize("host", ["sft", "dpo"])
def test_no_logits_are_allocated(tmp_path: Path, host: str) -> None:
    """The largest allocation of a step, evaluation's too, is smaller than the logits, whatever the loss."""
    cls, config, rows, _ = HOSTS[host]
    from patch_models import llama

    model = llama(vocab_size=20000, hidden_size=16)
    loss = losses.NLL() if host == "sft" else losses.SimPO()
    trainer = with_loss(cls)(
        model=model,
        args=config(**settings(tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=1)),
        train_dataset=rows(),
        processing_class=make_tokenizer(),
        loss=loss,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    batch = {name: x.repeat(8, 8) for name, x in batch.items()}
    gradient(trainer, {name: x[:2, :8] for name, x in batch.items()})  # the self-check, and the gradients' buffers
    mask = batch["labels"] != -100 if host == "sft" else batch["completion_mask"] > 0
    logits = 4 * 20000 * int(mask[:, 1:].sum())
    assert logits > 60e6
    with watch_allocations() as seen:
        gradient(trainer, batch)
    assert seen.largest < logits / 1.5


@pytest.mark.slow
def test_the_loss_of_a_router_is_added_as_trl_adds_it(folder: str, tmp_path: Path) -> None:
    def mixture() -> Any:
        torch.manual_seed(0)
        sizes = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        more = {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_local_experts": 4,
            "output_router_logits": True,
        }
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **more, router_aux_loss_coef=0.5))

    args = [trl.SFTConfig(**settings(tmp_path, loss_type=name)) for name in ("dft", "nll")]
    expected = run(trl.SFTTrainer, folder, args[0], sft_rows(), model=mixture())
    got = run(with_loss(trl.SFTTrainer), folder, args[1], sft_rows(), model=mixture(), loss="dft")
    assert expected[1][0]["aux_loss"] > 0.1
    same_run(expected, got)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    ("host", "loss", "message"),
    [
        ("sft", "dpo", r"cannot train 'dpo': it is a pair loss.*DPOTrainer serves it"),
        ("sft", "grpo", r"reads advantages.*GRPOTrainer serves it"),
        ("sft", "psft", r"reads old_logprob"),
        ("sft", "on_policy_distillation", r"samples of the policy"),
        ("sft", "top_k_distillation", r"lists of ids"),
        ("dpo", "nll", r"it is a token loss.*SFTTrainer serves it"),
        ("dpo", "bco_pair", r"reads reward_shift"),
        ("dpo", "kto", r"KTOTrainer serves it"),
        ("kto", "dpo", r"DPOTrainer serves it"),
        ("kto", "bco", r"reads reward_shift"),
    ],
)
def test_a_loss_of_another_kind_is_refused(folder: str, tmp_path: Path, host: str, loss: str, message: str) -> None:
    cls, config, rows, _ = HOSTS[host]
    with pytest.raises(ValueError, match=message):
        built(cls, config, folder, tmp_path, rows(), loss=loss)


@pytest.mark.parametrize("loss", ["nll", "dpo", "gvpo", "a2po", "on_policy_distillation"])
def test_grpo_takes_policy_losses_alone(folder: str, tmp_path: Path, loss: str) -> None:
    with pytest.raises(ValueError, match=f"GRPOTrainer cannot train '{loss}'"):
        built(
            *(trl.GRPOTrainer, trl.GRPOConfig, folder, tmp_path, sft_rows()),
            loss=loss,
            reward_funcs=lengths,
            options={"num_generations": 2},
        )


@pytest.mark.parametrize(
    ("host", "options", "message"),
    [
        ("sft", {"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ("dpo", {"loss_type": ["ipo"]}, "loss_type"),
        ("dpo", {"beta": 0.3}, r"beta: .*got 0\.3 in args.*losses\.SimPO\(beta=\.\.\.\)"),
        ("dpo", {"use_weighting": True}, "use_weighting"),
        ("dpo", {"ld_alpha": 0.5}, "ld_alpha"),
        ("kto", {"desirable_weight": 2.0}, "desirable_weight"),
    ],
)
def test_an_option_of_trls_loss_is_refused(
    folder: str, tmp_path: Path, host: str, options: dict[str, Any], message: str
) -> None:
    cls, config, rows, loss = HOSTS[host]
    with pytest.raises(ValueError, match=message):
        built(cls, config, folder, tmp_path, rows(), loss=loss, options=options)


def test_arguments_that_would_do_nothing_are_refused(folder: str, tmp_path: Path) -> None:
    sft, dpo = (trl.SFTTrainer, trl.SFTConfig), (trl.DPOTrainer, trl.DPOConfig)
    with pytest.raises(ValueError, match="compute_loss_func"):
        built(*sft, folder, tmp_path, sft_rows(), loss="dft", compute_loss_func=lambda *_: None)
    with pytest.raises(ValueError, match="reads no reference, got a model"):
        built(*sft, folder, tmp_path, sft_rows(), loss="dft", ref_model=other_model(folder))
    with pytest.raises(ValueError, match="reads no reference, got a model"):
        built(*dpo, folder, tmp_path, pair_rows(), loss="orpo", ref_model=other_model(folder))
    with pytest.raises(ValueError, match="pass ref_model="):
        built(*sft, folder, tmp_path, sft_rows(), loss="f_divergence_sft")
    with pytest.raises(ValueError, match="expected a loss or its name"):
        built(*sft, folder, tmp_path, sft_rows())
    with pytest.raises(TypeError, match="args: expected the trainer's configuration"):
        with_loss(trl.SFTTrainer)(model=folder, train_dataset=sft_rows(), loss="dft")


def test_trainers_that_are_not_served_are_named() -> None:
    for trainer in (trl.RewardTrainer, trl.RLOOTrainer, transformers.Trainer):
        with pytest.raises(TypeError, match=f"expected SFTTrainer, .* got {trainer.__name__}"):
            with_loss(trainer)


def test_a_failed_trainer_leaves_trl_as_it_was(folder: str, tmp_path: Path) -> None:
    module = sys.modules[trl.SFTTrainer.__module__]
    before = dict(vars(module))
    with pytest.raises(ValueError, match="train_dataset"):
        built(trl.SFTTrainer, trl.SFTConfig, folder, tmp_path, None, loss="dft")
    assert vars(module)["add_fused_lm_head"] is before["add_fused_lm_head"]
    assert vars(module)["BaseTunerLayer"] is before["BaseTunerLayer"]


def test_the_mixin_is_a_base_class_of_a_users_trainer(folder: str, tmp_path: Path) -> None:
    class Mine(LinearLossMixin, trl.SFTTrainer):
        """A user's."""

    args = trl.SFTConfig(**settings(tmp_path))
    trainer = Mine(folder, args, None, sft_rows(), loss="eaft", processing_class=make_tokenizer())
    assert trainer.train().training_loss > 0
    assert trainer.evaluate(sft_rows()).keys() >= {"eval_loss", "eval_entropy", "eval_mean_token_accuracy"}
    made = with_loss(trl.SFTTrainer)(folder, args, None, sft_rows(), loss="eaft", processing_class=make_tokenizer())
    assert made.train().training_loss == pytest.approx(trainer.state.log_history[STEPS]["train_loss"], rel=1e-4)


TWO_PROCESSES = """
import json, os, sys
import trl
from test_trl_losses import run, sft_rows, with_loss
from trl_runs import settings
from pathlib import Path

model, path = sys.argv[1], Path(sys.argv[2])
cls, theirs, ours = trl.SFTTrainer, {"loss_type": "dft"}, {}
args = [trl.SFTConfig(**settings(path, **more)) for more in (theirs, ours)]
host = run(cls, model, args[0], sft_rows())
mine = run(with_loss(cls), model, args[1], sft_rows(), loss="dft")
names = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens")
if host[0].accelerator.is_main_process:
    assert host[0].accelerator.num_processes == 2
    found = [[[entry[name] for name in names] for entry in log[:-1]] for log in (host[1], mine[1])]
    (path / "found.json").write_text(json.dumps(found))
"""


@pytest.mark.slow
def test_two_processes_divide_by_the_tokens_of_both(folder: str, tmp_path: Path) -> None:
    script, here = tmp_path / "two.py", Path(__file__).parent
    script.write_text(TWO_PROCESSES)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    paths = os.pathsep.join([str(here), *sys.path])
    command = [sys.executable, *launcher, str(script), folder, str(tmp_path)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": paths})
    host, mine = json.loads((tmp_path / "found.json").read_text())
    assert len(host) == STEPS
    torch.testing.assert_close(torch.tensor(mine), torch.tensor(host), rtol=2e-4, atol=2e-5)
