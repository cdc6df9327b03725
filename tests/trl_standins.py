"""TRL's own losses without its trainers: their methods run on stand-ins that hold the attributes they read.

The defaults are those of TRL's configurations, unless a test says otherwise.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from preference_cases import tail_weights
from torch import Tensor

#: The longest completion that TRL's Dr. GRPO divides by, where a test does not say another.
MAX_LENGTH = 9


class FakeAccelerator:
    device = torch.device("cpu")

    def gather(self, x: Tensor) -> Tensor:
        return x

    gather_for_metrics = gather


def fused_outputs(logprob: Tensor, log_sum_sq: Tensor) -> SimpleNamespace:
    nothing = torch.zeros_like(logprob.detach())
    return SimpleNamespace(
        log_probs=logprob,
        log_sum_sq_probs=log_sum_sq,
        entropy=nothing,
        mean_logits=nothing,
        is_top1=nothing.bool(),
    )


class FakeModel:
    """A model whose forward gives the next of the prepared outputs."""

    def __init__(self, *outputs: SimpleNamespace) -> None:
        self.outputs = list(outputs)

    def __call__(self, **_: Any) -> SimpleNamespace:
        return self.outputs.pop(0)


def trainer(**settings: Any) -> SimpleNamespace:
    """The attributes that the loss methods of TRL's trainers read, with TRL's defaults."""
    defaults: dict[str, Any] = dict(
        accelerator=FakeAccelerator(),
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        beta=0.1,
        label_smoothing=0.0,
        f_divergence_type="reverse_kl",
        f_alpha_divergence_coef=0.5,
        ld_alpha=None,
        use_weighting=False,
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        args=SimpleNamespace(discopop_tau=0.05),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    return SimpleNamespace(**defaults | settings)


def trl_dpo(problem: tuple[Tensor, Tensor, Tensor, Tensor], **settings: Any) -> tuple[Tensor, dict[str, float]]:
    """TRL's loss and metrics; the reference's sums weight the tail as the policy's do."""
    logprob, ref, mask, log_sum_sq = problem
    fake = trainer(**settings)
    weight = tail_weights(mask, 1.0 if fake.ld_alpha is None else fake.ld_alpha)
    reference = (ref * weight.to(ref.dtype)).sum(-1)
    with_prompt = torch.cat([torch.zeros(len(mask), 1, dtype=torch.bool), mask], dim=1)
    half = len(mask) // 2
    inputs = dict(
        input_ids=torch.zeros(with_prompt.shape, dtype=torch.int64),
        attention_mask=with_prompt.long(),
        completion_mask=with_prompt.long(),
        ref_chosen_logps=reference[:half],
        ref_rejected_logps=reference[half:],
    )
    model = FakeModel(fused_outputs(logprob, log_sum_sq))
    loss = pytest.importorskip("trl").DPOTrainer._compute_loss(fake, model, inputs, False)
    return loss, {name: values[-1] for name, values in fake._metrics["train"].items() if values}


def cpo_settings(**settings: Any) -> SimpleNamespace:
    defaults: dict[str, Any] = dict(alpha=0.0, loss_type="sigmoid", simpo_gamma=0.5, beta=0.1, label_smoothing=0.0)
    return SimpleNamespace(accelerator=FakeAccelerator(), **defaults | settings)


def trl_kto(
    problem: tuple[Tensor, Tensor, Tensor],
    mismatched: tuple[Tensor, Tensor] | None,
    label: Tensor,
    **settings: Any,
) -> tuple[Tensor, dict[str, list[float]]]:
    """The loss and metrics of TRL's KTO; `mismatched` has the model's and the reference's sums for the KL estimate."""
    module = pytest.importorskip("trl.trainer.kto_trainer")
    logprob, ref, mask = problem
    with_prompt = torch.cat([torch.zeros(len(mask), 1, dtype=torch.bool), mask], dim=1).long()
    fake = trainer(
        calculate_KL=mismatched is not None,
        _compute_kl_logps=lambda *_: None if mismatched is None else mismatched[0],
        **{"loss_type": "kto", "desirable_weight": 1.0, "undesirable_weight": 1.0} | settings,
    )
    batch = dict(
        input_ids=torch.zeros_like(with_prompt), attention_mask=with_prompt, completion_mask=with_prompt, label=label,
        ref_logps=ref.sum(-1), ref_KL_logps=None if mismatched is None else mismatched[1],
    )  # fmt: skip
    loss = module.KTOTrainer._compute_loss(fake, FakeModel(fused_outputs(logprob, ref)), batch, False)
    return loss, fake._metrics["train"]


class OneProcess:
    """A substitute for TRL's accelerator, for a single process."""

    num_processes = 1

    def reduce(self, x: Tensor, reduction: str) -> Tensor:
        return x

    def gather(self, x: Tensor) -> Tensor:
        return x

    def pad_across_processes(self, x: Tensor, dim: int, pad_index: float) -> Tensor:
        return x


def trl_loss(
    batch: SimpleNamespace, loss_type: str, inputs: dict[str, Tensor] | None = None, **settings: Any
) -> Tensor:
    """The loss of TRL's trainer on this batch, in evaluation mode, where nothing is divided for accumulation."""
    grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer")
    cls = grpo_trainer.GRPOTrainer
    if loss_type == "gmpo":
        cls = pytest.importorskip("trl.experimental.gmpo.gmpo_trainer").GMPOTrainer
    if loss_type == "rloo":
        cls = pytest.importorskip("trl.trainer.rloo_trainer").RLOOTrainer
    options = {
        "use_bias_correction_kl": False,
        "delta": None,
        "sapo_temperature_pos": 1.0,
        "sapo_temperature_neg": 1.05,
        "vespo_k_pos": 2.0,
        "vespo_lambda_pos": 3.0,
        "vespo_k_neg": 3.0,
        "vespo_lambda_neg": 2.0,
        "steps_per_generation": 1,
    }
    trainer = SimpleNamespace(
        accelerator=OneProcess(),
        args=SimpleNamespace(**{k: settings.get(k, v) for k, v in options.items()}),
        model=SimpleNamespace(training=False),
        loss_type=loss_type,
        epsilon_low=settings.get("epsilon_low", 0.2),
        epsilon_high=settings.get("epsilon_high", 0.2),
        beta=settings.get("beta", 0.0),
        importance_sampling_level=settings.get("importance_sampling_level", "token"),
        top_entropy_quantile=settings.get("top_entropy_quantile", 1.0),
        off_policy_mask_threshold=settings.get("off_policy_mask_threshold"),
        use_vllm=settings.get("use_vllm", False),
        vllm_importance_sampling_correction=True,
        max_completion_length=settings.get("max_completion_length", MAX_LENGTH),
        current_gradient_accumulation_steps=1,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=settings.get("entropy_coef", 0.0) > 0,
        entropy_coef=settings.get("entropy_coef", 0.0),
        use_adaptive_entropy=False,
        _metrics={"eval": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (batch.logprob, batch.entropy, None),
        get_off_policy_mask=grpo_trainer.GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=grpo_trainer.GRPOTrainer.get_gamma_weights,
    )
    trainer.get_high_entropy_mask = functools.partial(grpo_trainer.GRPOTrainer.get_high_entropy_mask, trainer)
    mask = batch.mask.to(batch.logprob.dtype)
    given = {
        "prompt_ids": torch.zeros(4, 1, dtype=torch.int64),
        "prompt_mask": torch.ones(4, 1),
        "completion_ids": torch.zeros(4, 6, dtype=torch.int64),
        "completion_mask": mask,
        "advantages": batch.per_sequence,
        "old_per_token_logps": batch.old_logprob,
        "ref_per_token_logps": batch.ref_logprob,
        "sampling_per_token_logps": batch.sampling_logprob,
        "old_logps": (batch.old_logprob * mask).sum(1),
        "num_items_in_batch": mask.sum(),
    }
    loss: Tensor = cls._compute_loss(trainer, None, given | (inputs or {}))
    batch.trl_metrics = {name: values[-1] for name, values in trainer._metrics["eval"].items()}
    return loss
