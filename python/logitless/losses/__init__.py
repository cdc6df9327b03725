"""Losses as pure functions of per-token or per-sequence vectors, each a frozen dataclass of its hyper-parameters.

- `nll`, `NLL(label_smoothing, z_loss)`: token level.
- `dft`, `DFT(power)`: token level.
- `f_divergence_sft`, `FDivergenceSFT(divergence, beta, value, alpha, saturate)`: token level with `ref_logprob`;
  sequence level with `ref_logprob` and `ref_lse` where `value="lse"`.
- `dpo`, `DPO(beta, loss_type, label_smoothing, divergence, alpha)`: pair level with `ref_logprob`.

`get("dft")` makes one by name, `names()` lists them, `register` adds one. `sequence_logprob` turns token
log-probabilities into those of sequences, which is what pair losses take.
"""

from .base import Loss, get, names, register, sequence_logprob
from .preference import DPO, PreferenceResult
from .sft import DFT, NLL, FDivergenceSFT

__all__ = [
    "DFT",
    "DPO",
    "NLL",
    "FDivergenceSFT",
    "Loss",
    "PreferenceResult",
    "get",
    "names",
    "register",
    "sequence_logprob",
]
