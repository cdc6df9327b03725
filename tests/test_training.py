"""Training runs on a tiny model: equal to materialised logits and to themselves in other shapes; what is refused."""

from __future__ import annotations

import math
import re
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
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, LlamaConfig, LlamaModel, get_scheduler

from logitless.testing import watch_allocations
from logitless.training import InputError, NonFiniteLossError, TrainResult, train
from logitless.training.checkpoint import checkpoints
from logitless.training.metrics import read_metrics
from logitless.training.model import check_packing
from logitless.training.optimizer import learning_rate

METHODS = ("sft", "dft", "f-divergence", "dpo")


class Bench:
    """A folder with a tiny model and data, and runs in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = make_model(folder / "model")
        self.rows = write_jsonl(folder / "rows.jsonl", completion_rows())
        self.pairs = write_jsonl(folder / "pairs.jsonl", preference_rows())
        self.runs = 0

    def run(self, **changes: Any) -> tuple[TrainResult, list[dict[str, Any]]]:
        """Trains; returns the result and the records of metrics.jsonl."""
        self.runs += 1
        data = self.pairs if changes.get("method") == "dpo" else self.rows
        defaults = {"model": self.model, "data": data, "folder": self.folder / f"run-{self.runs}"}
        result = train(make_options(**defaults | changes))
        return result, read_metrics(result.output_dir)

    def curve(self, **changes: Any) -> torch.Tensor:
        """[steps, 2] losses and gradient norms."""
        records = [record for record in self.run(**changes)[1] if "loss" in record]
        return torch.tensor([[record["loss"], record["grad_norm"]] for record in records], dtype=torch.float64)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def assert_same_curves(a: torch.Tensor, b: torch.Tensor, tolerance: float = 3e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# The same run in other ways


@pytest.mark.parametrize("method", METHODS)
def test_curves_lie_on_those_of_materialised_logits(bench: Bench, method: str) -> None:
    ours = bench.curve(method=method)
    assert_same_curves(ours, bench.curve(method=method, backend="materialised"))
    assert_same_curves(ours, bench.curve(method=method, backend="reference"))


@pytest.mark.parametrize("method", METHODS)
def test_as_close_to_materialised_logits_as_these_are_to_themselves(bench: Bench, method: str) -> None:
    """Two materialised runs that add up in another order differ by rounding; so does ours from one of them."""
    same: dict[str, Any] = {"method": method, "max_steps": 30, "learning_rate": 1e-3}
    whole: dict[str, Any] = {**same, "per_device_train_batch_size": 4}
    parts: dict[str, Any] = {**same, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    materialised = bench.curve(**whole, backend="materialised")
    other_order = (bench.curve(**parts, backend="materialised") - materialised).abs().mean(0)
    ours = (bench.curve(**whole) - materialised).abs().mean(0)
    # Either is a sample of rounding noise, 0.7 to 2.6 of the other when measured.
    assert (ours <= 4 * other_order + 1e-8).all(), (ours, other_order)


@pytest.mark.parametrize("method", METHODS)
def test_accumulation_is_normalised_over_the_whole_step(bench: Bench, method: str) -> None:
    whole = bench.curve(method=method, per_device_train_batch_size=4)
    parts = bench.curve(method=method, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert_same_curves(whole, parts)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_do_not_see_each_other(bench: Bench, attention: str) -> None:
    same: dict[str, Any] = {"per_device_train_batch_size": 12, "attn_implementation": attention}
    padded = bench.curve(**same)
    assert_same_curves(padded, bench.curve(**same, packing=True))
    assert_same_curves(padded, bench.curve(**same, padding_free=True))


def test_padding_free_pairs(bench: Bench) -> None:
    assert_same_curves(bench.curve(method="dpo"), bench.curve(method="dpo", padding_free=True))


def test_gradient_checkpointing_changes_nothing(bench: Bench) -> None:
    assert_same_curves(bench.curve(), bench.curve(gradient_checkpointing=True), tolerance=1e-6)


@pytest.mark.parametrize("method", ["f-divergence", "dpo"])
def test_precomputed_reference_is_the_reference(bench: Bench, method: str) -> None:
    on_the_fly = bench.curve(method=method)
    assert_same_curves(on_the_fly, bench.curve(method=method, precompute_ref_log_probs=True))
    (cached,) = (bench.folder / "cache" / "reference").iterdir()
    written = cached.stat().st_mtime_ns
    assert_same_curves(on_the_fly, bench.curve(method=method, precompute_ref_log_probs=True))
    assert cached.stat().st_mtime_ns == written  # read, not made again
    bench.curve(method=method, precompute_ref_log_probs=True, max_length=40)
    assert len(list(cached.parent.iterdir())) == (2 if method == "dpo" else 1)  # other tokens only where rows are long


def test_sequence_value_of_f_divergence(bench: Bench) -> None:
    lse: dict[str, Any] = {"method": "f-divergence", "loss": {"value": "lse"}}
    ours = bench.curve(**lse)
    assert_same_curves(ours, bench.curve(**lse, backend="materialised"))
    assert_same_curves(ours, bench.curve(**lse, padding_free=True, precompute_ref_log_probs=True))


def test_eager_reference_stays_where_the_run_began(bench: Bench) -> None:
    _, records = bench.run(method="dpo", max_steps=6)
    assert records[0]["loss"] == pytest.approx(math.log(2)) and records[0]["rewards/margins"] == 0
    assert records[-1]["rewards/margins"] > 0.05 and records[-1]["rewards/accuracies"] == 1
    assert {"rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"} <= records[0].keys()


def test_dropout_is_off_for_losses_with_a_reference(bench: Bench) -> None:
    model = make_model(bench.folder / "dropout", dropout=0.5)
    assert bench.curve(model=model, method="dpo", max_steps=1)[0, 0] == pytest.approx(math.log(2), abs=1e-7)
    assert bench.curve(model=model, method="dpo", max_steps=1, disable_dropout=False)[0, 0] != pytest.approx(
        math.log(2)
    )
    assert not torch.equal(bench.curve(model=model), bench.curve(model=model, disable_dropout=True))


# LoRA


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_lora_trains_the_adapter_alone(bench: Bench, method: str) -> None:
    pytest.importorskip("peft")
    result, records = bench.run(method=method, use_peft=True, lora_target_modules=("q_proj", "v_proj"))
    assert records[-1]["loss"] != records[0]["loss"]
    saved = load_file(result.output_dir / "adapter_model.safetensors")
    assert saved and all("lora_" in name for name in saved)
    assert any(tensor.abs().max() > 0 for name, tensor in saved.items() if "lora_B" in name)
    assert not (result.output_dir / "model.safetensors").exists()


def test_lora_reference_is_the_model_without_its_adapter(bench: Bench) -> None:
    pytest.importorskip("peft")
    lora: dict[str, Any] = {"method": "dpo", "use_peft": True, "lora_dropout": 0.0}
    on_the_fly = bench.curve(**lora)
    assert on_the_fly[0, 0] == pytest.approx(math.log(2))
    assert_same_curves(on_the_fly, bench.curve(**lora, precompute_ref_log_probs=True))


# Other models, other processes


def test_a_gguf_file_is_converted_once(bench: Bench) -> None:
    pytest.importorskip("gguf")
    file = write_gguf(bench.folder / "tiny.gguf", bench.model)
    assert_same_curves(bench.curve(), bench.curve(model=file), tolerance=1e-6)
    (converted,) = (bench.folder / "cache" / "gguf").iterdir()
    assert re.fullmatch(r"tiny-[0-9a-f]{16}", converted.name)
    written = (converted / "model.safetensors").stat().st_mtime_ns
    bench.run(model=file, method="dpo")
    assert (converted / "model.safetensors").stat().st_mtime_ns == written
    (bench.folder / "broken.gguf").write_bytes(b"GGUF and then nothing")
    with pytest.raises(InputError, match=r"broken\.gguf: Transformers cannot read this GGUF file"):
        bench.run(model=str(bench.folder / "broken.gguf"))
    assert len(list(converted.parent.iterdir())) == 1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dft", "dpo", "psft", "bco"])
def test_two_processes_take_the_same_steps(bench: Bench, method: str) -> None:
    marked = [{**row, "desirable": i % 2 == 0} for i, row in enumerate(completion_rows())]
    data = bench.pairs if method == "dpo" else write_jsonl(bench.folder / "marked.jsonl", marked)
    alone = bench.curve(method=method, data=data, gradient_accumulation_steps=2, save_strategy="steps", max_steps=3)
    output = bench.folder / "together"
    options = make_options(output, bench.model, data, method=method, save_strategy="steps", max_steps=3)
    train_in_two_processes(bench.folder, options)
    records = [record for record in read_metrics(output) if "loss" in record]
    together = torch.tensor([[record["loss"], record["grad_norm"]] for record in records], dtype=torch.float64)
    assert_same_curves(alone, together)
    states = load_file(output / "checkpoint-3" / "rng_state.safetensors")
    assert states.keys() == {"cpu.0", "cpu.1"}


TRL_CASES = {
    "sft": ("rows", {"method": "sft"}, {}),
    "dft": ("rows", {"method": "dft"}, {"loss_type": "dft"}),
    "chat": ("chat", {"method": "sft"}, {}),
    "conversations": ("conversations", {"completion_only_loss": False}, {}),
    "dpo": ("pairs", {"method": "dpo"}, {}),
    "ipo": ("pairs", {"method": "dpo", "loss_type": "ipo"}, {"loss_type": "ipo"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", TRL_CASES)
def test_trl_takes_the_same_steps(bench: Bench, case: str) -> None:
    """Rendering, masking, loss, clipping, schedule and optimizer at once, against TRL on the same rows and defaults."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    form, ours, theirs = TRL_CASES[case]
    pairs = preference_rows()
    rows: list[Any] = {
        "rows": completion_rows(),
        "pairs": pairs,
        "chat": [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs],
        "conversations": [{"messages": row["prompt"] + row["chosen"]} for row in pairs],
    }[form]
    data = write_jsonl(bench.folder / "same.jsonl", rows)
    _, records = bench.run(**ours, data=data, per_device_train_batch_size=len(rows), max_steps=3, bf16=False)
    trainer, config = (trl.DPOTrainer, trl.DPOConfig) if form == "pairs" else (trl.SFTTrainer, trl.SFTConfig)
    arguments = config(
        output_dir=str(bench.folder / "trl"),
        per_device_train_batch_size=len(rows),
        learning_rate=1e-3,
        max_steps=3,
        max_length=64,
        logging_steps=1,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        **theirs,
    )
    run = trainer(
        model=bench.model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=make_tokenizer(),
    )
    run.train()
    logged = [record for record in run.state.log_history if "loss" in record]
    # for IPO TRL reports sums over tokens, we the averages that its loss is made of
    rewards = ["rewards/margins", "logps/chosen"] if case == "dpo" else []
    for key in ("loss", "grad_norm", "learning_rate", "num_tokens", *rewards):
        assert [record[key] for record in records] == pytest.approx([record[key] for record in logged], rel=1e-4), key


# What is reported and saved


def test_evaluation_matches_the_stock_model(bench: Bench) -> None:
    _, records = bench.run(method="dft", eval_dataset_name=bench.rows, eval_on_start=True, eval_strategy="steps")
    first = records[0]
    assert first["step"] == 0 and sum("eval_loss" in record for record in records) == 1 + 4
    model = AutoModelForCausalLM.from_pretrained(bench.model).eval()
    tokenizer = make_tokenizer()
    nll, correct, probability, count = 0.0, 0.0, 0.0, 0
    for row in completion_rows():
        ids = torch.tensor([tokenizer(row["prompt"] + row["completion"] + "<|im_end|>")["input_ids"]])
        start = len(row["prompt"])
        logprobs = model(ids).logits[0, start - 1 : -1].detach().double().log_softmax(-1)
        target = ids[0, start:]
        own = logprobs.gather(1, target[:, None])[:, 0]
        nll, probability, count = nll - own.sum(), probability - (own.exp() * own).sum(), count + len(target)
        correct += (logprobs.argmax(1) == target).sum()
    assert first["eval_nll"] == pytest.approx(float(nll / count), rel=1e-5)
    assert first["eval_loss"] == pytest.approx(float(probability / count), rel=1e-5)
    assert first["eval_mean_token_accuracy"] == pytest.approx(float(correct / count))


def test_records_have_the_keys_that_users_chart(bench: Bench) -> None:
    result, records = bench.run(eval_fraction=0.2, report_to="tensorboard")
    expected = {"step", "epoch", "loss", "grad_norm", "learning_rate", "num_tokens", "tokens_per_second", "peak_memory"}
    assert expected == records[0].keys()
    assert [record["step"] for record in records] == [1, 2, 3, 4, 4]
    assert records[3]["num_tokens"] > records[0]["num_tokens"] and records[0]["peak_memory"] > 2**20
    assert result.eval_metrics["eval_loss"] == records[-1]["eval_loss"] and result.peak_memory > 2**20
    assert list((result.output_dir / "runs").glob("events.out.tfevents.*"))


def test_a_window_of_steps_is_averaged(bench: Bench) -> None:
    every, tenth = (bench.run(logging_steps=n)[1] for n in (1, 3))
    assert [record["step"] for record in tenth] == [1, 3, 4]  # the first and the last are always logged
    assert tenth[1]["loss"] == pytest.approx((every[1]["loss"] + every[2]["loss"]) / 2)


@pytest.mark.parametrize("tied", [True, False])
def test_the_final_model_loads_again(bench: Bench, tied: bool) -> None:
    model = make_model(bench.folder / f"tied-{tied}", tied=tied)
    result, _ = bench.run(model=model)
    trained = AutoModelForCausalLM.from_pretrained(result.output_dir)
    assert (trained.lm_head.weight is trained.model.embed_tokens.weight) is tied
    before = AutoModelForCausalLM.from_pretrained(model)
    assert not torch.equal(trained.lm_head.weight, before.lm_head.weight)
    assert not list(result.output_dir.glob(".unfinished*")) and not (result.output_dir / "final").exists()


@pytest.mark.parametrize("name", ["linear", "cosine", "constant", "constant_with_warmup"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_schedules_are_those_of_transformers(name: str, warmup: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=10)
    for step in range(10):
        assert learning_rate(step, 10, warmup, 0.5, name) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_bfloat16_autocast_trains(bench: Bench) -> None:
    half, full = bench.curve(bf16=True), bench.curve(bf16=False)
    assert not torch.equal(half, full)
    torch.testing.assert_close(half, full, rtol=0.05, atol=0.05)


def test_no_tensor_comes_near_the_logits(bench: Bench, tmp_path: Path) -> None:
    """The allocator's own record of a run: training steps and evaluation, of a token loss and of pairs."""
    vocabulary, tokens = 40_000, 1200
    config = LlamaConfig.from_pretrained(bench.model, vocab_size=vocabulary, hidden_size=8, intermediate_size=8)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "wide")
    make_tokenizer().save_pretrained(tmp_path / "wide")
    long = write_jsonl(tmp_path / "long.jsonl", [{"prompt": "p", "completion": "c" * 150} for _ in range(16)])
    pair = [{"prompt": "p", "chosen": "c" * 150, "rejected": "r" * 150} for _ in range(8)]
    pairs = write_jsonl(tmp_path / "long-pairs.jsonl", pair)
    same: dict[str, Any] = {"model": str(tmp_path / "wide"), "max_length": 160, "max_steps": 1}
    for method, data, batch in (("dft", long, 8), ("dpo", pairs, 4)):
        run = same | {"method": method, "data": data, "per_device_train_batch_size": batch, "eval_dataset_name": data}
        with watch_allocations() as seen:
            bench.run(**run)
        assert seen.largest < tokens * vocabulary * 4 / 4
    stock = same | {"data": long, "backend": "materialised", "per_device_train_batch_size": 8}
    with watch_allocations() as seen:
        bench.run(**stock)
    assert seen.largest >= tokens * vocabulary * 4  # the watch would see them


# What is refused


def test_a_non_finite_loss_stops_the_run(bench: Bench) -> None:
    run: dict[str, Any] = {"learning_rate": 1e30, "lr_scheduler_type": "constant"}
    with pytest.raises(NonFiniteLossError, match=r"step 2: the .* is (nan|inf); .* no checkpoint was written yet"):
        bench.run(**run)
    folder = bench.folder / "diverges"
    with pytest.raises(NonFiniteLossError, match=r"step 2: .* the newest checkpoint is .*checkpoint-1"):
        bench.run(**run, save_strategy="steps", save_steps=1, folder=folder)
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-1"]
    assert [record["step"] for record in read_metrics(folder)] == [1]


def test_a_model_of_nan_is_refused(bench: Bench) -> None:
    weights = load_file(Path(bench.model) / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, Path(bench.model) / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((InputError, NonFiniteLossError), match=r"nan|finite"):
        bench.run()


def test_models_that_cannot_be_trained_are_named(bench: Bench, tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path / "empty")
    config = LlamaConfig.from_pretrained(bench.model, tie_word_embeddings=False)
    LlamaModel(config).save_pretrained(tmp_path / "headless")
    bert = BertConfig(vocab_size=258, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    BertForMaskedLM(bert).save_pretrained(tmp_path / "bert")
    for name in ("headless", "bert"):
        make_tokenizer().save_pretrained(tmp_path / name)
    AutoModelForCausalLM.from_pretrained(bench.model).save_pretrained(tmp_path / "mute")
    for name, message in [
        ("none.gguf", "model file not found"),
        ("empty", "not a model folder, it has no config.json"),
        ("headless", "the checkpoint has no weights for the output head"),
        ("bert", "BertLMHeadModel"),
        ("mute", "no tokenizer could be loaded"),
    ]:
        with pytest.raises(InputError, match=message):
            bench.run(model=str(tmp_path / name))
    with pytest.raises(InputError, match=r"no (causal language model|tokenizer) could be loaded"):
        bench.run(model="nobody/no-such-model")


def test_what_this_machine_lacks_is_named(bench: Bench) -> None:
    with pytest.raises(InputError, match="use_liger_kernel needs a GPU and liger-kernel"):
        bench.run(use_liger_kernel=True)
    with pytest.raises(InputError, match="flash_attention_2 needs flash-attn and a GPU"):
        bench.run(attn_implementation="flash_attention_2")
    with pytest.raises(InputError, match=r"no tokenizer|no causal|attention"):
        bench.run(attn_implementation="no_such_attention")


def test_combinations_that_mean_nothing_are_named(bench: Bench) -> None:
    with pytest.raises(InputError, match="packing: dpo looks at whole sequences"):
        bench.run(method="dpo", packing=True)
    with pytest.raises(InputError, match=r"no data for it: .* has no split 'validation' \(dataset_test_split\)"):
        bench.run(eval_strategy="steps", dataset_test_split="validation")
    with pytest.raises(InputError, match=r"columns are .*chosen"):
        bench.run(method="sft", data=bench.pairs)
    with pytest.raises(InputError, match="chosen and rejected missing"):
        bench.run(method="dpo", data=bench.rows)


def test_packing_is_refused_where_rows_would_leak(bench: Bench) -> None:
    model = AutoModelForCausalLM.from_pretrained(bench.model)
    check_packing(model)
    forward = model.model.forward
    model.model.forward = lambda position_ids=None, **inputs: forward(**inputs)  # as models without positions do
    with pytest.raises(InputError, match="lets packed rows see each other"):
        check_packing(model)
