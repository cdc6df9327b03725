"""`patch(model)`: a Transformers causal LM that computes its loss from hidden states, never from logits.

Every family is patched in one way. The base model runs, and then the loss runs inside the output head's own call
(`heads.py`). A few families have a scale, a softcap or extra loss terms, which come from a table (`families.py`). The
result is checked once against the model's own logits (`selfcheck.py`). A call that needs logits (generation, no labels)
runs the original forward (`forward.py`), and an argument of ours that stands in the wrong place is refused
(`names.py`).
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any, TypeVar, get_args

from torch import nn

from .. import losses
from ..losses import Loss
from ..types import BackendName, BackwardName
from .families import head_rule, router_loss
from .forward import PatchedForward, logger
from .heads import find_head
from .scoring import Patch, check_temperature
from .support import causal_lm, check_model, fused_by_trl
from .tags import add_tags, before_call

Model = TypeVar("Model", bound=nn.Module)


def patch(
    model: Model,
    *,
    loss: Loss | str = "nll",
    backend: BackendName = "auto",
    backward: BackwardName = "auto",
    temperature: float = 1.0,
    eval_logits: bool = False,
    check: bool = True,
) -> Model:
    """Makes a Transformers causal LM compute its loss without logits, and returns that same object.

    Only this instance's `forward` is patched. Other models of the class, `generate`, checkpoints and the signature that
    `Trainer` reads stay as they are. Patch the model before DDP, FSDP, `torch.compile` or `Trainer` wrap it.
    `get_peft_model` may come before or after. Pickle, `torch.save(model)` and `copy.deepcopy` give a patched model.

    **TRL.** Its trainers put a forward of their own in this one's place, and compute their losses themselves. So a
    model patched with another loss than `"nll"` raises a ValueError while such a trainer is built, and one patched with
    `"nll"` trains TRL's loss, and says so. `logitless.integrations.trl` has both ways without logits: `enable()` for
    TRL's own losses, `with_loss` for any of the registry.

    **Evaluation.** A call with labels computes no logits in evaluation either, so that `Trainer.evaluate` needs no more
    memory than training. Whoever reads `output.logits` beside the loss says so: `skip_logits=False` in a call, or
    `patch(model, eval_logits=True)`. `Trainer` needs the latter for `compute_metrics`, `preprocess_logits_for_metrics`
    and the predictions of `predict`, which are an empty tuple without it.

    The patched forward takes, beside the model's own arguments:

    - `labels` `[B, T]`, which are shifted inside as Transformers does, or `shift_labels` `[B, T]`, which are not;
      `[B, T, K]` for a loss that reads lists of ids, such as `TopKDistillation`. A position with `ignore_index` (an
      argument too, -100 by default) does not count. The loss is the mean over the
      tokens that count, or their sum over `num_items_in_batch` if that is passed (an int or a tensor). For a pair loss
      it is the number of pairs, and for a loss whose reduction counts sequences the number of sequences. If all
      positions are ignored the loss is 0, where Transformers' own loss is NaN (also here, if it computes it: see
      `skip_logits`). The terms that the model itself adds (a
      router's loss, a z-loss) are added to any loss.
    - `skip_logits`: True computes no logits. False computes true logits besides the loss. None (the default) skips
      them, but not in evaluation with `eval_logits=True`. Skipped logits are `None` in the output. The original forward
      runs without labels, in `generate`, and if logits and plain NLL are asked for together.
    - `loss`: a loss or its name, used in place of the patch's for this call.
    - `loss_inputs`: a dict of the loss's own per-token inputs by name (`ref_logprob`, `token_weight`, ...), `[B, T]`.
      Position t holds the value for predicting token t + 1, as in `token_stats`. One number a sequence works too.
      `reduction`, `max_length` and `ref_head` are those of `logitless.linear_loss`.
    - `temperature`: in place of the patch's for this call.
    - `token_outputs`: names of `TokenStats` to return as `output.token_stats`, `[B, T]`, differentiable; but for
      `token_constants`, those of them that the loss does not read and that are metrics (see `linear_logprobs`).
    - `hidden_only`: True returns hidden states `[B, T, H]` in place of logits, with or without labels, for a host that
      computes a loss itself.
    - `cu_seqlens`: `[S + 1]` boundaries of the S sequences of a packed batch `[1, total]` (or of several packed rows,
      laid behind one another). The last token of each sequence then predicts nothing, and a loss on whole sequences
      sees these. A pair loss takes its 2B sequences this way, the chosen ones first, or as `[2B, T]` rows. Pass
      `position_ids` that start at 0 in every sequence and no `attention_mask`: then Transformers keeps attention inside
      the sequences. That works without a cache only, so `use_cache` is False unless it is passed.

    It returns `LinearCausalLMOutput`, or with `return_dict=False` a tuple, in which skipped logits have no place.

    The model's other arguments pass, also those that it hands down by `**kwargs`. But a name of ours that stands in the
    wrong place (`token_weight` outside `loss_inputs`, `beta` outside `loss=losses.DPO(beta=...)`), or nearly one of
    ours, is an error: the model would ignore it. A training call without labels runs as if unpatched, with full
    logits. The first one of a model warns, because hosts take the labels out where one does not expect it;
    `skip_logits=False` asks for them.

    LoRA on the head is computed as in PEFT, with several adapters, dropout and bias. It costs one copy of the weight
    per call and one of its gradient. So do the `trainable_token_indices` of a tied head. `modules_to_save` costs
    nothing. Other adapters on the head are refused.

    Args:
        model: a causal LM of Transformers whose head is a linear layer on the base model's output, or a `PeftModel`
            around one.
        loss: the loss to compute: an object with its hyper-parameters or a name with its defaults.
        backend, backward: as in `logitless.linear_logprobs`.
        temperature: the sampler's. Loss and `token_outputs` are those of the logits divided by it, and so are a
            reference's, unless its `ref_head` is a `Head`. 1 by default. The terms that the model adds, and the logits
            that it returns, stay at 1.
        eval_logits: whether a call with labels in evaluation computes true logits too.
        check: whether to compare with the model's own logits before the first loss (`selfcheck.self_check`). This is
            one forward of five tokens that leaves no trace, on every rank alike. It does not run here, because weights
            may still be empty, on another device, or about to be sharded. A new kind of head, such as LoRA added later,
            is checked again. If torch.compile comes first, the check runs while it traces.

    Raises:
        TypeError: `model` is not a module, or is a wrapper (DDP, FSDP, a compiled model). Patch the model inside.
        UnsupportedModelError: (a ValueError) the model is known not to fit. Also at the first loss, if the check shows
            that the logits differ.
        ValueError: the model is patched already, the loss, backend or backward is unknown, or the temperature is not
            positive.
    """
    inner = causal_lm(model)
    check_model(inner)
    for name, value, choices in (("backend", backend, BackendName), ("backward", backward, BackwardName)):
        if value not in get_args(choices):
            raise ValueError(f"{name}: expected one of {list(get_args(choices))}, got {value!r}")
    temperature = check_temperature(temperature)
    from .outputs import LinearCausalLMOutput  # imports Transformers, whose model this is

    state = Patch(
        loss=losses.get(loss),
        backend=backend,
        backward=backward,
        temperature=temperature,
        eval_logits=eval_logits,
        check=check,
        forward=PatchedForward(inner),
        shadowed=inner.__dict__.get("forward"),
        names=tuple(inspect.signature(inner.forward).parameters),
        router=router_loss(inner),
        output=LinearCausalLMOutput,
    )
    inner._logitless_patch = state  # type: ignore[assignment]
    inner.forward = state.forward
    inner._replicate_for_data_parallel = _refuse_replica  # type: ignore[method-assign]
    inner.add_model_tags = partial(add_tags, inner)  # type: ignore[assignment]
    state.hook = inner.register_forward_pre_hook(before_call, with_kwargs=True)
    _announce(inner, state)
    return model


def unpatch(model: Model) -> Model:
    """Undoes `patch`: the model has its own `forward` again.

    A head that a trainer of TRL has put on the patched model goes too, so that this trainer cannot run it any more.

    Raises:
        ValueError: the model is not patched, or its `forward` has been wrapped since (unwrap it first).
    """
    inner = causal_lm(model)
    state = inner.__dict__.get("_logitless_patch")
    if state is None:
        raise ValueError(f"unpatch: {type(inner).__name__} is not patched")
    forward = inner.__dict__.get("forward")
    if getattr(forward, "__func__", None) is not state.forward.__func__ and not fused_by_trl(forward):
        raise ValueError(
            f"unpatch: the forward of {type(inner).__name__} was wrapped after the patch (by accelerate?); "
            "unwrap it first"
        )
    if state.shadowed is None:
        del inner.forward
    else:
        inner.forward = state.shadowed
    del inner._logitless_patch, inner._replicate_for_data_parallel, inner.add_model_tags
    inner.__dict__.pop("_logitless_head", None)
    state.hook.remove()
    return model


def _refuse_replica(*_: Any) -> Any:
    """Raises in nn.DataParallel, which would run the first GPU's patched forward on every replica."""
    raise TypeError("a patched model cannot run in nn.DataParallel; start one process per GPU (torchrun)")


def _announce(model: nn.Module, state: Patch) -> None:
    rule, inner = head_rule(model), find_head(model).inner
    logger.info(
        "patched %s: head %s, logit_scale %g, softcap %s, bias %s, z_loss %g, loss %s, backend %s, backward %s; %s",
        type(model).__name__,
        list(inner.weight.shape),  # type: ignore[arg-type]
        rule.transform.logit_scale,
        rule.transform.softcap,
        getattr(inner, "bias", None) is not None,
        rule.z_loss,
        state.loss,
        state.backend,
        state.backward,
        "checked against its own logits before the first loss" if state.check else "not checked (check=False)",
    )
