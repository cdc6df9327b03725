"""A vLLM server as the sampler of on-policy training: prompt ids go out, token ids and their log-probs come back.

    prompts ──> one request each (n completions, a seed of its own) ──> choices, checked ──> completions
    trained model ──> `follow` ──> files that the server loads (`served_weights`)

A request's prompts would share its seed, and equal ones would get equal completions. So each prompt is a request, and
one that stands n times asks for n completions, which vLLM seeds one after the other. vLLM batches them all the same.

Which log-probs come back is the server's setting `--logprobs-mode`, which it does not tell: a first request finds out.

    setting               value of a drawn token                          sampling_logprob   logprob
    processed_logprobs    under what it was drawn from                    it                 it, if nothing is cut off
    raw_logprobs          under the model, logits undivided, uncut        it, if no cut      it; both at temperature 1
    ..._logits            no log-prob: refused                            -                  -

What is not said is NaN. At temperature 0 the likeliest token is drawn with certainty: its `sampling_logprob` is 0.

Source: vLLM 0.32.0, `entrypoints/openai/completion/protocol.py` and `serving.py`, `v1/sample/sampler.py`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from logitless.training.errors import InputError, nearest
from logitless.training.openai_server import OpenAIServer, waits_within
from logitless.training.parallel import World
from logitless.training.rollouts.answers import ROUNDING, Choice, choices_of, mass_of_listed
from logitless.training.rollouts.generation import Completion, Sampling
from logitless.training.rollouts.served_weights import ServedWeights

OPTION, COMPLETIONS = "vllm_server_base_url", "v1/completions"
START, ANSWER = 240.0, 3600.0  # seconds until the server is up, as in TRL; and for the completions of one prompt
REQUESTS = 64  # under way at once, of each process
RETRIED = (408, 429, 502, 503, 504)  # a 500 of vLLM is a fault that asking again does not mend
COLDEST = 0.01  # vLLM raises a lower temperature to this one
PROBED = 5  # ids that the first request has listed
#: What a server could otherwise add by itself, from the generation settings of its model.
_NEUTRAL = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


class ServerTextGenerator:
    """Samples completions from a vLLM server, and has it follow the trained model. Every process makes one.

    Args:
        url: the server, with or without `/v1`.
        end_ids: token ids that end a completion. The server is told to end at these alone.
        vocabulary: rows of the trained model's embedding; ids from there on are refused.
        folder: where weights are handed over, a folder of this run alone that the server reads under the same path.
            Nothing else may lie in it.
        world: this process among all.
        model_name: the model's name there; by default the first that the server lists.
        start_timeout: seconds to wait until the server is up, 240 by default, as in TRL.
        timeout: seconds for the completions of one prompt, 3600 by default.
        requests: prompts that are asked at once, 64 by default.

    Raises:
        InputError: an argument outside its range, no server there, no such model, or values that are no log-probs.
    """

    def __init__(
        self,
        url: str,
        *,
        end_ids: Collection[int],
        vocabulary: int,
        folder: Path,
        world: World,
        model_name: str | None = None,
        start_timeout: float = START,
        timeout: float = ANSWER,
        requests: int = REQUESTS,
    ) -> None:
        if not end_ids or not all(0 <= token < vocabulary for token in end_ids):
            raise InputError(f"end_ids: expected ids from 0 to {vocabulary - 1}, got {sorted(end_ids)}")
        for name, value in (("start_timeout", start_timeout), ("timeout", timeout), ("requests", requests)):
            if not value > 0:
                raise InputError(f"{name} must be above 0, got {value!r}")
        self._server = OpenAIServer(url, OPTION, timeout, RETRIED)
        self._end_ids, self._vocabulary, self._requests = frozenset(end_ids), vocabulary, requests
        cards = self._server.models(waits_within(start_timeout))
        card = _card(cards, model_name, self._server)
        self._aliases = {each["id"] for each in cards if not each.get("parent")}  # it answers under the first of them
        self._longest: int | None = card.get("max_model_len")
        self._weights = ServedWeights(self._server, card["id"], self._first_ids(), folder, world)
        self.processed = self._finds_processed()
        """Whether the server's log-probs are those of what tokens were drawn from; else of the undivided logits."""

    def generate(self, prompts: Sequence[torch.Tensor], sampling: Sampling, seed: int) -> list[Completion]:
        """A completion of every prompt, in their order.

        Equal calls give equal completions as far as the server computes alike: vLLM's sums depend on what else is in
        its batch, unless it runs with `VLLM_BATCH_INVARIANT=1`. Give every process a seed of its own.

        Raises:
            InputError: prompts or settings that the server cannot sample from, or an answer that cannot be used.
        """
        self._require(prompts, sampling)
        places: dict[tuple[int, ...], list[int]] = {}
        for place, prompt in enumerate(prompts):
            places.setdefault(tuple(prompt.tolist()), []).append(place)

        def asked(item: tuple[tuple[int, ...], list[int]]) -> list[Completion]:
            ids, own = item
            return self._completions(list(ids), len(own), sampling, _seed(seed, own[0]), f"prompt {own[0]}")

        with ThreadPoolExecutor(self._requests) as pool:
            answers = list(pool.map(asked, places.items()))
        found = {place: each for own, several in zip(places.values(), answers, strict=True)
                 for place, each in zip(own, several, strict=True)}  # fmt: skip
        return [found[place] for place in range(len(prompts))]

    def follow(self, model: Any, step: int) -> None:
        """Has the server take over the weights that `model` has after `step` updates. Every process must call it.

        The first call, at the step that the run begins with, comes before the first `generate`: until then the server
        samples from what it was started with.

        Args:
            model: as it is saved, without what stands around it for gradients; sharded or not.

        Raises:
            InputError: the server does not take them, or answers as if it had not.
        """
        self._weights.follow(model, step)

    def _require(self, prompts: Sequence[torch.Tensor], sampling: Sampling) -> None:
        """Raises where vLLM would refuse a prompt, or would sample otherwise than it is asked."""
        if 0 < sampling.temperature < COLDEST:
            raise InputError(f"temperature: vLLM samples at {COLDEST} where less is asked, got {sampling.temperature}; "
                             "0 takes the likeliest token")  # fmt: skip
        for place, prompt in enumerate(prompts):
            if prompt.ndim != 1 or not len(prompt):
                raise InputError(f"prompt {place}: expected ids [T], T at least 1, got shape {list(prompt.shape)}")
            if int(prompt.min()) < 0 or int(prompt.max()) >= self._vocabulary:
                raise InputError(f"prompt {place}: expected ids from 0 to {self._vocabulary - 1}, got "
                                 f"{int(prompt.min())} to {int(prompt.max())}")  # fmt: skip
            if self._longest is not None and len(prompt) + sampling.max_tokens > self._longest:
                raise InputError(
                    f"prompt {place}: {len(prompt)} tokens and a completion of up to {sampling.max_tokens} are longer "
                    f"than the server's max_model_len {self._longest}; start it with a longer --max-model-len, or "
                    "shorten max_completion_length or the prompts"
                )

    def _completions(self, ids: list[int], n: int, sampling: Sampling, seed: int, origin: str) -> list[Completion]:
        """n completions of one prompt; at temperature 0 vLLM draws one only, since all are alike."""
        greedy = sampling.temperature == 0
        asked, wrong = self._weights.name, f"{origin}: {self._server.address(COMPLETIONS)}: "
        body = self._request(sampling) | {"model": asked, "prompt": ids, "n": 1 if greedy else n, "seed": seed}
        answer = self._server.ask(COMPLETIONS, body, origin)
        found = choices_of(answer, body["n"], ids, self._vocabulary, wrong)
        if answer.get("model") != asked and not {answer.get("model"), asked} <= self._aliases:
            raise InputError(f"{wrong}the server answered for the model {answer.get('model')!r}, and was asked for "
                             f"{asked!r}")  # fmt: skip
        completions = [self._completion(choice, sampling, wrong) for choice in found]
        return completions * n if greedy else completions

    def _request(self, sampling: Sampling) -> dict[str, Any]:
        """What every request of a call says, down to settings that vLLM would otherwise take from its model's files."""
        return _NEUTRAL | {
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "stop_token_ids": sorted(self._end_ids),
            "ignore_eos": True,  # the server's own end tokens
            "logprobs": 0,  # of the drawn token alone
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,  # where a server does not know the former
        }

    def _completion(self, choice: Choice, sampling: Sampling, wrong: str) -> Completion:
        size, ended = len(choice.ids), bool(choice.ids) and choice.ids[-1] in self._end_ids
        if choice.reason == "length" and size < sampling.max_tokens:
            raise InputError(f"{wrong}a completion was cut off after {size} tokens of {sampling.max_tokens} at most: "
                             "the server's max_model_len is too short")  # fmt: skip
        if choice.reason not in ("stop", "length") or size > sampling.max_tokens:
            raise InputError(f"{wrong}expected a completion that ends with stop or length, of {sampling.max_tokens} "
                             f"tokens at most, got {size} tokens and {choice.reason}")  # fmt: skip
        if choice.reason == "stop" and size and not ended:
            raise InputError(f"{wrong}a completion stopped at the id {choice.ids[-1]} (stop_reason {choice.stop!r}), "
                             f"and the end tokens are {sorted(self._end_ids)}: the server ends completions by a "
                             "setting of its own; start it with --generation-config vllm")  # fmt: skip
        given = torch.tensor(choice.logprob, dtype=torch.float32)
        return Completion(torch.tensor(choice.ids, dtype=torch.int32), *self._values(given, sampling), ended)

    def _values(self, given: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
        """`sampling_logprob` and `logprob` of the server's values; see the table above."""
        unsaid = torch.full_like(given, math.nan)
        if sampling.temperature == 0:
            return torch.zeros_like(given), unsaid
        if self.processed:
            return given, unsaid if sampling.cuts else given
        if sampling.temperature != 1:
            return unsaid, unsaid
        return unsaid if sampling.cuts else given, given

    def _first_ids(self) -> list[int]:
        """A short prompt of the vocabulary's ids, far apart."""
        return [7919 * place % self._vocabulary for place in range(4)]

    def _finds_processed(self) -> bool:
        """Whether log-probs are processed, from a request that cuts off all but the likeliest token.

        Processed ones of the others are then -inf; raw ones are not, as the setting does not reach them.

        Raises:
            InputError: the server gives no log-probs, or logits in their place.
        """
        body = _NEUTRAL | {
            "model": self._weights.name,
            "prompt": self._first_ids(),
            "max_tokens": 1,
            "temperature": 1.0,
            "top_k": 1,
            "logprobs": PROBED,
            "return_tokens_as_token_ids": True,
        }
        wrong = f"{OPTION}: {self._server.address(COMPLETIONS)}: "
        mass, processed = mass_of_listed(self._server.ask(COMPLETIONS, body, OPTION), wrong)
        if not (abs(mass) if processed else mass) <= ROUNDING:
            raise InputError(f"{wrong}expected log-probs, got values whose probabilities add to exp({mass:.3g}): "
                             "start the server with --logprobs-mode processed_logprobs")  # fmt: skip
        return processed


def _card(cards: list[dict[str, Any]], name: str | None, server: OpenAIServer) -> dict[str, Any]:
    """The model of this name in a server's list, or the first that is no adapter."""
    own = [card for card in cards if not card.get("parent")] or cards
    if name is None:
        return own[0]
    for card in cards:
        if card["id"] == name:
            return card
    known = [str(card["id"]) for card in cards]
    raise InputError(f"model_name: {server.address('v1/models')} lists no {name!r}{nearest(name, known)}; it lists "
                     f"{', '.join(known)}")  # fmt: skip


def _seed(seed: int, place: int) -> int:
    """A seed of 62 bits for the prompt at a place, so that those of its completions, one up each, fit vLLM's int64."""
    digest = hashlib.blake2b(f"{seed} {place}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2
