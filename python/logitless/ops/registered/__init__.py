"""The `torch.library` ops: what `torch.compile` sees of this library.

    logitless::logprobs            statistics of every token, and what their backward keeps
    logitless::logprobs_backward   gradients from them
    logitless::token_loss          a sum of per-token losses with its gradients, in one sweep
    logitless::divergence          divergences of every token, and their unit gradients for frozen heads
    logitless::divergence_sum      a weighted sum of divergences with its gradients, in one sweep
    logitless::divergence_backward its gradients, the model's head's added to a caller's buffer

A schema knows tensors and plain numbers, so a head arrives as weight, bias and the three numbers of its transform, and
`Execution` says how to run. A custom op has a fixed number of outputs: a result that nobody asked for is an empty
tensor. Ignored tokens are dropped inside the ops, since their number is data (`ops.tokens`); a backend never sees them.
"""
