"""A patched model under Transformers' tensor parallelism: its head stays shared out, and results are one process's."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from processes import in_processes
from torch import Tensor

from logitless import patch, unpatch
from logitless.integrations import heads

transformers = pytest.importorskip("transformers")


def save_model(folder: Path, vocabulary: int, tied: bool) -> None:
    import patch_models

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": vocabulary, "num_hidden_layers": 1, "num_key_value_heads": 4}
    config = patch_models.config(**sizes, tie_word_embeddings=tied, pad_token_id=None)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def results(model: Any, loss: str) -> dict[str, Tensor]:
    """A step's loss, entropies and whole gradients."""
    torch.manual_seed(1)
    ids = torch.randint(model.config.vocab_size, (4, 9))
    inputs = {"loss_inputs": {"ref_logprob": torch.randn(4, 9) - 5}} if loss == "dpo" else {}
    model.train()
    model.zero_grad()
    patch(model, loss=loss)
    out = model(input_ids=ids, labels=ids, token_outputs=("entropy",), **inputs)
    out.loss.backward()
    unpatch(model)
    found = {"loss": out.loss.detach(), "entropy": out.token_stats.entropy.detach()}
    for name, p in model.named_parameters():
        found[name] = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
    return found


def worker(folder: str) -> None:
    whole = transformers.LlamaForCausalLM.from_pretrained(folder)
    shared: Any = transformers.LlamaForCausalLM.from_pretrained(folder, tp_plan="auto")
    assert hasattr(shared.lm_head.weight, "device_mesh")
    for loss in ("nll", "dft", "dpo"):
        expected = results(whole, loss)
        with mock.patch.object(heads, "whole", side_effect=AssertionError("the head was gathered")):
            found = results(shared, loss)
        for name, value in expected.items():
            # A sum over the ranks has another order: a few roundings of the largest term.
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_head_shared_by_tensor_parallelism_is_not_gathered(tmp_path: Path, tied: bool) -> None:
    save_model(tmp_path / "model", 101, tied)
    in_processes(2, tmp_path, worker, str(tmp_path / "model"))
