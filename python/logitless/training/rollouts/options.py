"""The options of runs that sample: what is drawn, how it is rewarded, what a reward means for a token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from logitless.losses.policy.weights import CORRECTIONS
from logitless.training.rollouts.advantages import ADVANTAGES

GROUP = "Rollouts"


def option(default: Any, help: str, *, group: str, choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field that carries what the command line needs to know about it."""
    return field(default=default, metadata={"help": help, "group": group, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class RolloutOptions:
    """Options of on-policy training, under TRL's names where TRL has them."""

    reward_funcs: tuple[str | Mapping[str, Any], ...] | None = option(
        None,
        "Reward functions, module:function or file.py:function, comma-separated; the model then samples its own "
        "completions of the rows' prompts.",
        group=GROUP,
    )
    reward_weights: tuple[float, ...] | None = option(None, "A weight for each of them. Default: 1.", group=GROUP)
    on_policy: bool | None = option(
        None,
        "Sample completions while training. Default: with reward_funcs, and for on-policy-distillation.",
        group=GROUP,
    )
    num_generations: int = option(8, "Completions of a prompt: the group that is compared.", group=GROUP)
    steps_per_generation: int | None = option(
        None,
        "Micro-batches that are sampled at once. Default: gradient_accumulation_steps, one update.",
        group=GROUP,
    )
    num_iterations: int = option(1, "Passes over what was sampled, before more is.", group=GROUP)
    max_completion_length: int = option(256, "Tokens of a completion at most.", group=GROUP)
    temperature: float = option(1.0, "Of sampling, and of the policy that is trained.", group=GROUP)
    top_p: float = option(1.0, "Probability of the likeliest tokens that are drawn from.", group=GROUP)
    top_k: int = option(0, "How many of the likeliest tokens are drawn from; 0: all.", group=GROUP)
    min_p: float = option(0.0, "Least share of the likeliest token's probability that is drawn.", group=GROUP)
    per_device_generation_batch_size: int | None = option(
        None, "Completions that are sampled together. Default: all of a round.", group=GROUP
    )
    advantage_estimator: str | None = option(
        None, "How rewards become advantages. Default: as the loss's paper has it.", group=GROUP, choices=ADVANTAGES
    )
    scale_rewards: str | None = option(
        None,
        "Whose deviation a group's advantages are divided by. Default: as the loss's paper has it.",
        group=GROUP,
        choices=("group", "batch", "none"),
    )
    mask_truncated_completions: bool = option(
        False, "Leave completions that were cut off out of the loss.", group=GROUP
    )
    importance_sampling: str | None = option(
        None,
        "What corrects for a sampler that draws from another distribution than the policy's. Default: token_truncate "
        "where top_p, top_k or min_p cut it, or a server samples; else none.",
        group=GROUP,
        choices=("none", *CORRECTIONS),
    )
    importance_sampling_cap: float = option(3.0, "Greatest weight of that correction.", group=GROUP)
    num_demonstrations: int = option(
        1, "Completions of a prompt that show its demonstration, for losses that read demonstrations.", group=GROUP
    )
    demonstration_schedule: Mapping[str, Any] | None = option(
        None, "Settings of the schedule by which they show less of it, e.g. {start: 0.95, end: 0.05}.", group=GROUP
    )
    gamma: float = option(1.0, "Discount of a value function's returns.", group=GROUP)
    lam: float = option(0.95, "GAE's lambda.", group=GROUP)
    cliprange_value: float = option(0.2, "How far a value moves in a round before its loss is clipped.", group=GROUP)
    critic_learning_rate: float = option(1e-5, "Of the value function, constant.", group=GROUP)
    use_vllm: bool = option(False, "Sample from a vLLM server instead of the model in this process.", group=GROUP)
    vllm_server_base_url: str = option("http://localhost:8000", "The server's address.", group=GROUP)
    vllm_server_timeout: float = option(240.0, "Seconds to wait until the server is up.", group=GROUP)
    vllm_request_timeout: float = option(3600.0, "Seconds for the completions of one prompt.", group=GROUP)
    vllm_server_model: str | None = option(
        None, "The model's name there. Default: the first that the server lists.", group=GROUP
    )
    vllm_server_requests: int = option(64, "Prompts that each process asks at once.", group=GROUP)
    vllm_weights_dir: str | None = option(
        None, "Folder in which the server finds the trained weights. Default: vllm in output_dir.", group=GROUP
    )
    num_generations_eval: int = option(1, "Completions of a prompt in evaluation.", group=GROUP)
    log_completions: bool = option(
        False, "Write what was sampled, with its rewards, to rollouts/ in output_dir.", group=GROUP
    )
