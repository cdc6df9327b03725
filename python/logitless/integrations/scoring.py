"""One call of a patched model: its arguments, the base model, and the loss inside the head's call."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import reduce
from ..arguments import loss_inputs
from ..linear import linear_loss
from ..losses import Loss
from ..losses.layout import check_boundaries, token_layout
from ..ops import linear_logprobs
from ..types import OUTPUTS, BackendName, BackwardName, Head, LogitTransform, OptionKeywords, TokenStats
from .families import HeadRule, RouterLoss, base_of, head_rule, text_config
from .heads import HeadModules, dense_product, find_head, kept_rows, own_product, product
from .support import causal_lm

if TYPE_CHECKING:
    from .outputs import LinearCausalLMOutput


@dataclass
class Patch:
    """The state of a patched model. It is copied and pickled with the model: it refers to no module but the model."""

    loss: Loss
    backend: BackendName
    backward: BackwardName
    temperature: float
    eval_logits: bool
    check: bool
    forward: Any  # the `PatchedForward` that is in place of the model's own
    shadowed: Any  # the instance's own `forward` before the patch, or None
    names: tuple[str, ...]  # of the forward's parameters, in order
    router: RouterLoss | None
    output: type[LinearCausalLMOutput]
    head_dtype: torch.dtype | None = None  # in which the head multiplies, outside autocast; None: as the model does
    checked: type[nn.Module] | None = None  # class of the head that the self-check has seen
    admitted: set[str] = field(default_factory=set)  # names of arguments that have been looked at in a call,
    admitted_to_loss: set[str] = field(default_factory=set)  # and in one with a loss that is not the model's own
    warned: bool = False  # that a training call computed logits
    hook: Any = None  # what takes `tags.before_call` off the model

    def original(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The forward that the model had before the patch."""
        if self.shadowed is not None:
            return self.shadowed(*args, **kwargs)
        return type(model).forward(model, *args, **kwargs)


@dataclass
class Request:
    """The arguments of one call: the patch's own by name, and the base model's in `inputs`."""

    inputs: dict[str, Any]
    labels: Tensor | None = None
    shift_labels: Tensor | None = None
    num_items_in_batch: Tensor | float | None = None
    ignore_index: int = -100
    logits_to_keep: int | Tensor = 0
    return_dict: bool | None = None
    skip_logits: bool | None = None
    loss: Loss | str | None = None
    loss_inputs: dict[str, Tensor] | None = None
    token_outputs: tuple[str, ...] = ()
    token_constants: tuple[str, ...] = ()
    hidden_only: bool = False
    cu_seqlens: Tensor | None = None
    temperature: float | None = None
    gain: Tensor | None = field(default=None)  # [T], the self-check's

    @property
    def scored(self) -> bool:
        """Whether the call has labels, and so a loss."""
        return self.labels is not None or self.shift_labels is not None


#: What `loss_inputs` may hold beside tensors of the batch's shape: arguments of `linear_loss`.
CALL_SETTINGS = ("reduction", "max_length", "ref_head")
REQUEST_ARGUMENTS = tuple(name for name in Request.__dataclass_fields__ if name not in ("inputs", "gain"))


def check_request(request: Request) -> None:
    """Checks the arguments, as far as that is possible before the base model runs."""
    names = request.token_outputs
    if isinstance(names, str) or any(name not in OUTPUTS for name in names):
        raise ValueError(f"token_outputs: expected a tuple of names of {list(OUTPUTS)}, got {names!r}")
    if isinstance(request.token_constants, str) or not set(request.token_constants) <= set(names):
        got = request.token_constants
        raise ValueError(f"token_constants: expected a tuple of names of token_outputs, got {got!r}")
    if request.loss_inputs is not None and not isinstance(request.loss_inputs, dict):
        raise TypeError(f"loss_inputs: expected a dict of tensors by name, got {type(request.loss_inputs).__name__}")
    request.num_items_in_batch = _number_of_items(request.num_items_in_batch)
    reduction = (request.loss_inputs or {}).get("reduction")
    if request.num_items_in_batch is not None and reduction in ("none", "sum"):
        raise ValueError(f"num_items_in_batch: divides a mean, and loss_inputs has reduction={reduction!r}")
    if request.temperature is not None:
        request.temperature = check_temperature(request.temperature)
    if not request.scored:
        needing = {
            "loss": request.loss is not None,
            "loss_inputs": bool(request.loss_inputs),
            "token_outputs": bool(names),
            "temperature": request.temperature is not None,
            "skip_logits=True": bool(request.skip_logits) and not request.hidden_only,
        }
        for name, present in needing.items():
            if present:
                raise ValueError(f"{name}: needs labels or shift_labels, got neither")


def check_temperature(temperature: Any) -> float:
    """The temperature as a number of Python's; raises ValueError unless it is a positive one, NumPy's included.

    A tensor is none: its value would have to come from the device at every call.
    """
    if isinstance(temperature, bool) or not isinstance(temperature, numbers.Real):
        got = f"a tensor, {temperature!r}" if isinstance(temperature, Tensor) else repr(temperature)
        raise ValueError(f"temperature: expected a positive number, got {got}")
    LogitTransform(temperature=float(temperature))
    return float(temperature)


def _number_of_items(items: Any) -> Tensor | float | None:
    """`num_items_in_batch` as an op takes it: a tensor for 0, which divides nothing; numbers of NumPy as Python's.

    The value of a tensor on an accelerator is not looked at, because that would wait for it.
    """
    if not isinstance(items, (Tensor, int, float, type(None))) and getattr(items, "size", None) == 1:
        items = items.item()  # NumPy's; a compiler's symbolic number is an int and has no attributes
    if isinstance(items, Tensor) and items.numel() != 1:
        raise ValueError(f"num_items_in_batch: expected one number, got a tensor of shape {list(items.shape)}")
    if isinstance(items, bool) or not isinstance(items, (Tensor, int, float, type(None))):
        raise TypeError(f"num_items_in_batch: expected a number or a tensor of one, got {type(items).__name__}")
    if items is None or (isinstance(items, Tensor) and (torch.compiler.is_compiling() or items.device.type != "cpu")):
        return items
    if not 0 <= items < math.inf:
        raise ValueError(f"num_items_in_batch: expected a finite number, 0 or more, got {items}")
    return items if isinstance(items, Tensor) or items > 0 else torch.zeros(())


def score(model: nn.Module, state: Patch, request: Request, loss: Loss, *, skip: bool) -> LinearCausalLMOutput:
    """The base model, then the loss inside the head's call, then the terms that the model adds to its loss."""
    base, routed = _run_base(model, state, request)
    hidden = _kept(base[0], request.logits_to_keep)
    names = ("past_key_values", "hidden_states", "attentions")
    fields: dict[str, Any] = {name: getattr(base, name, None) for name in names}
    fields["logits"] = hidden if request.hidden_only else None
    # A class without the argument `output_router_logits` reports what its base model was asked to record.
    records = routed or "output_router_logits" not in state.names
    fields["router_logits"] = getattr(base, "router_logits", None) if records else None
    added = None
    if routed and state.router is not None and isinstance(fields["router_logits"], tuple):
        fields["aux_loss"], added = state.router(model, fields["router_logits"], request.inputs.get("attention_mask"))
    if request.scored:
        if request.gain is not None:
            hidden = hidden * request.gain[:, None]
        fields |= score_hidden(model, state, request, loss, hidden, with_logits=not skip and not request.hidden_only)
        if added is not None:
            fields["loss"] = fields["loss"] + added.to(fields["loss"].device)
    return state.output(**fields)  # made at once: a field that is set later would come behind those that were there


def score_hidden(
    model: nn.Module, state: Patch, request: Request, loss: Loss, hidden: Tensor, *, with_logits: bool = False
) -> dict[str, Any]:
    """The output's fields that come from the head: the loss of hidden states, inside the head's own call."""
    head = find_head(model)
    work = _HeadCall(state, request, loss, head, head_rule(model), _targets(request, hidden, loss), with_logits)
    return work.unpack(head.call(hidden, work))


def _run_base(model: nn.Module, state: Patch, request: Request) -> tuple[Any, bool]:
    """The base model's output, and whether it holds the router's logits."""
    inputs, routed = request.inputs, False
    if request.cu_seqlens is not None and "use_cache" in state.names:
        inputs = {"use_cache": False, **inputs}
    if "output_router_logits" in state.names:
        asked = inputs.get("output_router_logits")
        routed = bool(getattr(text_config(model), "output_router_logits", False) if asked is None else asked)
        inputs = {**inputs, "output_router_logits": routed}
    return base_of(model)(**inputs, return_dict=True), routed


def _kept(hidden: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The positions that Transformers' `logits_to_keep` names: last n, indices `[n]`, `[B, n]`, or a mask `[B, T]`."""
    if isinstance(logits_to_keep, int):
        return hidden if logits_to_keep == 0 else hidden[:, -logits_to_keep:, :]
    if logits_to_keep.dim() == 2 and logits_to_keep.dtype == torch.bool:
        return hidden[logits_to_keep]
    if logits_to_keep.dim() == 2:
        return torch.take_along_dim(hidden, logits_to_keep[..., None], dim=1)
    return hidden[:, logits_to_keep, :]


def _targets(request: Request, hidden: Tensor, loss: Loss) -> Tensor:
    """The targets of the positions of `hidden`, on its device; lists of them for a loss of lists."""
    name = "labels" if request.shift_labels is None else "shift_labels"
    labels = request.labels if request.shift_labels is None else request.shift_labels
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        got = str(labels.dtype) if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{name}: expected a tensor of integer token ids, got {got}")
    positions = hidden.shape[:-1]
    if loss.lists and name == "labels":
        raise ValueError(f"labels: {loss.name!r} reads lists of ids [..., K], which are not shifted: shift_labels")
    if (labels.shape[:-1] if loss.lists else labels.shape) != positions:
        expected = [*positions, "K"] if loss.lists else list(positions)
        raise ValueError(f"{name}: expected shape {expected} like the hidden states, got {list(labels.shape)}")
    targets = labels.to(hidden.device).long()
    if name == "labels":
        targets = F.pad(targets, (0, 1), value=request.ignore_index)[..., 1:]
    if request.cu_seqlens is not None:
        check_boundaries(request.cu_seqlens, positions.numel())
        if name == "labels":
            last = (request.cu_seqlens[1:] - 1).to(hidden.device).long()
            targets = targets.flatten().index_fill(0, last, request.ignore_index).view_as(targets)
    return targets


@dataclass
class _HeadCall:
    """The replacement of the head's forward for one call. It computes the loss, statistics and logits, as requested.

    It returns a flat dict of tensors, because every wrapper's hooks know how to walk one. `unpack` puts these into the
    output.
    """

    state: Patch
    request: Request
    loss: Loss
    head: HeadModules
    rule: HeadRule
    targets: Tensor
    with_logits: bool
    own_forward: Callable[..., Tensor] = field(init=False)
    result_type: Any = None

    def __post_init__(self) -> None:
        self.own_forward = self.head.inner.forward

    def __call__(self, hidden: Tensor, **extra: Any) -> dict[str, Tensor]:
        if extra:
            raise ValueError(
                f"the output head was called with {sorted(extra)}, which the patch does not serve; skip_logits=False "
                "runs the model's own forward where the loss is plain NLL"
            )
        with torch.autocast(hidden.device.type, enabled=False) if self.state.head_dtype else nullcontext():
            results = self._score(hidden)
        if self.with_logits:
            results["logits"] = self.rule.finish(self.own_forward(hidden))
        return results

    def _score(self, hidden: Tensor) -> dict[str, Tensor]:
        hidden, weight, bias, group = product(self.head.inner, hidden).cut(self.rule.vocabulary)
        if self.state.head_dtype is not None:
            hidden, weight = hidden.to(self.state.head_dtype), weight.to(self.state.head_dtype)
            bias = None if bias is None else bias.to(self.state.head_dtype)
        options: OptionKeywords = {
            "bias": bias,
            "logit_scale": self.rule.transform.logit_scale,
            "softcap": self.rule.transform.softcap,
            "temperature": self.state.temperature if self.request.temperature is None else self.request.temperature,
            "ignore_index": self.request.ignore_index,
            "backend": self.state.backend,
            "backward": self.state.backward,
        }
        if group is not None:
            options["group"] = group
        results = self._token_stats(hidden, weight, options)
        if results and self._reads_them:
            results["loss"] = self._loss_of_stats(results)
        else:
            results |= self._linear_loss(hidden, weight, options)
        if self.rule.z_loss > 0:
            own: OptionKeywords = {**_recomputable(options), "temperature": 1.0}  # a term of the model's own logits
            lse = linear_logprobs(hidden, weight, None, outputs=("lse",), **own).lse
            assert lse is not None
            results["loss"] = results["loss"] + self.rule.z_loss * lse.square().mean()
        return results

    @property
    def _reads_them(self) -> bool:
        """Whether the loss is a function of the call's own statistics and of its inputs."""
        plain = self.loss.token_wise and not self.loss.lists and self.loss.stats_temperature == 1.0
        return plain and not {"ref_hidden", "among"} & set(self.request.loss_inputs or ())

    def _token_stats(self, hidden: Tensor, weight: Tensor, options: OptionKeywords) -> dict[str, Tensor]:
        """The statistics that the call and the loss ask for, from one product."""
        if not self.request.token_outputs:
            return {}
        read = self.loss.outputs if self._reads_them else ()
        outputs = tuple(dict.fromkeys((*self.request.token_outputs, *read)))
        constants = tuple([name for name in self.request.token_constants if name not in read])
        own = _recomputable(options)
        stats = linear_logprobs(hidden, weight, self.targets, outputs=outputs, constants=constants, **own)
        return {f"stats.{name}": value for name, value in stats._asdict().items() if value is not None}

    def _loss_of_stats(self, results: dict[str, Tensor]) -> Tensor:
        """The loss of tokens whose statistics have been computed already."""
        inputs = self._inputs()
        settings = {name: inputs.pop(name, None) for name in ("token_weight", "max_length")}
        settings["reduction"] = inputs.pop("reduction", self.loss.reduction)
        reduce.check(settings["reduction"], self.request.num_items_in_batch, settings["max_length"])
        tokens = token_layout(self.targets != self.request.ignore_index, self.request.cu_seqlens)
        stats, items = _stats(results, self.loss.outputs), self.request.num_items_in_batch
        known = loss_inputs(self.loss, inputs, tokens, self.targets.device)
        out: Tensor = self.loss.evaluate(stats, tokens, known, normalizer=items, **settings)
        return out

    def _linear_loss(self, hidden: Tensor, weight: Tensor, options: OptionKeywords) -> dict[str, Tensor]:
        result = linear_loss(
            self.loss,
            hidden,
            weight,
            self.targets,
            cu_seqlens=self.request.cu_seqlens,
            normalizer=self.request.num_items_in_batch,
            **{**self._inputs(), **options},
        )
        if isinstance(result, Tensor):
            return {"loss": result}
        self.result_type = type(result)
        return {"loss": result.loss, **{f"result.{k}": v for k, v in result._asdict().items() if v is not None}}

    def _inputs(self) -> dict[str, Any]:
        """The loss's inputs on the targets' device, and the call's settings (such as a reduction) unchanged."""
        inputs = self.request.loss_inputs or {}
        expected = self.targets.shape[:-1] if self.loss.lists else self.targets.shape
        for name, value in inputs.items():
            if name in CALL_SETTINGS:
                continue
            per_sequence = (
                isinstance(value, Tensor)
                and value.dim() < 2
                and name in (*self.loss.inputs, *self.loss.sequence_inputs, *self.loss.optional_inputs)
            )
            if not isinstance(value, Tensor) or not (per_sequence or value.shape[: len(expected)] == expected):
                got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"loss_inputs[{name!r}]: expected a tensor {list(expected)} like labels, got {got}")
        return {k: v.to(self.targets.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}

    def unpack(self, results: dict[str, Tensor]) -> dict[str, Any]:
        """The fields of the output that the results of the head's call fill."""
        filled: dict[str, Any] = {name: results[name] for name in ("loss", "logits") if name in results}
        if self.request.token_outputs:
            filled["token_stats"] = _stats(results, self.request.token_outputs)
        if self.result_type is not None:
            fields = {name: results.get(f"result.{name}") for name in self.result_type._fields}
            filled["loss_result"] = self.result_type(**fields)
        return filled


def plain_head(model: nn.Module) -> Head:
    """A model's own output head without any adapter."""
    return _head_of(model, own_product)


def dense_head(model: nn.Module) -> Head:
    """A model's output head with its active adapter in it, as a reference model's hidden states need it."""
    return _head_of(model, dense_product)


def _head_of(model: nn.Module, product_of: Callable[[HeadModules], tuple[Tensor, Tensor | None]]) -> Head:
    inner = causal_lm(model)
    rule = head_rule(inner)
    weight, bias = kept_rows(*product_of(find_head(inner)), rule.vocabulary)
    return Head(weight.detach(), None if bias is None else bias.detach(), *rule.transform.numbers)


def _recomputable(options: OptionKeywords) -> OptionKeywords:
    """Options without `backward="single_pass"`, which is for a loss: statistics of a trainable head refuse it."""
    return {**options, "backward": "auto"} if options["backward"] == "single_pass" else options


def _stats(results: dict[str, Tensor], names: tuple[str, ...]) -> TokenStats:
    return TokenStats(**{name: results[f"stats.{name}"] for name in names})
