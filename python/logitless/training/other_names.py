"""Names of options in the files of TRL, Transformers and PEFT that are no options here: what each of them is read as.

A saved file of these tools holds every setting, most of them at their defaults. So a default is never an error; a value
that would train something else is one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from logitless.training.errors import InputError

# The same option under the name another tool, or an older release, gives it.
ALIASES = {
    "torch_dtype": "dtype",
    "f_divergence_type": "divergence",
    "f_alpha_divergence_coef": "alpha",
    "activation_checkpointing": "gradient_checkpointing",
    "max_seq_length": "max_length",
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "use_liger": "use_liger_kernel",
}

# Settings of a loss that stand beside the options in TRL's files: the loss's name of each, and TRL's default. That is
# the loss's own default too, or one that switches off what a loss without the setting does not have.
LOSS_SETTINGS: dict[str, tuple[str, Any]] = {
    "desirable_weight": ("desirable_weight", 1.0),
    "undesirable_weight": ("undesirable_weight", 1.0),
    "discopop_tau": ("discopop_tau", 0.05),
    "use_weighting": ("use_weighting", False),
    "ld_alpha": ("tail_weight", None),
    "epsilon": ("epsilon_low", 0.2),
    "epsilon_high": ("epsilon_high", None),
    "delta": ("delta", None),
}

# Options that TRL leaves null for "not given"; null elsewhere has a meaning of its own there, or none.
NULLABLE = (
    *("model_name_or_path", "dataset_name", "attn_implementation", "gradient_checkpointing", "warmup_ratio"),
    *("max_completion_length", "top_k", "min_p"),
)

_INERT = {
    "rows are tokenised in one process": ("dataset_num_proc",),
    "batches are made in the main process": (
        *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_in_order"),
        *("dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
    ),
    "rows are shuffled anew in every epoch": (
        *("shuffle_dataset", "train_sampling_strategy", "group_by_length", "length_column_name"),
    ),
    "columns that no form uses are always ignored": ("remove_unused_columns", "label_names"),
    "padding counts in no loss": ("pad_to_multiple_of",),
    "packing is always best-fit decreasing": ("packing_strategy",),
    "checkpointing is always the non-reentrant form": (
        *("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
    ),
    "activations stay on the device": ("activation_offloading",),
    "training makes no cache": ("use_cache",),
    "the device's memory is left to PyTorch": ("torch_empty_cache_steps", "skip_memory_metrics"),
    "the model is not compiled": ("torch_compile", "torch_compile_backend", "torch_compile_mode"),
    "float32 products are PyTorch's": ("tf32",),
    "torchrun or accelerate launch sets up several devices": (
        *("ddp_backend", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_find_unused_parameters", "ddp_timeout"),
        *("ddp_static_graph", "local_rank", "ignore_bias_buffers", "fsdp_config", "fsdp_min_num_params"),
        *("fsdp_transformer_layer_cls_to_wrap", "ray_scope", "mp_parameters", "tp_size"),
    ),
    "tokens are always averaged across devices": ("average_tokens_across_devices",),
    "the command always trains": ("do_train",),
    "evaluation runs whenever there is evaluation data": ("do_eval", "do_predict"),
    "evaluation computes the loss and its metrics alone": (
        *("prediction_loss_only", "include_for_metrics", "batch_eval_metrics", "eval_accumulation_steps"),
        *("eval_do_concat_batches", "eval_use_gather_object", "include_inputs_for_metrics"),
        "use_legacy_prediction_loop",
    ),
    "no checkpoint is the best one": ("metric_for_best_model", "greater_is_better"),
    "every checkpoint is whole": (
        *("save_only_model", "save_on_each_node", "enable_jit_checkpoint"),
        "restore_callback_states_from_checkpoint",
    ),
    "progress bars appear on terminals only": ("disable_tqdm",),
    "runs are named by their output_dir": ("run_name", "project"),
    "a folder that holds checkpoints is continued by resume, or refused": ("overwrite_output_dir",),
    "weights are saved as safetensors": ("save_safetensors",),
    "records are written to output_dir": ("logging_dir",),
    "the first step is always logged": ("logging_first_step",),
    "every record is shown": ("log_level", "log_level_replica", "log_on_each_node"),
    "a loss that is not finite ends the run": ("logging_nan_inf_filter",),
    "the tokens seen are always logged": ("include_num_input_tokens_seen", "include_tokens_per_second"),
    "nothing is computed in float16 beside float32": ("fp16_backend", "fp16_opt_level", "half_precision_backend"),
    "the reference reads batches of per_device_eval_batch_size": ("precompute_ref_batch_size",),
    "the task is always CAUSAL_LM": ("lora_task_type",),
    "weights are not quantised": ("bnb_4bit_quant_type", "bnb_4bit_quant_storage", "use_bnb_nested_quant"),
    "nothing is pushed to the hub": (
        *("hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push", "hub_revision"),
        *("push_to_hub_model_id", "push_to_hub_organization", "push_to_hub_token"),
        *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    ),
    "PyTorch is not made to look for faults": ("debug",),
}
# Keys that change nothing here, with the reason printed when one is met.
INERT_KEYS = {key: reason for reason, keys in _INERT.items() for key in keys}

# Keys that are accepted with these values, or null: what others would switch on is not there.
UNSUPPORTED_KEYS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("push_to_hub", "fp16", "load_in_4bit", "load_in_8bit", "use_dora", "use_rslora"), (False,)),
    **dict.fromkeys(("dataset_streaming", "load_best_model_at_end", "full_determinism"), (False,)),
    **dict.fromkeys(("auto_find_batch_size", "dataloader_drop_last", "ignore_data_skip"), (False,)),
    **dict.fromkeys(("reference_free", "generate_during_eval"), (False,)),
    **dict.fromkeys(("adafactor", "use_mps_device", "use_ipex", "jit_mode_eval", "tpu_metrics_debug"), (False,)),
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval"), (False,)),
    **dict.fromkeys(("label_smoothing_factor", "eval_delay"), (0, 0.0)),
    **dict.fromkeys(("data_seed", "dataset_kwargs", "deepspeed", "fsdp", "parallelism_config"), ()),
    **dict.fromkeys(("tpu_num_cores", "torchdynamo", "split_batches", "dispatch_batches"), ()),
    **dict.fromkeys(("per_gpu_train_batch_size", "per_gpu_eval_batch_size"), ()),
    **dict.fromkeys(("lr_scheduler_kwargs", "optim_args", "optim_target_modules", "neftune_noise_alpha"), ()),
    **dict.fromkeys(("model_init_kwargs", "router_aux_loss_coef", "liger_kernel_config", "eval_packing"), ()),
    **dict.fromkeys(("lora_modules_to_save", "lora_target_parameters", "loss_weights"), ()),
    **dict.fromkeys(("rpo_alpha", "max_prompt_length"), ()),
    "past_index": (-1,),
    "vllm_mode": ("server",),
    "logging_strategy": ("steps",),
    "eos_token": ("<EOS_TOKEN>",),  # what a saved configuration has in place of every token, null or not
    "pad_token": ("<PAD_TOKEN>",),
    "accelerator_config": (
        {
            "split_batches": False,
            "dispatch_batches": None,
            "even_batches": True,
            "use_seedable_sampler": True,
            "non_blocking": False,
            "gradient_accumulation_kwargs": None,
        },
    ),
}
# What to give in place of some of these.
_INSTEAD = {
    "vllm_mode": "a server of its own samples, or the model in this process (use_vllm: false)",
    "label_smoothing_factor": "label_smoothing is the loss's",
    "data_seed": "seed is that of the data too",
    "eos_token": "chat_template_path names a tokenizer with another template",
    "deepspeed": "accelerate launch --config_file says how the model is sharded",
    "fsdp": "accelerate launch --config_file says how the model is sharded",
    "bf16_full_eval": "bf16 is evaluation's too",
    "max_prompt_length": "max_length and truncation_mode cut a whole row",
}


def loss_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the loss that stand beside the options, under the loss's own names, unless at TRL's default."""
    given = [(*LOSS_SETTINGS[name], _plain(value)) for name, value in values.items() if name in LOSS_SETTINGS]
    found = {own: value for own, default, value in given if value not in (None, default)}
    if "epsilon_low" in found:  # TRL's epsilon is both bounds, unless epsilon_high is given
        found.setdefault("epsilon_high", found["epsilon_low"])
    return found


def _plain(value: Any) -> Any:
    """Text of a command line as the number or the truth that it says; whatever else it is, the loss refuses it."""
    words = {"true": True, "false": False, "none": None}
    if not isinstance(value, str):
        return value
    try:
        return words[value.lower()] if value.lower() in words else float(value)
    except ValueError:
        return value


def notes_of(values: Mapping[str, Any], source: str) -> Iterator[str]:
    """A line a reason on the keys that change nothing, without those that are null."""
    inert = [key for key, value in values.items() if key in INERT_KEYS and value is not None]
    for reason in dict.fromkeys(INERT_KEYS[key] for key in inert):
        same = [key for key in inert if INERT_KEYS[key] == reason]
        yield f"{source}: {', '.join(same)} {'change' if same[1:] else 'changes'} nothing here: {reason}"


def require_unused(key: str, value: Any, source: str) -> None:
    """Raises InputError for a value that switches on what is not there."""
    accepted = UNSUPPORTED_KEYS[key]
    text = {"none", "null", *(str(each).lower() for each in accepted)}
    if value in (None, "", [], {}, *accepted) or str(value).lower() in text:
        return
    expected = str(accepted[0]).lower() if accepted and str(accepted[0])[0] not in "<{" else "left out"
    instead = f"; {_INSTEAD[key]}" if key in _INSTEAD else ""
    raise InputError(f"{source}: {key} can only be {expected}, got {value!r}{instead}")
