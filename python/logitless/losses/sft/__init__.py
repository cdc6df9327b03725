"""Supervised fine-tuning: losses of demonstrated answers.

`likelihood` has plain NLL. The losses of `token_weights` look at a token's own distribution, those of `f_divergence`
and `anchored` hold the model near a reference, and those of `per_answer` look at whole answers.

```python
import torch
from logitless import linear_loss, losses

hidden = torch.randn(2, 6, 16, requires_grad=True)  # [B, T, H], the last hidden states
weight = torch.randn(100, 16, requires_grad=True)  # [V, H], the output head
targets = torch.randint(100, (2, 6))  # at every position the token that follows
targets[:, :2] = -100  # a prompt does not count

loss = linear_loss("dft", hidden, weight, targets)
loss.backward()

# A loss with a reference takes its log-probs (ref_logprob=), or scores its hidden states itself.
ref_hidden = hidden.detach() + 0.1 * torch.randn(2, 6, 16)
loss = linear_loss(losses.FDivergenceSFT("reverse_kl", beta=0.2), hidden, weight, targets, ref_hidden=ref_hidden)
print(loss.item())
```
"""
