"""A small server with vLLM's interface, which samples from a Transformers model by its own forward passes.

What it answers, and when it refuses, follows vLLM 0.32.0 (paths below `vllm/`):

    entrypoints/openai/completion/protocol.py   fields of a request and their defaults; fields of a choice
    entrypoints/openai/completion/serving.py    order of choices; `token_id:...` names; -9999.0 in place of -inf; a null
                                                in `token_logprobs` where a log-prob is missing, or NaN
    entrypoints/serve/engine/protocol.py        the list of models; `{"error": {"message", "type", "param", "code"}}`
    entrypoints/openai/models/serving.py        adapters: names, what is refused, the words of success
    entrypoints/serve/utils/api_utils.py        `max_tokens` is lowered to what `max_model_len` leaves
    entrypoints/serve/dev/rpc, .../cache        `/collective_rpc` and `/reset_prefix_cache`, in development mode alone
    v1/sample/sampler.py                        what each mode of log-probs gives; greedy below a temperature of 1e-5
    v1/engine/parallel_sampling.py              the seed of the i-th of n completions: the request's plus i
    v1/core/sched/utils.py                      when a completion ends, and its `stop_reason`
    renderers/base.py, renderers/params.py      ids out of the vocabulary, prompts that are too long

The end token's id is among `token_ids`. Logits of a prompt are kept until `/reset_prefix_cache`, as in a prefix cache.
"""

from __future__ import annotations

import copy
import json
import math
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

DEFAULTS = {"n": 1, "max_tokens": 16, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": None,
            "logprobs": None, "stop_token_ids": [], "ignore_eos": False, "repetition_penalty": 1.0}  # fmt: skip


class Refusal(Exception):
    """An answer with an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class VllmServer:
    """A server on a port of this machine, until `close`.

    Args:
        folder: the model.
        mode: `--logprobs-mode`.
        max_model_len: tokens of prompt and completion together.
        max_logprobs: `--max-logprobs`.
        lora, dev: whether it has the paths of adapters, and those of development.
    """

    def __init__(
        self,
        folder: str,
        *,
        mode: str = "processed_logprobs",
        max_model_len: int = 256,
        max_logprobs: int = 20,
        lora: bool = True,
        dev: bool = True,
    ) -> None:
        self.mode, self.max_model_len, self.max_logprobs, self.lora, self.dev = (
            mode,
            max_model_len,
            max_logprobs,
            lora,
            dev,
        )
        self.folder = folder
        self.model = LlamaForCausalLM.from_pretrained(folder).eval()
        self.adapters: dict[str, tuple[str, Any]] = {}
        self.cache: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
        self.lock = threading.Lock()
        #: Paths that were asked for, with what was posted.
        self.asked: list[tuple[str, Any]] = []
        #: Statuses that come before any answer.
        self.statuses: list[int] = []
        #: Makes another answer of each answer to a request for completions.
        self.spoil: Callable[[Any, Any], Any] = lambda answer, body: answer
        #: Seconds before an answer to a request for completions, from its prompt's first id.
        self.delay: Callable[[int], float] = lambda first: 0.0
        #: Whether it says that it takes weights over, and does not.
        self.stale = False
        #: Whether other requests hold its prefix cache.
        self.at_work = False
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def answer(self, path: str, body: Any) -> Any:
        """What the server says; a text stands for itself."""
        self.asked.append((path, body))
        if self.statuses:
            raise Refusal(self.statuses.pop(0), "not now")
        paths: dict[str, Any] = {"/v1/models": self.models, "/v1/completions": self.completions}
        if self.lora:
            paths |= {"/v1/load_lora_adapter": self.load, "/v1/unload_lora_adapter": self.unload}
        if self.dev:
            paths |= {"/collective_rpc": self.rpc, "/reset_prefix_cache": self.reset}
        if path not in paths:
            raise Refusal(404, "Not Found")
        return paths[path](body)

    def models(self, body: Any) -> Any:
        cards = [{"id": "tiny", "root": self.folder, "parent": None, "max_model_len": self.max_model_len}]
        cards += [{"id": name, "root": path, "parent": "tiny", "max_model_len": None}
                  for name, (path, _) in self.adapters.items()]  # fmt: skip
        return {"object": "list", "data": [{"object": "model", "owned_by": "vllm"} | card for card in cards]}

    def load(self, body: Any) -> str:
        from peft import PeftModel

        name, path = body["lora_name"], body["lora_path"]
        if name in self.adapters:
            raise Refusal(400, f"The lora adapter '{name}' has already been loaded.")
        if not (Path(path) / "adapter_config.json").is_file():
            raise Refusal(404, f"Loading lora {name} failed: No adapter found for {path}")
        if not self.stale:
            self.adapters[name] = path, PeftModel.from_pretrained(copy.deepcopy(self.model), path).eval()
        return f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, body: Any) -> str:
        if self.adapters.pop(body["lora_name"], None) is None:
            raise Refusal(404, f"The lora adapter '{body['lora_name']}' cannot be found.")
        return f"Success: LoRA adapter '{body['lora_name']}' removed successfully."

    def rpc(self, body: Any) -> Any:
        if body["method"] != "reload_weights":
            raise Refusal(500, f"no method {body['method']}")
        state: dict[str, torch.Tensor] = {}
        for file in Path(body["kwargs"]["weights_path"]).glob("*.safetensors"):
            state |= load_file(file)
        if not state:
            raise Refusal(500, f"Cannot find any model weights with `{body['kwargs']['weights_path']}`")
        if not self.stale:
            self.model.load_state_dict(state, strict=False)
            self.model.tie_weights()
        return {"results": [None]}

    def reset(self, body: Any) -> Any:
        if not self.at_work:
            self.cache.clear()
        return {"success": not self.at_work}

    def completions(self, body: Any) -> Any:
        asked = DEFAULTS | body
        name, prompts = asked["model"], asked["prompt"]
        prompts = [prompts] if isinstance(prompts[0], int) else prompts
        if name != "tiny" and name not in self.adapters:
            raise Refusal(404, f"The model `{name}` does not exist. Valid aliases: tiny.")
        for prompt in prompts:
            self.require(asked, prompt)
        time.sleep(self.delay(prompts[0][0]))
        choices = []
        for prompt in prompts:
            for index in range(asked["n"]):
                choice = self.choice(asked, prompt, index)
                choices.append({"index": len(choices), "text": "", "prompt_logprobs": None} | choice)
        counts = sum(map(len, prompts)), sum(len(each["token_ids"]) for each in choices)
        usage = {"prompt_tokens": counts[0], "completion_tokens": counts[1], "total_tokens": sum(counts)}
        if not asked.get("return_token_ids"):
            choices = [each | {"token_ids": None, "prompt_token_ids": None} for each in choices]
        answer = {"id": "cmpl-0", "object": "text_completion", "created": 0, "model": name, "choices": choices}
        return self.spoil(answer | {"usage": usage}, body)

    def require(self, asked: dict[str, Any], prompt: list[int]) -> None:
        """Refuses what vLLM refuses."""
        size = self.model.config.vocab_size
        if outside := [token for token in prompt if not 0 <= token < size]:
            raise Refusal(400, f"Token id {outside[0]} is out of vocabulary")
        if len(prompt) >= self.max_model_len:
            raise Refusal(400, f"This model's maximum context length is {self.max_model_len} tokens. However, your "
                               f"prompt contains {len(prompt)} input tokens")  # fmt: skip
        if (asked["logprobs"] or 0) > self.max_logprobs:
            raise Refusal(400, f"Requested sample logprobs of {asked['logprobs']}, which is greater than max allowed: "
                               f"{self.max_logprobs}")  # fmt: skip
        if asked["temperature"] == 0 and asked["n"] > 1:
            raise Refusal(400, f"n must be 1 when using greedy sampling, got {asked['n']}.")
        if asked["temperature"] > 2:
            raise Refusal(400, f"temperature must be in [0, 2], got {asked['temperature']}.")

    def choice(self, asked: dict[str, Any], prompt: list[int], index: int) -> dict[str, Any]:
        generator = torch.Generator()
        generator.manual_seed(asked["seed"] + index) if asked["seed"] is not None else generator.seed()
        ids: list[int] = []
        values: list[dict[int, float]] = []
        limit, reason, stop = min(asked["max_tokens"], self.max_model_len - len(prompt)), None, None
        while reason is None:
            token, listed = self.drawn(self.logits(asked["model"], [*prompt, *ids]), asked, generator)
            ids.append(token)
            values.append(listed)
            if token == self.model.config.eos_token_id and not asked["ignore_eos"]:
                reason = "stop"
            elif token in asked["stop_token_ids"]:
                reason, stop = "stop", token
            elif len(ids) == limit:
                reason = "length"
        logprobs = _logprobs(ids, values) if asked["logprobs"] is not None else None
        return {"logprobs": logprobs, "finish_reason": reason, "stop_reason": stop, "token_ids": ids,
                "prompt_token_ids": prompt}  # fmt: skip

    @torch.no_grad()
    def logits(self, name: str, ids: list[int]) -> torch.Tensor:
        key = name, tuple(ids)
        model = self.adapters[name][1] if name in self.adapters else self.model
        with self.lock:
            if key not in self.cache:
                self.cache[key] = model(torch.tensor([ids])).logits[0, -1].float()
            return self.cache[key]

    def drawn(
        self, logits: torch.Tensor, asked: dict[str, Any], generator: torch.Generator
    ) -> tuple[int, dict[int, float]]:
        """A token, and the values of it and of the likeliest in the server's mode."""
        masked = logits.clone()
        if asked["temperature"] < 1e-5:
            token = int(masked.argmax())
        else:
            masked = cut(masked / asked["temperature"], asked["top_p"], asked["top_k"], asked["min_p"])
            noise = torch.empty_like(masked).exponential_(generator=generator)
            token = int((masked.softmax(-1) / noise).argmax())
        shown = masked if self.mode.startswith("processed") else logits
        shown = shown.log_softmax(-1) if self.mode.endswith("logprobs") else shown
        likeliest = shown.topk(asked["logprobs"] or 0).indices.tolist()
        return token, {each: float(shown[each]) for each in [token, *likeliest]}


def cut(logits: torch.Tensor, top_p: float, top_k: int, min_p: float) -> torch.Tensor:
    """The logits with -inf for what cannot be drawn: min_p first, then top_k, then top_p."""
    probability = logits.softmax(-1)
    logits = logits.masked_fill(probability < min_p * probability.max(), -math.inf)
    if top_k > 0:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, len(logits))).values[-1], -math.inf)
    if top_p < 1:
        ascending, order = logits.sort()
        out = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        out[-1] = False
        logits = logits.masked_fill(torch.zeros_like(out).scatter(0, order, out), -math.inf)
    return logits


def _logprobs(ids: list[int], values: list[dict[int, float]]) -> dict[str, Any]:
    listed = [{f"token_id:{token}": max(value, -9999.0) for token, value in each.items()} for each in values]
    return {"tokens": [f"token_id:{token}" for token in ids], "text_offset": [0] * len(ids), "top_logprobs": listed,
            "token_logprobs": [max(each[token], -9999.0) for token, each in zip(ids, values, strict=True)]}  # fmt: skip


def _handler(server: VllmServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.say(None)

        def do_POST(self) -> None:
            self.say(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def say(self, body: Any) -> None:
            try:
                status, found = 200, server.answer(self.path, body)
            except Refusal as error:
                status, found = error.status, {"error": {"message": error.message, "type": "BadRequestError",
                                                         "param": None, "code": error.status}}  # fmt: skip
            content = found.encode() if isinstance(found, str) else json.dumps(found).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except OSError:  # the client waits no longer
                pass

        def log_message(self, *arguments: Any) -> None:
            pass

    return Handler
