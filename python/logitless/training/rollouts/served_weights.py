"""How a vLLM server takes over trained weights: by files in a folder that it reads, and requests that it load them.

    an adapter (use_peft)   peft's files ──> /v1/load_lora_adapter, by a new name ──> listed? ──> the old one unloaded
    all weights             safetensors  ──> /collective_rpc reload_weights ──> /reset_prefix_cache ──> other values?

An adapter has a new name and a new path at every update. vLLM's prefix cache is kept by both, so that none of an older
one's is used, and requests name the update that they sample from. Whole weights have no name. Their cache is reset, and
a fixed request shows whether the server computes otherwise than before: if not one bit of its answer changes although
most of the weights did, it still has the old ones.

Source: vLLM 0.32.0, `entrypoints/serve/lora`, `entrypoints/serve/dev` and `model_executor/model_loader/reload`.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from logitless.training import files
from logitless.training.errors import InputError
from logitless.training.openai_server import OpenAIServer, ServerError
from logitless.training.parallel import World
from logitless.training.settings import without_generation
from logitless.training.sharding import gathered_state

LOAD, UNLOAD = "v1/load_lora_adapter", "v1/unload_lora_adapter"
RELOAD, FORGET = "collective_rpc", "reset_prefix_cache"
_TOKENS, _LISTED = 12, 5  # of the fixed request
_UPDATE = re.compile(r"update-[0-9a-f]{12}-\d+-\d+")
#: What a server lacks that does not know a path.
_NEEDS = {
    LOAD: "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora",
    RELOAD: "start it with VLLM_SERVER_DEV_MODE=1",
}


class ServedWeights:
    """What a server samples from. Every process makes one; the main one hands weights over.

    Args:
        server: how it is asked.
        base: the name of the model that it was started with.
        prompt: ids of the fixed request.
        folder: of this run alone, which the server reads under the same path.
        world: this process among all.

    Raises:
        InputError: a folder that cannot be written to, or that holds anything else.
    """

    def __init__(self, server: OpenAIServer, base: str, prompt: list[int], folder: Path, world: World) -> None:
        self._server, self._base, self._prompt, self._world = server, base, prompt, world
        self._folder = Path(folder).resolve()
        self.name = base
        """What requests ask for."""
        self._seen: tuple[list[int], str] | None = None  # weights of an update, and what the server answers with them
        if world.is_main:
            _require_own(self._folder)
        # one name for all processes, which no earlier run has given the server
        token = world.gather({"token": torch.tensor(secrets.randbits(48))})[0]["token"]
        self._run, self._updates = f"{int(token):012x}", 0

    def follow(self, model: Any, step: int) -> None:
        """Has the server take over a model's weights; see `ServerTextGenerator.follow`."""
        self._world.wait()  # every process has its completions of the old ones
        adapter = hasattr(model, "peft_config")
        weights = gathered_state(model, keep=self._world.is_main)
        self._updates += 1
        path = self._folder / f"update-{self._run}-{step}-{self._updates}"
        if self._world.is_main:
            with files.new_folder(path) as unfinished, without_generation(model):
                model.save_pretrained(unfinished, **({} if weights is None else {"state_dict": weights}))
            if adapter:
                self._load(path, f"step {step}")
            else:
                self._reload(path, _fingerprint(weights or model.state_dict()), f"step {step}")
            self._remove_all_but(path)
        self._world.wait()
        self.name = path.name if adapter else self._base

    def _load(self, path: Path, origin: str) -> None:
        """Has the server load an adapter, and unload every other one of this folder."""
        self._post(LOAD, {"lora_name": path.name, "lora_path": str(path)}, origin)
        own = self._own_adapters()
        if not any(card["id"] == path.name and card.get("root") == str(path) for card in own):
            raise InputError(f"{origin}: {self._server.address('v1/models')} does not list the adapter {path.name} "
                             "that the server said it had loaded")  # fmt: skip
        for card in own:
            if card["id"] != path.name:
                self._post(UNLOAD, {"lora_name": card["id"]}, origin)

    def _own_adapters(self) -> list[dict[str, Any]]:
        cards = self._server.models()
        return [card for card in cards if card.get("parent") and Path(str(card.get("root"))).parent == self._folder]

    def _reload(self, path: Path, weights: list[int], origin: str) -> None:
        """Has the server load whole weights in place of those that it has."""
        answer = _json(self._post(RELOAD, {"method": "reload_weights", "kwargs": {"weights_path": str(path)}}, origin))
        if not isinstance(answer, dict) or not answer.get("results"):
            raise InputError(f"{origin}: {self._server.address(RELOAD)}: expected an answer of each worker, got "
                             f"{answer!r}")  # fmt: skip
        answer = _json(self._post(FORGET, {}, origin))
        if not isinstance(answer, dict) or answer.get("success") is not True:
            raise InputError(f"{origin}: {self._server.address(FORGET)}: the server keeps what it computed with the "
                             f"old weights, since it is at work for others; it answered {answer!r}")  # fmt: skip
        self._compare(weights, self._shown(origin), origin)

    def _compare(self, weights: list[int], shown: str, origin: str) -> None:
        """Raises where the server answers as it did with weights most of which were others.

        A change of fewer may be too small for the server's precision, as in the first steps of a warm-up: the next
        update is then compared with the same answer.
        """
        if self._seen is None or self._seen[1] != shown:
            self._seen = weights, shown
            return
        changed = sum(own != before for own, before in zip(weights, self._seen[0], strict=True))
        if 2 * changed > len(weights):
            raise InputError(f"{origin}: {self._server.address('v1/completions')}: the server still has the old "
                             "weights: it said that it had loaded the new ones, and answers as before to the last "
                             "bit")  # fmt: skip

    def _shown(self, origin: str) -> str:
        """The server's answer to the fixed request: what it finds likeliest, with the log-probs."""
        body = {
            "model": self._base,
            "prompt": self._prompt,
            "max_tokens": _TOKENS,
            "temperature": 0.0,
            "ignore_eos": True,
            "logprobs": _LISTED,
            "return_tokens_as_token_ids": True,
        }
        answer = self._server.ask("v1/completions", body, origin)
        try:
            found = answer["choices"][0]["logprobs"]
            return json.dumps([found["token_logprobs"], found["top_logprobs"]])
        except (KeyError, IndexError, TypeError) as error:
            raise InputError(
                f"{origin}: {self._server.address('v1/completions')}: the answer has no log-probs"
            ) from error

    def _post(self, path: str, body: Any, origin: str) -> bytes:
        """An answer to a request that is made once only."""
        try:
            return self._server.read(path, body, origin, waits=())
        except ServerError as error:
            if error.status is None or path not in _NEEDS:
                raise
            no_such_path = error.status == 404 and str(error).endswith("Not Found")
            cure = _NEEDS[path] if no_such_path else f"it was to read {self._folder}"
            raise ServerError(f"{error}; the server does not take the weights over: {cure}", error.status) from error

    def _remove_all_but(self, path: Path) -> None:
        for old in self._folder.iterdir():
            if old != path:
                shutil.rmtree(old)


def _require_own(folder: Path) -> None:
    """Makes the folder; raises where it holds anything but what earlier updates left."""
    try:
        files.require_writable(folder)
    except OSError as error:
        raise InputError(f"folder: weights cannot be handed over in {folder}: {error}") from error
    files.clean(folder)
    others = sorted(path.name for path in folder.iterdir() if not _UPDATE.fullmatch(path.name))
    if others:
        raise InputError(f"folder: expected a folder for weights alone, and {folder} holds {others[0]}")


@torch.no_grad()
def _fingerprint(state: Mapping[str, torch.Tensor]) -> list[int]:
    """A number for each weight that changes, almost always, if any of its elements does in bfloat16.

    Servers compute in bfloat16 or finer, so a change that is seen here is one that they see.
    """
    floating = (x for x in state.values() if x.is_floating_point())
    return [int(x.to(torch.bfloat16).view(torch.int16).sum(dtype=torch.int64)) for x in floating]


def _json(content: bytes) -> Any:
    """What an answer says; None where it is empty or no JSON."""
    try:
        return json.loads(content)
    except ValueError:
        return None
