"""The check that a patch computes what its model computes: one small forward of each, compared, without a trace.

The logits of a freshly initialised model are tiny. At that size a softcap does nothing, and a scale hardly shows. So
both runs multiply the hidden states by a gain, which grows from token to token until the logits reach `REACH`. Then a
transform that the patch does not know of changes the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..losses.sft.likelihood import NLL
from .families import UnsupportedModelError, text_config
from .heads import find_head
from .scoring import Patch, Request, score

if TYPE_CHECKING:
    from .outputs import LinearCausalLMOutput

TOKENS = 5  # four predictions
REACH = 50.0  # of the largest gained logit, before the model's transform: beyond every softcap in use
ROUNDINGS = 8  # of a logit of that size, allowed between two ways to compute it


@torch.no_grad()
def self_check(model: nn.Module, state: Patch) -> float:
    """The largest difference between the model's log-probs, logsumexps and NLL and the patch's, in nats.

    It runs the model's own forward and the patched one on five token ids, in evaluation mode, without gradients.
    Afterwards mode, random state and buffers are as before. Gradients are not touched.

    Raises:
        UnsupportedModelError: they differ by more than the rounding of the logits' dtype allows.
    """
    ids = probe_ids(model).expand(_rows(model), -1)
    inputs = {"input_ids": ids, **({"use_cache": False} if "use_cache" in state.names else {})}
    with _untouched(model):
        own, gain = _own_forward(model, state, inputs)
        request = Request(inputs, labels=ids, token_outputs=("logprob", "lse"), temperature=1.0, gain=gain)
        try:
            ours = score(model, state, request, NLL(), skip=True)
        except (TypeError, ValueError) as error:
            raise UnsupportedModelError(f"{type(model).__name__}: the patch cannot run on it: {error}") from error
    worst, allowed = _largest_error(own, ours, ids), tolerance(own.logits)
    if not worst <= allowed:
        raise UnsupportedModelError(
            f"{type(model).__name__}: the patch's log-probabilities and the model's own differ by {worst:.3g} "
            f"(allowed {allowed:.3g}): between its base model and its loss it does something that logitless does not "
            "know. Nothing has been trained; unpatch(model) gives it back as it was"
        )
    return worst


def _largest_error(own: Any, ours: LinearCausalLMOutput, ids: Tensor) -> float:
    """The largest difference in nats, over log-probs, logsumexps and the loss. A padded head has no loss of its own."""
    logits = own.logits[:, :-1].to(torch.promote_types(own.logits.dtype, torch.float32))
    expected = logits.log_softmax(-1).gather(-1, ids[:, 1:, None].to(logits.device))[..., 0]
    stats, loss = ours.token_stats, ours.loss
    assert stats is not None and stats.logprob is not None and stats.lse is not None and loss is not None
    errors = [stats.logprob[:, :-1] - expected, stats.lse[:, :-1] - logits.logsumexp(-1)]
    if own.loss is not None:
        errors.append(loss - own.loss)
    return max(float(error.abs().max()) for error in errors)


def tolerance(logits: Tensor) -> float:
    """`ROUNDINGS` of the largest logit, in the precision of the product, and float32 at best because NLL is float32."""
    eps = max(torch.finfo(logits.dtype).eps, torch.finfo(torch.float32).eps)
    if logits.is_cuda and logits.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        eps = 2.0**-10
    return ROUNDINGS * eps * (1 + _largest(logits))


def _rows(model: nn.Module) -> int:
    """Rows of the check: 1, or those of a call of a `PeftModel` whose hooks hold `adapter_names`, an adapter a row."""
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    names = (getattr(hook, "keywords", {}).get("adapter_names") for hook in hooks)
    return next((len(each) for each in names if each), 1)


def probe_ids(model: nn.Module) -> Tensor:
    """`[1, 5]` token ids spread over the vocabulary, without those that the configuration gives a special meaning."""
    config = text_config(model)
    named = [v for c in (config, model.config) for k, v in vars(c).items() if k.endswith(("_token_id", "_token_index"))]
    special = {i for v in named for i in (v if isinstance(v, list | tuple) else [v])}
    plain = [i for i in range(config.vocab_size) if i not in special] or list(range(config.vocab_size))
    ids = [plain[len(plain) * (k + 1) // (TOKENS + 2)] for k in range(TOKENS)]
    return torch.tensor([ids], device=model.get_input_embeddings().weight.device)  # type: ignore[operator]


def _own_forward(model: nn.Module, state: Patch, inputs: dict[str, Any]) -> tuple[Any, Tensor]:
    """The model's own output for hidden states times the gain, and that gain, `[T]`."""
    inner = find_head(model).inner
    gained = _Gained(inner.forward, len(inputs["input_ids"]))
    replaced = inner.__dict__.get("forward")
    # A head that was padded or resized breaks the view in Transformers' own loss.
    fits = inner.weight.shape[0] == text_config(model).vocab_size  # type: ignore[index]
    inner.forward = gained
    parameters = state.forward.__signature__.parameters
    passing = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    asked = {"return_dict": True} if passing or "return_dict" in parameters else {}
    try:
        own = state.original(model, **inputs, labels=inputs["input_ids"] if fits else None, **asked)
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__}: the self-check could not run the model's own forward on {TOKENS} tokens "
            f"({error}); patch(model, check=False) goes without it"
        ) from error
    finally:
        if replaced is None:
            del inner.forward
        else:
            inner.forward = replaced
    if gained.gain is None or gained.calls != 1:
        raise UnsupportedModelError(
            f"{type(model).__name__}: its forward calls its output head {gained.calls} times on a whole sequence; "
            "expected once"
        )
    return own, gained.gain


class _Gained:
    """A head's forward on hidden states `[B, T, H]` times `gain[t]`: powers of two, up to logits of `REACH`."""

    def __init__(self, forward: Callable[..., Tensor], rows: int) -> None:
        self.forward = forward
        self.rows = rows
        self.gain: Tensor | None = None
        self.calls = 0

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        if hidden.shape[:-1] != (self.rows, TOKENS):
            return self.forward(hidden, *args, **kwargs)
        room = math.log2(REACH / max(_largest(self.forward(hidden, *args, **kwargs)), 2.0**-20))
        most = math.log2(torch.finfo(hidden.dtype).max) - math.log2(max(_largest(hidden), 1.0)) - 2
        steps = [int(max(0.0, min(room, most)) * min(k / (TOKENS - 2), 1)) for k in range(TOKENS)]
        self.gain = torch.tensor([2.0**s for s in steps], device=hidden.device, dtype=hidden.dtype)
        return self.forward(hidden * self.gain[:, None], *args, **kwargs)


def _largest(x: Tensor) -> float:
    """The largest finite magnitude, or 0 if there is none."""
    return float(x.masked_fill(~x.isfinite(), 0).abs().max())


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within the context. Afterwards modes, buffers and the random state are as before."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(m, name, b, b.clone()) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    devices = {p.device for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=sorted(devices, key=str)):
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for module, name, buffer, before in buffers:
                buffer.copy_(before)
                module._buffers[name] = buffer
