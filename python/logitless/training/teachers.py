"""Teachers that say which ids they hold likeliest at every token that counts: a model in this process, or a server.

A server is one that speaks OpenAI's completions with vLLM's `prompt_logprobs`. It is sent the ids of a row as its
prompt, and answers for each of them but the first with the K likeliest ids and their log-probabilities. vLLM adds the
prompt's own id where that is not among them (`max_logprobs` of the server must be K at least). The id that it adds is
dropped, as in verl, so that every list holds the K likeliest and a server's file is the one of the model itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from logitless import linear_top_k
from logitless.losses.distillation.top_k import unlisted_mass
from logitless.training.collate import Piece, padded
from logitless.training.errors import InputError
from logitless.training.examples import IGNORED, Example
from logitless.training.objective import PatchedEngine, autocast, shifted
from logitless.training.openai_server import OpenAIServer
from logitless.training.reference_model import first_rows
from logitless.types import BackendName

MOST_MASS = 0.02  # the logarithm of a list's mass is 0 at most, but for log-probabilities rounded to bfloat16


class Listed(NamedTuple):
    """A teacher's view of the n tokens of a sequence that count."""

    ids: torch.Tensor  # [n, K] int64, the likeliest first
    logprob: torch.Tensor  # [n, K] float32
    tail: torch.Tensor  # [n] float32, the logarithm of the mass that is not listed


class Teacher(Protocol):
    """What answers for a batch of sequences; `origins` say where they stand in the data, for errors."""

    def __call__(self, examples: Sequence[Example], origins: Sequence[str]) -> list[Listed]: ...


@dataclass(frozen=True)
class ModelTeacher:
    """A patched model in this process: hidden states, then `linear_top_k`, so that there are no logits.

    Args:
        engine: how it is asked.
        model: the teacher.
        k: ids a token.
        backend: of `linear_top_k`.
        rows: of its head that are the data's tokens. Those behind them, with which heads are padded, are left out.
    """

    engine: PatchedEngine
    model: Any
    k: int
    backend: BackendName
    rows: int

    @torch.no_grad()
    def __call__(self, examples: Sequence[Example], origins: Sequence[str]) -> list[Listed]:
        batch = padded([Piece(example) for example in examples], pad_token=0).to(self.engine.device)
        counts = shifted(batch.labels) != IGNORED
        given = self.engine.hidden(self.model, batch)
        head = first_rows(given["ref_head"], self.rows)
        options: dict[str, Any] = dict(zip(head._fields[1:], head[1:], strict=True))
        with autocast(self.engine.device, self.engine.bf16):
            top = linear_top_k(given["ref_hidden"][counts], head.weight, self.k, backend=self.backend, **options)
        sizes = counts.sum(1).tolist()
        parts = (x.cpu().split(sizes) for x in (top.ids, top.logprob, top.tail))
        return [Listed(*of_row) for of_row in zip(*parts, strict=True)]


@dataclass(frozen=True)
class ServerTeacher:
    """A model behind an OpenAI-compatible server with vLLM's `prompt_logprobs`.

    Args:
        url: the server, with or without `/v1`.
        k: ids a token.
        requests: how many are under way at once, a row each.
        model: its name there; None, the default, takes the first that the server lists.

    Raises:
        InputError: no address of a server, or one that lists no model.
    """

    url: str
    k: int
    requests: int
    model: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", self.model or str(self._server.models()[0]["id"]))

    def __call__(self, examples: Sequence[Example], origins: Sequence[str]) -> list[Listed]:
        with ThreadPoolExecutor(self.requests) as pool:
            return list(pool.map(self._listed, examples, origins))

    @property
    def _server(self) -> OpenAIServer:
        return OpenAIServer(self.url)

    def _listed(self, example: Example, origin: str) -> Listed:
        ids = example.input_ids.tolist()
        body = {"model": self.model, "prompt": ids, "max_tokens": 1, "prompt_logprobs": self.k}
        answer = self._server.ask("v1/completions", body, origin)
        wrong = f"{origin}: {self._server.address('v1/completions')}: "
        try:
            given = answer["choices"][0]["prompt_logprobs"]
        except (KeyError, IndexError, TypeError) as error:
            raise InputError(f"{wrong}the answer has no choices[0].prompt_logprobs, as vLLM's has") from error
        if not isinstance(given, list) or len(given) != len(ids):
            got = f"{len(given)} entries" if isinstance(given, list) else repr(given)
            raise InputError(f"{wrong}prompt_logprobs: expected one entry for each of {len(ids)} ids, got {got}")
        places = (example.labels != IGNORED).nonzero()[:, 0].tolist()
        tops = [self._top(given[place], ids[place], f"{wrong}prompt_logprobs[{place}]: ") for place in places]
        logprob = torch.tensor([[value for value, _ in top] for top in tops], dtype=torch.float64)
        if not (logprob.logsumexp(-1) <= MOST_MASS).all():
            raise InputError(
                f"{wrong}the listed probabilities add to more than 1; expected log-probabilities, not logits"
            )
        listed = torch.tensor([[token for _, token in top] for top in tops])
        return Listed(listed, logprob.float(), unlisted_mass(logprob).float())

    def _top(self, entry: Any, token: int, wrong: str) -> list[tuple[float, int]]:
        """The K likeliest of an entry `{id: {"logprob": ...}}`, likeliest first."""
        try:
            found = {int(key): float(value["logprob"]) for key, value in entry.items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{wrong}expected ids with their logprob, got {str(entry)[:200]}") from error
        if token not in found:
            raise InputError(f"{wrong}the prompt's own id {token} is missing: the server read another prompt")
        if len(found) < self.k:
            raise InputError(f"{wrong}expected k={self.k} ids at least, got {len(found)}")
        return sorted(((value, key) for key, value in found.items()), key=lambda pair: -pair[0])[: self.k]
