"""`ServerTextGenerator`: what a vLLM server draws and says is the model's own, and what it does wrong is named."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from training_fixtures import make_model
from transformers import LlamaForCausalLM
from vllm_server import VllmServer

from logitless.training import InputError, openai_server
from logitless.training.parallel import World
from logitless.training.rollouts.generation import Completion, Sampling
from logitless.training.rollouts.server import ServerTextGenerator

ALONE = World(0, 1, torch.device("cpu"))
VOCABULARY, END = 258, (1, 70, 71, 72, 73)  # several end ids, so that some completions end
PROMPTS = [torch.tensor(ids, dtype=torch.int32) for ids in ([5, 6, 7], [8], [5, 6, 7], [9, 10], [200, 100, 50, 25])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that is far from uniform."""
    return make_model(tmp_path_factory.mktemp("model"), tied=False, sharpness=20)


@pytest.fixture
def serve(folder: str) -> Iterator[Callable[..., VllmServer]]:
    started: list[VllmServer] = []

    def make(**options: Any) -> VllmServer:
        started.append(VllmServer(folder, **options))
        return started[-1]

    yield make
    for server in started:
        server.close()


@pytest.fixture
def server(serve: Callable[..., VllmServer]) -> VllmServer:
    return serve()


def generator_of(server: VllmServer, tmp_path: Path, **changes: Any) -> ServerTextGenerator:
    options = {"end_ids": END, "vocabulary": VOCABULARY, "folder": tmp_path / "weights", "world": ALONE}
    return ServerTextGenerator(**{"url": server.url, **options, "timeout": 60.0, **changes})


def own_logprobs(model: Any, prompt: torch.Tensor, completion: Completion, temperature: float) -> torch.Tensor:
    """`[T, V]`: the model's log-probs at each token of a completion, from full logits in float64."""
    ids = torch.cat([prompt.long(), completion.ids.long()])
    with torch.no_grad():
        logits = model(ids[None]).logits[0, len(prompt) - 1 : -1].double()
    return (logits / temperature).log_softmax(-1)


def kept(logprob: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """`[T, V]`: which tokens can be drawn, from the words of `Sampling`, one after the other."""
    found = logprob.exp() >= sampling.min_p * logprob.exp().max(-1, keepdim=True).values
    order = logprob.masked_fill(~found, -math.inf).argsort(-1, descending=True)
    rank = order.argsort(-1)
    if sampling.top_k:
        found &= rank < sampling.top_k
    probability = logprob.masked_fill(~found, -math.inf).softmax(-1).gather(-1, order)
    before = (probability.cumsum(-1) - probability).gather(-1, rank)
    return found & (before < sampling.top_p)


def drawn(logprob: torch.Tensor, completion: Completion) -> torch.Tensor:
    return logprob.gather(-1, completion.ids.long()[:, None])[:, 0].float()


SETTINGS = {
    "plain": {},
    "cold": {"temperature": 0.5},
    "hot": {"temperature": 1.5},
    "top_p": {"top_p": 0.6},
    "top_k": {"top_k": 3},
    "all": {"temperature": 0.7, "top_p": 0.8, "top_k": 9, "min_p": 0.05},
}


@pytest.mark.parametrize("mode", ["processed_logprobs", "raw_logprobs"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_log_probs_are_the_models_own(
    serve: Callable[..., VllmServer], tmp_path: Path, mode: str, settings: str
) -> None:
    """Each of the two is right where the server's mode says it, and NaN elsewhere; float32's tolerance."""
    server, sampling = serve(mode=mode), Sampling(max_tokens=10, **SETTINGS[settings])
    generator = generator_of(server, tmp_path)
    assert generator.processed is (mode == "processed_logprobs")
    raw = mode == "raw_logprobs"
    says_drawn = not raw or (sampling.temperature == 1 and not sampling.cuts)
    says_model = sampling.temperature == 1 if raw else not sampling.cuts
    for prompt, completion in zip(PROMPTS, generator.generate(PROMPTS, sampling, 3), strict=True):
        own = own_logprobs(server.model, prompt, completion, sampling.temperature)
        can = kept(own, sampling)
        assert can.gather(-1, completion.ids.long()[:, None]).all()
        cut = own.masked_fill(~can, -math.inf).log_softmax(-1)
        for given, says, expected in (
            (completion.sampling_logprob, says_drawn, drawn(cut, completion)),
            (completion.logprob, says_model, drawn(own, completion)),
        ):
            assert given.dtype == torch.float32 and given.shape == completion.ids.shape
            wanted = expected if says else torch.full_like(expected, math.nan)
            torch.testing.assert_close(given, wanted, atol=2e-5, rtol=0, equal_nan=True)


def test_temperature_zero_takes_the_likeliest(server: VllmServer, tmp_path: Path) -> None:
    """Tokens are drawn with certainty, and a prompt that stands twice is asked for one completion, as vLLM wants."""
    found = generator_of(server, tmp_path).generate(PROMPTS, Sampling(max_tokens=6, temperature=0), 0)
    for prompt, completion in zip(PROMPTS, found, strict=True):
        own = own_logprobs(server.model, prompt, completion, 1.0)
        assert completion.ids.tolist() == own.argmax(-1).tolist()
        assert not completion.sampling_logprob.any() and completion.logprob.isnan().all()
    assert found[0].ids.equal(found[2].ids)


def as_lists(completions: list[Completion]) -> list[Any]:
    return [(each.ids.tolist(), each.sampling_logprob.tolist(), each.ended) for each in completions]


def test_equal_calls_give_equal_completions(server: VllmServer, tmp_path: Path) -> None:
    generator, sampling = generator_of(server, tmp_path), Sampling(max_tokens=8)
    first = as_lists(generator.generate(PROMPTS, sampling, 1))
    assert first == as_lists(generator.generate(PROMPTS, sampling, 1))
    assert first == as_lists(generator_of(server, tmp_path, requests=1).generate(PROMPTS, sampling, 1))
    assert first != as_lists(generator.generate(PROMPTS, sampling, 2))
    assert first[0] != first[2], "a prompt that stands twice is sampled twice"
    seeds = [body["seed"] for path, body in server.asked if path == "/v1/completions" and "seed" in body]
    assert len(set(seeds)) == 2 * 4 and all(0 <= seed < 2**62 for seed in seeds)


def test_draws_follow_the_distribution(server: VllmServer, tmp_path: Path) -> None:
    """Frequencies of the first token after a prompt are its probabilities, within five deviations."""
    count, prompt = 2000, PROMPTS[1]
    found = generator_of(server, tmp_path).generate([prompt] * count, Sampling(max_tokens=1), 0)
    with torch.no_grad():
        p = server.model(prompt[None].long()).logits[0, -1].double().softmax(-1)
    counts = torch.bincount(torch.cat([each.ids for each in found]).long(), minlength=VOCABULARY)
    assert ((counts - count * p).abs() <= 5 * (count * p * (1 - p)).sqrt() + 1).all()
    assert len([path for path, _ in server.asked if path == "/v1/completions"]) == 2, "all of them are one request"


def test_results_are_in_the_order_of_prompts(server: VllmServer, tmp_path: Path) -> None:
    """The first prompt's answer comes last; all are under way at once, since none comes before all are asked."""
    prompts = [torch.tensor([20 + place]) for place in range(8)]
    generator, sampling = generator_of(server, tmp_path), Sampling(max_tokens=4)
    expected = as_lists(generator.generate(prompts, sampling, 0))
    together = threading.Barrier(len(prompts))

    def delay(first: int) -> float:
        together.wait(timeout=30)
        return 0.02 * (28 - first)

    server.delay = delay
    assert as_lists(generator.generate(prompts, sampling, 0)) == expected


def test_completions_end_at_the_end_tokens_alone(server: VllmServer, tmp_path: Path) -> None:
    """The end token is the last id; the server's own end token (1) is none where it is not named."""
    sampling = Sampling(max_tokens=40)
    found = generator_of(server, tmp_path).generate([PROMPTS[0]] * 30, sampling, 0)
    assert {each.ended for each in found} == {True, False}
    for each in found:
        inner, last = each.ids[:-1].tolist(), int(each.ids[-1])
        assert each.ids.dtype == torch.int32 and not set(inner) & set(END) and (last in END) is each.ended
        assert each.ended or len(each.ids) == 40
    server.model.lm_head.weight.data[1] = server.model.lm_head.weight.data.mean(0)
    server.cache.clear()
    found = generator_of(server, tmp_path, end_ids=(2,)).generate([PROMPTS[0]] * 30, Sampling(max_tokens=60), 0)
    assert any(1 in each.ids for each in found) and all(each.ended is (int(each.ids[-1]) == 2) for each in found)


def test_long_prompts(serve: Callable[..., VllmServer], tmp_path: Path) -> None:
    server = serve(max_model_len=64)
    generator, sampling = generator_of(server, tmp_path), Sampling(max_tokens=4)
    longest = torch.arange(60) + 2
    (found,) = generator.generate([longest], sampling, 0)
    torch.testing.assert_close(
        found.logprob, drawn(own_logprobs(server.model, longest, found, 1.0), found), atol=2e-5, rtol=0
    )
    with pytest.raises(
        InputError, match=r"prompt 1: 61 tokens and a completion of up to 4 .* max_model_len 64; .*--max"
    ):
        generator.generate([longest, torch.arange(61)], sampling, 0)
    generator._longest = None  # a server that does not tell
    with pytest.raises(
        InputError, match=r"prompt 0: .*a completion was cut off after 3 tokens of 4 at most: .*max_model"
    ):
        generator.generate([torch.arange(61)], sampling, 0)
    with pytest.raises(InputError, match=r"prompt 0: .*status 400: This model's maximum context length is 64 tokens"):
        generator.generate([torch.arange(64)], sampling, 0)


def test_a_server_may_give_no_token(server: VllmServer, tmp_path: Path) -> None:
    generator = generator_of(server, tmp_path)
    none = {"token_ids": [], "logprobs": {"token_logprobs": [], "tokens": []}, "finish_reason": "stop"}
    server.spoil = lambda answer, body: answer | {"choices": [each | none for each in answer["choices"]]}
    for each in generator.generate(PROMPTS, Sampling(max_tokens=3), 0):
        assert each.ids.shape == each.sampling_logprob.shape == each.logprob.shape == (0,)
        assert each.ids.dtype == torch.int32 and not each.ended
    assert generator.generate([], Sampling(max_tokens=3), 0) == []


def test_an_older_server_names_its_ids(server: VllmServer, tmp_path: Path) -> None:
    """Without `return_token_ids` the ids are the tokens' names."""
    generator, sampling = generator_of(server, tmp_path), Sampling(max_tokens=5)
    expected = as_lists(generator.generate(PROMPTS, sampling, 0))
    older = {"token_ids": None, "prompt_token_ids": None}
    server.spoil = lambda answer, body: answer | {"choices": [each | older for each in answer["choices"]]}
    assert as_lists(generator.generate(PROMPTS, sampling, 0)) == expected


# ---------------------------------------------------------------------------------------------------------------------
# Faults


def first(**changes: Any) -> Callable[[Any, Any], Any]:
    """The answer with other fields of its first choice; a function makes the new from the old."""

    def spoil(answer: Any, body: Any) -> Any:
        choice = dict(answer["choices"][0])
        for name, change in changes.items():
            choice[name] = change(choice[name]) if callable(change) else change
        return answer | {"choices": [choice, *answer["choices"][1:]]}

    return spoil


def values(change: Callable[[list[Any]], list[Any]]) -> Callable[[Any, Any], Any]:
    return first(logprobs=lambda old: old | {"token_logprobs": change(old["token_logprobs"])})


SPOILED: dict[str, Callable[[Any, Any], Any]] = {
    "choices: expected 2 for 2 completions, got 1": lambda answer, body: answer | {"choices": answer["choices"][:1]},
    "choices: expected 2 for 2 completions, got None": lambda answer, body: {"model": "tiny"},
    r"choices: expected the indices 0 to 1, got \[1, 1\]": first(index=1),
    "answered for the model 'other', and was asked for 'tiny'": lambda answer, body: answer | {"model": "other"},
    r"choices\[0\]: the answer has no log-probs": first(logprobs=None),
    r"choices\[0\]: the answer has no token ids": first(token_ids=["a"]),
    r"expected a log-prob for each of \d token ids, got \d": values(lambda old: old[:-1]),
    r"token_logprobs\[1\]: expected the log-prob of a drawn token, got null, which is NaN": values(
        lambda old: [old[0], None, *old[2:]]
    ),
    r"token_logprobs\[0\]: .* got -9999.0": values(lambda old: [-9999.0, *old[1:]]),
    r"token_logprobs\[0\]: .* got 3.5": values(lambda old: [3.5, *old[1:]]),
    "expected token ids from 0 to 257, got .* to 258: the server has another model": first(
        token_ids=lambda old: [*old[:-1], 258]
    ),
    "its prompt_token_ids differ": first(prompt_token_ids=[0, 5, 6, 7]),
    "ends with stop or length, of 4 tokens at most, got 4 tokens and abort": first(finish_reason="abort"),
    r"stopped at the id \d+ \(stop_reason None\), and the end tokens are .*--generation-config vllm": first(
        finish_reason="stop"
    ),
}


@pytest.mark.parametrize("message", SPOILED)
def test_an_answer_that_cannot_be_used_is_named(server: VllmServer, tmp_path: Path, message: str) -> None:
    generator = generator_of(server, tmp_path, end_ids=(2,))
    server.spoil = SPOILED[message]
    with pytest.raises(InputError, match=rf"prompt 0: {server.url}/v1/completions: .*{message}"):
        generator.generate([PROMPTS[0]] * 2, Sampling(max_tokens=4), 0)


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([torch.tensor([3]), torch.tensor([4, 258])], {}, "prompt 1: expected ids from 0 to 257, got 4 to 258"),
        ([torch.tensor([-1])], {}, "prompt 0: expected ids from 0 to 257, got -1"),
        ([torch.tensor([], dtype=torch.int32)], {}, r"prompt 0: expected ids \[T\], T at least 1, got shape \[0\]"),
        ([torch.tensor([[3]])], {}, r"got shape \[1, 1\]"),
        (
            [torch.tensor([3])],
            {"temperature": 0.005},
            "temperature: vLLM samples at 0.01 where less is asked, got 0.005",
        ),
        ([torch.tensor([3])], {"temperature": 3.0}, r"prompt 0: .*status 400: temperature must be in \[0, 2\]"),
    ],
)
def test_what_cannot_be_sampled_is_refused(
    server: VllmServer, tmp_path: Path, prompts: list[torch.Tensor], settings: dict[str, float], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        generator_of(server, tmp_path).generate(prompts, Sampling(max_tokens=4, **settings), 0)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were waited, without waiting."""
    found: list[float] = []
    monkeypatch.setattr("logitless.training.openai_server.time.sleep", found.append)
    return found


def test_a_server_that_is_not_up_yet_is_waited_for(server: VllmServer, tmp_path: Path, waits: list[float]) -> None:
    server.statuses = [503, 503, 503, 503, 503, 502]
    assert generator_of(server, tmp_path).processed
    assert [wait for wait in waits if wait] == [1, 2, 4, 8, 8, 8]
    waits.clear()
    with pytest.raises(InputError, match=r"vllm_server_base_url: http://127.0.0.1:1/v1/models: no answer"):
        generator_of(server, tmp_path, url="http://127.0.0.1:1", start_timeout=20.0)
    assert sum(waits) == 20 == sum(openai_server.waits_within(20))


def test_a_busy_server_is_asked_again(server: VllmServer, tmp_path: Path, waits: list[float]) -> None:
    generator, sampling = generator_of(server, tmp_path, requests=1), Sampling(max_tokens=3)
    expected = as_lists(generator.generate(PROMPTS, sampling, 0))
    server.statuses = [503, 429, 504]
    assert as_lists(generator.generate(PROMPTS, sampling, 0)) == expected and sum(waits) == 7
    for statuses, asked in (([503] * 4, 4), ([500], 1), ([400], 1)):
        server.statuses, before = list(statuses), len(server.asked)
        with pytest.raises(InputError, match=rf"prompt 0: .*/v1/completions: status {statuses[0]}: not now"):
            generator.generate(PROMPTS[:1], sampling, 0)
        assert len(server.asked) - before == asked


def test_a_server_that_hangs_is_asked_once(server: VllmServer, tmp_path: Path) -> None:
    generator = generator_of(server, tmp_path, timeout=0.5)
    server.delay = lambda first: 1.5
    before = len(server.asked)
    with pytest.raises(InputError, match=r"prompt 0: .*/v1/completions: no answer within 0.5 seconds"):
        generator.generate(PROMPTS[:1], Sampling(max_tokens=3), 0)
    assert len(server.asked) == before + 1


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({}, {"model_name": "tinny"}, r"model_name: .*/v1/models lists no 'tinny' \(nearest: tiny\); it lists tiny"),
        ({"max_logprobs": 2}, {}, "status 400: Requested sample logprobs of 5, which is greater than max allowed: 2"),
        ({"mode": "raw_logits"}, {}, "expected log-probs, got .*--logprobs-mode processed_logprobs"),
        ({"mode": "processed_logits"}, {}, "expected log-probs, got .*--logprobs-mode processed_logprobs"),
        ({}, {"end_ids": ()}, r"end_ids: expected ids from 0 to 257, got \[\]"),
        ({}, {"end_ids": (258,)}, r"end_ids: expected ids from 0 to 257, got \[258\]"),
        ({}, {"requests": 0}, "requests must be above 0, got 0"),
        ({}, {"timeout": 0}, "timeout must be above 0, got 0"),
    ],
)
def test_what_cannot_be_used_is_said_at_the_start(
    serve: Callable[..., VllmServer], tmp_path: Path, options: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        generator_of(serve(**options), tmp_path, **changes)


def test_a_server_without_log_probs_is_refused_at_the_start(server: VllmServer, tmp_path: Path) -> None:
    server.spoil = first(logprobs=None)
    with pytest.raises(InputError, match=r"vllm_server_base_url: .*the answer has no log-probs"):
        generator_of(server, tmp_path)


def test_a_model_among_several_names(server: VllmServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM answers under the first of its `--served-model-name`; adapters of others are not what is served."""
    cards = [{"id": "x", "parent": "tiny"}, {"id": "tiny"}, {"id": "alias"}]
    monkeypatch.setattr(server, "models", lambda body: {"data": cards})
    assert generator_of(server, tmp_path)._weights.name == "tiny"
    generator = generator_of(server, tmp_path, model_name="tiny")
    server.spoil = lambda answer, body: answer | {"model": "alias"}
    assert generator.generate(PROMPTS, Sampling(max_tokens=2), 0)
    monkeypatch.setattr(server, "models", lambda body: {"data": []})
    with pytest.raises(InputError, match=r"vllm_server_base_url: .*/v1/models lists no model"):
        generator_of(server, tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def trained(folder: str, adapter: bool) -> Any:
    """The served model, with an adapter that changes it or changed itself."""
    import peft

    torch.manual_seed(1)
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    if adapter:
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4)).eval()
    moved(model)
    return model


@torch.no_grad()
def moved(model: Any) -> None:
    """A step of training."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * 0.02)


def assert_samples_from(generator: ServerTextGenerator, model: Any) -> None:
    for prompt, completion in zip(PROMPTS, generator.generate(PROMPTS, Sampling(max_tokens=6), 0), strict=True):
        own = drawn(own_logprobs(model, prompt, completion, 1.0), completion)
        torch.testing.assert_close(completion.logprob, own, atol=2e-5, rtol=0)


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "weights"])
def test_the_server_follows_the_trained_model(server: VllmServer, folder: str, tmp_path: Path, adapter: bool) -> None:
    """After each update it samples from the model as it then is, and nothing of earlier ones is left."""
    generator, model = generator_of(server, tmp_path), trained(folder, adapter)
    assert_samples_from(generator, LlamaForCausalLM.from_pretrained(folder))
    for step in (0, 1, 2):
        generator.follow(model, step)
        assert_samples_from(generator, model)
        assert len(list((tmp_path / "weights").iterdir())) == 1
        assert [path for path, _ in server.adapters.values()] == list(map(str, (tmp_path / "weights").iterdir()))[
            :adapter
        ]
        before = as_lists(generator.generate(PROMPTS, Sampling(max_tokens=6), 0))
        moved(model)
        assert before == as_lists(generator.generate(PROMPTS, Sampling(max_tokens=6), 0)), "until it follows"
    generator.follow(model, 2)  # a step may be taken over twice
    assert_samples_from(generator, model)


def test_a_later_run_clears_what_an_earlier_one_left(server: VllmServer, folder: str, tmp_path: Path) -> None:
    """The run that stopped has left an adapter on the server and files; a name never stands for two adapters."""
    model = trained(folder, True)
    generator_of(server, tmp_path).follow(model, 5)
    (earlier,) = server.adapters
    moved(model)
    again = generator_of(server, tmp_path)
    again.follow(model, 5)
    assert earlier not in server.adapters and len(server.adapters) == 1
    assert_samples_from(again, model)


def test_weights_that_did_not_change_are_no_fault(server: VllmServer, folder: str, tmp_path: Path) -> None:
    """A first step of a warm-up has a learning rate of 0."""
    generator, model = generator_of(server, tmp_path), trained(folder, False)
    generator.follow(model, 0)
    generator.follow(model, 1)
    assert_samples_from(generator, model)


def test_changes_below_the_servers_precision_are_no_fault(server: VllmServer, folder: str, tmp_path: Path) -> None:
    """Few weights change in a warm-up. They add up: the answer that they are compared with stays until it changes."""
    generator, model = generator_of(server, tmp_path), trained(folder, False)
    generator.follow(model, 0)
    server.stale = True
    parameters = [parameter for parameter in model.parameters() if parameter.is_leaf]
    for step, parameter in enumerate(parameters[: len(parameters) // 2]):
        parameter.data.mul_(2)
        generator.follow(model, step)
    parameters[-1].data.mul_(2)
    parameters[-2].data.mul_(2)
    with pytest.raises(InputError, match="the server still has the old weights"):
        generator.follow(model, len(parameters))


@pytest.mark.parametrize(
    ("adapter", "options", "fault", "message"),
    [
        (True, {}, {"stale": True}, "step 1: .*/v1/models does not list the adapter update-.* said it had loaded"),
        (False, {}, {"stale": True}, "step 1: .*the server still has the old weights"),
        (False, {}, {"at_work": True}, "step 1: .*/reset_prefix_cache: .*at work for others; it answered .*False"),
        (True, {"lora": False}, {}, "step 0: .*load_lora_adapter: status 404: .*VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
        (False, {"dev": False}, {}, "step 0: .*/collective_rpc: status 404: .*VLLM_SERVER_DEV_MODE=1"),
        (True, {}, {"statuses": [500]}, "step 1: .*/v1/load_lora_adapter: status 500: not now"),
        (False, {}, {"statuses": [503]}, "step 1: .*/collective_rpc: status 503: not now"),
    ],
)
def test_a_server_that_does_not_follow_is_named(
    serve: Callable[..., VllmServer],
    folder: str,
    tmp_path: Path,
    adapter: bool,
    options: dict[str, Any],
    fault: dict[str, Any],
    message: str,
) -> None:
    """Nothing is sampled from old weights: `follow` itself fails."""
    server = serve(**options)
    generator, model = generator_of(server, tmp_path), trained(folder, adapter)
    with pytest.raises(InputError, match=message):
        for step in (0, 1):
            generator.follow(model, step)
            vars(server).update(fault)
            moved(model)


def test_a_server_that_reads_other_files_says_so(server: VllmServer, folder: str, tmp_path: Path) -> None:
    """A folder that the server does not see under the same path: its own words are shown."""
    generator, model = generator_of(server, tmp_path), trained(folder, True)
    load = server.load
    server.load = lambda body: load(body | {"lora_path": "/elsewhere"})  # type: ignore[method-assign]
    with pytest.raises(
        InputError, match=r"step 3: .*status 404: .*No adapter found for /elsewhere; .*it was to read .*/weights"
    ):
        generator.follow(model, 3)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"results": []}, "expected an answer of each worker, got {'results': ..}"),
        ("", "expected an answer of each worker, got None"),
    ],
)
def test_a_reload_that_no_worker_confirms(
    server: VllmServer, folder: str, tmp_path: Path, answer: Any, message: str
) -> None:
    generator = generator_of(server, tmp_path)
    server.rpc = lambda body: answer  # type: ignore[method-assign]
    with pytest.raises(InputError, match=f"step 0: .*/collective_rpc: {message}"):
        generator.follow(trained(folder, False), 0)


def test_a_folder_that_holds_anything_else_is_refused(server: VllmServer, tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "thesis.txt").touch()
    with pytest.raises(InputError, match=r"folder: expected a folder for weights alone, and .* holds thesis.txt"):
        generator_of(server, tmp_path)
    with pytest.raises(InputError, match=r"folder: weights cannot be handed over in .*thesis.txt"):
        generator_of(server, tmp_path, folder=tmp_path / "weights" / "thesis.txt")


PROCESS = """
import os, sys, torch
from transformers import LlamaForCausalLM
import peft
from logitless.training import parallel
from logitless.training.rollouts.generation import Sampling
from logitless.training.rollouts.server import ServerTextGenerator
url, folder, out = sys.argv[1:]
world = parallel.start(True)
torch.manual_seed(1)
model = LlamaForCausalLM.from_pretrained(folder)
model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4)).eval()
for parameter in model.parameters():
    if parameter.requires_grad:
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
generator = ServerTextGenerator(url, end_ids=(1,), vocabulary=258, folder=out, world=world)
generator.follow(model, 0)
(found,) = generator.generate([torch.tensor([40 + world.rank])], Sampling(max_tokens=5), world.rank)
ids = torch.cat([torch.tensor([40 + world.rank]), found.ids.long()])
with torch.no_grad():
    own = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
torch.testing.assert_close(found.logprob, own, atol=2e-5, rtol=0)
world.wait()
sys.stdout.flush()
os._exit(0)
"""


def test_two_processes_share_a_server(server: VllmServer, folder: str, tmp_path: Path) -> None:
    """The main one hands the weights over, once; each samples from them for its own prompts."""
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run([*command, server.url, folder, str(tmp_path / "weights")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [path for path, _ in server.asked].count("/v1/load_lora_adapter") == 1
    names = {body["model"] for path, body in server.asked if path == "/v1/completions" and "seed" in body}
    assert names == set(server.adapters) and len(names) == 1
