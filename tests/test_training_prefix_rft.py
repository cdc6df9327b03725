"""A task that Prefix-RFT solves, and that neither its demonstrations nor its reward teach alone.

An answer is a derivation of six tokens and a result, and is right as a whole or not at all. Chance does not find it (8
tokens, seven places), so that a run with the reward alone never sees one. Demonstrations have the derivation, and a
result that was drawn blindly: who imitates them is right as often as they are, once in five. A policy that continues
them finds results first, then ever more of the derivation.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from rollout_cases import HERE
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from training_fixtures import make_options, write_jsonl
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from logitless.training import train
from logitless.training.metrics import read_metrics

TOKENS = ["<s>", "</s>", "=", *"01234"]
DERIVATION, RESULTS = "3=1=40", "32041"
STEPS = 300


def make_task(folder: Path, seed: int) -> tuple[str, str, str]:
    """A model that knows nothing, data to train on, and prompts that are held out."""
    torch.manual_seed(seed)
    core = Tokenizer(models.WordLevel({token: index for index, token in enumerate(TOKENS)}, unk_token="="))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder / "model")
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    draw = random.Random(seed)
    rows = []
    for number in range(125):
        asked = f"{number // 25}{number // 5 % 5}{number % 5}"
        shown, right = DERIVATION + draw.choice("01234"), DERIVATION + RESULTS[int(asked[0])]
        rows.append({"prompt": f"{asked}=", "completion": shown, "truth": right})
    draw.shuffle(rows)
    parts = zip(("train", "held-out"), (rows[:100], rows[100:]), strict=True)
    return str(folder / "model"), *(write_jsonl(folder / f"{name}.jsonl", part) for name, part in parts)  # type: ignore[return-value]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_prefix_rft_solves_what_sft_and_grpo_do_not(tmp_path: Path, seed: int) -> None:
    model, data, held_out = make_task(tmp_path, seed)
    sampled: dict[str, Any] = {
        "reward_funcs": (f"{HERE}:true",),
        "num_generations": 8,
        "max_completion_length": 7,
    }

    def run(name: str, start: str, **changes: Any) -> Path:
        settings: dict[str, Any] = {
            "seed": seed,
            "max_steps": STEPS,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "linear",
            "per_device_train_batch_size": 64,
            "max_length": 32,
        }
        options = make_options(tmp_path / name, start, data, **settings | changes)
        train(options)
        return Path(options.output_dir)

    def share_of_right(folder: Path) -> float:
        """The share of right answers to prompts that were not trained on, eight to each."""
        asked = {**sampled, "num_generations_eval": 8, "eval_dataset_name": held_out, "eval_on_start": True}
        found = run(f"{folder.name}-asked", str(folder), method="grpo", max_steps=1, **asked)
        share: float = read_metrics(found)[0]["eval_reward"]
        return share

    shown = {"num_demonstrations": 4, "demonstration_schedule": {"end": 0.0}, "loss": {"entropy_coef": 0.03}}
    prefix = run("prefix_rft", model, method="prefix_rft", **shown, **sampled)
    grpo = run("grpo", model, method="grpo", **sampled)
    sft = run("sft", model, method="sft")
    assert all(record["frac_reward_zero_std"] == 1 for record in read_metrics(grpo) if "loss" in record)
    assert share_of_right(grpo) == 0
    assert share_of_right(sft) < 0.4
    assert share_of_right(prefix) > 0.6  # rounding decides whether a seed misses one of the five results
