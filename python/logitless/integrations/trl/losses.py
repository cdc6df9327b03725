"""Any loss of the registry in TRL's trainers: `with_loss(trl.SFTTrainer)` and then `loss="dft"`.

A trainer of TRL is a forward, a loss of a few numbers per token, and metrics of these numbers. Its forward becomes the
patched one, which computes the numbers without logits. TRL's own code then runs as it is and records its metrics. Its
loss, a function of vectors, is dropped and the given one stands in its place, with TRL's divisors:

trainer          level                             the loss reads                       divided by
SFTTrainer       token, sequence, distribution     labels, `ref_model`                  tokens of the global batch
DPOTrainer       pair                              pairs, the reference                 pairs of the local batch
KTOTrainer       unpaired                          marks, KL, the reference             completions of the local batch
GRPOTrainer      token, sequence                   advantages, old and reference        as TRL divides its namesake
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import losses as registry
from ...arguments import loss_inputs
from ...losses import Loss, PolicyLoss
from ...losses.layout import TokenLayout, token_layout
from ..scoring import plain_head
from ..support import causal_lm
from . import versions
from .loss_head import FusedCall, Recorder, add_linear_head, at_first_token, last


@dataclass(frozen=True)
class TrainerKind:
    """What one of TRL's trainers offers to a loss, and the options of its own loss."""

    name: str
    levels: tuple[str, ...]
    inputs: tuple[str, ...]  # what it has for a loss to read
    required: tuple[str, ...]  # what a loss has to read, lest it train something else
    options: tuple[str, ...]  # of TRL's own loss, which loss= replaces
    prepare: Callable[[Loss, dict[str, Any]], dict[str, Any]]
    evaluate: Callable[[Any, dict[str, Any], list[FusedCall], Any], Tensor]

    def misfit(self, loss: Loss) -> str | None:
        """Why a loss cannot be trained here; None if it can."""
        if loss.lists:
            return "it reads lists of ids, which no trainer of TRL has"
        if loss.level not in self.levels:
            return f"it is a {loss.level} loss, and this trainer's are of level {' or '.join(self.levels)}"
        missing = [name for name in (*loss.inputs, *loss.sequence_inputs) if name not in self.inputs]
        if missing:
            return f"it reads {', '.join(missing)}, and this trainer has {', '.join(self.inputs)}"
        for name in self.required:
            if name not in loss.inputs:
                return f"it does not read {name}, so that this trainer's would have no effect"
        if not self.required and "old_logprob" in loss.optional_inputs:
            return "it is about samples of the policy, and this trainer's tokens come from data"
        unknown = [name for name in loss.outputs if name == "tail" or name == "lse"]
        return f"it reads {unknown[0]}, which TRL's forward does not return" if unknown else None


class LinearLossMixin:
    """A TRL trainer that trains a loss of the registry: `class MySFT(LinearLossMixin, trl.SFTTrainer)`.

    `with_loss(trl.SFTTrainer)` makes such a class. TRL's data, generation, reference models, PEFT, distribution,
    checkpoints and metrics stay as they are. No logits are computed, those of a reference included, and LoRA on the
    output head is served. A loss without a reference has none loaded. `rewards/*` are then those of the loss, without
    the reference's part; `clip_ratio/*` are those of the loss, too.

    Args:
        *args, **kwargs: the trainer's. `args=` has to be given.
        loss: a loss or its name. None: the one that the model was patched with.
        ref_model: in SFTTrainer, the reference or teacher that a loss compares with. None: the model itself without
            its adapter. The other trainers have an argument of this name.
        backend, backward: as in `logitless.patch`.

    Raises:
        TypeError: the class is no trainer that is served, or `args` is missing.
        ValueError: the loss does not fit the trainer, or an option of TRL's own loss is set; the message says what
            serves.
    """

    def __init__(
        self, *args: Any, loss: Loss | str | None = None, backend: Any = "auto", backward: Any = "auto", **kwargs: Any
    ) -> None:
        kind, host = _kind_of(type(self))
        names = list(inspect.signature(host.__init__).parameters)[1:]
        given: dict[str, Any] = {**dict(zip(names, args, strict=False)), **kwargs}
        self._linear_loss = _loss_of(loss, given.get("model"))
        check_fit(self._linear_loss, kind)
        if given.get("args") is None:
            raise TypeError(
                f"args: expected the trainer's configuration with loss={self._linear_loss.name!r}, got None"
            )
        _check_loss_options(self._linear_loss, kind, given)
        self._linear_kind, self._recorder = kind, Recorder()
        given = kind.prepare(self._linear_loss, given)
        reference = given.pop("ref_model", None) if kind is SFT_TRAINER else None
        options = {"backend": backend, "backward": backward}
        with _linear_heads(host, self._recorder, self._linear_loss, options):
            super().__init__(**given)
        if kind is SFT_TRAINER:
            _check_parallel(self)
            self._linear_reference = _sft_reference(self, reference, options)
            return
        if kind in (DPO_TRAINER, KTO_TRAINER) and hasattr(self._linear_loss, "beta"):
            self.beta = self._linear_loss.beta  # of TRL's reward metrics
        if kind is DPO_TRAINER and "ref_logprob" not in self._linear_loss.inputs:
            self.precompute_ref_logps = False  # nothing is known of a data set that `evaluate` gets later

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss of a batch, for its metrics, and in its place the loss of the registry."""
        request = _sft_request(self, inputs, num_items_in_batch)
        with _without_reference(self, inputs) as inputs, self._recorder.recording(**request) as calls:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
            if not calls:
                raise RuntimeError(
                    f"loss: the model of this {type(self).__name__} has been given to another trainer since, or was "
                    "unpatched, so that its head is no longer this trainer's; build the trainer again"
                )
            loss = self._linear_kind.evaluate(self, inputs, calls, num_items_in_batch)
        return (loss, result[1]) if return_outputs else loss

    def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's pass over the data for the reference's values, where the loss reads them."""
        if "ref_logprob" not in self._linear_loss.inputs:
            return dataset
        return super()._precompute_ref_logps(dataset, *args, **kwargs)  # type: ignore[misc]


def with_loss(trainer: type) -> type:
    """The trainer class with `LinearLossMixin`, under the same name: `SFTTrainer = with_loss(trl.SFTTrainer)`.

    Args:
        trainer: `SFTTrainer`, `DPOTrainer`, `KTOTrainer` or `GRPOTrainer` of TRL, or a subclass. One that has the mixin
            already is returned as it is.

    Raises:
        TypeError: another class, or no class.
    """
    _kind_of(trainer)
    if issubclass(trainer, LinearLossMixin):
        return trainer
    return type(trainer.__name__, (LinearLossMixin, trainer), {"__module__": trainer.__module__})


def check_fit(loss: Loss, kind: TrainerKind) -> None:
    """Raises ValueError if the loss cannot be trained by this trainer; the message names those by which it can."""
    reason = kind.misfit(loss)
    if reason is None:
        return
    others = [other.name for other in TRAINERS if other.misfit(loss) is None]
    cure = f"{' or '.join(others)} serves it" if others else "logitless.linear_loss takes it in a loop of your own"
    raise ValueError(f"loss: {kind.name} cannot train {loss.name!r}: {reason}; {cure}")


# ---------------------------------------------------------------------------------------------------------------------
# Construction


def _kind_of(cls: type) -> tuple[TrainerKind, Any]:
    """The kind of a trainer class, and the class of TRL that it is or derives from."""
    got = getattr(cls, "__name__", None) or f"{cls!r:.80}, which is no class"
    for base in (base for base in getattr(cls, "__mro__", ()) if base.__module__.startswith("trl.")):
        kind = next((kind for kind in TRAINERS if kind.name == base.__name__), None)
        if kind is not None and "compute_loss" in vars(base):
            versions.check_release()
            return kind, base
        if "compute_loss" in vars(base):  # from a forward of its own, as in GKDTrainer, which derives from SFTTrainer
            got = f"{got}, whose loss {base.__module__} computes in another way"
            break
    served = ", ".join(kind.name for kind in TRAINERS)
    raise TypeError(
        f"trainer: expected {served} of TRL, or a subclass, got {got}. Under logitless.integrations.trl.enable() "
        "TRL's other trainers compute their own losses, RLOOTrainer and DistillationTrainer without logits"
    )


def _loss_of(loss: Loss | str | None, model: Any) -> Loss:
    """The loss that was passed, or the patch's; an error if there are two."""
    patch = None if isinstance(model, str) or model is None else vars(causal_lm(model)).get("_logitless_patch")
    of_model: Loss | None = None if patch is None else patch.loss
    if loss is None and of_model is None:
        raise ValueError('loss: expected a loss or its name, such as loss="dft", got None and a model without a patch')
    found = of_model if loss is None else registry.get(loss)
    assert found is not None
    if of_model not in (None, found, registry.get("nll")):
        raise ValueError(f"loss: the trainer got {found}, and the model was patched with {of_model}; pass one")
    return found


#: Options of TRL's losses that have another name in ours.
_OUR_NAMES = {"epsilon": "epsilon_low"}


def _check_loss_options(loss: Loss, kind: TrainerKind, given: dict[str, Any]) -> None:
    """Refuses options of TRL's own loss that would have no effect."""
    args = given["args"]
    defaults = {field.name: field for field in dataclasses.fields(args)}
    for name in (*kind.options, "label_smoothing_factor"):
        if name not in defaults:
            continue
        value, known = getattr(args, name), defaults[name]
        factory: Any = known.default_factory
        default = known.default if factory is dataclasses.MISSING else factory()
        same = (loss.name if name == "loss_type" else None, getattr(loss, _OUR_NAMES.get(name, name), None))
        only = value[0] if isinstance(value, list) and len(value) == 1 else value
        if value != default and only not in same:
            ours = _OUR_NAMES.get(name, name)
            where = f"losses.{type(loss).__name__}({ours}=...)" if ours in vars(loss) else "a loss that has it"
            raise ValueError(
                f"{name}: belongs to TRL's own loss, which loss={loss.name!r} replaces, got {value!r} in args; leave "
                f"it at {default!r} and use {where}, or train TRL's loss without loss="
            )
    if given.get("compute_loss_func") is not None:
        raise ValueError(f"compute_loss_func: expected None with loss={loss.name!r}, which computes the loss")


@contextmanager
def _linear_heads(host: Any, recorder: Recorder, loss: Loss, options: dict[str, Any]) -> Iterator[None]:
    """While a trainer is built: TRL gives its models our head in place of its own, and LoRA on a head passes."""
    module: Any = sys.modules[host.__module__]
    saved = {name: vars(module)[name] for name in ("add_fused_lm_head", "BaseTunerLayer") if name in vars(module)}

    def add(model: Any, temperature: float = 1.0, cast_lm_head_to_fp32: bool = False, outputs: Any = ()) -> None:
        head: dict[str, Any] = {"temperature": temperature, "cast_lm_head_to_fp32": cast_lm_head_to_fp32}
        add_linear_head(model, recorder, loss, outputs=tuple(outputs) or ("log_probs",), **head, **options)

    class NoTunerLayer:
        """Stands for the class of adapter layers in TRL's check of the head, which our head does not need."""

    vars(module).update({"add_fused_lm_head": add, **({"BaseTunerLayer": NoTunerLayer} if len(saved) > 1 else {})})
    try:
        yield
    finally:
        vars(module).update(saved)


def _unchanged(loss: Loss, given: dict[str, Any]) -> dict[str, Any]:
    return given


def _with_args(given: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The arguments with a configuration that differs in some fields; the caller's own stays as it is."""
    args = copy.copy(given["args"])
    for name, value in changes.items():
        setattr(args, name, value)
    return {**given, "args": args}


def _prepare_dpo(loss: Loss, given: dict[str, Any]) -> dict[str, Any]:
    """A loss without a reference has none loaded, as if its values were known already."""
    if "ref_logprob" in loss.inputs:
        return given
    if given.get("ref_model") is not None:
        raise ValueError(f"ref_model: {loss.name!r} reads no reference, got a model")
    return _with_args(given, precompute_ref_log_probs=True)


def _prepare_kto(loss: Loss, given: dict[str, Any]) -> dict[str, Any]:
    """A loss without a KL reference point spares the passes that estimate it."""
    if "reference_point" in loss.sequence_inputs:
        return given
    return _with_args(given, loss_type="apo_zero_unpaired")


def _prepare_grpo(loss: Loss, given: dict[str, Any]) -> dict[str, Any]:
    """The loss's weight of the KL decides whether TRL has a reference."""
    return _with_args(given, beta=float(getattr(loss, "beta", 0.0)))


def _check_parallel(trainer: Any) -> None:
    parallel = trainer.accelerator.parallelism_config
    if parallel is None:
        return
    if parallel.sp_enabled:
        raise ValueError("loss: under sequence parallelism TRL takes the model's own loss; use context parallelism")
    if parallel.cp_enabled and (trainer._linear_loss.of_sequences or trainer._linear_loss.reduction != "mean"):
        raise ValueError(f"loss: {trainer._linear_loss.name!r} reads whole sequences, which context parallelism cuts")


# ---------------------------------------------------------------------------------------------------------------------
# The reference


def _sft_reference(trainer: Any, reference: Any, options: dict[str, Any]) -> Any:
    """The model that an SFT loss compares with, ready to run; None where there is none, or it is the model itself."""
    loss = trainer._linear_loss
    if trainer.aux_loss_enabled and _within_forward(loss):
        raise ValueError(f"router_aux_loss_coef: has to be 0 with {loss.name!r}, which the forward itself computes")
    if not _reads_reference(loss) and reference is not None:
        raise ValueError(f"ref_model: {loss.name!r} reads no reference, got a model")
    if not _reads_reference(loss):
        return None
    if reference is None:
        if not hasattr(trainer.model, "disable_adapter"):
            raise ValueError(f"ref_model: {loss.name!r} needs a reference: pass ref_model=, or train an adapter")
        return None
    if isinstance(reference, str):
        raise TypeError(f"ref_model: expected a model, got {reference!r}; load it by AutoModelForCausalLM")
    if causal_lm(reference) is causal_lm(trainer.model):
        raise ValueError("ref_model: expected a model of its own, got the one that is trained")
    add_linear_head(reference, Recorder(), registry.get("nll"), **options)
    return _placed(trainer, reference.requires_grad_(False).eval())


def _placed(trainer: Any, reference: Any) -> Any:
    """The reference on the trainer's device, and sharded as TRL shards its own."""
    from trl.models import prepare_deepspeed, prepare_fsdp

    if trainer.is_deepspeed_enabled:
        return prepare_deepspeed(reference, trainer.accelerator)
    if trainer.is_fsdp_enabled:
        return prepare_fsdp(reference, trainer.accelerator)
    return trainer.accelerator.prepare_model(reference, evaluation_mode=True)


@contextmanager
def _reference_of(trainer: Any, model: Any) -> Iterator[Any]:
    """The reference of an SFT trainer: its own model, or the policy without its adapter, as in evaluation."""
    if trainer._linear_reference is not None:
        with torch.no_grad():
            yield trainer._linear_reference
        return
    with torch.no_grad(), trainer.accelerator.unwrap_model(model).disable_adapter():
        yield model


@contextmanager
def _without_reference(trainer: Any, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The batch; in DPO for a loss without a reference, with zeros as the known values of one."""
    if trainer._linear_kind is not DPO_TRAINER or "ref_logprob" in trainer._linear_loss.inputs:
        yield inputs
        return
    zeros = torch.zeros(len(inputs["input_ids"]) // 2, device=inputs["input_ids"].device)
    trainer.precompute_ref_logps = True
    try:
        yield {**inputs, "ref_chosen_logps": zeros, "ref_rejected_logps": zeros}
    finally:
        trainer.precompute_ref_logps = False


# ---------------------------------------------------------------------------------------------------------------------
# SFT


def _sft_request(trainer: Any, inputs: dict[str, Any], items: Any) -> dict[str, Any]:
    """What the forward computes beside the statistics: the loss itself, where these are not enough for it."""
    loss = trainer._linear_loss
    if not (trainer._linear_kind is SFT_TRAINER and _within_forward(loss)):
        return {}
    divisor = None if items is None else torch.as_tensor(items).clamp(min=1)
    request = {"loss": loss} if divisor is None else {"loss": loss, "num_items_in_batch": divisor}
    if not _reads_reference(loss):
        return request
    kept = {name: x for name, x in inputs.items() if name not in ("labels", "shift_labels")}
    with _reference_of(trainer, trainer.model_wrapped) as reference:
        hidden = reference(**kept, hidden_only=True, use_cache=False).logits
        head = plain_head(trainer.accelerator.unwrap_model(reference))
    return {**request, "loss_inputs": {"ref_hidden": hidden, "ref_head": head}}


def _reads_reference(loss: Loss) -> bool:
    """Whether a loss reads something of a reference."""
    return "ref_logprob" in loss.inputs or loss.compares_distributions


def _within_forward(loss: Loss) -> bool:
    """Whether a loss of tokens needs more than the statistics that TRL's metrics read: its own product."""
    return loss.compares_distributions or loss.stats_temperature != 1.0


def _sft_loss(trainer: Any, inputs: dict[str, Any], calls: list[FusedCall], items: Any) -> Tensor:
    """The loss over the tokens (sequences) of the global batch, and the router's part."""
    call, loss = calls[0], trainer._linear_loss
    steps = 1 if items is None else trainer.current_gradient_accumulation_steps
    if _within_forward(loss):
        value, by_tokens = call.output.loss, True
    else:
        tokens = token_layout(call.mask, _packed(inputs, call.mask))
        by_tokens = loss.reduction == "mean" and items is not None
        divisor = torch.as_tensor(items, device=call.mask.device).clamp(min=1) if by_tokens else None
        value = _evaluate(loss, call, tokens, _sft_inputs(trainer, inputs), divisor)
        value = value if by_tokens else value / steps
    if by_tokens and items is not None and trainer.args.average_tokens_across_devices:
        value = value * (trainer.accelerator.num_processes // trainer.get_tp_size())
    return _with_router(trainer, value, call, steps)


def _sft_inputs(trainer: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    if "ref_logprob" not in trainer._linear_loss.inputs:
        return {}
    kept = {name: x for name, x in inputs.items() if name != "output_router_logits"}
    with _reference_of(trainer, trainer.model_wrapped) as reference:
        return {"ref_logprob": reference(**kept, fused_lm_head=True).log_probs}


def _packed(inputs: dict[str, Any], mask: Tensor) -> Tensor | None:
    """The boundaries of the sequences of packed rows, which have positions that start at 0; None for padded rows."""
    positions = inputs.get("position_ids")
    if positions is None or "attention_mask" in inputs:
        return None
    starts = positions[:, : mask.shape[1]] == 0
    starts[:, 0] = True
    places = starts.flatten().nonzero()[:, 0]
    return torch.cat([places, places.new_tensor([mask.numel()])])


# ---------------------------------------------------------------------------------------------------------------------
# DPO and KTO


def _dpo_loss(trainer: Any, inputs: dict[str, Any], calls: list[FusedCall], items: Any) -> Tensor:
    """The mean over the pairs of the batch."""
    sums = None
    if trainer.precompute_ref_logps:
        sums = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
    result, call = _whole_sequences(trainer, inputs, calls[0], calls[-1], sums, {})
    if "ref_logprob" not in trainer._linear_loss.inputs:
        _set_metrics(
            trainer,
            {
                "rewards/chosen": result.chosen_reward,
                "rewards/rejected": result.rejected_reward,
                "rewards/margins": result.margin,
                "rewards/accuracies": result.accuracy,
            },
        )
    return _with_router(trainer, result.loss, call)


def _kto_loss(trainer: Any, inputs: dict[str, Any], calls: list[FusedCall], items: Any) -> Tensor:
    """The mean over the completions of the batch."""
    policy = calls[1] if trainer.calculate_KL else calls[0]
    device = policy.mask.device
    given = {"desirable": torch.as_tensor(inputs["label"], dtype=torch.bool, device=device)}
    if "reference_point" in trainer._linear_loss.sequence_inputs:
        given["reference_point"] = torch.tensor(_metrics(trainer)["kl"][-1], device=device)
    sums = inputs["ref_logps"] if trainer.precompute_ref_logps else None
    result, call = _whole_sequences(trainer, inputs, policy, calls[-1], sums, given)
    return _with_router(trainer, result.loss, call)


def _whole_sequences(
    trainer: Any,
    inputs: dict[str, Any],
    policy: FusedCall,
    reference: FusedCall,
    sums: Tensor | None,
    given: dict[str, Tensor],
) -> tuple[Any, FusedCall]:
    """The result of a loss of whole sequences; `sums [S]` are the reference's log-probs if they were precomputed."""
    mask = inputs["completion_mask"][:, 1:].bool()
    call = last(policy, mask.shape[1])
    loss = trainer._linear_loss
    if "ref_logprob" in loss.inputs:
        ref = last(reference, mask.shape[1]).stats.logprob if sums is None else at_first_token(sums, mask)
        given = {**given, "ref_logprob": ref.detach()}  # type: ignore[union-attr]
    return _evaluate(loss, call, token_layout(mask, None), given, None), call


# ---------------------------------------------------------------------------------------------------------------------
# GRPO


def _grpo_loss(trainer: Any, inputs: dict[str, Any], calls: list[FusedCall], items: Any) -> Tensor:
    """The policy loss with TRL's divisor, and its clip ratios."""
    mask = inputs["completion_mask"] * inputs.get("tool_mask", 1) > 0
    call, loss = last(calls[0], mask.shape[1]), trainer._linear_loss
    tokens = token_layout(mask, None)
    known = (*loss.inputs, *loss.optional_inputs)
    given = {name: x for name, x in _samples(trainer, inputs, call).items() if name in known}
    value = _evaluate(loss, call, tokens, given, _grpo_divisor(trainer, inputs, mask), trainer.max_completion_length)
    if isinstance(loss, PolicyLoss) and "clip_ratio/low_mean" in _metrics(trainer):
        spread = loss_inputs(loss, given, tokens, mask.device)
        place = {} if loss.token_wise else {"mask": mask}
        _set_clip_metrics(trainer, loss.metrics(call.stats, **place, **spread), mask)
    return _with_router(trainer, value, call, _steps(trainer))


def _samples(trainer: Any, inputs: dict[str, Any], call: FusedCall) -> dict[str, Tensor]:
    """What TRL knows of its samples, under our names."""
    mask = call.mask
    advantages = inputs["advantages"]
    found = {"advantages": advantages if advantages.dim() == 1 else advantages.expand(mask.shape)}
    for ours, theirs in (("old_logprob", "old_per_token_logps"), ("ref_logprob", "ref_per_token_logps")):
        if inputs.get(theirs) is not None:
            found[ours] = inputs[theirs]
    if trainer.use_vllm and trainer.vllm_importance_sampling_correction:
        found["policy_weight"] = inputs["importance_sampling_ratio"].expand(mask.shape)
    if inputs.get("sampling_per_token_logps") is not None:
        drawn, now = inputs["sampling_per_token_logps"], call.stats.logprob
        assert now is not None
        found["sampling_logprob"] = torch.where(drawn.isnan(), now.detach(), drawn)
    return found


def _grpo_divisor(trainer: Any, inputs: dict[str, Any], mask: Tensor) -> Tensor:
    """TRL's count for a loss of this reduction, times the steps of an accumulation."""
    loss, steps = trainer._linear_loss, _steps(trainer)
    if loss.reduction != "mean":
        return torch.tensor(float(len(mask) * steps), device=mask.device)
    if loss.name == "bnpo":
        return mask.sum().clamp(min=1) * steps
    items = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
    return items * steps / trainer.args.steps_per_generation if trainer.model.training else items


def _set_clip_metrics(trainer: Any, metrics: Any, mask: Tensor) -> None:
    """TRL's clip ratios from the loss's own: means over the tokens, and the extremes of the sequences' means."""
    low, high = (x * mask for x in (metrics.clipped_low, metrics.clipped_high))
    either = torch.maximum(low, high)
    gather, count = trainer.accelerator.gather, trainer.accelerator.gather(mask.sum()).sum().clamp(min=1)
    found = _metrics(trainer)
    for name, x in (("low_mean", low), ("high_mean", high), ("region_mean", either)):
        found[f"clip_ratio/{name}"][-1] = (gather(x.sum()).sum() / count).item()
    lengths = mask.sum(1)
    by_sequence = [gather(torch.where(lengths > 0, x.sum(1) / lengths, torch.nan)) for x in (low, high)]
    for name, x, pick in (("low_min", by_sequence[0], torch.amin), ("high_max", by_sequence[1], torch.amax)):
        known = x[~x.isnan()]
        found[f"clip_ratio/{name}"][-1] = pick(known).item() if known.numel() else float("nan")


# ---------------------------------------------------------------------------------------------------------------------
# Shared


def _evaluate(
    loss: Loss,
    call: FusedCall,
    tokens: TokenLayout,
    given: dict[str, Tensor],
    normalizer: Tensor | None,
    max_length: int | None = None,
) -> Any:
    """The loss from a call's statistics, reduced as its paper has it."""
    known = loss_inputs(loss, given, tokens, tokens.mask.device)
    length = max_length if loss.reduction == "constant_length" else None
    settings: dict[str, Any] = {"reduction": loss.reduction, "normalizer": normalizer, "max_length": length}
    return loss.evaluate(call.stats, tokens, known, **settings)


def _steps(trainer: Any) -> int:
    return int(trainer.current_gradient_accumulation_steps) if trainer.model.training else 1


def _with_router(trainer: Any, loss: Tensor, call: FusedCall, steps: int = 1) -> Tensor:
    """The loss and the router's, weighted as TRL weights it."""
    if not trainer.aux_loss_enabled:
        return loss
    return loss + trainer.router_aux_loss_coef * call.output.aux_loss / steps


def _metrics(trainer: Any) -> Any:
    return trainer._metrics["train" if trainer.model.training else "eval"]


def _set_metrics(trainer: Any, values: dict[str, Tensor]) -> None:
    """Means over all processes in place of those that TRL has just recorded."""
    for name, x in values.items():
        _metrics(trainer)[name][-1] = trainer.accelerator.gather(x).mean().item()


SFT_TRAINER = TrainerKind(
    name="SFTTrainer",
    levels=("token", "sequence", "distribution"),
    inputs=("ref_logprob",),
    required=(),
    options=("loss_type",),
    prepare=_unchanged,
    evaluate=_sft_loss,
)
DPO_TRAINER = TrainerKind(
    name="DPOTrainer",
    levels=("pair",),
    inputs=("ref_logprob",),
    required=(),
    options=(
        *("loss_type", "loss_weights", "beta", "label_smoothing", "use_weighting", "ld_alpha", "f_divergence_type"),
        *("f_alpha_divergence_coef", "discopop_tau"),
    ),
    prepare=_prepare_dpo,
    evaluate=_dpo_loss,
)
KTO_TRAINER = TrainerKind(
    name="KTOTrainer",
    levels=("unpaired",),
    inputs=("ref_logprob", "desirable", "reference_point"),
    required=(),
    options=("loss_type", "beta", "desirable_weight", "undesirable_weight"),
    prepare=_prepare_kto,
    evaluate=_kto_loss,
)
GRPO_TRAINER = TrainerKind(
    name="GRPOTrainer",
    levels=("token", "sequence"),
    inputs=("advantages", "ref_logprob"),
    required=("advantages",),
    options=(
        *("loss_type", "beta", "epsilon", "epsilon_high", "delta", "importance_sampling_level"),
        *("use_bias_correction_kl", "off_policy_mask_threshold", "sapo_temperature_neg", "sapo_temperature_pos"),
        *("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
        *("top_entropy_quantile", "entropy_coef", "use_adaptive_entropy"),
    ),
    prepare=_prepare_grpo,
    evaluate=_grpo_loss,
)
TRAINERS = (SFT_TRAINER, DPO_TRAINER, KTO_TRAINER, GRPO_TRAINER)
