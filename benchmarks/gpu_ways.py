"""The ways through a cell: cuBLAS's products alone, materialised logits, every backend and strategy, the peers.

A way is a loss that autograd differentiates, so that its forward and its backward are timed alike.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from logitless.types import BackendName, BackwardName

from . import peers
from .definitions import materialised_nll
from .gpu_cells import FROZEN_GEMMS, GEMM
from .problems import Inputs
from .providers import Loss, Role, logitless_nll


@dataclass(frozen=True)
class Way:
    """`package` is what must be installed; `checked` whether its gradients are held against float64 ones."""

    name: str
    role: Role
    loss: Loss
    frozen: bool = False
    checked: bool = True
    package: str | None = None

    def missing(self) -> str | None:
        """Why it cannot run here, as far as that shows before it is called."""
        if self.package == TORCH_OP:
            return None if hasattr(F, "linear_cross_entropy") else f"torch {torch.__version__} has no {TORCH_OP}"
        absent = self.package is not None and importlib.util.find_spec(self.package) is None
        return f"{self.package} is not installed" if absent else None

    def of(self, inputs: Inputs) -> Inputs:
        """The inputs as this way takes them."""
        return inputs._replace(problem=replace(inputs.problem, frozen_head=self.frozen))


class _Products(torch.autograd.Function):
    """The floor: one product forwards, one for each gradient backwards, nothing else."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        z = hidden @ weight.T
        ctx.save_for_backward(hidden, weight, z)
        return z.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, Tensor | None]:
        hidden, weight, z = ctx.saved_tensors
        return z @ weight, z.T @ hidden if ctx.needs_input_grad[1] else None


def products(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    """A loss whose forward and backward are the products alone."""
    return _Products.apply(hidden, weight)


@cache
def _compiled() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(hidden @ weight.T, targets)

    return torch.compile(loss, dynamic=False)


def _compiled_nll(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    return _compiled()(hidden, weight, inputs.targets)


# ---------------------------------------------------------------------------------------------------------------------
# Peers, as their own users call them on a GPU; `peers` has the others


def _torch_nll(hidden: Tensor, weight: Tensor, inputs: Inputs, **options: Any) -> Tensor:
    chosen = torch.nn.LinearCrossEntropyOptions(**options)
    return F.linear_cross_entropy(hidden, weight, inputs.targets, options=chosen)


def _liger_fused(hidden: Tensor, weight: Tensor, inputs: Inputs, accum_dtype: torch.dtype | None = None) -> Tensor:
    """Its default accumulates the head's gradient in the head's dtype, chunk after chunk."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(accum_dtype=accum_dtype)(weight, hidden, inputs.targets)


def _cce(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, inputs.targets, impl="cce")


def _quack(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(hidden, weight, inputs.targets)


def _flash_attn(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    """On logits, whose gradient takes their place."""
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    return cross_entropy_loss(hidden @ weight.T, inputs.targets, inplace_backward=True)[0].mean()


def cce_build() -> str | None:
    """PyPI's Cut Cross-Entropy is another program than its repository's; this says which one is installed."""
    try:
        found = importlib.metadata.distribution("cut-cross-entropy")
    except importlib.metadata.PackageNotFoundError:
        return None
    origin = json.loads(found.read_text("direct_url.json") or "{}")
    commit = origin.get("vcs_info", {}).get("commit_id")
    place = f"{origin['url'].split('@')[-1]} {commit or ''}".strip() if "url" in origin else "a package index"
    return f"{found.version}, from {place}"


TORCH_OP = "torch.nn.functional.linear_cross_entropy"
_torch_1024 = partial(_torch_nll, batch_chunk_size=1024, chunking_method=None)
_PEERS = (
    ("torch F.linear_cross_entropy", TORCH_OP, _torch_nll),
    ("torch F.linear_cross_entropy, chunks of 1024", TORCH_OP, _torch_1024),
    ("TRL ChunkedLogProbFunction", "trl", peers.trl_nll),
    ("Liger fused linear", "liger_kernel", _liger_fused),
    ("Liger fused linear, float32 sums", "liger_kernel", partial(_liger_fused, accum_dtype=torch.float32)),
    ("Liger scaled", "liger_kernel", peers.liger_nll),
    ("Cut Cross-Entropy", "cut_cross_entropy", _cce),
    ("quack", "quack", _quack),
    ("flash-attn, on logits", "flash_attn", _flash_attn),
)  # fmt: skip
PEERS = tuple(Way(name, "peer", loss, package=package) for name, package, loss in _PEERS)

# ---------------------------------------------------------------------------------------------------------------------
# All of them


def _own() -> Iterator[Way]:
    """Every backend and strategy that `logitless.types` names, and a frozen head in a single pass."""
    for backend in get_args(BackendName):
        if backend in ("auto", "reference"):
            continue
        for backward in get_args(BackwardName)[1:]:
            if backward != "screened":  # a CPU's
                loss = partial(logitless_nll, backend=backend, backward=backward)
                yield Way(f"{backend}, {backward}", "logitless", loss)
        frozen = partial(logitless_nll, backend=backend, backward="single_pass")
        yield Way(f"{backend}, frozen head", "logitless", frozen, frozen=True)


WAYS = (
    Way(GEMM, "floor", products, checked=False),
    Way(FROZEN_GEMMS, "floor", products, frozen=True, checked=False),
    Way("materialised", "materialised", materialised_nll),
    Way("materialised, compiled", "materialised", _compiled_nll, checked=False),
    *_own(),
    *PEERS,
)
