"""Measures of what rows hold: the likelihood of their answers, and which answer of a pair the model prefers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

from logitless.losses import DPO, sequence_logprob
from logitless.losses.preference.dpo import preference_result
from logitless.losses.whole_sequence import PreferenceResult
from logitless.training.collate import Batch, consecutive
from logitless.training.config import TrainOptions
from logitless.training.data import Row
from logitless.training.evaluate.measures import Measure, all_of, measured
from logitless.training.examples import TokenizedData
from logitless.training.forms import canonical, canonical_pair, canonical_prompt
from logitless.training.frozen import Frozen
from logitless.training.loader import Loader
from logitless.training.metrics import Progress
from logitless.training.objective import batch_layout, objective_of_stats
from logitless.training.render import Renderer
from logitless.training.statistics import numbered


def measures_of_answers(
    data: TokenizedData, prompt: torch.Tensor, policy: Frozen, progress: Progress
) -> dict[str, Measure]:
    """Negative log-likelihood and accuracy by token, means over all tokens that count.

    Args:
        prompt: int64, a number for each item's prompt.
    """
    parts = []
    loader = Loader(data, policy.pad_token, flat=False)
    for numbers in consecutive(len(data.items), policy.options.per_device_eval_batch_size):
        batch = loader.batch(numbers).to(policy.engine.device)
        stats = policy.stats(policy.states(batch), batch, ("logprob", "correct"))
        assert stats.logprob is not None and stats.correct is not None
        tokens = batch_layout(batch).mask.sum(1).double().cpu()
        nll, right = (x.double().sum(1).cpu() for x in (-stats.logprob, stats.correct))
        own = {"nll": measured(nll, prompt[numbers], tokens)}
        parts.append(own | {"mean_token_accuracy": measured(right, prompt[numbers], tokens, share=True)})
        progress.advance(numbers[-1] + 1)
    return all_of(parts)


def measures_of_pairs(
    data: TokenizedData, prompt: torch.Tensor, policy: Frozen, reference: Frozen | None, progress: Progress
) -> dict[str, Measure]:
    """How often, and by how much, the chosen answer of a pair is preferred.

    `rewards/...` are DPO's implicit rewards against the reference, `beta (logprob - ref_logprob)`; `logps/...` compare
    summed log-probabilities, and `mean_logps/...` those by token.
    """
    parts = []
    loader = Loader(data, policy.pad_token, flat=False)
    for numbers in consecutive(len(data.items), policy.options.per_device_eval_batch_size):
        batch = loader.batch(numbers).to(policy.engine.device)
        parts.append(_of_pairs(batch, prompt[numbers], policy, reference))
        progress.advance(numbers[-1] + 1)
    return all_of(parts)


def _of_pairs(batch: Batch, prompt: torch.Tensor, policy: Frozen, reference: Frozen | None) -> dict[str, Measure]:
    stats = policy.stats(policy.states(batch), batch, ("logprob",))
    assert stats.logprob is not None
    found: dict[str, Measure] = {}
    if reference is not None:
        ref_logprob = reference.stats(reference.states(batch), batch, ("logprob",)).logprob
        loss = preference_of(policy.options)
        result = objective_of_stats(loss, stats, batch.with_inputs(ref_logprob=ref_logprob)).result
        found |= _preferences("rewards", result, prompt)
        found |= {f"rewards/{side}": measured(getattr(result, f"{side}_reward").double().cpu(), prompt)
                  for side in ("chosen", "rejected")}  # fmt: skip
    mask = batch_layout(batch).mask
    for name, average in (("logps", False), ("mean_logps", True)):
        chosen, rejected = sequence_logprob(stats.logprob.double(), mask=mask, average=average).chunk(2)
        result = preference_result(torch.zeros_like(chosen), chosen, rejected, chosen, rejected)
        found |= _preferences(name, result, prompt)
    return found


def _preferences(name: str, result: PreferenceResult, prompt: torch.Tensor) -> dict[str, Measure]:
    return {
        f"{name}/accuracies": measured(result.accuracy.double().cpu(), prompt, share=True),
        f"{name}/margins": measured(result.margin.double().cpu(), prompt),
    }


def preference_of(options: TrainOptions) -> DPO:
    """DPO with the beta of the options, whose rewards are the implicit ones."""
    return DPO() if options.beta is None else DPO(beta=options.beta)


def has_pairs(rows: Sequence[Row]) -> bool:
    """Whether rows are pairs; one that is none then ends the reading."""
    return any(row.values.get("chosen") is not None and row.values.get("completion") is None for row in rows)


def prompts_of_pairs(rows: Sequence[Row], chat: bool) -> torch.Tensor:
    """A number for each pair's prompt."""
    return numbered([_key(canonical_pair(row, chat=chat)) for row in rows])


def prompts_of_answers(rows: Sequence[Row], renderer: Renderer) -> torch.Tensor:
    """A number for each row's prompt; a text without one has a number of its own."""
    return numbered([number if is_text(row, renderer) else _key(canonical_prompt(row, chat=_chat(renderer)))
                     for number, row in enumerate(rows)])  # fmt: skip


def is_text(row: Row, renderer: Renderer) -> bool:
    """Whether the row is plain text, all of which counts."""
    made = canonical(row, text_field=renderer.text_field, chat=_chat(renderer))
    return "messages" not in made.values and "prompt" not in made.values


def _chat(renderer: Renderer) -> bool:
    return bool(renderer.tokenizer.chat_template)


def _key(row: Row) -> str:
    asked: Any = row.values["prompt"]
    return json.dumps(asked, sort_keys=True)
