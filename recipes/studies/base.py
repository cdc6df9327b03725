"""The base model of the studies: a small Llama over single characters, trained from nothing on running sums."""

from __future__ import annotations

from pathlib import Path

import task

CHARACTERS = "0123456789+="
SPECIAL = ("<pad>", "<s>", "</s>")
LENGTHS = (2, 2, 3, 3, 4, 4, 5, 5, 6, 7, 8)  # of the questions it learns: short ones more often
ROWS, SEED = 50_000, 0


def make(folder: Path, steps: int) -> Path:
    """The base model in `folder`, made on first use by `logitless train`."""
    trained = folder / "base"
    if not (trained / "model.safetensors").is_file():
        _train(_untrained(folder / "untrained"), task.write(folder / "corpus.jsonl", _corpus()), trained, steps)
    return trained


def _corpus() -> list[task.Row]:
    return task.demonstrations(SEED, ROWS, lengths=LENGTHS)


def _untrained(folder: Path) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(CHARACTERS),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def _tokenizer():  # type: ignore[no-untyped-def]
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *CHARACTERS))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[0]))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    pad, start, end = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=pad, bos_token=start, eos_token=end)


def _train(model: Path, corpus: Path, output: Path, steps: int) -> None:
    from logitless.training import TrainOptions, train

    train(
        TrainOptions(
            method="sft",
            model_name_or_path=str(model),
            dataset_name=str(corpus),
            output_dir=str(output),
            per_device_train_batch_size=64,
            max_steps=steps,
            max_length=64,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            warmup_steps=50,
            save_strategy="no",
            logging_steps=100,
            seed=SEED,
            use_cpu=True,
        )
    )
