"""Losses of the registry in TRL's trainers: TRL's own loss, weights and metrics where it has the loss, else by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")
datasets = pytest.importorskip("datasets")

from training_fixtures import make_model, make_tokenizer  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import logitless  # noqa: E402
from logitless import losses  # noqa: E402
from logitless.integrations.families import UnsupportedModelError  # noqa: E402
from logitless.integrations.trl.losses import LinearLossMixin, with_loss  # noqa: E402
from logitless.testing import watch_allocations  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

#: Metrics that are no function of the model: times and rates.
CLOCKS = ("runtime", "per_second", "step_time", "total_flos", "epoch")
STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("trl") / "model"
    make_model(path, tied=False)
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():  # logits that tell losses apart
        model.lm_head.weight.mul_(10)
    model.save_pretrained(path)
    return str(path)


def sft_rows() -> Any:
    texts = ["red", "a longer answer", "x", "blue or green", "four", "no", "maybe so", "7", "the end", "yes", "ok", "one"]
    return datasets.Dataset.from_list([{"prompt": f"q{i} ", "completion": t} for i, t in enumerate(texts)])


def pair_rows() -> Any:
    pairs = [("good", "bad thing"), ("a long good answer", "no"), ("y", "n"), ("fine", "not so fine"), ("ab", "ba")]
    rows = [{"prompt": f"q{i} ", "chosen": c, "rejected": r} for i, (c, r) in enumerate(pairs * 3)]
    return datasets.Dataset.from_list(rows[:12])


def marked_rows() -> Any:
    texts = ["good", "bad thing", "a long good answer", "no", "y", "fine", "not so fine", "ab", "ba", "c", "dd", "e"]
    rows = [{"prompt": f"q{i} ", "completion": t, "label": i % 3 != 1} for i, t in enumerate(texts)]
    return datasets.Dataset.from_list(rows)


def settings(path: Path, **more: Any) -> dict[str, Any]:
    fixed = {"output_dir": str(path), "max_steps": STEPS, "report_to": "none", "use_cpu": True, "bf16": False}
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 1}
    rest = {"learning_rate": 1e-3, "disable_tqdm": True, "save_strategy": "no", "gradient_checkpointing": False}
    return {**fixed, **sizes, **rest, **more}


def run(cls: Any, folder: str, args: Any, rows: Any, **more: Any) -> tuple[Any, list[dict[str, float]]]:
    """Trains from the model in the folder; the trainer, and what it logged at every step."""
    torch.manual_seed(0)
    model = more.pop("model", None)
    model = AutoModelForCausalLM.from_pretrained(folder) if model is None else model
    trainer = cls(model=model, args=args, train_dataset=rows, processing_class=make_tokenizer(), **more)
    torch.manual_seed(0)
    trainer.train()
    return trainer, trainer.state.log_history


def same_run(one: tuple[Any, Any], two: tuple[Any, Any], *, but: tuple[str, ...] = (), rel: float = 2e-4) -> None:
    """Both ended at the same weights, and logged the same metrics, gradient norms and losses among them."""
    for (name, x), (_, y) in zip(one[0].model.named_parameters(), two[0].model.named_parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")
    assert len(one[1]) == len(two[1]) > STEPS - 1
    for a, b in zip(one[1], two[1], strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            if not any(word in name for word in (*CLOCKS, *but)):
                assert b[name] == pytest.approx(value, rel=rel, abs=2e-5, nan_ok=True), name


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


@pytest.mark.parametrize("loss", ["nll", "dft"])
def test_sft_is_trls_own(folder: str, tmp_path: Path, loss: str) -> None:
    both(folder, tmp_path, trl.SFTTrainer, trl.SFTConfig, sft_rows(), {"loss_type": loss}, loss)


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


@pytest.mark.parametrize("case", DPO_CASES)
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


def lengths(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text))) for text in completions]


GRPO_CASES = {
    "dapo": ({}, "dapo"),
    "grpo": ({"loss_type": "grpo"}, "grpo"),
    "bnpo": ({"loss_type": "bnpo"}, "bnpo"),
    "dr_grpo": ({"loss_type": "dr_grpo"}, "dr_grpo"),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 5.0}, "cispo"),
    "kl": ({"loss_type": "grpo", "beta": 0.1}, losses.GRPO(beta=0.1, kl_importance=True)),
    "gspo": ({"loss_type": "grpo", "importance_sampling_level": "sequence"}, "gspo"),
}


@pytest.mark.parametrize("case", GRPO_CASES)
def test_grpo_is_trls_own(folder: str, tmp_path: Path, case: str) -> None:
    theirs, loss = GRPO_CASES[case]
    if case == "gspo":
        theirs = {**theirs, "epsilon": losses.GSPO().epsilon_low, "epsilon_high": losses.GSPO().epsilon_high}
    if case == "dapo":
        theirs = {**theirs, "epsilon_high": losses.DAPO().epsilon_high}
    rows = datasets.Dataset.from_list([{"prompt": f"q{i} "} for i in range(12)])
    shared = {
        "max_completion_length": 6,
        "num_generations": 2,
        "temperature": 0.7,
        "steps_per_generation": 4,
        "num_iterations": 2,
        "learning_rate": 3e-3,
    }
    but = ("cispo_clip_ratio", "clip_ratio") if case == "cispo" else ()
    if case == "cispo":
        pytest.importorskip("trl")
    run_both = {"shared": shared, "more": {"reward_funcs": lengths}, "but": but}
    if case != "cispo":
        both(folder, tmp_path, trl.GRPOTrainer, trl.GRPOConfig, rows, theirs, loss, **run_both)
        return
    expected = run(trl.GRPOTrainer, folder, trl.GRPOConfig(**settings(tmp_path, **shared, **theirs)), rows, reward_funcs=lengths)
    got = run(with_loss(trl.GRPOTrainer), folder, trl.GRPOConfig(**settings(tmp_path, **shared)), rows, loss=loss, reward_funcs=lengths)
    for a, b in zip(expected[1], got[1], strict=True):
        for name in ("loss", "grad_norm", "entropy"):
            if name in a:
                assert b[name] == pytest.approx(a[name], rel=2e-4, abs=2e-5)


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
    with pytest.raises(UnsupportedModelError, match=r"integrations\.trl\.losses\.with_loss"):
        logitless.patch(trainer.model)


def test_tags_of_others_pass_and_unpatching_leaves_nothing(folder: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = set(vars(model))
    logitless.patch(model, loss="dft").add_model_tags("mine")
    assert model.model_tags == ["mine"]
    logitless.unpatch(model)
    assert set(vars(model)) - {"model_tags"} == before - {"model_tags"}
