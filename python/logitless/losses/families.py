"""The families that are loaded when a loss of theirs is asked for: half of what importing the package would take."""

from .advantages import (
    discounted_sum,
    generalized_advantages,
    group_advantages,
    prefix_rft_advantages,
    rloo_advantages,
    whiten,
)
from .answers import IFT, IWSFT, DiscriminativeSFT, MinorSFT, PoFT
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
from .reference_free import CPO, ORPO, AlphaPO, ChosenNLL, SimPO
from .unpaired import (
    BCO,
    KTO,
    RunningMean,
    UnpairedResult,
    bco_density_ratio,
    bco_reward_shift,
    kto_reference_point,
)

__all__ = [
    "BCO",
    "BNPO",
    "CHORD",
    "CISPO",
    "CPO",
    "DAPO",
    "DPPO",
    "DRO",
    "GMPO",
    "GRPO",
    "GSPO",
    "IFT",
    "IWSFT",
    "KTO",
    "LUFFY",
    "LUSPO",
    "MPO",
    "ORPO",
    "PPO",
    "RLOO",
    "RPO",
    "SAPO",
    "SRFT",
    "UFT",
    "VESPO",
    "AlphaPO",
    "ChosenNLL",
    "DensePathReinforce",
    "DiscriminativeSFT",
    "Distillation",
    "DrGRPO",
    "GSPOToken",
    "ImplicitReward",
    "MinorSFT",
    "PoFT",
    "PolicyLoss",
    "PolicyMetrics",
    "PrefixRFT",
    "Reinforce",
    "RunningMean",
    "SimPO",
    "UnpairedResult",
    "WeightedSum",
    "bco_density_ratio",
    "bco_reward_shift",
    "centred_advantage",
    "chord_mu",
    "dense_rewards",
    "discounted_sum",
    "generalized_advantages",
    "group_advantages",
    "kl_estimate",
    "kto_reference_point",
    "off_policy_mask",
    "own_means",
    "prefix_rft_advantages",
    "prefix_rft_length",
    "rloo_advantages",
    "sampler_correction",
    "top_entropy_mask",
    "uft_hint_length",
    "whiten",
]
