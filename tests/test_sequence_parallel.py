"""Sequences cut among processes (Ulysses, ring attention): the recipes of docs/sharded.md equal one process.

The attention gathers keys and values with their gradients, which is what every such scheme computes. Everything else is
a patched model of Transformers on its piece of the sequence.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from processes import in_processes
from torch import Tensor

pytest.importorskip("transformers")
from patch_models import llama

import logitless
from logitless import losses

dist = torch.distributed
B, T = 4, 16


def recipes() -> SimpleNamespace:
    """The functions that docs/sharded.md defines."""
    page = (Path(__file__).parents[1] / "docs" / "sharded.md").read_text(encoding="utf-8")
    (block,) = [code for code in re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S) if "\ndef " in code]
    names: dict[str, Any] = {"torch": torch, "dist": dist}
    exec(block, names)
    return SimpleNamespace(**names)


def batch() -> dict[str, Tensor]:
    """Prompts reach beyond the first quarter, so that a process has no label of some sequences, or of any."""
    torch.manual_seed(5)
    ids = torch.randint(3, llama().config.vocab_size, (B, T))
    labels = ids.clone()
    for row, prompt in enumerate((5, 6, 9, 5)):
        labels[row, :prompt] = -100
    labels[1, -3:] = -100
    return {"input_ids": ids, "labels": labels}


def own_places(rank: int, world: int, balanced: bool) -> Tensor:
    """The places of a sequence that one process holds: a piece, or one from either end."""
    if not balanced:
        return torch.arange(T).chunk(world)[rank]
    pieces = torch.arange(T).chunk(2 * world)
    return torch.cat([pieces[rank], pieces[2 * world - 1 - rank]])


def model_of_pieces(group: Any) -> Any:
    """A patched model whose attention sees the keys of all processes of the group, by their positions."""
    from transformers import AttentionInterface

    whole = recipes().whole_sequences

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        key, value = (whole(x.transpose(1, 2), group).transpose(1, 2) for x in (key, value))
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        own = kwargs["position_ids"]
        later = own[:, None, :, None] < whole(own, group)[:, None, None, :]
        scores = (query @ key.mT * kwargs["scaling"]).masked_fill(later, -torch.inf)
        return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None

    AttentionInterface.register("pieces", attention)
    model = logitless.patch(llama())
    model.config._attn_implementation = "pieces"
    return model


def shifted(labels: Tensor) -> Tensor:
    return torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]


def averaged(model: Any) -> dict[str, Tensor]:
    """The gradients as FSDP2 and DDP reduce them."""
    for p in model.parameters():
        dist.all_reduce(p.grad)
        p.grad /= dist.get_world_size()
    return {name: p.grad for name, p in model.named_parameters()}


def worker(data: int) -> dict[str, Any]:
    """`data` groups of processes share the rows, the processes of a group the sequences."""
    rank, world, found = dist.get_rank(), dist.get_world_size(), {}
    groups = [dist.new_group(ranks.tolist()) for ranks in torch.arange(world).chunk(data)]
    per_group = world // data
    group, place = groups[rank // per_group], rank % per_group
    pairs = batch()  # the rows of one data-parallel process: of the chosen and of the rejected half
    rows = torch.arange(B).view(2, -1)[:, rank // per_group :: data].flatten()
    x = {name: value[rows] for name, value in pairs.items()}
    for kind in ("contiguous", "balanced"):
        own = own_places(place, per_group, kind == "balanced")
        inputs = {"input_ids": x["input_ids"][:, own], "position_ids": own.expand(len(rows), -1)}
        labels = shifted(x["labels"])[:, own]
        if kind == "contiguous":
            assert torch.equal(recipes().next_token_labels(x["labels"][:, own], group), labels)
        normalizer = recipes().global_count(labels, dist.group.WORLD) / world
        for loss in ("nll", "dft"):
            model = model_of_pieces(group)
            out = model(
                **inputs, labels=x["labels"][:, own], shift_labels=labels, num_items_in_batch=normalizer, loss=loss
            )  # fmt: skip
            out.loss.backward()
            found[f"{kind}-{loss}"] = {"loss": out.loss.detach(), "grads": averaged(model)}
        model = model_of_pieces(group)
        hidden = model(**inputs, hidden_only=True).logits
        piece = logitless.linear_logprobs(hidden, model.lm_head.weight, labels).logprob
        sums = losses.sequence_logprob(recipes().whole_sequences(piece, group))
        chosen, rejected = sums.chunk(2)
        loss = losses.DPO(beta=0.1)(chosen, rejected, torch.full_like(chosen, -60.0), torch.full_like(rejected, -50.0))
        loss.loss.mean().backward()
        found[f"{kind}-dpo"] = {"loss": loss.loss.mean().detach(), "grads": averaged(model)}
    found["deepspeed"] = _deepspeed_loss(model_of_pieces(dist.group.WORLD), inputs, labels) if data == 1 else {}
    return found


def _deepspeed_loss(model: Any, inputs: dict[str, Tensor], labels: Tensor) -> dict[str, Any]:
    """The Trainer's own function for DeepSpeed's sequence parallelism; of DeepSpeed it asks the group alone."""
    from transformers.integrations.deepspeed import deepspeed_sp_compute_loss

    package, utils = ModuleType("deepspeed"), ModuleType("deepspeed.utils")
    utils.groups = SimpleNamespace(_get_sequence_parallel_group=lambda: dist.group.WORLD)  # type: ignore[attr-defined]
    sys.modules |= {"deepspeed": package, "deepspeed.utils": utils}
    config = SimpleNamespace(sp_backend="deepspeed", sp_size=dist.get_world_size())
    loss = deepspeed_sp_compute_loss(None, model, {**inputs, "shift_labels": labels}, False, config)
    loss.backward()
    return {"loss": loss.detach(), "grads": averaged(model)}


def truth(kind: str) -> dict[str, Any]:
    model, x = logitless.patch(llama()), batch()
    model.config._attn_implementation = "eager"
    if kind == "dpo":
        hidden = model(x["input_ids"], hidden_only=True).logits
        targets, totals = shifted(x["labels"]), torch.tensor([-60.0, -50.0]).repeat_interleave(B // 2)
        counts = targets != -100  # spread over the tokens that count, the totals are the reference's sums
        ref_logprob = torch.where(counts, totals[:, None] / counts.sum(1, keepdim=True), 0.0)
        loss = logitless.linear_dpo(hidden, model.lm_head.weight, targets, beta=0.1, ref_logprob=ref_logprob).loss
    else:
        loss = model(**x, loss=kind).loss
    loss.backward()
    return {"loss": loss.detach(), "grads": {name: p.grad for name, p in model.named_parameters()}}


def check(results: list[dict[str, Any]]) -> None:
    for kind in ("nll", "dft", "dpo"):
        expected = truth(kind)
        names = [f"{order}-{kind}" for order in ("contiguous", "balanced")]
        for name in names + (["deepspeed"] if kind == "nll" and results[0]["deepspeed"] else []):
            mean = sum(found[name]["loss"] for found in results) / len(results)
            torch.testing.assert_close(mean, expected["loss"], msg=lambda m, at=name: f"{at}: {m}")
            for found in results:
                torch.testing.assert_close(
                    found[name]["grads"], expected["grads"], rtol=1e-4, atol=2e-6, msg=lambda m, at=name: f"{at}: {m}"
                )  # sums of float32 in another order


@pytest.mark.parametrize(
    ("world", "data"),
    [(2, 1), pytest.param(4, 1, marks=pytest.mark.slow), pytest.param(4, 2, marks=pytest.mark.slow)],
)
def test_pieces_of_sequences_give_what_whole_ones_give(tmp_path: Path, world: int, data: int) -> None:
    check(in_processes(world, tmp_path, worker, data))
