"""Policy: losses of a policy's own samples and their advantages, with or without demonstrations among them.

The losses of `token_ratio` weigh each token by its own ratio to the policy that sampled, those of `sequence_ratio` by
its sequence's. Those of `covariance` restrain the tokens that cost most entropy, and those of `demonstrations` mix
samples with demonstrations. `policy_loss` has what all of them share.

Their constants come from `advantages`, `weights` and `implicit_reward`, the loss of a value function from `values`, and
the course of a run from `schedules`.

```python
import torch
from logitless import linear_logprobs, linear_loss, losses

hidden = torch.randn(4, 6, 16, requires_grad=True)  # [S, T, H]: two samples for each of two prompts
weight = torch.randn(100, 16, requires_grad=True)
targets = torch.randint(100, (4, 6))
rewards = torch.tensor([1.0, 0.0, 0.2, 0.4])

advantages = losses.group_advantages(rewards, 2)  # one number a sample
with torch.no_grad():
    old_logprob = linear_logprobs(hidden, weight, targets).logprob  # once, before several updates

loss = linear_loss(losses.GRPO(), hidden, weight, targets, advantages=advantages, old_logprob=old_logprob)
loss.backward()

# Dr. GRPO divides by a constant, and KL to a reference is an option of every policy loss.
loss = losses.DrGRPO(beta=0.04)
out = linear_loss(loss, hidden, weight, targets, advantages=advantages, ref_hidden=hidden.detach(), max_length=8)
print(out.item())

# PPO with a value function, whose own loss has no vocabulary.
value_head = torch.nn.Linear(16, 1)
mask = targets != -100
with torch.no_grad():
    old_values = value_head(hidden)[..., 0]
found = losses.generalized_advantages(losses.token_rewards(rewards, mask), old_values, mask=mask)
advantages = losses.whiten(found.advantages, mask)
loss = linear_loss(losses.PPO(delta=3.0), hidden, weight, targets, advantages=advantages, old_logprob=old_logprob)
loss = loss + 0.5 * losses.value_loss(value_head(hidden)[..., 0], found.returns, old_values, mask=mask)
loss.backward()
```
"""
