"""A tiny random Llama with a byte-level tokenizer, and small data files, for the tests of the training command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from logitless.training import TrainOptions

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>"]


def make_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """One token per byte, two special tokens, ids 0 to 257."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[1],
        pad_token=SPECIAL[1],
        chat_template=chat_template,
    )


def make_model(
    folder: Path,
    *,
    tied: bool = True,
    dropout: float = 0.0,
    chat_template: str | None = CHATML,
    vocabulary: int = 258,
    sharpness: float = 1.0,
) -> str:
    """Saves the model and tokenizer; returns the folder as the option takes it. `sharpness` multiplies the logits."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        attention_dropout=dropout,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(sharpness)
    model.save_pretrained(folder)
    make_tokenizer(chat_template).save_pretrained(folder)
    return str(folder)


def write_gguf(path: Path, folder: str) -> str:
    """Saves the model and tokenizer in `folder` as an unquantised GGUF file; returns its path."""
    import gguf

    model = LlamaForCausalLM.from_pretrained(folder)
    config, writer = model.config, gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = make_tokenizer().get_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    writer.add_token_types([3, 3] + [1] * (len(vocabulary) - 2))  # control tokens, then normal ones
    writer.add_token_scores([0.0] * len(vocabulary))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)
    writer.add_chat_template(CHATML)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":  # tied
            values, count = tensor.numpy(), heads.get(name.split(".")[-2])
            if count is not None:  # the format keeps the two halves of a rotated head interleaved
                halves = values.reshape(count, 2, len(values) // count // 2, -1)
                values = halves.swapaxes(1, 2).reshape(values.shape).copy()
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def write_jsonl(path: Path, rows: list[Any]) -> str:
    """Saves rows as JSONL; returns the path as the option takes it."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def completion_rows(count: int = 12) -> list[dict[str, str]]:
    """Prompt and completion as strings, of many lengths."""
    return [{"prompt": f"{i} + {i} = ", "completion": str(2 * i) * (1 + i % 4)} for i in range(count)]


def preference_rows(count: int = 8) -> list[dict[str, Any]]:
    """Chat prompt, chosen and rejected."""
    return [
        {
            "prompt": [{"role": "user", "content": f"{i} + 1?"}],
            "chosen": [{"role": "assistant", "content": str(i + 1)}],
            "rejected": [{"role": "assistant", "content": "no idea " * (1 + i % 2)}],
        }
        for i in range(count)
    ]


def make_options(folder: Path, model: str, data: str, **changes: Any) -> TrainOptions:
    """Options of a quick run on the CPU."""
    defaults: dict[str, Any] = {
        "model_name_or_path": model,
        "dataset_name": data,
        "output_dir": str(folder),
        "cache_dir": str(folder.parent / "cache"),
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "max_length": 64,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
    }
    return TrainOptions(**defaults | changes)


def train_in_processes(
    folder: Path, options: TrainOptions, processes: int = 2, config: Path | None = None, before: str = ""
) -> subprocess.CompletedProcess[str]:
    """Runs the options in processes on this machine, after the lines `before`; scripts go into `folder`.

    They are started by torchrun, or by `accelerate launch` where there is a configuration for it.
    """
    settings, script = folder / "options.json", folder / "run.py"
    settings.write_text(json.dumps(options.to_dict()))
    script.write_text(
        f"import json, os, sys\nfrom logitless.training import TrainOptions, train\n{before}"
        "train(TrainOptions(**json.load(open(sys.argv[1]))))\n"
        # once in many runs a thread of gloo outlives Python's shutdown, and C++ then aborts the process
        "sys.stdout.flush()\nsys.stderr.flush()\nos._exit(0)\n"
    )
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    if config is not None:
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", str(processes)]
        launcher += ["--main_process_port", "0"]
    command = [sys.executable, *launcher, str(script), str(settings)]
    return subprocess.run(command, capture_output=True, text=True)


def train_in_two_processes(folder: Path, options: TrainOptions) -> None:
    """Runs the options under torchrun, two processes on this machine; scripts go into `folder`."""
    done = train_in_processes(folder, options)
    assert done.returncode == 0, done.stderr
