"""Sweeps over chunks of logits that every backend builds on; their gradients are exact."""
