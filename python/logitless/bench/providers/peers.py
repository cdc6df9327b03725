"""Other libraries' ways to the same losses, each called as its own users call it.

Imports happen inside the steps: a peer that is not installed, or does not run here, is a line in the table with its
reason and no more.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from logitless import TokenStats

from ..problem import Inputs
from ..provider import Loss, Provider
from .materialised import BETA, LOSSES, constants, dpo_of_logprob, of_stats, ref_hidden

#: What TRL's trainers pass (trl.trainer.utils, release 1.16).
TRL_VOCABULARY_CHUNK = 32768


def torch_nll(hidden: Tensor, weight: Tensor, inputs: Inputs, **options: Any) -> Tensor:
    """torch 2.13's op; without options it materialises the logits."""
    chosen = torch.nn.LinearCrossEntropyOptions(**options)
    return F.linear_cross_entropy(hidden, weight, inputs.targets, options=chosen)


def trl_logprob(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    chunk = min(TRL_VOCABULARY_CHUNK, inputs.problem.vocabulary)
    return ChunkedLogProbFunction.apply(hidden, weight, None, inputs.targets, 1.0, chunk, None, 1.0, ())[0]


def trl_nll(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    return -trl_logprob(hidden, weight, inputs).mean()


def trl_dpo(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    return dpo_of_logprob(trl_logprob(hidden, weight, inputs), inputs)


def trl_top_k(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    """Forward KL on a teacher's listed ids with a bucket for the rest, as TRL's server distillation has it."""
    from trl.experimental.server_distillation import server_distillation_trainer as trl

    loss = LOSSES["top_k_distillation"]
    teacher = constants(loss, inputs)["teacher_logprob"].flatten(0, 1).to(hidden.dtype)
    logprob = F.log_softmax(hidden @ weight.T, dim=-1).gather(-1, inputs.lists())
    valid = torch.ones_like(logprob, dtype=torch.bool)
    student, support = trl._add_tail_bucket(logprob, valid)
    return trl._jsd_divergence(student, trl._add_tail_bucket(teacher, valid)[0], 0, support).sum(-1).mean()


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


# ---------------------------------------------------------------------------------------------------------------------
# Those that need a GPU


def liger_fused(hidden: Tensor, weight: Tensor, inputs: Inputs, accum_dtype: torch.dtype | None = None) -> Tensor:
    """Liger's default accumulates the head's gradient in the head's dtype, chunk after chunk."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(accum_dtype=accum_dtype)(weight, hidden, inputs.targets)


def cce_kernels(hidden: Tensor, weight: Tensor, inputs: Inputs, filter_eps: str | None = "high") -> Tensor:
    """Cut Cross-Entropy leaves out blocks of small gradients, which may be most of a confident token's gradient."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, inputs.targets, impl="cce", filter_eps=filter_eps)


def quack(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(hidden, weight, inputs.targets)


def flash_attn(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    """On logits, whose gradient takes their place."""
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    return cross_entropy_loss(hidden @ weight.T, inputs.targets, inplace_backward=True)[0].mean()


# ---------------------------------------------------------------------------------------------------------------------
# Losses of the registry. Where a library's step is its log-probabilities and a formula of vectors, the formula is ours:
# the tests hold the two together, and it takes no time that could be seen.


def trl_of_logprob(name: str, hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    """What TRL's SFT, DPO, KTO and GRPO trainers do: chunks over the vocabulary."""
    return of_stats(LOSSES[name], TokenStats(trl_logprob(hidden, weight, inputs)), inputs)


def trl_of_logits(name: str, hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    """What its CPO and ORPO trainers do (SimPO is one of CPO's): log-probabilities of full logits."""
    from trl.trainer.utils import selective_log_softmax

    logprob = selective_log_softmax(hidden @ weight.T, inputs.targets)
    return of_stats(LOSSES[name], TokenStats(logprob), inputs)


def trl_js(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    """TRL's op for its distillation trainer."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    reference = ref_hidden(inputs), weight.detach(), None
    heads = hidden, weight, None, *reference
    return ChunkedDivergenceFunction.apply(*heads, 0.5, 1.0, 1.0, None, 1.0, None)[0].mean()


def liger_dft(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    """Liger's per-token primitive, weighted."""
    module = import_without_parents("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    nll = module.LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, inputs.targets)
    return (torch.exp(-nll.detach()) * nll).mean()


def liger_pairs(loss: str, settings: dict[str, Any], hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    """Liger's reference-free pair losses, by the name of their class, with the paper's settings; compiled."""
    from liger_kernel import chunked_loss

    shape = inputs.problem.shape
    module = getattr(chunked_loss, f"LigerFusedLinear{loss}Loss")(**settings)
    return module(weight, hidden.view(*shape, -1), inputs.targets.view(shape))[0]


def liger_kto(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    """A uniform reference's log-probability is a constant, which its `kl` can hold beside the reference point."""
    from liger_kernel.chunked_loss import LigerFusedLinearKTOLoss

    problem, given = inputs.problem, constants(LOSSES["kto"], inputs)
    point = given["reference_point"] + problem.length * inputs.ref_logprob[0]
    rows, targets = hidden.view(*problem.shape, -1), inputs.targets.view(problem.shape)
    return LigerFusedLinearKTOLoss()(rows, weight, targets, preference_labels=given["desirable"], kl=point)[0]


def liger_grpo(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    """Liger's GRPO with the log-probabilities of an older policy, and no reference."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    shape, given = inputs.problem.shape, constants(LOSSES["grpo"], inputs)
    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="grpo")
    return loss(
        hidden.view(*shape, -1),
        weight,
        inputs.targets.view(shape),
        torch.ones(shape, device=hidden.device),
        given["advantages"][:, 0],
        old_per_token_logps=given["old_logprob"],
    )[0]


def liger_js(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    """Liger's JS divergence without the cross-entropy that it mixes in by default."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5)
    return loss(hidden, weight, ref_hidden(inputs), weight.detach(), inputs.targets)


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


# ---------------------------------------------------------------------------------------------------------------------
# Providers


#: What `--against` calls the other libraries, by the first word of a provider's name.
LIBRARIES = {
    "torch": "torch",
    "TRL": "trl",
    "Liger": "liger",
    "Cut": "cce",
    "quack": "quack",
    "flash-attn,": "flash-attn",
}


def _peer(name: str, loss: Loss, compared: str = "nll") -> Provider:
    return Provider(name, "peer", loss, compared, library=LIBRARIES[name.split()[0]])


TORCH = _peer("torch F.linear_cross_entropy", torch_nll)
TRL = _peer("TRL ChunkedLogProbFunction", trl_nll)
TRL_TOP_K = _peer("TRL top-k", trl_top_k, "top_k_distillation")
TRL_DPO = _peer(TRL.name, trl_dpo, "dpo")
LIGER = _peer("Liger scaled cross-entropy", liger_nll)
LIGER_DPO = _peer("Liger chunked DPO", liger_dpo, "dpo")
CCE = _peer("Cut Cross-Entropy, compiled", cce_nll)
LIGER_FUSED = _peer("Liger fused linear", liger_fused)
LIGER_FUSED_FLOAT32 = _peer("Liger fused linear, float32 sums", partial(liger_fused, accum_dtype=torch.float32))
CCE_KERNELS = _peer("Cut Cross-Entropy", cce_kernels)
CCE_UNFILTERED = _peer("Cut Cross-Entropy, unfiltered", partial(cce_kernels, filter_eps=None))
QUACK = _peer("quack", quack)
FLASH_ATTN = _peer("flash-attn, on logits", flash_attn)
_torch_1024 = partial(torch_nll, batch_chunk_size=1024, chunking_method=None)
#: NLL by other libraries, as they are called on a processor and on a GPU.
ON_PROCESSOR = (TORCH, TRL, LIGER, CCE)
ON_GPU = (
    *(TORCH, _peer("torch F.linear_cross_entropy, chunks of 1024", _torch_1024), TRL),
    *(LIGER_FUSED, LIGER_FUSED_FLOAT32, LIGER, CCE_KERNELS, CCE_UNFILTERED),
    *(QUACK, FLASH_ATTN),
)

SIMPO = dict(beta=2.0, compute_nll_loss=False)
#: TRL's and Liger's losses of the registry's names.
OF_REGISTRY: dict[str, tuple[Provider, ...]] = {
    name: (_peer(f"TRL {name}", trl, name), _peer(f"Liger {name}", liger, name))
    for name, trl, liger in (
        ("dft", partial(trl_of_logprob, "dft"), liger_dft),
        ("dpo", partial(trl_of_logprob, "dpo"), liger_dpo),
        ("simpo", partial(trl_of_logits, "simpo"), partial(liger_pairs, "SimPO", SIMPO)),
        ("orpo", partial(trl_of_logits, "orpo"), partial(liger_pairs, "ORPO", {})),
        ("cpo", partial(trl_of_logits, "cpo"), partial(liger_pairs, "CPO", {})),
        ("kto", partial(trl_of_logprob, "kto"), liger_kto),
        ("grpo", partial(trl_of_logprob, "grpo"), liger_grpo),
        ("js", trl_js, liger_js),
    )
}
