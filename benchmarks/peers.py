"""Other libraries' ways to the same losses, each called as its own users call it.

Imports happen inside the steps: a peer that is not installed, or does not run here, is a line in the table with its
reason and no more.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from .problems import Inputs
from .providers import BETA, Provider, differentiate, dpo_of_logprob

#: What TRL's trainers pass (trl.trainer.utils, release 1.16).
TRL_VOCABULARY_CHUNK = 32768


def torch_nll(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    """torch 2.13's op; without `options` it materialises the logits."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, inputs.targets, options=options)


def trl_logprob(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    chunk = min(TRL_VOCABULARY_CHUNK, inputs.problem.vocabulary)
    return ChunkedLogProbFunction.apply(hidden, weight, None, inputs.targets, 1.0, chunk, None, 1.0, ())[0]


def trl_nll(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    return -trl_logprob(hidden, weight, inputs).mean()


def trl_dpo(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    return dpo_of_logprob(trl_logprob(hidden, weight, inputs), inputs)


def liger_nll(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    """The per-token primitive; off a GPU it takes its PyTorch fallback of 512-token chunks."""
    module = import_without_parents("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    return module.LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, inputs.targets).mean()


def liger_dpo(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    """Pair by pair, compiled: its defaults. It takes no log-probabilities of a reference; a uniform one cancels."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    shape = (2 * inputs.problem.pairs, inputs.problem.length)
    loss = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False)
    return loss(weight, hidden.view(*shape, -1), inputs.targets.view(shape))[0]


def cce_nll(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    """The path that it has for machines without a GPU: the materialised loss under `torch.compile`."""
    module = import_without_parents("cut_cross_entropy.torch_compile")
    return module.torch_compile_linear_cross_entropy(hidden, weight, inputs.targets)


def import_without_parents(name: str) -> ModuleType:
    """Imports `a.b.c` without running `a/__init__.py` and `a/b/__init__.py`, which load Triton kernels.

    Where Triton is not installed those fail, though the module asked for does not need it.
    """
    if name in sys.modules:
        return sys.modules[name]
    parents = [name.rsplit(".", depth)[0] for depth in range(name.count("."), 0, -1)]
    stand_ins = [parent for parent in parents if parent not in sys.modules]
    try:
        for parent in stand_ins:
            sys.modules[parent] = _without_init(parent)
        return importlib.import_module(name)
    finally:
        for parent in stand_ins:
            sys.modules.pop(parent, None)


def _without_init(name: str) -> ModuleType:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    module = ModuleType(name)
    module.__path__ = list(spec.submodule_search_locations)
    return module


def _nll(name: str, loss: Callable[[Tensor, Tensor, Inputs], Tensor]) -> Provider:
    return Provider(name, "peer", "nll", partial(differentiate, loss))


def _dpo(name: str, loss: Callable[[Tensor, Tensor, Inputs], Tensor]) -> Provider:
    return Provider(name, "peer", "dpo", partial(differentiate, loss))


TORCH = _nll("torch F.linear_cross_entropy", torch_nll)
TRL = _nll("TRL ChunkedLogProbFunction", trl_nll)
TRL_DPO = _dpo("TRL ChunkedLogProbFunction", trl_dpo)
LIGER = _nll("Liger scaled cross-entropy", liger_nll)
LIGER_DPO = _dpo("Liger chunked DPO", liger_dpo)
CCE = _nll("Cut Cross-Entropy, compiled", cce_nll)
