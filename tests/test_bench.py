"""`logitless bench` with made-up competitors: what it says of them is what they do, and nothing is lost on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_files
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

from logitless import losses
from logitless.bench import curves, defaults, memory
from logitless.bench import problem as problem_module
from logitless.bench import session as session_module
from logitless.bench import worker as worker_module
from logitless.bench.curves import Curve, Known, too_slow
from logitless.bench.defaults import completed, folder_of
from logitless.bench.limits import Limit, Search, Trial
from logitless.bench.machine import Cpu, Gpu
from logitless.bench.measure import Part, explain, silent
from logitless.bench.problem import Inputs, Problem
from logitless.bench.progress import Progress
from logitless.bench.provider import Provider
from logitless.bench.providers import choice, floors, materialised, own
from logitless.bench.report import load
from logitless.bench.request import Request
from logitless.bench.session import Session
from logitless.bench.worker import Worker
from logitless.cli import app
from logitless.training import InputError

SMALL = dict(hidden=24, vocab=96, tokens=40)
PROBLEM = Problem(40, 24, 96)
#: Seconds that the sleeping competitor takes.
NAP = 0.4


def far() -> float:
    return time.monotonic() + 600


def request(**other: Any) -> Request:
    """The request of a command line with these options, on a tiny problem."""
    options: dict[str, Any] = dict.fromkeys(
        ("model", "hidden", "vocab", "tokens", "dtype", "against", "parts", "memory", "rounds", "minutes", "losses")
    )
    options |= {
        "loss": "nll",
        "length": 8,
        "frozen_head": False,
        "checkpointing": False,
        "data": "random",
        "device": "cpu",
    }
    options |= {"backward": "auto,recompute", "quick": False}
    return completed(**(options | SMALL | other))


# ---------------------------------------------------------------------------------------------------------------------
# Made-up competitors


def _cross_entropy(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    return materialised.materialised_nll(hidden, weight, inputs)


def sleeps(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    time.sleep(NAP)
    return _cross_entropy(hidden, weight, inputs)


def allocates(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    torch.empty(1 << 23).fill_(0.0)  # 32 MiB
    return _cross_entropy(hidden, weight, inputs)


def dies(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    os._exit(7)


def hangs(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    time.sleep(600)
    raise AssertionError


def absent(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    import no_such_peer  # type: ignore[import-not-found]

    return no_such_peer.loss(hidden, weight)  # type: ignore[no-any-return]


def halved(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    """Right in value, wrong in gradient."""
    loss = _cross_entropy(hidden, weight, inputs)
    return loss.detach() + (loss - loss.detach()) / 2


def shifted(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    """Right in gradient, wrong in value."""
    return _cross_entropy(hidden, weight, inputs) + 0.1


def not_a_number(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    return _cross_entropy(hidden, weight, inputs) * float("nan")


def a_little_off(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    return _cross_entropy(hidden, weight, inputs) * 1.01


def peer(loss: Callable[..., Tensor], **other: Any) -> Provider:
    return Provider(loss.__name__, "peer", loss, **other)


def measured(*providers: Provider, problem: Problem = PROBLEM, rounds: int = 1) -> dict[str, Any]:
    part = Part("step", problem, providers, method=replace(session_module.METHOD, rounds=rounds))
    return {row["provider"]: row for row in part.measure(Cpu(), far(), {}, silent)["rows"]}


def test_a_competitor_that_sleeps_is_measured_right() -> None:
    row = measured(materialised.NLL, peer(sleeps), rounds=5)["sleeps"]
    plain = NAP + 0.002  # the loss itself takes a millisecond or two
    assert len(row["seconds"]) == 5
    assert sorted(row["seconds"])[2] == pytest.approx(plain, rel=0.05)


def test_an_allocation_is_seen() -> None:
    rows = measured(materialised.NLL, peer(allocates))
    more = rows["allocates"]["memory"]["allocated"] - max(0, rows["materialised"]["memory"]["allocated"])
    assert more == pytest.approx(2**25, rel=0.01)


@pytest.mark.slow
def test_an_allocation_is_seen_in_a_process_of_its_own() -> None:
    found = memory.in_process(Part("step", PROBLEM), peer(allocates))
    assert found["allocated"] == pytest.approx(2**25, rel=0.01)
    assert found["resident"] is None or found["resident"] == pytest.approx(2**25, rel=0.25)


@pytest.mark.parametrize("wrong", [halved, shifted, not_a_number])
def test_a_wrong_competitor_is_flagged_and_not_timed(wrong: Callable[..., Tensor]) -> None:
    row = measured(materialised.NLL, peer(wrong), rounds=3)[wrong.__name__]
    assert row["failure"].startswith("wrong: ") and row["seconds"] == [] and row["memory"] is None
    assert row["error"] is not None


def test_rounding_and_approximation_are_no_mistakes() -> None:
    """A hundredth off is wrong in float32, right for bfloat16, and right for what approximates by design."""
    assert measured(materialised.NLL, peer(a_little_off))["a_little_off"]["failure"].startswith("wrong: loss is off by")
    half = replace(PROBLEM, dtype=torch.bfloat16)
    assert measured(materialised.NLL, peer(a_little_off), problem=half)["a_little_off"]["failure"] is None
    assert measured(materialised.NLL, peer(a_little_off, approximate=True))["a_little_off"]["failure"] is None


def test_who_is_absent_is_named() -> None:
    rows = measured(materialised.NLL, peer(absent), *choice.others("orpo", ("quack",), gpu=False))
    assert rows["absent"]["failure"] == "not installed: no_such_peer"
    assert rows["quack"]["failure"] == "no orpo of it is known for this device"


def test_a_copy_has_its_bytes() -> None:
    row = measured(floors.COPY)["copy"]
    assert row["bytes"] == 2 * floors.COPIED and row["seconds"][0] > 0 and row["memory"] is None


def test_what_a_part_still_takes_is_told() -> None:
    told: list[tuple[str, float | None]] = []
    part = Part("step", PROBLEM, (materialised.NLL, peer(sleeps)), method=replace(session_module.METHOD, rounds=3))
    part.measure(Cpu(), far(), {}, lambda doing, so_far: told.append((doing, so_far["seconds_left"])))
    assert told[0] == ("materialised", None)
    known = [seconds for doing, seconds in told if doing == "sleeps" and seconds is not None]
    assert known[-2] > known[-1] == pytest.approx(NAP, rel=0.5)


# ---------------------------------------------------------------------------------------------------------------------
# Whom a request compares


@pytest.mark.parametrize("loss", ["nll", "dft", "dpo", "kto", "grpo", "top_k_distillation", "distillation", "orpo"])
def test_a_request_computes_one_loss(loss: str) -> None:
    asked = request(loss=loss, tokens=64, against="materialised,trl")
    chosen = (*asked.floors(), *asked.competitors())
    rows = measured(*chosen, problem=asked.problem())
    assert {row["role"] for row in rows.values()} >= {"floor", "materialised", "logitless"}
    for name, row in rows.items():
        assert row["failure"] is None or "no " in row["failure"], (name, row["failure"])
        if row["role"] != "floor" and row["failure"] is None:
            assert max(row["error"].values()) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peaked_data_take_little_beyond_what_is_held(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Making them must not bound the longest sequence. In blocks they are the same, to the last bit."""
    problem = Problem(1000, 300, 500, dtype=dtype, data="peaked")
    whole = problem.inputs()
    monkeypatch.setattr(problem_module, "BLOCK", 7 * 300)
    blocks: list[Inputs] = []
    beyond = Cpu().peak(lambda: blocks.append(problem.inputs())) - problem.input_bytes
    assert torch.equal(whole.hidden, blocks[0].hidden) and torch.equal(whole.weight, blocks[0].weight)
    assert 0 < beyond < 100_000  # once more the hidden states in float32 would be 1.2 million


def test_constants_are_copied_to_a_device_once() -> None:
    inputs, loss = PROBLEM.inputs(), losses.get("grpo")
    elsewhere = inputs._replace(hidden=inputs.hidden.to("meta"))
    made = materialised.constants(loss, elsewhere)["advantages"]
    assert made.device.type == "meta" and materialised.constants(loss, elsewhere)["advantages"] is made
    assert materialised.constants(loss, inputs)["advantages"].device.type == "cpu"


class Watched(Cpu):
    """A processor that says what is still held when it is asked to give memory back."""

    def __init__(self) -> None:
        self.held: list[bool] = []
        self.constants: weakref.ref[Tensor] | None = None

    def uses_constants(self, hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
        self.constants = weakref.ref(materialised.constants(losses.get("grpo"), inputs)["old_logprob"])
        return _cross_entropy(hidden, weight, inputs)

    def recover(self) -> None:
        assert self.constants is not None
        self.held.append(self.constants() is not None)


def test_a_part_leaves_the_memory_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent asks a GPU what is free, for the next part, while the child waits."""
    machine = Watched()
    monkeypatch.setattr(worker_module, "this_machine", lambda *, gpu: machine)
    part = Part("step", PROBLEM, (Provider("grpo", "logitless", machine.uses_constants, ""),))
    assert worker_module._measure(part, far(), {}, False, silent)["complete"]
    assert machine.held == [False]


def test_a_gpu_gives_back_what_a_failure_left_in_a_cycle(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cycle:
        def __init__(self) -> None:
            self.itself = self

    left, held = weakref.ref(Cycle()), list[bool]()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: held.append(left() is not None))
    Gpu.recover(object.__new__(Gpu))
    assert held == [False]


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["nll", "dpo", "dft"])
def test_compiled_logits_give_the_same_loss(loss: str) -> None:
    [compiled] = choice.others(loss, ("compiled",), gpu=False)
    row = measured(compiled, problem=request(loss=loss, tokens=64).problem())[compiled.name]
    assert row["failure"] is None and max(row["error"].values()) < 1e-5


def test_strategies_are_rows_of_their_own() -> None:
    asked = request(backward="auto,tail-corrected,screened", against="materialised")
    assert [(p.name, p.approximate) for p in asked.competitors()] == [
        ("materialised", False),
        ("logitless, auto", False),
        ("logitless, tail-corrected", True),
        ("logitless, screened", True),
    ]


def test_half_types_have_the_floor_of_float32_where_there_are_no_units(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = replace(PROBLEM, dtype=torch.bfloat16)
    for units, expected in ((False, floors.FLOAT32_GEMMS), (True, floors.GEMMS)):
        monkeypatch.setattr(choice, "BF16_UNITS", units)
        assert choice.floors_of("nll", problem, gpu=False)[0] is expected
    assert choice.floors_of("distillation", problem, gpu=False)[0] is floors.GEMMS_OF_BOTH_HEADS


def test_quick_is_the_step_alone() -> None:
    quick, whole = (request(quick=quick, tokens=None) for quick in (True, False))
    assert quick.parts == ("step",) and "cce" not in quick.against and quick.minutes < 2
    assert set(whole.parts) == {"step", "tokens", "vocabulary", "hidden", "longest", "pairs"}
    assert quick.tokens < whole.tokens and whole.minutes == 14
    assert folder_of(quick, quick=True) != folder_of(whole, quick=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "nil"}, r"loss: expected a name that `logitless losses` lists, got 'nil' \(nearest: nll"),
        ({"tokens": 0}, "tokens: expected a positive number, got 0"),
        ({"rounds": -1}, "rounds: expected a positive number, got -1"),
        ({"minutes": 0.0}, "minutes: expected a positive number"),
        ({"minutes": float("nan")}, "minutes: expected a positive number"),
        ({"against": "ligre"}, r"against: expected one of materialised, .*, got 'ligre' \(nearest: liger"),
        ({"backward": "magic"}, "backward: expected one of auto, .*, got 'magic'"),
        ({"dtype": "int8"}, "dtype: expected one of float32, bfloat16, float16, got 'int8'"),
        ({"data": "real"}, "data: expected one of random, peaked, got 'real'"),
        ({"parts": "steps"}, "parts: expected one of step, .*, got 'steps'"),
        ({"parts": "model"}, "parts: 'model' needs a model"),
        ({"device": "tpu"}, "device: expected cpu or cuda, got 'tpu'"),
        ({"loss": "dpo", "tokens": 40}, "tokens: expected a multiple of 16, pairs of --length 8 for dpo, got 40"),
        ({"memory": "80XB"}, "memory: expected a positive number and one of"),
        ({"model": "somewhere", "hidden": 24}, "model: it has a hidden size"),
        ({"model": "no/such/model", "hidden": None, "vocab": None}, "model: "),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        request(**options)


def test_the_default_memory_has_room_for_the_head() -> None:
    small, large = (request(hidden=hidden).memory for hidden in (24, 1024))
    assert 2**28 < small < 2**28 + 2**20 and large - small == pytest.approx(2 * 4 * 1000 * 96, rel=0.1)


def test_the_default_memory_of_a_gpu_is_a_share_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(defaults, "available_memory", lambda *, gpu: 1000)
    found = request(device="cuda")
    assert found.memory == 900 and not found.memory_given and request(device="cuda", memory="1KB").memory_given


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named() -> None:
    with pytest.raises(InputError, match="device: got cuda, and PyTorch finds no GPU"):
        request(device="cuda")


def test_a_model_gives_the_sizes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 32, "vocab_size": 1000}))
    asked = request(model=str(tmp_path), hidden=None, vocab=None, tokens=64)
    assert (asked.hidden, asked.vocabulary) == (32, 1000) and "model" in asked.parts


# ---------------------------------------------------------------------------------------------------------------------
# Limits and curves


@given(
    st.integers(1, 10**6), st.integers(0, 10**6), st.integers(1, 4096), st.integers(1, 2000), st.integers(10**3, 10**9)
)
def test_the_largest_that_fits_is_found_in_few_trials(
    slope: int, base: int, step: int, first: int, budget: int
) -> None:
    """Memory that grows in steps, as chunks make it."""

    def attempt(value: int) -> Trial:
        taken = base + slope * -(-value // step) * step
        return Trial(value, taken, 0.0, taken <= budget)

    search = Search(attempt, budget, far(), most=10**7)
    search.run(first)
    best = search.largest
    assert len(search.tried) < 60
    if best is None:
        assert not attempt(1).fits
    else:
        assert best.fits
        beyond = max(best.value + 1, int(best.value * 1.3) + step)
        assert search.ended_by == "cap" or not attempt(beyond).fits


def test_a_search_stops_where_the_time_does() -> None:
    def attempt(value: int) -> Trial:
        return Trial(value, value, value * 1.0, True)

    search = Search(attempt, 10**9, time.monotonic() + 100.0, most=10**7)
    search.run(1)
    assert search.ended_by == "time" and search.largest is not None and 50 < search.largest.value <= 100


def test_a_search_names_who_fails() -> None:
    search = Search(lambda value: Trial(value, None, 0.1, False, "out of memory"), 100, far(), most=100)
    search.run(64)
    assert search.largest is None and search.ended_by == "failure" and len(search.tried) == 1


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    result = Worker(plain=True)
    yield result
    result.stop()


def test_a_limit_is_what_fits(worker: Worker) -> None:
    """Materialised logits reach the memory long before logitless does, whose chunk is small."""
    problem = Problem(16, 24, 4096, chunk_bytes=2**18)
    limit = Limit(
        "longest",
        "nll",
        lambda tokens: replace(problem, tokens=tokens),
        (materialised.NLL, own.NLL, peer(absent)),
        2**24,
        first=16,
        most=4096,
    )
    kept: list[int] = []
    found = limit.measure(
        worker,
        far(),
        gpu=False,
        skip={"absent": "not installed: it"},
        keep=lambda so_far: kept.append(len(so_far["rows"])),
    )
    rows = {row["provider"]: row for row in found["rows"]}
    whole, ours = rows["materialised"], rows[own.NLL.name]
    assert kept == [1, 2, 3] and found["complete"] and found["unit"] == "tokens"
    assert whole["ended_by"] == "memory" and 0.8 * 2**24 < whole["bytes"] <= 2**24
    assert ours["ended_by"] == "cap" and ours["largest"] == 4096 > 4 * whole["largest"]
    assert rows["absent"]["failure"] == "not installed: it" and rows["absent"]["largest"] is None
    assert all(trial["fits"] == (trial["bytes"] <= 2**24) for trial in whole["tried"])


def test_a_curve_ends_with_the_memory(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(curves.RANGES, "tokens", (16, 256))
    curve = Curve(
        "tokens",
        "nll",
        lambda tokens: Problem(tokens, 24, 4096, chunk_bytes=2**18),
        (floors.GEMMS, materialised.NLL, own.NLL, peer(dies), peer(absent)),
        2**22,
    )
    known = Known(PROBLEM, [{"provider": "absent", "role": "peer", "failure": "not installed: it"}])
    found = curve.measure(worker, far(), gpu=False, known=known, keep=lambda so_far: None)
    rows = {point["value"]: {row["provider"]: row for row in point["rows"]} for point in found["points"]}
    assert list(rows) == [16, 32, 64, 128, 256] and found["complete"] and found["ended_by"] == "range"
    assert rows[256][own.NLL.name]["seconds"] and rows[64]["materialised"]["seconds"]
    assert "would take more than" in rows[256]["materialised"]["failure"]
    assert "its process ended with status 7" in rows[16]["dies"]["failure"] and not rows[256]["dies"]["seconds"]
    assert all(point["absent"]["failure"] == "not installed: it" for point in rows.values())


class Answers(Worker):
    """A worker that has one answer, and starts nothing."""

    def __init__(self, point: dict[str, Any]) -> None:
        super().__init__()
        self.point = {"rows": [], "complete": False, **point}

    def measure(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        return self.point


@pytest.mark.parametrize(
    ("point", "ended_by"),
    [
        ({}, "time"),
        ({"failure": explain(torch.OutOfMemoryError())}, "memory"),
        ({"failure": "its process ended with status 7"}, "failure"),
    ],
)
def test_a_curve_says_why_its_last_point_is_not_complete(point: dict[str, Any], ended_by: str) -> None:
    curve = Curve("tokens", "nll", lambda tokens: Problem(tokens, 24, 96), (materialised.NLL,), 2**30)
    found = curve.measure(Answers(point), far(), gpu=False, known=Known(PROBLEM, []), keep=lambda so_far: None)
    assert found["ended_by"] == ended_by and not found["complete"]


def test_a_curve_leaves_the_slowest_out_when_the_time_runs_short() -> None:
    def row(name: str, role: str, seconds: float) -> dict[str, Any]:
        return {"provider": name, "role": role, "first_call_seconds": 0.0, "seconds": [seconds, seconds]}

    rows = [row("floor", "floor", 3.0), row("ours", "logitless", 10.0), row("a", "peer", 1.0), row("b", "peer", 5.0)]
    assert too_slow(rows, 1.0, 1000.0) == {}
    assert list(too_slow(rows, 1.0, 61.0)) == []
    assert list(too_slow(rows, 2.0, 61.0)) == ["b", "a", "ours"]
    assert list(too_slow(rows, 1.0, 60.0 - 12.0)) == ["b", "ours"]
    compiled = rows[2] | {"first_call_seconds": 20.0}
    assert list(too_slow([compiled], 0.01, 30.0)) == ["a"]


# ---------------------------------------------------------------------------------------------------------------------
# The session


def quiet() -> Progress:
    return Progress(Console(file=open(os.devnull, "w"), width=200))


def session(folder: Path, asked: Request, patience: float = 60.0) -> Session:
    return Session(asked, folder, quiet(), start=time.monotonic(), patience=patience)


def fakes(monkeypatch: pytest.MonkeyPatch, *providers: Provider) -> None:
    monkeypatch.setattr(choice, "others", lambda loss, libraries, *, gpu: providers)
    monkeypatch.setattr(memory, "in_process", lambda part, provider, log: {"allocated": 2**20, "resident": None})


def test_one_that_crashes_or_hangs_is_a_line_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes(monkeypatch, peer(dies), peer(absent), peer(halved), Provider("hangs", "logitless", hangs))
    session(tmp_path, request(parts="step", rounds=2), patience=20.0).run()
    rows = {row["provider"]: row for row in load(tmp_path / "bench.json")["parts"]["step"]["rows"]}
    assert rows["dies"]["failure"] == "its process ended with status 7, in step"
    assert rows["hangs"]["failure"] == "no answer for 20 s, in step"
    assert rows["absent"]["failure"] == "not installed: no_such_peer"
    assert rows["halved"]["failure"].startswith("wrong: d_")
    for name in ("GEMMs alone", "copy", "materialised", "logitless, auto", "logitless, recompute"):
        assert len(rows[name]["seconds"]) == 2, name
    for name in ("bench.md", "bench.html"):
        text = (tmp_path / name).read_text()
        assert "no answer for 20 s" in text and "not installed: no_such_peer" in text


def test_every_part_is_measured_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes(monkeypatch)
    monkeypatch.setattr(session_module, "SAVING", 0.0)  # what is so far is shown too
    monkeypatch.setattr(curves, "RANGES", {"tokens": (16, 64), "vocabulary": (64, 256), "hidden": (8, 32)})
    asked = request(rounds=1, memory="1MiB", backward="auto", minutes=5.0)
    session(tmp_path, asked).run()
    results = load(tmp_path / "bench.json")
    assert results["format"] == "logitless-bench/1" and results["request"] == asked.as_json()
    assert {name: part["kind"] for name, part in results["parts"].items()} == {
        "step": "step",
        "tokens": "curve",
        "vocabulary": "curve",
        "hidden": "curve",
        "longest": "limit",
        "pairs": "limit",
    }
    assert all(part["complete"] and part["environment"]["cpu"] for part in results["parts"].values())
    assert results["parts"]["pairs"]["loss"] == "dpo" and results["parts"]["longest"]["loss"] == "nll"


def test_results_of_another_request_are_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes(monkeypatch)
    session(tmp_path, request(parts="step", rounds=1)).run()
    with pytest.raises(InputError, match=r"output: .* another tokens, model_tokens; name another folder"):
        session(tmp_path, request(parts="step", rounds=1, tokens=48))


def test_a_memory_that_was_not_asked_for_stays_that_of_the_results(tmp_path: Path) -> None:
    """On a GPU it is a share of what is free, which another process changes by a byte."""
    asked = request()
    session(tmp_path, asked).save()
    again = session(tmp_path, replace(asked, memory=asked.memory - 1))
    assert again.request == asked and again.results["request"] == asked.as_json()
    with pytest.raises(InputError, match=r"output: .* a request with another memory; name another folder"):
        session(tmp_path, request(memory="1MiB"))


INTERRUPTED = """
import sys, time
import test_bench
from logitless.bench.providers import choice
from logitless.cli import app

choice.others = lambda loss, libraries, *, gpu: (test_bench.peer(test_bench.sleeps),)
if __name__ == "__main__":
    app(sys.argv[1:])
"""


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_an_interrupted_run_keeps_what_it_had(tmp_path: Path, kill: signal.Signals) -> None:
    script = tmp_path / "run.py"
    script.write_text(INTERRUPTED)
    sizes = [f"--{name}={value}" for name, value in SMALL.items()]
    arguments = [sys.executable, str(script), "bench", *sizes, "--parts=step", "--rounds=200", f"--output={tmp_path}"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(Path(__file__).parent), *sys.path))}
    running = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    found = _wait_for_rounds(tmp_path / "bench.json", 2)
    running.send_signal(kill)
    _, errors = running.communicate(timeout=60)
    kept = load(tmp_path / "bench.json")["parts"]["step"]
    assert not kept["complete"]
    assert len(_slept(kept)) >= len(_slept(found)) >= 2
    if kill == signal.SIGINT:
        assert running.returncode == 130 and "the same command goes on" in errors and "Traceback" not in errors
        assert "sleeps" in (tmp_path / "bench.html").read_text()


def _wait_for_rounds(path: Path, count: int) -> dict[str, Any]:
    end = time.monotonic() + 90
    while time.monotonic() < end:
        if path.exists():
            part = load(path)["parts"].get("step")
            if part and len(_slept(part)) >= count:
                return part  # type: ignore[no-any-return]
        time.sleep(0.1)
    raise AssertionError(f"{path} has no {count} rounds")


def _slept(part: dict[str, Any]) -> list[float]:
    return next((row["seconds"] for row in part["rows"] if row["provider"] == "sleeps"), [])


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_the_command_writes_json_tables_and_a_page(tmp_path: Path) -> None:
    sizes = [f"--{name}={value}" for name, value in SMALL.items()]
    arguments = ["-m", "logitless", "bench", "--quick", *sizes, "--against=torch,quack", f"--output={tmp_path}"]
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "logitless, auto" in done.stdout and "left of this part" in done.stderr
    rows = load(tmp_path / "bench.json")["parts"]["step"]["rows"]
    assert {row["provider"] for row in rows if row["memory"]} >= {"materialised", "logitless, auto"}
    assert {path.name for path in tmp_path.iterdir()} == {"bench.json", "bench.md", "bench.html", "bench.log"}


def test_the_command_s_errors_are_one_line(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["bench", "--loss", "nil", "--output", str(tmp_path)])
    assert done.exit_code == 2 and done.output.startswith("error: loss: expected a name that")
    assert not list(tmp_path.iterdir())


def test_every_option_has_a_help_text() -> None:
    shown = CliRunner().invoke(app, ["bench", "--help"], env={"COLUMNS": "200"}).output
    for option in ("--model", "--against", "--quick", "--memory", "compare", "report"):
        assert option in shown


def _files(folder: Path, *names: str) -> list[str]:
    """Made-up files of results, each in a folder of its name."""
    for name in names:
        (folder / name).mkdir()
        (folder / name / "bench.json").write_text(json.dumps(bench_files.whole()))
    return [str(folder / name / "bench.json") for name in names]


def test_two_files_are_compared_and_several_shown(tmp_path: Path) -> None:
    files = _files(tmp_path, "before", "after")
    done = CliRunner().invoke(app, ["bench", "compare", *files, "--fail_if_slower"])
    assert done.exit_code == 0 and done.output.startswith("# Two files compared")
    done = CliRunner().invoke(app, ["bench", "report", *files, "--output", str(tmp_path / "both" / "page.html")])
    assert done.exit_code == 0, done.output
    for name in ("page.html", "page.md"):
        text = (tmp_path / "both" / name).read_text()
        assert "before" in text and "after" in text


def test_a_row_that_became_slower_fails_if_asked(tmp_path: Path) -> None:
    files = _files(tmp_path, "before", "after")
    results = json.loads(Path(files[1]).read_text())
    for part in results["parts"].values():
        for row in part.get("rows", ()):
            if row["role"] == "logitless" and "seconds" in row:
                row["failure"] = "out of memory"
    Path(files[1]).write_text(json.dumps(results))
    assert CliRunner().invoke(app, ["bench", "compare", *files]).exit_code == 0
    assert CliRunner().invoke(app, ["bench", "compare", *files, "--fail_if_slower"]).exit_code == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected the results of logitless bench in JSON"),
        ("{", "expected the results of logitless bench in JSON"),
        ("[]", "expected results of the format 'logitless-bench/1', got None"),
        ('{"format": "logitless-bench/9"}', "got 'logitless-bench/9'"),
    ],
)
def test_a_file_of_something_else_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "bench.json"
    if content is not None:
        path.write_text(content)
    for arguments in (["compare", str(path), str(path)], ["report", str(path), "--output", str(tmp_path / "a.html")]):
        done = CliRunner().invoke(app, ["bench", *arguments])
        assert done.exit_code == 2 and f"error: {path}: " in done.output and message in done.output


def test_a_page_has_its_ending(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["bench", "report", *_files(tmp_path, "one"), "--output", str(tmp_path / "page")])
    assert done.exit_code == 2 and "expected a name that ends with .html" in done.output
