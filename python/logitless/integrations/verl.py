"""verl's fused log-probabilities and entropies: `enable()` where its workers start, with `use_fused_kernels=True`.

verl asks a class of its own for both numbers (`FusedLinearForPPO`), under its backends `torch` and `liger`. The method
of that class is replaced. Its policy losses, its KL terms and its metrics read the two numbers and stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from torch import Tensor

from ..ops import linear_logprobs
from .hosts import Change, Switch, UnsupportedHostError

#: Releases of verl that the tests ran.
TESTED = ">=0.9.1,<0.10"
_FUSED = Switch("verl", TESTED)


def enable(**options: Any) -> Switch:
    """Makes verl compute a token's log-probability and entropy by `logitless.linear_logprobs`.

    It takes effect in the process that calls it, for models that run with
    `actor_rollout_ref.model.use_fused_kernels=True`. Ray's workers are processes of their own: call it there, in the
    module that `actor_rollout_ref.model.external_lib` names. `disable()` or the end of a `with` block takes it back.

    Args:
        **options: `backend`, `backward`, `chunk_bytes` and `chunk_dtype` of `linear_logprobs`.

    Raises:
        UnsupportedHostError: another release than `TESTED`, or enabled already. Later, as a model is prepared: the
            backend `triton`, which does not go through that class.
    """
    return _FUSED.on(lambda: _fused_changes(options))


def disable() -> None:
    """Puts verl's own method back."""
    _FUSED.off()


def _fused_changes(options: dict[str, Any]) -> list[Change]:
    from verl.models.transformers import monkey_patch
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    operands = ("self", "hidden_states", "vocab_weights", "input_ids", "temperature")
    prepared = ("model", "use_fused_kernels", "fused_kernels_backend")
    return [
        Change(FusedLinearForPPO, "forward", operands, partial(_replaced, options=options)),
        Change(monkey_patch, "patch_forward_with_backends", prepared, _checked),
    ]


def _replaced(own: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    @wraps(own)
    def forward(
        self: Any, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        outputs = ("logprob", "entropy")
        stats = linear_logprobs(
            hidden_states, vocab_weights, input_ids.long(), temperature=float(temperature), outputs=outputs, **options
        )
        assert stats.logprob is not None and stats.entropy is not None
        return stats.logprob, stats.entropy.to(hidden_states.dtype)

    return forward


def _checked(own: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(own)
    def patch_forward_with_backends(
        model: Any, use_fused_kernels: bool = False, fused_kernels_backend: str | None = None
    ) -> Any:
        if use_fused_kernels and fused_kernels_backend not in ("torch", "liger"):
            raise UnsupportedHostError(
                f"fused_kernel_options.impl_backend={fused_kernels_backend!r}: logitless takes the place of 'torch' "
                "and 'liger'; choose one of them"
            )
        return own(model, use_fused_kernels, fused_kernels_backend)

    return patch_forward_with_backends
