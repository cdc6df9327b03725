"""What a model answers: greedy completions of chat prompts in batches, remembered on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MAX_NEW_TOKENS = 96
BATCH_SIZE = 48


def answers(model_folder: Path, prompts: Sequence[str], cache: Path) -> list[str]:
    """The model's completions, one per prompt. Earlier completions of the same weights and prompts are read from disk.

    Args:
        model_folder: a Transformers model with a chat template in its tokenizer.
        prompts: what the user says, each in a conversation of its own.
        cache: folder of earlier answers.
    """
    file = cache / f"{_key(model_folder, prompts)}.json"
    if not file.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(_generate_all(model_folder, prompts)), encoding="utf-8")
        unfinished.replace(file)
    remembered: list[str] = json.loads(file.read_text(encoding="utf-8"))
    return remembered


def _key(model_folder: Path, prompts: Sequence[str]) -> str:
    digest = hashlib.sha256(json.dumps([MAX_NEW_TOKENS, *prompts]).encode())
    for weights in sorted(model_folder.glob("*.safetensors")):
        with weights.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


def _generate_all(model_folder: Path, prompts: Sequence[str]) -> list[str]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    found: dict[int, str] = {}
    for start in range(0, len(prompts), BATCH_SIZE):
        batch = by_length[start : start + BATCH_SIZE]
        found |= zip(batch, _generate(model, tokenizer, [prompts[index] for index in batch]), strict=True)
    return [found[index] for index in range(len(prompts))]


def _generate(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    import torch

    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
        for prompt in prompts
    ]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
    with torch.inference_mode():
        written = model.generate(
            **inputs,
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            use_cache=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    completions = written[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(completions, skip_special_tokens=True)]
