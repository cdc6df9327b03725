"""Distillation: a teacher's distributions, its log-probabilities of the model's own samples, or another tokenizer's.

`distribution` compares the model's next-token distribution with a teacher's, over the whole vocabulary. `sampled` needs
the teacher's log-probability of each token that the model sampled, one number a token. `top_k` compares the model with
what is stored or served of a teacher, the log-probabilities of its likeliest ids. `cross_tokenizer` has the functions
that bring a teacher of another tokenizer to the model's tokens, or compare both without common ids.

```python
import torch
from logitless import Head, linear_loss, losses

hidden = torch.randn(2, 6, 16, requires_grad=True)
weight = torch.randn(100, 16, requires_grad=True)
targets = torch.randint(100, (2, 6))  # say which positions count, and serve nll_weight
teacher = torch.randn(2, 6, 32)  # another hidden size, the same vocabulary
head = Head(torch.randn(100, 32), temperature=2.0)

loss = losses.Distillation("js", mixture=0.5, nll_weight=0.1)
out = linear_loss(loss, hidden, weight, targets, ref_hidden=teacher, ref_head=head, temperature=2.0)
out.backward()
print(out.item())

# On-policy: the targets are the model's own samples, and the teacher gives one number for each.
ref_logprob = -3 * torch.rand(2, 6)
linear_loss("on_policy_distillation", hidden, weight, targets, ref_logprob=ref_logprob).backward()
```
"""
