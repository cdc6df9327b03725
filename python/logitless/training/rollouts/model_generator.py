"""Completions of the model in this process, by Transformers' `generate`: batches, left-padded, with its cache.

The log-probabilities of what was drawn are noted while it is drawn, from one `[B, V]` at a time: scores of a whole
completion are never kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from logitless.integrations.support import causal_lm
from logitless.training.checks import learned_positions
from logitless.training.model import evaluating
from logitless.training.objective import autocast
from logitless.training.rollouts.generation import Completion, Sampling
from logitless.training.rollouts.prompts import written_ends


class ModelTextGenerator:
    """Samples from a causal language model, patched or not.

    Args:
        model: the trained model, whose weights are today's whenever it is asked.
        pad_token: what fills short prompts and ended completions.
        ends: ids that end a completion.
        bf16: whether it runs under bfloat16 autocast, as in training.
        batch_size: completions sampled together at most; None: all.
    """

    def __init__(
        self, model: Any, *, pad_token: int, ends: Sequence[int], bf16: bool = False, batch_size: int | None = None
    ) -> None:
        self.model, self.pad_token, self.ends = model, pad_token, tuple(ends)
        self.bf16, self.batch_size = bf16, batch_size

    def follow(self, model: Any, step: int) -> None:
        """Nothing: the model is the trained one itself."""

    @torch.no_grad()
    def generate(self, prompts: Sequence[torch.Tensor], sampling: Sampling, seed: int) -> list[Completion]:
        """A completion of every prompt; see `TextGenerator`."""
        found: dict[int, Completion] = {}
        device = self.model.get_input_embeddings().weight.device
        with evaluating(self.model), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            for batch, limit in self._batches(list(map(len, prompts)), sampling.max_tokens):
                with autocast(device, self.bf16):
                    sampled = self._sample([prompts[index].to(device) for index in batch], sampling, limit)
                found |= dict(zip(batch, sampled, strict=True))
        return [found[index] for index in range(len(prompts))]

    def _batches(self, lengths: Sequence[int], max_tokens: int) -> list[tuple[list[int], int]]:
        """Indices of prompts that are sampled together, and how many tokens at most.

        A prompt so long, by what it shows of a demonstration, that the model's table of positions would not do for its
        neighbours' tokens is sampled alone, up to the table's end.
        """
        # neighbours of like lengths need little padding; the sort is stable, so that equal calls batch equally
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        most = learned_positions(self.model)
        long = [index for index in order if most is not None and lengths[index] + max_tokens > most]
        order = order[: len(order) - len(long)]
        size = self.batch_size or max(len(order), 1)
        batches = [(order[start : start + size], max_tokens) for start in range(0, len(order), size)]
        return batches + [([index], most - lengths[index]) for index in long if most is not None]

    def _sample(self, prompts: list[torch.Tensor], sampling: Sampling, limit: int) -> list[Completion]:
        from transformers import LogitsProcessorList

        width = max(map(len, prompts))
        ids, mask = _left_padded(prompts, width, self.pad_token)
        recorder = _Recorder(sampling)
        with _plain_generation(self.model, self.pad_token, self.ends):
            sequences = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=limit,
                do_sample=sampling.temperature > 0,
                logits_processor=LogitsProcessorList([recorder]),
            )
        drawn = sequences[:, width:].cpu()
        recorder.note(sequences)
        sampled, logprob = (torch.stack(each, 1).cpu() for each in (recorder.sampled, recorder.logprob))
        return [self._completion(*each) for each in zip(drawn, sampled[:, : drawn.shape[1]], logprob, strict=True)]

    def _completion(self, ids: torch.Tensor, sampled: torch.Tensor, logprob: torch.Tensor) -> Completion:
        """A row of what was drawn, up to its end token."""
        ending = torch.isin(ids, torch.tensor(self.ends, dtype=ids.dtype)).nonzero()
        length = int(ending[0]) + 1 if len(ending) else len(ids)
        return Completion(ids[:length].int(), sampled[:length], logprob[:length], bool(len(ending)))


class _Recorder:
    """Cuts the distribution as asked, and notes the log-probabilities of the tokens that were drawn from it.

    `generate` calls it with all tokens so far and the next one's logits, after its own processors, of which a plain
    configuration has none. So the token that a call decides stands at the end of the next call's tokens.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.temperature = sampling.temperature or 1.0
        self.cuts = _cuts(sampling)
        self.sampled: list[torch.Tensor] = []
        self.logprob: list[torch.Tensor] = []
        self._before: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.note(input_ids)
        policy = scores.float() / self.temperature
        drawn_from = policy
        for cut in self.cuts:
            drawn_from = cut(input_ids, drawn_from)
        own = policy.log_softmax(-1)
        self._before = (drawn_from.log_softmax(-1) if self.cuts else own), own
        return drawn_from

    def note(self, input_ids: torch.Tensor) -> None:
        """Notes the last token, which the call before decided."""
        if self._before is None:
            return
        for noted, before in zip((self.sampled, self.logprob), self._before, strict=True):
            noted.append(before.gather(1, input_ids[:, -1:])[:, 0])
        self._before = None


def _cuts(sampling: Sampling) -> list[Any]:
    """Transformers' own ways of leaving tokens out, in its order."""
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    if sampling.temperature == 0:
        return [TopKLogitsWarper(1)]
    cuts: list[Any] = [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    cuts += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    return cuts + ([MinPLogitsWarper(sampling.min_p)] if sampling.min_p else [])


def _left_padded(prompts: list[torch.Tensor], width: int, pad_token: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask, `[B, width]` int64, with the padding in front."""
    ids = torch.full((len(prompts), width), pad_token, dtype=torch.int64, device=prompts[0].device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return ids, mask


@contextmanager
def _plain_generation(model: Any, pad_token: int, ends: Sequence[int]) -> Iterator[None]:
    """The model's settings of generation replaced by none.

    A checkpoint may bring penalties and cuts of its own, which would make another policy of what is sampled; values
    that a call leaves out come from there.
    """
    from transformers import GenerationConfig

    inner: Any = causal_lm(model)
    own = inner.generation_config
    inner.generation_config = GenerationConfig(
        pad_token_id=pad_token, eos_token_id=list(ends) or None, do_sample=True, top_k=0, use_cache=True
    )
    try:
        yield
    finally:
        inner.generation_config = own


def ends_of(model: Any, tokenizer: Any, template_end: str) -> tuple[int, ...]:
    """The ids that end a completion: the model's, the tokenizer's, and what its chat template ends an answer with."""
    own = getattr(causal_lm(model).generation_config, "eos_token_id", None)
    found = {*(own if isinstance(own, (list, tuple)) else [own]), *written_ends(tokenizer, template_end)}
    return tuple(sorted(found - {None}))
