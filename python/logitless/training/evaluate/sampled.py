"""Measures of completions that the model samples: rewards, pass@k, lengths, entropy, distance from a reference.

The policy is the model at the sampling temperature, and so is the reference: entropy and divergence are of the
distributions that training at this temperature has.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from logitless.losses import kl_estimate
from logitless.training.checks import head_rows
from logitless.training.collate import Piece, by_sequence, consecutive, padded
from logitless.training.config import TrainOptions
from logitless.training.errors import InputError
from logitless.training.evaluate.measures import Measure, measured
from logitless.training.forms import with_completion
from logitless.training.frozen import Frozen
from logitless.training.metrics import Progress
from logitless.training.right import Right
from logitless.training.rollouts.generation import TextGenerator
from logitless.training.rollouts.groups import Schedule, slots_of
from logitless.training.rollouts.prompts import Prompt, Prompts
from logitless.training.rollouts.rewards import Scores, load_rewards
from logitless.training.rollouts.rollout import Rollout
from logitless.training.rollouts.rounds import Judge, answered, as_answer
from logitless.training.rollouts.setup import sampling_of
from logitless.training.statistics import numbered, pass_at_k


class Drawn(NamedTuple):
    """Completions of a dataset's prompts, `num_generations` of each behind one another."""

    prompts: list[Prompt]
    """Of each completion."""
    rollouts: list[Rollout]
    scores: Scores | None
    """None without reward functions."""


def make_judge(options: TrainOptions, right: Right) -> Judge | None:
    """What rewards completions; None where no functions are named.

    Raises:
        InputError: functions that cannot be loaded, weights without functions, or a threshold that cannot be used.
    """
    if options.reward_funcs is None:
        if options.reward_weights is not None:
            raise InputError("reward_weights: no reward_funcs are named")
        return None
    judge = Judge(tuple(load_rewards(options.reward_funcs, Path.cwd())), options.reward_weights)
    right.require(judge)
    return judge


def sample_prompts(
    options: TrainOptions, generator: TextGenerator, prompts: Prompts, judge: Judge | None, tokenizer: Any,
    progress: Progress,
) -> Drawn:  # fmt: skip
    """Drawn and rewards completions, `per_device_eval_batch_size` prompts at a time; equal options draw alike."""
    sampling, group = sampling_of(options), options.num_generations
    if group < 1 or (sampling.temperature == 0 and group > 1):
        expected = "at least 1" if group < 1 else "1 at temperature 0, where all completions of a prompt are alike"
        raise InputError(f"num_generations must be {expected}, got {group}")
    asked: list[Prompt] = []
    rollouts: list[Rollout] = []
    scores: list[Scores] = []
    for batch in consecutive(len(prompts.prompts), options.per_device_eval_batch_size):
        own = [prompts.prompts[number] for number in batch]
        slots = slots_of(own, Schedule("nothing", {}), group=group, demonstrations=0, step=0, total_steps=1,
                         generator=torch.Generator())  # fmt: skip
        found = answered(generator, slots, sampling, options.seed * 1_000_003 + batch[0] & (2**63 - 1))
        of_slots = [own[slot.prompt] for slot in slots]
        if judge is not None:
            scores.append(judge(of_slots, found, tokenizer))
        asked += of_slots
        rollouts += found
        progress.advance(batch[-1] + 1)
    return Drawn(asked, rollouts, _joined_scores(scores) if scores else None)


def _joined_scores(scores: Sequence[Scores]) -> Scores:
    parts = {name: torch.cat([each.parts[name] for each in scores]) for name in scores[0].parts}
    return Scores(torch.cat([each.total for each in scores]), parts, {}, {})


# ---------------------------------------------------------------------------------------------------------------------
# Measures


def measures_of_samples(
    sampled: Drawn, right: Right, policy: Frozen, reference: Frozen | None, temperature: float, *, cuts: bool
) -> dict[str, Measure]:
    """All measures of completions.

    Args:
        temperature: of policy and reference, above 0.
        cuts: whether the sampler left tokens out, so that estimates over its samples are none of the policy's.
    """
    prompt = numbered([json.dumps(each.asked, sort_keys=True) for each in sampled.prompts])
    found = {} if sampled.scores is None else _of_rewards(sampled.scores, right, prompt)
    length = torch.tensor([float(len(each.completion)) for each in sampled.rollouts])
    cut = torch.tensor([float(not each.ended) for each in sampled.rollouts])
    found["completions/mean_length"] = measured(length, prompt)
    found["completions/clipped_ratio"] = measured(cut, prompt, share=True)
    sums = _token_sums(sampled.rollouts, policy, reference, temperature)
    tokens = torch.tensor([float(each.sampled) for each in sampled.rollouts])
    for name, total in sums.items():
        if not (cuts and name in ("kl/k1", "kl/k3")):
            found[name] = measured(total, prompt, tokens)
    return found


def _of_rewards(scores: Scores, right: Right, prompt: torch.Tensor) -> dict[str, Measure]:
    is_right = right(scores)
    found = {"reward": measured(scores.total, prompt)}
    found |= {f"rewards/{name}/mean": measured(part, prompt) for name, part in scores.parts.items()}
    found["accuracy"] = measured(is_right, prompt, share=True)
    return found | pass_rates(is_right, prompt)


def pass_rates(right: torch.Tensor, prompt: torch.Tensor) -> dict[str, Measure]:
    """pass@k by prompt, for k = 1, 2, 4, ... and as many completions as a prompt has at most.

    A prompt with fewer than k completions that are known to be right or wrong is none of pass@k's.

    Args:
        right: `[S]` 1, 0, or NaN for unknown.
        prompt: `[S]` int64.
    """
    numbers = prompt.unique()
    known = [right[(prompt == number) & ~right.isnan()] for number in numbers]
    most = max(map(len, known), default=0)
    powers = [2**n for n in range(most.bit_length())]
    found = {}
    for k in sorted({*powers, most} - {0}):
        rates = [pass_at_k(int(own.sum()), len(own), k) if len(own) >= k else math.nan for own in known]
        found[f"pass@{k}"] = measured(torch.tensor(rates, dtype=torch.float64), numbers, share=True)
    return found


def _token_sums(
    rollouts: Sequence[Rollout], policy: Frozen, reference: Frozen | None, temperature: float
) -> dict[str, torch.Tensor]:
    """Sums over the sampled tokens of every completion, float64 `[S]` by metric."""
    found: dict[str, list[torch.Tensor]] = {}
    for numbers in consecutive(len(rollouts), policy.options.per_device_eval_batch_size):
        own = [rollouts[number] for number in numbers]
        for name, values in _token_values(own, policy, reference, temperature).items():
            sums = [each[rollout.aligned(0.0, 1.0) > 0].sum() for each, rollout in zip(values, own, strict=True)]
            found.setdefault(name, []).append(torch.stack(sums))
    return {name: torch.cat(parts) for name, parts in found.items()}


def _token_values(
    rollouts: Sequence[Rollout], policy: Frozen, reference: Frozen | None, temperature: float
) -> dict[str, list[torch.Tensor]]:
    """Values of every token where it is predicted, float64 `[T]` a completion, by metric."""
    batch = padded([Piece(each.example()) for each in rollouts], policy.pad_token).to(policy.engine.device)
    states = policy.states(batch, temperature=temperature)
    stats = policy.stats(states, batch, ("logprob", "entropy"))
    assert stats.logprob is not None and stats.entropy is not None
    values = {"entropy": stats.entropy}
    if reference is not None:
        theirs = reference.states(batch, temperature=temperature, rows=head_rows(policy.model))
        ref_logprob = reference.stats(theirs, batch, ("logprob",)).logprob
        assert ref_logprob is not None
        values["kl"] = policy.divergence(states, theirs, batch)
        values |= {f"kl/{name}": kl_estimate(stats.logprob, ref_logprob, estimator=name) for name in ("k1", "k3")}
    return {name: by_sequence(batch, each.detach().double().cpu()) for name, each in values.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def rows_of_samples(sampled: Drawn, tokenizer: Any) -> list[dict[str, Any]]:
    """A row of prompt and completion for every sample, with the columns of the row that it answers.

    Beside them stand `reward` (null where it is unknown), `rewards` by function, `ended`, whether it was not cut off,
    and `token_ids`.
    """
    texts = tokenizer.batch_decode([each.completion for each in sampled.rollouts], skip_special_tokens=True)
    rows = []
    for number, (prompt, rollout, text) in enumerate(zip(sampled.prompts, sampled.rollouts, texts, strict=True)):
        row = with_completion(prompt.columns, prompt.asked, as_answer(prompt.asked, text))
        if sampled.scores is not None:
            row["reward"] = _plain_number(sampled.scores.total[number])
            row["rewards"] = {name: _plain_number(part[number]) for name, part in sampled.scores.parts.items()}
        rows.append({**row, "ended": rollout.ended, "token_ids": rollout.completion.tolist()})
    return rows


def _plain_number(value: torch.Tensor) -> float | None:
    return None if value.isnan() else float(value)
