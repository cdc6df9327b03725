"""Preference: losses of answers that are preferred to others, or marked good or bad.

Pairs are compared with a reference in `dpo` and without one in `reference_free`; `sums` adds several pair losses. The
losses of `unpaired` take single answers, and constants that `unpaired_statistics` makes. Those of `sampled` read the
rewards of sampled answers.

```python
import torch
from logitless import linear_loss, losses

hidden = torch.randn(4, 6, 16, requires_grad=True)  # [2B, T, H]: two chosen answers, then the two rejected ones
weight = torch.randn(100, 16, requires_grad=True)
targets = torch.randint(100, (4, 6))
ref_hidden = hidden.detach() + 0.1 * torch.randn(4, 6, 16)

result = linear_loss(losses.DPO(beta=0.2), hidden, weight, targets, ref_hidden=ref_hidden)
result.loss.backward()
print(result.accuracy, result.margin)  # one number a pair

desirable = torch.tensor([True, False, True, False])  # four single answers, marked
result = linear_loss(
    "kto", hidden, weight, targets, ref_hidden=ref_hidden, desirable=desirable, reference_point=torch.tensor(0.1)
)
print(result.reward)  # one number an answer

score = hidden[:, -1] @ torch.randn(16)  # a reward model's loss reads scores of the answers, and no vocabulary
losses.bradley_terry_loss(*score.chunk(2), center=0.01).mean().backward()
```

Methods that are one of these losses on data, or under a schedule, of their own:

- **Online DPO** (arXiv 2402.04792): `dpo` on two answers that the policy sampled and a judge ordered. TRL's `ipo`
  there is of sums; `dpo`'s is of averages.
- **SPIN** (arXiv 2401.01335): `dpo`, or its loss type `hinge`. The data's answer is chosen, and the rejected one is the
  answer of the round's first policy, which is the reference too.
- **TR-DPO** (arXiv 2404.09656): any loss with a reference, which follows the trained model: `--sync_ref_model` of the
  training command.
- **SPPO** (arXiv 2405.00675): `dpo`'s loss type `sppo_hard`, twice the authors' value, or with measured win rates
  `a2po`.
- **TPO** and TPO-L (arXiv 2405.16681): `cpo` with `nll_weight=0`, or `simpo`, on the pair, and `tpo_alpha` times `nll`
  on a third answer, the best one. The authors' code has `tpo_alpha` 0.05, TRL's trainer 1.
- **Nash-MD** (arXiv 2312.00886), as TRL trains it: `reinforce` with `beta`, `kl="k2"` and the advantages P - 1/2. P is
  the chance to win against an answer of the policy mixed with the reference. A mean over answers of sums over tokens is
  `reduction="constant_length", max_length=1`.
- **LLaMA-Factory's `pref_bco_weight`** and MPO with its shift: a `weighted_sum` with `bco_pair`.
"""
