"""The planner: its memory against the allocator's, its times against a clock, and what it refuses."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from typer.testing import CliRunner

import logitless
from logitless import losses
from logitless.backends import native
from logitless.bench import memory
from logitless.bench.machine import Cpu
from logitless.bench.measure import Part, Row, in_turns, time_once
from logitless.bench.problem import Inputs, Problem
from logitless.bench.provider import Provider
from logitless.bench.providers import materialised, own
from logitless.cli import app
from logitless.losses import Distillation, Loss
from logitless.plan import StepPlan, calibrate, given_rates, plan, read_bytes, show_bytes
from logitless.plan import rates as rates_module
from logitless.plan.cost import costs_of
from logitless.plan.rest import rough_terms
from logitless.plan.shape import Body, Shape, shape_from
from logitless.plan.step import STRATEGIES, Step
from logitless.plan.terms import memory_of, total

#: Eight chunks of 128 tokens, and pairs that fit one.
PROBLEM = Problem(1024, 256, 8192, pairs=8, chunk_bytes=128 * 8192 * 4)
#: What a loss keeps of single numbers and small vectors, which the planner does not count one by one.
SLACK = 2**16


def step_of(problem: Problem, loss: Loss, **settings: Any) -> Step:
    return Step(
        problem.tokens,
        problem.hidden,
        problem.vocabulary,
        loss,
        problem.dtype,
        "cpu",
        "chunked",
        frozen_head=problem.frozen_head,
        length=problem.length if problem.pairs else None,
        chunk_bytes=problem.chunk_bytes,
        **settings,
    )


def provider_of(problem: Problem, loss: Loss, strategy: str) -> Provider:
    if loss.compares_distributions:
        return Provider(strategy, "logitless", against_reference(problem, loss, strategy))
    if strategy != "materialised":
        return Provider(strategy, "logitless", partial(own.registered_loss, loss, backward=strategy))
    return materialised.DPO if loss.name == "dpo" else materialised.NLL


def against_reference(problem: Problem, loss: Loss, strategy: Any) -> Callable[[Tensor, Tensor, Inputs], Tensor]:
    """The loss against a reference whose hidden states are there before the step."""
    states = {each.tokens: each.inputs().hidden.flip(0) for each in (problem, problem.brief())}

    def against(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
        options: Any = dict(backward=strategy, chunk_bytes=problem.chunk_bytes, ref_hidden=states[len(hidden)])
        out: Tensor = logitless.linear_loss(loss, hidden, weight, inputs.targets, **options)
        return out

    return against


def check_memory(problem: Problem, step: Step, strategy: str, provider: Provider) -> None:
    """Holds the extra against the allocator's, to a tenth."""
    found = memory.of_step(Part("", problem), provider)["allocated"]
    assert found is not None
    predicted = memory_of(step, strategy)
    assert total(predicted.gradients) == problem.gradient_bytes
    assert abs(predicted.extra - found) <= max(0.1 * abs(found), SLACK), (predicted, found)


def cases() -> list[Any]:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for frozen in (False, True):
            for name in ("nll", "dpo", "kto", "eaft", "gspo", "distillation"):
                for strategy in STRATEGIES:
                    problem = Problem(**{**PROBLEM.__dict__, "dtype": dtype, "frozen_head": frozen})
                    loss = losses.get(name)
                    if step_of(problem, loss).obstacle(strategy) or (strategy == "materialised" and len(name) > 3):
                        continue
                    label = f"{name}-{strategy}-{str(dtype)[6:]}-{'frozen' if frozen else 'trainable'}"
                    found.append(pytest.param(problem, loss, strategy, id=label))
    return found


@pytest.mark.parametrize(("problem", "loss", "strategy"), cases())
def test_memory_is_the_allocator_s(problem: Problem, loss: Loss, strategy: str) -> None:
    check_memory(problem, step_of(problem, loss), strategy, provider_of(problem, loss, strategy))


@pytest.mark.parametrize("strategy", ["recompute", "single_pass"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_memory_without_the_compiled_kernels(dtype: torch.dtype, strategy: str, monkeypatch: Any) -> None:
    """PyTorch's operations alone, as on other devices."""
    monkeypatch.setattr(native, "usable", lambda device: False)
    problem = Problem(1024, 256, 8192, dtype=dtype, chunk_bytes=PROBLEM.chunk_bytes)
    loss = losses.get("nll")
    check_memory(problem, step_of(problem, loss), strategy, provider_of(problem, loss, strategy))


@pytest.mark.parametrize("strategy", ["recompute", "single_pass"])
@pytest.mark.parametrize("frozen", [False, True])
def test_memory_under_a_softcap(strategy: Any, frozen: bool) -> None:
    problem = Problem(768, 256, 8192, frozen_head=frozen, chunk_bytes=PROBLEM.chunk_bytes)

    def capped(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
        options: Any = dict(softcap=30.0, backward=strategy, chunk_bytes=problem.chunk_bytes)
        return logitless.linear_cross_entropy(hidden, weight, inputs.targets, **options)

    step = step_of(problem, losses.get("nll"), softcap=30.0)
    check_memory(problem, step, strategy, Provider(strategy, "logitless", capped))


@pytest.mark.parametrize("loss", [Distillation("js"), Distillation(nll_weight=1.0)], ids=["js", "with nll"])
@pytest.mark.parametrize("strategy", ["recompute", "single_pass"])
def test_memory_of_distributions(loss: Loss, strategy: str) -> None:
    problem = Problem(768, 256, 8192, pairs=8, chunk_bytes=384 * 8192 * 4)
    check_memory(problem, step_of(problem, loss), strategy, provider_of(problem, loss, strategy))


@pytest.mark.parametrize("strategy", ["recompute", "single_pass"])
def test_memory_of_a_large_vocabulary_by_default(strategy: str) -> None:
    problem = Problem(640, 320, 50000)
    loss = losses.get("nll")
    check_memory(problem, step_of(problem, loss), strategy, provider_of(problem, loss, strategy))


# ---------------------------------------------------------------------------------------------------------------------
# Time


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True])
def test_times_are_the_clock_s(dtype: torch.dtype, frozen: bool) -> None:
    """Ratios to the materialised step, to 30%; calibrated anew where something else ran meanwhile."""
    problem = Problem(1024, 576, 49152, dtype=dtype, frozen_head=frozen)
    loss = losses.get("nll")
    providers = {strategy: provider_of(problem, loss, strategy) for strategy in STRATEGIES}
    off: dict[str, float] = {}
    for _ in range(3):
        step = step_of(problem, loss)
        rates = calibrate(step)
        predicted = {name: sum(cost.seconds for cost in costs_of(step, name, rates) or ()) for name in STRATEGIES}
        measured = _ratios(problem, providers)
        off = {name: predicted[name] / predicted["materialised"] / measured[name] for name in measured}
        if all(1 / 1.3 <= each <= 1.3 for each in off.values()):
            return
    pytest.fail(f"predicted over measured after the last calibration: {off}")


def _ratios(problem: Problem, providers: dict[str, Provider]) -> dict[str, float]:
    """Medians over rounds of each one's time over the materialised one's of the same round."""
    machine, inputs = Cpu(), problem.inputs()
    rows = {name: Row(name, provider.role) for name, provider in providers.items()}
    for name in in_turns(list(providers), 4):
        time_once(providers[name], rows[name], inputs, machine)
    base = rows["materialised"].seconds[1:]  # the first round warms up
    return {
        name: statistics.median(a / b for a, b in zip(row.seconds[1:], base, strict=True)) for name, row in rows.items()
    }


RATES = given_rates(700.0, 4000.0)


def planned(**settings: Any) -> StepPlan:
    usual: dict[str, Any] = dict(tokens=4096, memory=read_bytes("80GB"), hidden=4096, vocabulary=128256, device="cuda")
    return plan(**{**usual, "rates": RATES, **settings})


@pytest.mark.parametrize(
    ("loss", "frozen", "expected"),
    [
        ("nll", False, {"materialised": 3, "recompute": 4, "single_pass": 3}),
        ("nll", True, {"materialised": 2, "recompute": 3, "single_pass": 2}),
        ("gspo", False, {"materialised": 3, "recompute": 4}),
        ("distillation", False, {"recompute": 6, "single_pass": 4}),
        ("asft", False, {"recompute": 10, "single_pass": 7}),
    ],
)
def test_products_are_counted(loss: str, frozen: bool, expected: dict[str, int]) -> None:
    found = planned(loss=loss, frozen_head=frozen).strategies
    assert {each.name: each.products for each in found if each.obstacle is None} == expected


def test_kernels_that_finish_the_only_chunk_need_no_sum_for_the_head() -> None:
    whole, cut = (planned(tokens=tokens, backend="triton").strategy("single_pass").memory for tokens in (4096, 4097))
    assert whole is not None and cut is not None
    head = "float32 sum of the gradient of the head"
    assert head not in {each.name for each in whole.alive} and head in {each.name for each in cut.alive}


def test_calibration_measures_this_machine() -> None:
    rates = calibrate(step_of(Problem(64, 32, 500), losses.get("nll")))
    assert min(rates.whole, rates.chunk, rates.memory, rates.cache, rates.stream) > 0
    assert planned(device="cpu", hidden=32, vocabulary=500, tokens=64, rates=None).rates is not None


def test_products_of_a_chunk_are_timed_as_the_sweep_makes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """On numbers that are not zeros, and float16's within the context that makes them fast on a GPU."""
    seen: list[Any] = []

    @contextmanager
    def context(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
        seen.append(dtype)
        yield
        seen.append("end")

    def product(matrix: Tensor, weight: Tensor, out: Tensor) -> None:
        seen.append(int((matrix != 0).sum()) / matrix.numel())

    monkeypatch.setattr(rates_module, "float16_products", context)
    monkeypatch.setattr(rates_module, "products_with_head", product)
    step = step_of(Problem(64, 32, 500, dtype=torch.float16), losses.get("nll"))
    rates_module._chunk_products(step, torch.device("cpu"))[1]()
    assert seen == [torch.float16, pytest.approx(1.0, abs=0.01), "end"]


def test_full_logits_are_timed_on_more_tokens_where_products_are_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def operands(step: Step, tokens: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        asked.append(tokens)
        return torch.empty(1, 1), torch.empty(1, 1)

    monkeypatch.setattr(rates_module, "_timed_operands", operands)
    for device, tokens in (("cpu", 100_000), ("cuda", 100_000), ("cuda", 700)):
        step = replace(step_of(Problem(tokens), losses.get("nll")), device=device)
        rates_module._whole_products(step, torch.device("cpu"))
    assert asked == [512, 8192, 700]


def test_what_is_short_is_timed_many_times_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def work() -> None:
        clock[0] += 40e-6 if clock[0] else 1.0  # the first call loads and warms up

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    calls = rates_module._calls_of_a_timing(work, torch.device("cpu"))
    assert calls == 128 and rates_module._timed(work, calls, torch.device("cpu")) == pytest.approx(calls * 40e-6)


def test_a_slower_memory_costs_the_materialised_step_more() -> None:
    fast, slow = (planned(tokens=65536, rates=given_rates(700.0, each)) for each in (4000.0, 1000.0))
    assert fast.strategies[0].seconds < slow.strategies[0].seconds  # type: ignore[operator]


# ---------------------------------------------------------------------------------------------------------------------
# What fits, and what to choose


@given(memory=st.integers(2**20, 2**38), frozen=st.booleans(), loss=st.sampled_from(["nll", "dpo", "distillation"]))
def test_the_most_tokens_fit_and_one_more_does_not(memory: int, frozen: bool, loss: str) -> None:
    found = planned(memory=memory, frozen_head=frozen, loss=loss)
    for strategy in found.strategies:
        if strategy.obstacle is None:
            assert strategy.fits or strategy.most_tokens < found.step.tokens
            for tokens, fits in ((strategy.most_tokens, True), (strategy.most_tokens + 1, False)):
                if tokens:
                    again = planned(memory=memory, frozen_head=frozen, loss=loss, tokens=tokens)
                    assert again.strategy(strategy.name).fits == fits


def test_the_choice_is_the_fastest_that_fits() -> None:
    found = planned(tokens=65536, loss="dpo", length=512)
    fitting = {each.name: each.seconds for each in found.strategies if each.fits}
    assert found.choice == min(fitting, key=lambda name: fitting[name] or 0)
    tight = planned(tokens=65536, memory=read_bytes("12GB"))
    assert not tight.strategies[0].fits and tight.choice == "single_pass"
    assert planned(tokens=65536, memory=read_bytes("9GB")).choice == "recompute"
    assert planned(tokens=65536, memory=read_bytes("1GB")).choice is None


def test_a_strategy_that_does_not_serve_says_why() -> None:
    long = planned(loss="dpo", length=8192, tokens=65536).strategy("single_pass")
    assert long.memory is None and "16384 tokens of a pair loss's group exceed a chunk of 4096" in str(long.obstacle)
    assert "all tokens' statistics" in str(planned(loss="gspo").strategy("single_pass").obstacle)
    entropy = planned(loss="eaft").strategy("materialised")
    assert "no one way to write" in str(entropy.obstacle) and entropy.ratio is None


def test_adapters_freeze_the_head_and_weigh_less() -> None:
    body = Body(layers=2, intermediate=24, queries=16, keys=8)
    shape, step = Shape(16, 100, body=body), planned(hidden=16, vocabulary=100, tokens=10).step
    parameters = 2 * (16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 24)
    whole = {each.name: each.bytes for each in rough_terms(shape, step, lora=None, checkpointing=False)}
    assert whole["weights below the head"] == 2 * (parameters + 16 * 100)
    assert whole["AdamW of them"] == 2 * whole["their gradients"] == 2 * whole["weights below the head"]
    adapted = {each.name: each.bytes for each in rough_terms(shape, step, lora=2, checkpointing=True)}
    assert adapted["adapters, their gradients and AdamW, float32"] == 16 * 2 * 2 * (32 + 48 + 32 + 120)
    assert adapted["inputs of all layers"] < whole["activations of all layers, without checkpointing"]
    assert planned(lora=16).step.frozen_head


# ---------------------------------------------------------------------------------------------------------------------
# Models and sizes

CONFIG = {
    "hidden_size": 64,
    "vocab_size": 1000,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def test_a_shape_is_read_from_a_configuration() -> None:
    shape = shape_from(CONFIG, "c")
    assert shape == Shape(64, 1000, tied=True, body=Body(2, 128, 64, 32), missing="")
    nested = shape_from({"text_config": {**CONFIG, "final_logit_softcapping": 30.0}, "tie_word_embeddings": False}, "c")
    assert nested.hidden == 64 and nested.softcap == 30.0
    assert shape_from({"n_embd": 8, "vocab_size": 9}, "c").missing == (
        "c has no num_hidden_layers, intermediate_size, num_attention_heads"
    )


@pytest.mark.parametrize(
    ("text", "expected"), [("80GB", 80 * 10**9), ("79GiB", 79 * 2**30), ("24000MB", 24 * 10**9), ("1.5 tib", 3 * 2**39)]
)
def test_sizes_are_read(text: str, expected: int) -> None:
    assert read_bytes(text) == expected


@given(st.integers(0, 2**50))
def test_sizes_are_shown_to_three_digits(count: int) -> None:
    text = show_bytes(count)
    assert count == 0 or abs(read_bytes(text) - count) <= 0.006 * count


@pytest.mark.parametrize("text", ["80XB", "80", "GB", "-1GB", "0GB", "1e3GB", ""])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="memory: expected a positive number and one of B, KB, KiB"):
        read_bytes(text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(tokens=0), "tokens: expected a positive whole number, got 0"),
        (dict(lora=-1), "lora: expected a positive whole number, got -1"),
        (dict(loss="dop"), "no loss is named 'dop'"),
        (dict(loss="top_k_distillation"), "'top_k_distillation' lists several ids a token, which is not predicted"),
        (dict(model="."), "expected a model, or hidden and vocabulary, got both"),
        (dict(hidden=None), "expected a model, or both hidden and vocabulary"),
        (dict(dtype=torch.float64), "dtype: expected one of float32, bfloat16, float16"),
        (dict(device="tpu"), "device: expected 'cpu' or 'cuda', got 'tpu'"),
        (dict(backend="reference"), "backend: expected one of"),
    ],
)
def test_bad_arguments_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planned(**settings)


def test_a_count_of_another_type_is_named() -> None:
    with pytest.raises(TypeError, match="tokens: expected a positive whole number, got float"):
        planned(tokens=1.5)


@pytest.mark.parametrize("pair", [(1.0, None), (None, 1.0), (0.0, 1.0), (1.0, -2.0)])
def test_rates_come_together_and_positive(pair: tuple[float | None, float | None]) -> None:
    with pytest.raises(ValueError, match="expected a positive number, and both or neither"):
        given_rates(*pair)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["plan", *arguments])


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., str]:
    def write(**changes: Any) -> str:
        (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **changes}))
        return str(tmp_path)

    return write


def test_the_command_explains_and_writes_everything(model: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    arguments = ["--tokens", "2048", "--memory", "80GB", "--loss", "dpo", "--device", "cuda", "--json", str(file)]
    done = run("--model", model(), *arguments, "--tflops", "700", "--bandwidth", "4000")
    assert done.exit_code == 0, done.output
    content = json.loads(file.read_text())
    assert f'choose: backward="{content["choice"]}"' in done.output or "choose: materialised" in done.output
    assert "V 1000 x H 64 x 2 bytes" in done.output and "tail_corrected: not predicted" in done.output
    for strategy in content["strategies"]:
        found = strategy["memory"]
        assert found["total"] == sum(each["bytes"] for each in (*found["inputs"], *found["alive"]))
        assert strategy["seconds"] == pytest.approx(sum(each["seconds"] for each in strategy["costs"]))
    assert content["rest"] and content["rates"]["source"] == "given"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "80XB", "--hidden", "8", "--vocab", "9"], "memory: expected a positive number"),
        (["--memory", "1GB", "--hidden", "8"], "model: expected a model, or both hidden and vocabulary"),
        (["--memory", "1GB", "--hidden", "8", "--vocab", "9", "--dtype", "int8"], "dtype: expected one of"),
        (["--memory", "1GB", "--hidden", "8", "--vocab", "9", "--tflops", "7"], "bandwidth: expected a positive"),
    ],
)
def test_errors_of_the_command_are_one_line(arguments: list[str], message: str) -> None:
    done = run("--tokens", "64", *arguments)
    assert done.exit_code == 2 and message in done.output and len(done.output.strip().splitlines()) == 1


def test_a_configuration_without_a_size_is_named(model: Callable[..., str]) -> None:
    folder = model(hidden_size=None)
    done = run("--tokens", "64", "--memory", "1GB", "--model", folder)
    assert done.exit_code == 2
    assert "expected a positive hidden_size or n_embd or d_model in" in done.output


def test_a_folder_without_a_configuration_is_named(tmp_path: Path) -> None:
    done = run("--tokens", "64", "--memory", "1GB", "--model", str(tmp_path))
    assert done.exit_code == 2 and "expected a folder with a config.json" in done.output


def test_the_page_shows_what_the_command_prints() -> None:
    page = (Path(__file__).parents[1] / "docs" / "plan.md").read_text(encoding="utf-8")
    command = page.split("```bash\n")[1].split("```")[0].replace("\\\n", " ").split()
    shown = page.split("```text\n")[1].split("```")[0]
    done = run(*command[command.index("plan") + 1 :])
    assert done.exit_code == 0 and done.output == shown
