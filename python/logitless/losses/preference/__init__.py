"""Preference: losses of answers that are preferred to others, or marked good or bad.

Pairs are compared with a reference in `dpo` and without one in `reference_free`; `sums` adds several pair losses. The
losses of `unpaired` take single answers, and constants that `unpaired_statistics` makes.

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
```
"""
