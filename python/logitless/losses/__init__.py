"""Losses as pure functions of per-token or per-sequence vectors, each a frozen dataclass of its hyper-parameters.

docs/losses.md lists them all, with formula, inputs, defaults and sources. `implicit_reward` has what a fine-tuned model
says of a text's tokens.

`get("dft")` makes one by name, `names()` lists them, `register` adds one. `sequence_logprob` turns token
log-probabilities into those of sequences, which is what pair losses take.
"""

from .advantages import (
    discounted_sum,
    generalized_advantages,
    group_advantages,
    prefix_rft_advantages,
    rloo_advantages,
    whiten,
)
from .answers import IFT, IWSFT, DiscriminativeSFT, MinorSFT, PoFT
from .base import Loss, get, names, register, sequence_logprob
from .combined import MPO, RPO, WeightedSum
from .demonstrations import (
    CHORD,
    LUFFY,
    SRFT,
    UFT,
    DensePathReinforce,
    PrefixRFT,
    chord_mu,
    prefix_rft_length,
    uft_hint_length,
)
from .distillation import Distillation
from .implicit_reward import ImplicitReward, centred_advantage, dense_rewards
from .policy import BNPO, CISPO, DAPO, DPPO, DRO, GRPO, PPO, SAPO, DrGRPO, Reinforce
from .policy_base import PolicyLoss, PolicyMetrics, kl_estimate
from .policy_sequence import GMPO, GSPO, LUSPO, RLOO, VESPO, GSPOToken
from .policy_weights import off_policy_mask, own_means, sampler_correction, top_entropy_mask
from .preference import DPO, DPOP, RDPO, PreferenceResult
from .reference_free import CPO, ORPO, AlphaPO, ChosenNLL, SimPO
from .sft import ASFT, NLL, PSFT, SFTKL, FDivergenceSFT
from .unpaired import (
    BCO,
    KTO,
    RunningMean,
    UnpairedResult,
    bco_density_ratio,
    bco_reward_shift,
    kto_reference_point,
)
from .weighted import (
    DFT,
    EAFT,
    GEM,
    IDFT,
    SEDSFT,
    CHORDPhi,
    DeformedLog,
    Focal,
    LUFFYShaping,
    ProFiT,
    Unlikelihood,
    idft_mix,
)

__all__ = [
    "ASFT",
    "BCO",
    "BNPO",
    "CHORD",
    "CISPO",
    "CPO",
    "DAPO",
    "DFT",
    "DPO",
    "DPOP",
    "DPPO",
    "DRO",
    "EAFT",
    "GEM",
    "GMPO",
    "GRPO",
    "GSPO",
    "IDFT",
    "IFT",
    "IWSFT",
    "KTO",
    "LUFFY",
    "LUSPO",
    "MPO",
    "NLL",
    "ORPO",
    "PPO",
    "PSFT",
    "RDPO",
    "RLOO",
    "RPO",
    "SAPO",
    "SEDSFT",
    "SFTKL",
    "SRFT",
    "UFT",
    "VESPO",
    "AlphaPO",
    "CHORDPhi",
    "ChosenNLL",
    "DeformedLog",
    "DensePathReinforce",
    "DiscriminativeSFT",
    "Distillation",
    "DrGRPO",
    "FDivergenceSFT",
    "Focal",
    "GSPOToken",
    "ImplicitReward",
    "LUFFYShaping",
    "Loss",
    "MinorSFT",
    "PoFT",
    "PolicyLoss",
    "PolicyMetrics",
    "PreferenceResult",
    "PrefixRFT",
    "ProFiT",
    "Reinforce",
    "RunningMean",
    "SimPO",
    "Unlikelihood",
    "UnpairedResult",
    "WeightedSum",
    "bco_density_ratio",
    "bco_reward_shift",
    "centred_advantage",
    "chord_mu",
    "dense_rewards",
    "discounted_sum",
    "generalized_advantages",
    "get",
    "group_advantages",
    "idft_mix",
    "kl_estimate",
    "kto_reference_point",
    "names",
    "off_policy_mask",
    "own_means",
    "prefix_rft_advantages",
    "prefix_rft_length",
    "register",
    "rloo_advantages",
    "sampler_correction",
    "sequence_logprob",
    "top_entropy_mask",
    "uft_hint_length",
    "whiten",
]
