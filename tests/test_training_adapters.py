"""An adapter's folder as the model to start from: trained on, merged or refused; never dropped."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_fixtures import (
    completion_rows,
    make_model,
    make_options,
    make_tokenizer,
    preference_rows,
    train_in_two_processes,
    write_gguf,
    write_jsonl,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, GraniteConfig, GraniteForCausalLM

from logitless.training import InputError, TrainResult, train
from logitless.training.checkpoint import checkpoints
from logitless.training.metrics import read_metrics
from logitless.training.teach import write_teacher_columns

peft = pytest.importorskip("peft")

IDS = torch.arange(5, 60)[None]
LORA: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "init_lora_weights": False}
KINDS: dict[str, Callable[[], Any]] = {
    "plain": lambda: peft.LoraConfig(**LORA),
    "rslora": lambda: peft.LoraConfig(**LORA, use_rslora=True),
    "ranks": lambda: peft.LoraConfig(**LORA, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 3}),
    "head": lambda: peft.LoraConfig(**LORA, target_modules=["q_proj", "lm_head"]),
    "head and embedding": lambda: peft.LoraConfig(**LORA, target_modules=["q_proj", "lm_head", "embed_tokens"]),
    "saved embedding": lambda: peft.LoraConfig(**LORA, modules_to_save=["embed_tokens"]),
    "saved head": lambda: peft.LoraConfig(**LORA, modules_to_save=["lm_head"]),
    "saved both": lambda: peft.LoraConfig(**LORA, modules_to_save=["embed_tokens", "lm_head"]),
    "saved, tied": lambda: peft.LoraConfig(**LORA, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
}
MERGED_KINDS: dict[str, Callable[[], Any]] = {
    "tokens": lambda: peft.LoraConfig(**LORA, trainable_token_indices=[1, 2, 3, 70]),
    "dora on the head": lambda: peft.LoraConfig(**LORA, target_modules=["q_proj", "lm_head"], use_dora=True),
    "ia3": lambda: peft.IA3Config(task_type="CAUSAL_LM", init_ia3_weights=False),
}


def logits(place: str | Path) -> torch.Tensor:
    """What `from_pretrained` makes of a folder."""
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(place).eval()(IDS).logits


def add_adapter(base: str, folder: Path, config: Any) -> tuple[str, torch.Tensor]:
    """Saves a random adapter for a base; returns its folder and the logits of the model that it makes."""
    torch.manual_seed(1)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        return str(folder), model(IDS).logits


class Bench:
    """A tiny base, an adapter of it, and runs that start from the adapter's folder."""

    def __init__(self, folder: Path, kind: str = "plain", *, tied: bool = True) -> None:
        self.folder, self.runs = folder, 0
        self.base = make_model(folder / "base", tied=tied)
        self.rows = write_jsonl(folder / "rows.jsonl", completion_rows())
        self.pairs = write_jsonl(folder / "pairs.jsonl", preference_rows())
        self.adapter, self.start = add_adapter(self.base, folder / "adapter", (KINDS | MERGED_KINDS)[kind]())

    def run(self, model: str | None = None, **changes: Any) -> tuple[TrainResult, list[dict[str, Any]]]:
        self.runs += 1
        data = self.pairs if changes.get("method") == "dpo" else self.rows
        output = self.folder / f"run-{self.runs}"
        result = train(make_options(output, model or self.adapter, data, **{"lora_dropout": 0.0} | changes))
        return result, [record for record in read_metrics(result.output_dir) if "loss" in record]

    def refusal(self, model: str | None = None, **changes: Any) -> str:
        with pytest.raises(InputError) as caught:
            self.run(model, **changes)
        return str(caught.value)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def assert_is(place: str | Path, expected: torch.Tensor) -> None:
    """Float32 rounds a logit of size 1 by 6e-8, some tens of times."""
    torch.testing.assert_close(logits(place), expected, rtol=0, atol=1e-5)


def edit(folder: str, **values: Any) -> None:
    path = Path(folder) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# What is trained and saved


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_given_adapter_is_trained_on(tmp_path: Path, kind: str, tied: bool) -> None:
    bench = Bench(tmp_path, kind, tied=tied)
    result, _ = bench.run(use_peft=True, learning_rate=0.0, max_steps=1)
    assert_is(result.output_dir, bench.start)
    ours, theirs = (
        json.loads((Path(x) / "adapter_config.json").read_text()) for x in (result.output_dir, bench.adapter)
    )
    assert ours == theirs | {"lora_dropout": 0.0}
    trained, _ = bench.run(use_peft=True)
    assert not (trained.output_dir / "model.safetensors").exists()
    assert (logits(trained.output_dir) - bench.start).abs().max() > 1e-3
    before, after = (load_file(Path(x) / "adapter_model.safetensors") for x in (bench.adapter, trained.output_dir))
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before if "lora" in name)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [*KINDS, *MERGED_KINDS])
def test_without_use_peft_it_is_merged_into_its_base(tmp_path: Path, kind: str, tied: bool) -> None:
    bench = Bench(tmp_path, kind, tied=tied)
    result, _ = bench.run(learning_rate=0.0, max_steps=1)
    assert_is(result.output_dir, bench.start)
    assert not (result.output_dir / "adapter_config.json").exists()
    ours, theirs = (json.loads((Path(x) / "config.json").read_text()) for x in (result.output_dir, bench.base))
    may_differ = {"tie_word_embeddings", "use_cache"}
    assert {k: v for k, v in ours.items() if k not in may_differ} == {
        k: v for k, v in theirs.items() if k not in may_differ
    }
    trained, _ = bench.run()
    assert (logits(trained.output_dir) - bench.start).abs().max() > 1e-3


def test_dora_keeps_its_magnitudes(bench: Bench) -> None:
    """Compared through peft: Transformers 5.24 leaves the magnitudes of the file out."""
    adapter, start = add_adapter(bench.base, bench.folder / "dora", peft.LoraConfig(**LORA, use_dora=True))
    for use_peft in (True, False):
        result, records = bench.run(adapter, use_peft=use_peft, method="dpo", learning_rate=0.0, max_steps=1)
        assert records[0]["loss"] == pytest.approx(math.log(2))
        model = AutoModelForCausalLM.from_pretrained(bench.base if use_peft else result.output_dir)
        if use_peft:
            model = peft.PeftModel.from_pretrained(model, result.output_dir)
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(IDS).logits, start, rtol=0, atol=1e-5)


def test_two_runs_in_a_row_as_the_first_page_of_the_documents_has_them(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    sft, _ = bench.run(bench.base, use_peft=True, learning_rate=0.02, lora_dropout=None)
    start = logits(sft.output_dir)
    assert (start - logits(bench.base)).abs().max() > 0.01
    dpo, records = bench.run(str(sft.output_dir), method="dpo", use_peft=True, lora_dropout=None)
    assert records[0]["loss"] == pytest.approx(math.log(2))
    config = json.loads((dpo.output_dir / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (16, 32, 0.05)
    assert config["base_model_name_or_path"] == bench.base
    step = (logits(dpo.output_dir) - start).abs().max()
    assert 0 < step < 0.5 * (start - logits(bench.base)).abs().max()


def test_a_checkpoint_of_an_earlier_run_is_a_model_to_start_from(bench: Bench) -> None:
    first, _ = bench.run(use_peft=True, save_strategy="steps", save_steps=2, learning_rate=0.01)
    place = first.output_dir / "checkpoint-2"
    second, _ = bench.run(str(place), use_peft=True, learning_rate=0.0, max_steps=1)
    assert_is(second.output_dir, logits(place))


def test_the_run_says_what_becomes_of_the_adapter(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.run(use_peft=True, max_steps=1)
    assert f"{bench.adapter} holds an adapter of {bench.base}: it is trained on" in capsys.readouterr().out
    bench.run(max_steps=1)
    assert f"{bench.adapter} holds an adapter of {bench.base}: it is merged into it" in capsys.readouterr().out


def test_bfloat16(bench: Bench) -> None:
    """The adapter stays in float32 under use_peft, and a merged weight is rounded once."""
    kept, _ = bench.run(use_peft=True, dtype="bfloat16", learning_rate=0.0, max_steps=1)
    assert_is(kept.output_dir, bench.start)
    merged, records = bench.run(method="dpo", dtype="bfloat16", learning_rate=0.0, max_steps=1)
    assert records[0]["loss"] == pytest.approx(math.log(2))
    assert (logits(merged.output_dir).float() - bench.start).abs().max() < 0.05
    _, stored = bench.run(method="dpo", dtype="bfloat16", use_peft=True, max_steps=1, precompute_ref_log_probs=True)
    assert stored[0]["loss"] == pytest.approx(math.log(2))


# The reference


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("use_peft", [False, True])
@pytest.mark.parametrize("kind", ["plain", "head", "saved both"])
def test_the_reference_is_the_model_as_it_was_given(tmp_path: Path, kind: str, use_peft: bool, stored: bool) -> None:
    bench = Bench(tmp_path, kind)
    by_hand = make_model(tmp_path / "merged")
    changes: dict[str, Any] = {"method": "dpo", "use_peft": use_peft, "precompute_ref_log_probs": stored}
    _, records = bench.run(**changes)
    assert records[0]["loss"] == pytest.approx(math.log(2))
    assert records[-1]["rewards/margins"] > 0
    if kind == "plain":
        model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bench.base), bench.adapter)
        model.merge_and_unload().save_pretrained(by_hand)
        _, expected = bench.run(by_hand, **changes)
        assert records[0]["logps/chosen"] == pytest.approx(expected[0]["logps/chosen"], abs=1e-3)
        assert bench.run(bench.base, **changes)[1][0]["logps/chosen"] != pytest.approx(
            expected[0]["logps/chosen"], abs=0.1
        )


@pytest.mark.parametrize("kind", ["plain", "head", "saved head"])
@pytest.mark.parametrize("use_peft", [False, True])
def test_a_distribution_is_compared_with_the_model_as_it_was_given(tmp_path: Path, kind: str, use_peft: bool) -> None:
    """The head's adapter is in the reference's head, and the reference stays while the adapter moves."""
    bench = Bench(tmp_path, kind)
    _, records = bench.run(method="distillation", use_peft=use_peft, max_steps=1)
    assert records[0]["loss"] == pytest.approx(0, abs=1e-6)
    changes: dict[str, Any] = {
        "method": "sft_kl",
        "loss": {"kl_weight": 1.0},
        "use_peft": use_peft,
        "learning_rate": 0.01,
    }
    itself, apart = (bench.run(**changes, **x)[1] for x in ({}, {"teacher_model_name_or_path": bench.adapter}))
    assert [r["loss"] for r in itself] == pytest.approx([r["loss"] for r in apart], abs=2e-5)


def test_the_trained_adapter_comes_back_after_the_reference_was_asked(bench: Bench) -> None:
    """A precomputed reference never touches the trained model: the same losses, step by step."""
    changes: dict[str, Any] = {"method": "dpo", "use_peft": True, "learning_rate": 0.01}
    curves = [bench.run(**changes, precompute_ref_log_probs=stored)[1] for stored in (False, True)]
    for ours, theirs in zip(*curves, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6)
        assert ours["rewards/margins"] == pytest.approx(theirs["rewards/margins"], abs=1e-5)


def test_the_cache_of_reference_values_knows_the_adapter(bench: Bench) -> None:
    changes: dict[str, Any] = {"method": "dpo", "use_peft": True, "precompute_ref_log_probs": True, "max_steps": 1}

    def files() -> int:
        return len(list((bench.folder / "cache" / "reference").iterdir()))

    bench.run(**changes)
    bench.run(**changes)
    assert files() == 1
    edit(bench.adapter, lora_alpha=80)
    assert bench.run(**changes)[1][0]["loss"] == pytest.approx(math.log(2))
    assert files() == 2
    path = Path(bench.adapter) / "adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    assert bench.run(**changes)[1][0]["loss"] == pytest.approx(math.log(2))
    assert files() == 3


@pytest.mark.parametrize("use_peft", [False, True])
def test_an_adapter_is_a_teacher(bench: Bench, use_peft: bool) -> None:
    teacher = {"teacher_model_name_or_path": bench.adapter}
    _, same = bench.run(method="distillation", use_peft=use_peft, max_steps=1, **teacher)
    _, other = bench.run(bench.base, method="distillation", use_peft=use_peft, max_steps=1, **teacher)
    assert same[0]["loss"] == pytest.approx(0, abs=1e-6) and other[0]["loss"] > 1e-3


@pytest.mark.parametrize("use_peft", [False, True])
def test_an_adapter_teaches(bench: Bench, use_peft: bool) -> None:
    output = bench.folder / "taught.jsonl"
    options = make_options(bench.folder / "none", bench.adapter, bench.rows, use_peft=use_peft)
    write_teacher_columns(options, str(output), k=258)
    row = json.loads(output.read_text().splitlines()[0])
    tokenizer = make_tokenizer()
    prompt, answer = (tokenizer(row[name], add_special_tokens=False).input_ids for name in ("prompt", "completion"))
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bench.base), bench.adapter).eval()
    with torch.no_grad():
        expected = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1].log_softmax(-1)
    given = torch.zeros(258)
    given[torch.tensor(row["target_ids"][0])] = torch.tensor(row["teacher_logprob"][0])
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-4)


def test_a_following_reference_follows_a_merged_adapter(bench: Bench) -> None:
    following: dict[str, Any] = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0}
    _, records = bench.run(method="dpo", **following)
    assert all(record["loss"] == pytest.approx(math.log(2)) for record in records)
    assert "sync_ref_model: use_peft" in bench.refusal(method="dpo", use_peft=True, **following)


def test_components_of_a_mixture_start_from_the_adapter(bench: Bench) -> None:
    mixture = [
        {"method": "sft", "dataset_name": bench.rows},
        {"method": "dpo", "dataset_name": bench.pairs},
        {"method": "distillation", "dataset_name": bench.rows},
    ]
    options = make_options(bench.folder / "mixed", bench.adapter, "", mixture=mixture, use_peft=True, lora_dropout=0.0)
    first = read_metrics(train(options).output_dir)[0]
    assert first["dpo/loss"] == pytest.approx(math.log(2)) and first["distillation/loss"] == pytest.approx(0, abs=1e-6)


# Going on after an interruption


@pytest.mark.parametrize("use_peft", [False, True])
@pytest.mark.parametrize("stored", [False, True])
def test_resuming_is_exact(bench: Bench, use_peft: bool, stored: bool) -> None:
    changes: dict[str, Any] = {
        "method": "dpo", "use_peft": use_peft, "precompute_ref_log_probs": stored, "save_strategy": "steps",
        "save_steps": 2, "learning_rate": 0.01, "lora_dropout": 0.2, "disable_dropout": False,
    }  # fmt: skip
    whole, records = bench.run(**changes)
    parts, _ = bench.run(**changes)
    shutil.rmtree(checkpoints(parts.output_dir)[-1])
    (parts.output_dir / ("adapter_model.safetensors" if use_peft else "model.safetensors")).unlink()
    train(make_options(parts.output_dir, bench.adapter, bench.pairs, **changes, resume=True))
    assert [r["loss"] for r in read_metrics(parts.output_dir)] == [r["loss"] for r in records]
    assert torch.equal(logits(parts.output_dir), logits(whole.output_dir))


def test_a_resumed_run_needs_the_adapter_that_it_began_with(bench: Bench) -> None:
    first, _ = bench.run(use_peft=True, save_strategy="steps", save_steps=2)
    again = {"use_peft": True, "resume": True, "output_dir": str(first.output_dir), "max_steps": 6}
    assert "lora_r: the adapter in" in bench.refusal(**again, lora_r=8)
    edit(bench.adapter, lora_alpha=9)
    assert "adapter has other weights or settings of the adapter than" in bench.refusal(**again)


@pytest.mark.parametrize("use_peft", [False, True])
def test_a_resumed_run_needs_the_base_that_its_adapter_had(bench: Bench, use_peft: bool) -> None:
    changes: dict[str, Any] = {"method": "dpo", "use_peft": use_peft}
    first, _ = bench.run(**changes, save_strategy="steps", save_steps=2)
    again = changes | {"resume": True, "output_dir": str(first.output_dir), "max_steps": 6}
    model = AutoModelForCausalLM.from_pretrained(bench.base)
    model.model.norm.weight.data.mul_(1.5)
    model.save_pretrained(bench.base)
    assert "has other weights of the adapter's base than the model" in bench.refusal(**again)


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_r": 16}, "lora_r: the adapter in {adapter}, which is trained on, has 4, got 16"),
        ({"lora_alpha": 32}, "lora_alpha: the adapter in {adapter}, which is trained on, has 8, got 32"),
        ({"lora_target_modules": ("q_proj",)}, "has ['q_proj', 'v_proj'], got ['q_proj']"),
        ({"lora_target_modules": ("all-linear",)}, "has ['q_proj', 'v_proj'], got ['all-linear']"),
    ],
)
def test_an_adapter_of_another_shape_is_not_what_is_trained_on(
    bench: Bench, changes: dict[str, Any], message: str
) -> None:
    assert message.format(adapter=bench.adapter) in bench.refusal(use_peft=True, **changes)


def test_every_name_of_a_module_is_one(bench: Bench) -> None:
    """peft adapts those that it finds, and leaves the others out."""
    message = "lora_target_modules: the model has no module called 'v_porj' (nearest: v_proj"
    assert message in bench.refusal(bench.base, use_peft=True, lora_target_modules=("q_proj", "v_porj"))
    bench.run(bench.base, use_peft=True, max_steps=1, lora_target_modules=("layers.1.self_attn.q_proj", "lm_head"))


def test_options_of_lora_without_it_are_noted(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.run(bench.base, max_steps=1, lora_dropout=None, lora_r=8)
    assert "note: lora_r: no effect without use_peft; all weights are trained" in capsys.readouterr().out
    for changes in ({"lora_r": 8, "use_peft": True}, {}):
        bench.run(bench.base, max_steps=1, **{"lora_dropout": None} | changes)
        assert "no effect without" not in capsys.readouterr().out


def test_a_model_for_which_peft_chooses_no_modules(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    sizes = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = GraniteConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    GraniteForCausalLM(config).save_pretrained(bench.base)
    message = "lora_target_modules: peft has no choice for models of type 'granite'; expected names, or all-linear"
    assert message in bench.refusal(bench.base, use_peft=True)
    bench.run(bench.base, use_peft=True, max_steps=1, lora_target_modules=("all-linear",))


def test_the_adapters_own_shape_may_be_named(bench: Bench) -> None:
    bench.run(use_peft=True, max_steps=1, lora_r=4, lora_alpha=8, lora_target_modules=("v_proj", "q_proj"))
    every, _ = bench.run(bench.base, use_peft=True, max_steps=1, lora_target_modules=("all-linear",))
    result, _ = bench.run(
        str(every.output_dir), use_peft=True, max_steps=1, lora_target_modules=("all-linear",), lora_dropout=0.1
    )
    assert json.loads((result.output_dir / "adapter_config.json").read_text())["lora_dropout"] == 0.1


@pytest.mark.parametrize(
    ("kind", "message"),
    [("ia3", "use_peft: {} holds an adapter of kind IA3"), ("dora on the head", "adapter of kind Dora")],
)
def test_other_kinds_are_not_trained_on(tmp_path: Path, kind: str, message: str) -> None:
    bench = Bench(tmp_path, kind)
    assert message.format(bench.adapter) in bench.refusal(use_peft=True)


@pytest.mark.parametrize("use_peft", [False, True])
def test_virtual_tokens_are_refused(bench: Bench, use_peft: bool) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(bench.base), config)
    model.save_pretrained(bench.folder / "prompt")
    assert "kind PROMPT_TUNING is made of virtual tokens" in bench.refusal(
        str(bench.folder / "prompt"), use_peft=use_peft
    )


@pytest.mark.parametrize("use_peft", [False, True])
def test_a_base_that_is_not_there_is_named(bench: Bench, use_peft: bool) -> None:
    moved = bench.folder / "elsewhere"
    Path(bench.base).rename(moved)
    found = bench.refusal(use_peft=use_peft)
    assert f"{bench.adapter}: the adapter's base model {bench.base!r} (base_model_name_or_path" in found
    edit(bench.adapter, base_model_name_or_path=str(moved))
    bench.run(use_peft=use_peft, max_steps=1)
    edit(bench.adapter, base_model_name_or_path="no-one/no-such-model")
    assert (
        "'no-one/no-such-model' (base_model_name_or_path in adapter_config.json) was not found, neither as a folder"
        in (bench.refusal(use_peft=use_peft))
    )
    edit(bench.adapter, base_model_name_or_path=None)
    assert "names no base_model_name_or_path" in bench.refusal(use_peft=use_peft)
    upper = add_adapter(str(moved), bench.folder / "upper", KINDS["plain"]())[0]
    edit(upper, base_model_name_or_path=bench.adapter)
    assert "holds an adapter itself" in bench.refusal(upper, use_peft=use_peft)


@pytest.mark.parametrize("use_peft", [False, True])
def test_a_model_and_an_adapter_in_one_folder(bench: Bench, use_peft: bool) -> None:
    """A configuration without weights is no model: some trainers copy the base's beside the adapter."""
    shutil.copy(Path(bench.base) / "config.json", bench.adapter)
    result, _ = bench.run(use_peft=use_peft, learning_rate=0.0, max_steps=1)
    assert_is(result.output_dir, bench.start)
    shutil.copy(Path(bench.base) / "model.safetensors", bench.adapter)
    assert "holds a whole model (model.safetensors) and an adapter (adapter_config.json)" in bench.refusal(
        use_peft=use_peft
    )


def test_an_output_folder_never_holds_both(bench: Bench) -> None:
    adapted, _ = bench.run(use_peft=True, max_steps=1)
    whole, _ = bench.run(max_steps=1)
    assert "holds an adapter (adapter_config.json)" in bench.refusal(output_dir=str(adapted.output_dir))
    assert "holds a whole model (config.json)" in bench.refusal(output_dir=str(whole.output_dir), use_peft=True)
    assert "is the base of the adapter" in bench.refusal(output_dir=bench.base)


def test_several_adapters_in_one_folder(bench: Bench) -> None:
    """The one in the folder itself is the model; those in folders below are others."""
    several = bench.folder / "several"
    for name in ("first", "second"):
        shutil.copytree(bench.adapter, several / name)
    assert "not a model folder, it has no config.json" in bench.refusal(str(several), use_peft=True)
    shutil.copytree(bench.adapter, several, dirs_exist_ok=True)
    result, _ = bench.run(str(several), use_peft=True, learning_rate=0.0, max_steps=1)
    assert_is(result.output_dir, bench.start)
    assert not [path for path in result.output_dir.iterdir() if path.name in ("first", "second")]


def damaged(bench: Bench, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> str:
    path = Path(bench.adapter) / "adapter_model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    return bench.refusal(use_peft=True)


def test_every_weight_of_an_adapter_finds_its_place(bench: Bench) -> None:
    prefix = "does not fit"
    assert prefix in damaged(bench, lambda w: {k.replace("base_model.", "", 1): v for k, v in w.items()})
    assert prefix in damaged(bench, lambda w: {k: v[:, :1].clone() if "lora_B" in k else v for k, v in w.items()})
    (Path(bench.adapter) / "adapter_model.safetensors").unlink()
    assert "no adapter could be loaded from there: the folder has none of the files" in bench.refusal()
    for content, reason in (
        (b"no tensors", "adapter_model.safetensors is damaged or not whole"),
        (b"version https://git-lfs.github.com/spec/v1", "adapter_model.safetensors is a pointer of Git LFS"),
    ):
        (Path(bench.adapter) / "adapter_model.safetensors").write_bytes(content)
        assert f"no adapter could be loaded from there: {reason}" in bench.refusal()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{", "its adapter_config.json cannot be read: JSONDecodeError"),
        ('{"peft_type": "OF_TOMORROW", "base_model_name_or_path": "base"}', "cannot be read: KeyError: 'OF_TOMORROW'"),
    ],
)
def test_a_configuration_that_cannot_be_read(bench: Bench, settings: str, message: str) -> None:
    (Path(bench.adapter) / "adapter_config.json").write_text(settings)
    assert message in bench.refusal(use_peft=True)


def test_what_peft_does_not_know_is_no_matter_only_where_it_is_off(bench: Bench) -> None:
    edit(bench.adapter, of_tomorrow=False, tomorrows_size=16, tomorrows_config=None, peft_version="99.0")
    bench.run(use_peft=True, max_steps=1)
    edit(bench.adapter, of_tomorrow=True)
    assert "does not know of_tomorrow in adapter_config.json, which peft 99.0 wrote" in bench.refusal(use_peft=True)


def test_an_adapter_of_a_deeper_model_does_not_fit(bench: Bench) -> None:
    def add_layer(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return weights | {name.replace("layers.1", "layers.2"): x.clone() for name, x in weights.items()}

    assert "does not fit" in damaged(bench, add_layer)


# Tokenizers and other sources


def test_the_tokenizer_is_the_adapters_or_else_the_bases(bench: Bench) -> None:
    result, _ = bench.run(use_peft=True, max_steps=1)
    assert AutoTokenizer.from_pretrained(result.output_dir).chat_template == make_tokenizer().chat_template
    make_tokenizer("{{ messages[0]['content'] }}").save_pretrained(bench.adapter)
    for use_peft in (False, True):
        result, _ = bench.run(use_peft=use_peft, max_steps=1)
        assert AutoTokenizer.from_pretrained(result.output_dir).chat_template == "{{ messages[0]['content'] }}"


def test_an_adapter_of_a_gguf_model(bench: Bench) -> None:
    pytest.importorskip("gguf")
    file = write_gguf(bench.folder / "tiny.gguf", bench.base)
    first, _ = bench.run(file, use_peft=True, learning_rate=0.02)
    second, _ = bench.run(str(first.output_dir), use_peft=True, learning_rate=0.0, max_steps=1)
    assert_is(second.output_dir, logits(first.output_dir))
    (base,) = (bench.folder / "cache" / "gguf").iterdir()
    assert (logits(first.output_dir) - logits(base)).abs().max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("use_peft", [False, True])
def test_two_processes_take_the_same_steps(bench: Bench, use_peft: bool) -> None:
    changes: dict[str, Any] = {"method": "dpo", "use_peft": use_peft, "learning_rate": 0.01, "lora_dropout": 0.0}
    _, alone = bench.run(**changes, gradient_accumulation_steps=2)
    options = make_options(bench.folder / "together", bench.adapter, bench.pairs, **changes)
    train_in_two_processes(bench.folder, options)
    together = [record for record in read_metrics(bench.folder / "together") if "loss" in record]
    for ours, theirs in zip(together, alone, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=3e-5)


@pytest.mark.parametrize("use_peft", [False, True])
@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_brings_the_rows_of_its_own_tokens(tmp_path: Path, tied: bool, use_peft: bool) -> None:
    bench = Bench(tmp_path, tied=tied)
    config = peft.LoraConfig(**LORA, modules_to_save=["embed_tokens"] if tied else ["embed_tokens", "lm_head"],
                             ensure_weight_tying=tied)  # fmt: skip
    grown = AutoModelForCausalLM.from_pretrained(bench.base)
    grown.resize_token_embeddings(261)
    torch.manual_seed(1)
    model = peft.get_peft_model(grown, config).eval()
    model.get_input_embeddings().weight.data.add_(0.05)
    model.save_pretrained(tmp_path / "grown")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<tool>", "</tool>", "<end>"])
    tokenizer.save_pretrained(tmp_path / "grown")
    rows = [{"prompt": "p", "completion": "<tool>1</tool>"}] * 4
    bench.rows = write_jsonl(tmp_path / "tools.jsonl", rows)
    result, _ = bench.run(str(tmp_path / "grown"), use_peft=use_peft, learning_rate=0.0, max_steps=1)
    ids = tokenizer("p<tool>1</tool>", return_tensors="pt").input_ids
    assert ids.max() == 259
    with torch.no_grad():
        expected = model(ids).logits
        if use_peft:
            base = AutoModelForCausalLM.from_pretrained(bench.base)
            base.resize_token_embeddings(261)
            again = peft.PeftModel.from_pretrained(base, result.output_dir).eval()
        else:
            again = AutoModelForCausalLM.from_pretrained(result.output_dir).eval()
            assert again.config.vocab_size == 261
        torch.testing.assert_close(again(ids).logits, expected, rtol=0, atol=1e-5)
    assert bench.run(str(tmp_path / "grown"), use_peft=use_peft, method="dpo")[1][0]["loss"] == pytest.approx(
        math.log(2)
    )


def test_rows_that_neither_base_nor_adapter_has(tmp_path: Path) -> None:
    bench = Bench(tmp_path, tied=False)
    grown = AutoModelForCausalLM.from_pretrained(bench.base)
    grown.resize_token_embeddings(261)
    config = peft.LoraConfig(**LORA, modules_to_save=["embed_tokens"])
    peft.get_peft_model(grown, config).save_pretrained(tmp_path / "grown", save_embedding_layers=False)
    assert "was trained with 261 rows of the vocabulary, and its base" in bench.refusal(str(tmp_path / "grown"))


@pytest.mark.parametrize("kind", ["dora on the head", "ia3", "tokens"])
def test_any_adapter_that_can_be_merged_is_a_teacher_of_lora(tmp_path: Path, kind: str) -> None:
    bench = Bench(tmp_path, kind)
    changes: dict[str, Any] = {"method": "distillation", "use_peft": True, "max_steps": 1}
    _, records = bench.run(bench.base, teacher_model_name_or_path=bench.adapter, **changes)
    assert records[0]["loss"] > 1e-4
    merged, _ = bench.run(max_steps=1, learning_rate=0.0)
    _, same = bench.run(str(merged.output_dir), teacher_model_name_or_path=bench.adapter, **changes)
    assert same[0]["loss"] == pytest.approx(0, abs=1e-6)


def test_an_activated_lora_is_refused(bench: Bench) -> None:
    edit(bench.adapter, alora_invocation_tokens=[70, 71])
    for use_peft in (False, True):
        assert "an activated LoRA (alora_invocation_tokens)" in bench.refusal(use_peft=use_peft)


@pytest.mark.parametrize("changes", [{"packing": True}, {"padding_free": True}, {"gradient_checkpointing": True},
                                     {"backend": "materialised"}, {"backend": "reference"}], ids=str)  # fmt: skip
def test_the_shape_of_a_run_changes_nothing(bench: Bench, changes: dict[str, Any]) -> None:
    for use_peft in (False, True):
        result, _ = bench.run(use_peft=use_peft, learning_rate=0.0, max_steps=1, **changes)
        assert_is(result.output_dir, bench.start)
