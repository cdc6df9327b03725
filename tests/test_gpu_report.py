"""The suite `gpu` in its tiny mode: every step on the CPU, and what becomes of what fails."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from benchmarks import internals
from benchmarks.gpu import build as gpu_build
from benchmarks.gpu import bundle, device_tests, kernels, once, tools
from benchmarks.gpu.kernels import CHUNKS, CONFIGURATIONS, FORWARD, KERNELS, ROWS, TOKENS
from benchmarks.places import RESULTS
from benchmarks.suites import gpu
from benchmarks.suites.gpu import CELLS, MAIN, PROFILES, PROVIDERS, SANITIZER, TESTS
from cuda_build import host_library, needs_compiler

from logitless.backends import cuda
from logitless.bench import measure, tables, targets
from logitless.bench.environment import describe
from logitless.bench.machine import Cpu
from logitless.bench.measure import Part, silent
from logitless.bench.problem import Problem
from logitless.bench.provider import Provider
from logitless.bench.providers.floors import FROZEN_GEMMS, GEMMS
from logitless.bench.providers.materialised import materialised_nll
from logitless.bench.targets import BUDGET, COPY, HALF_LOGITS, HEAD_GRADIENT, LOGITS, PRODUCT, Target
from logitless.bench.worker import Worker

FEW = tuple(p for p in PROVIDERS if p.role == "floor" or p.name == "materialised" or p.name.startswith("chunked"))
MAIN_CELL = CELLS[0]


def dies(hidden, weight, inputs):
    os._exit(7)


def hangs(hidden, weight, inputs):
    time.sleep(600)


def fails(hidden, weight, inputs):
    raise ValueError("no such shape\nand more")


def absent(hidden, weight, inputs):
    import no_such_peer  # noqa: F401


def out_of_memory(hidden, weight, inputs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB")


def far() -> float:
    return time.monotonic() + 600


def by_name(found: dict) -> dict:
    return {row["provider"]: row for row in found["rows"]}


# ---------------------------------------------------------------------------------------------------------------------
# The table


def test_the_cells_are_the_shapes_by_the_data_and_the_main_one_comes_first():
    assert len({cell.name for cell in CELLS}) == len(CELLS) == 24
    assert MAIN_CELL.name == "n8192-h4096-v128256-peaked"
    assert all(cell.problem.dtype == torch.bfloat16 for cell in CELLS)


def test_every_backend_and_strategy_and_peer_is_a_provider():
    names = {provider.name for provider in PROVIDERS}
    assert len(names) == len(PROVIDERS)
    assert {"triton, single_pass", "cuda, recompute", "chunked, tail_corrected", "cuda, frozen head"} <= names
    peers = " ".join(provider.name for provider in PROVIDERS if provider.role == "peer")
    assert all(x in peers for x in ("torch", "TRL", "Liger fused", "Liger scaled", "Cut Cross", "quack", "flash-attn"))


def test_peaked_data_is_like_a_trained_models():
    """Half of the tokens are nearly certain, and the mean is that of tokens which are not."""
    problem = Problem(2000, 128, 5000, data="peaked")
    inputs = problem.inputs()
    nll = torch.nn.functional.cross_entropy(inputs.hidden @ inputs.weight.T, inputs.targets, reduction="none")
    assert 0.05 < nll.median() < 0.3 and 0.7 < nll.mean() < 1.5
    again = problem.inputs()
    assert torch.equal(again.hidden, inputs.hidden) and torch.equal(again.targets, inputs.targets)


def test_random_data_is_flat():
    inputs = CELLS[1].tiny().problem.inputs()
    logits = inputs.hidden.float() @ inputs.weight.float().T
    assert CELLS[1].problem.data == "random" and 1.5 < logits.std() < 2.5


@pytest.mark.parametrize("provider", [GEMMS, FROZEN_GEMMS], ids=lambda provider: provider.name)
def test_the_floor_is_the_products_alone(provider):
    inputs = MAIN.tiny().inputs()
    found, z = provider.step(inputs), inputs.hidden @ inputs.weight.T
    assert torch.equal(found.d_hidden, z @ inputs.weight)
    if provider is GEMMS:
        assert torch.equal(found.d_weight, z.T @ inputs.hidden)
    else:
        assert found.d_weight is None


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def cell(*providers: Provider, **method) -> Part:
    """The main cell, tiny, with these providers."""
    part = MAIN_CELL.tiny()
    return replace(part, providers=providers, method=replace(part.method, **method))


def test_a_cell_measures_every_provider_that_runs_and_names_the_others():
    part = cell(
        *FEW,
        Provider("fails", "peer", fails),
        Provider("oom", "peer", out_of_memory),
        Provider("absent", "peer", absent),
        rounds=1,
    )
    told = []
    found = part.measure(
        Cpu(), far(), {"chunked, recompute": "skipped"}, lambda doing, so_far: told.append((doing, so_far["complete"]))
    )
    rows = by_name(found)
    assert found["complete"] and not any(complete for _, complete in told) and told[0][0] == GEMMS.name
    assert rows["fails"]["failure"] == "ValueError: no such shape" and rows["oom"]["failure"] == "out of memory"
    assert rows["absent"]["failure"] == "not installed: no_such_peer"
    assert rows["chunked, recompute"]["failure"] == "skipped"
    for name in ("chunked, single_pass", "chunked, frozen head", "materialised"):
        row = rows[name]
        assert [len(row[x]) for x in ("forward", "backward", "seconds")] == [1, 1, 1]
        gradients = replace(part.problem, frozen_head=row["frozen"]).gradient_bytes
        assert row["memory"]["forward"] > 0 and row["memory"]["allocated"] + gradients > 0
        assert row["loss"] == pytest.approx(rows["materialised"]["loss"], rel=1e-2)
        assert max(row["error"].values()) < 2e-2
        assert ("d_weight" in row["error"]) != row["frozen"]
    assert rows[GEMMS.name]["error"] is None and rows[GEMMS.name]["loss"] is None
    json.dumps(found)


def test_where_the_first_calls_take_the_time_the_others_are_still_timed(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(measure.time, "monotonic", lambda: clock[0])

    def slow(hidden, weight, inputs):
        clock[0] += 100
        return materialised_nll(hidden, weight, inputs)

    part = cell(FEW[0], Provider("slow", "peer", slow, ""), Provider("later", "peer", materialised_nll, ""))
    found = part.measure(Cpu(), 150.0, {}, silent)
    rows = by_name(found)
    assert not found["complete"] and rows["later"]["failure"] == measure.NO_TIME
    assert rows[GEMMS.name]["seconds"] and rows["slow"]["seconds"]


def test_a_device_that_is_lost_with_a_failure_is_no_mere_line():
    class Lost(Cpu):
        def recover(self):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    row = measure.Row("x", "peer")
    with pytest.raises(measure.DeviceLost, match="no such shape"):
        measure.attempt(row, partial(fails, None, None, None), Lost(), MAIN_CELL.method)


def measured_by(worker: Worker, part: Part) -> dict:
    try:
        return worker.measure(part, far(), far(), gpu=False)
    finally:
        worker.stop()


def test_a_provider_that_ends_its_process_is_a_line_and_the_others_are_measured():
    part = cell(Provider("dies", "peer", dies), Provider("materialised", "materialised", materialised_nll))
    found = measured_by(Worker(plain=True), part)
    rows = by_name(found)
    assert found["complete"] and rows["materialised"]["seconds"]
    assert rows["dies"]["failure"] == f"its process ended with status 7, in {MAIN_CELL.name}"


@pytest.mark.slow
def test_a_provider_that_hangs_is_ended():
    part = cell(Provider("hangs", "logitless", hangs), Provider("materialised", "materialised", materialised_nll))
    rows = by_name(measured_by(Worker(plain=True, patience=30), part))
    assert rows["materialised"]["seconds"] and "no answer for 30 s" in rows["hangs"]["failure"]


# ---------------------------------------------------------------------------------------------------------------------
# Kernels one by one


def measured_kernels(part: str, deadline: float | None = None) -> dict:
    return gpu.MEASURED[part].tiny().measure(Cpu(), far() if deadline is None else deadline, {}, silent)


@pytest.fixture
def host(monkeypatch):
    """The CUDA kernels' twin for the CPU."""
    monkeypatch.setenv(gpu_build.VARIABLE, str(host_library()))


@needs_compiler
def test_first_light_holds_forwards_against_float64_and_a_product(host):
    found = measured_kernels(FORWARD)
    row = by_name(found)["cuda, fused"]
    assert found["complete"] and row["wrong"] == [] and row["error"]["other bits"] == 0
    assert len(row["seconds"]) == len(row["floor"]) == kernels.METHOD.rounds
    json.dumps(found)


@needs_compiler
def test_first_light_names_what_is_wrong(host, monkeypatch):
    right, calls = internals.fused_forward, []

    def wrong(kernel, inputs):
        stats = right(kernel, inputs)
        calls.append(None)
        return stats._replace(lse=stats.lse + 1e-3, logprob=stats.logprob + len(calls) * 1e-9)

    monkeypatch.setattr(internals, "fused_forward", wrong)
    assert by_name(measured_kernels(FORWARD))["cuda, fused"]["wrong"][0] == "lse"


@needs_compiler
def test_an_engine_that_makes_and_measures_logits_at_once_is_timed(host, monkeypatch):
    def project(inputs, logits):
        torch.mm(inputs.hidden.float(), inputs.weight.float().T, out=logits)
        return internals.Rows("cuda").measure(logits, inputs.targets, ("logprob", "lse"))

    monkeypatch.setattr(internals, "projects", lambda inputs: True)
    monkeypatch.setattr(internals, "project", project)
    row = by_name(measured_kernels(FORWARD))["cuda, 40 tokens' logits and statistics"]
    assert row["seconds"] and row["wrong"] == []


def test_not_a_number_is_wrong():
    row = measure.Row("x", "logitless")
    check = dict(lse=(float("nan"), 1.0), logprob=(0.5, 1.0))
    kernel = kernels.Kernel("x", lambda: None, lambda: None, check=lambda: check)
    kernels.measure_kernel(kernel, row, Cpu())
    assert row.wrong == ["lse"]


@needs_compiler
def test_every_configuration_that_the_library_names_is_timed(host, monkeypatch):
    assert len(measured_kernels(CONFIGURATIONS)["rows"]) == len(internals.configurations())
    right, asked = internals.fused_forward, []

    def fused(kernel, inputs):
        asked.append((kernel, cuda.CONFIGURATION))
        return right("forward_sm80", inputs)

    monkeypatch.setattr(internals, "fused_forward", fused)
    monkeypatch.setattr(cuda, "CONFIGURATION", 7, raising=False)
    monkeypatch.setattr(internals, "configurations", lambda: ("wide", "ping-pong"))
    rows = by_name(measured_kernels(CONFIGURATIONS))
    assert list(rows) == ["wide", "ping-pong"] and all(row["seconds"] and row["wrong"] == [] for row in rows.values())
    assert set(asked) == {("forward_sm90", 0), ("forward_sm90", 1)} and cuda.CONFIGURATION == 7


def test_kernels_on_a_chunk_against_a_copy():
    found = measured_kernels(ROWS)
    rows = by_name(found)
    logits = 16 * 96 * 4
    for name, read_and_written in (("statistics", logits), ("gradient", 1.5 * logits)):
        row = rows[f"chunked, {name}"]
        assert (row["bytes"], row["floor_bytes"], row["wrong"]) == (read_and_written, 2 * logits, [])
        assert len(row["seconds"]) == kernels.METHOD.rounds
    assert found["complete"] and all(row["failure"] or row["seconds"] for row in rows.values())


def test_steps_are_measured_by_the_budget_of_a_chunk_and_calls_by_their_tokens(monkeypatch):
    monkeypatch.setattr(kernels, "OWN", ("chunked",))
    steps, calls = by_name(measured_kernels(CHUNKS)), by_name(measured_kernels(TOKENS))
    assert "chunked: chunk by default" in steps and "chunked: frozen head, chunk 256 MiB" in steps
    assert "chunked: chunk 256 MiB of bfloat16" in steps
    rows = [*steps.values(), *calls.values()]
    assert all(row["seconds"] and row["floor"] and row["memory"]["allocated"] > 0 for row in rows if not row["failure"])
    wide, narrow = (steps[f"chunked: chunk {size} MiB"]["memory"]["allocated"] for size in ("256", "0.005859"))
    assert wide > narrow
    assert calls["linear_logprobs, N 40"]["wrong"] == calls["linear_logprobs, softcap 30"]["wrong"] == []


@pytest.mark.parametrize("part", sorted(KERNELS))
def test_every_kernel_has_a_name_of_its_own(part):
    names = [kernel.name for kernel in KERNELS[part](MAIN.tiny().inputs())]
    assert len(names) == len(set(names))


def test_out_of_time_a_part_of_kernels_is_not_complete():
    found = measured_kernels(ROWS, deadline=0.0)
    assert not found["complete"] and found["rows"] == []


@needs_compiler
def test_once_calls_everything_of_ours_or_one_kernel(host, capsys, monkeypatch):
    once.main(["--small"])
    printed = capsys.readouterr().out
    assert "forward: cuda, fused: runs" in printed and "step: cuda, tail_corrected: runs" in printed
    called = []
    monkeypatch.setattr(kernels._Rows, "_gradient", lambda self, *given: called.append(self.backend))
    once.main([ROWS, "cuda, gradient"])
    assert called == ["cuda", "cuda"]
    with pytest.raises(SystemExit):
        once.main([ROWS, "nothing"])
    assert "expected one of ['cuda, statistics'" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Building and testing


def test_a_build_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(gpu_build, "find", lambda name: None)
    found = gpu_build.build(10)
    assert found["missing"] == ["cmake", "nvcc"] and found["failure"] == "not built: no cmake and no nvcc in PATH"


@pytest.mark.parametrize("code", [0, 3])
def test_a_build_keeps_cmakes_notes_and_names_the_library(monkeypatch, tmp_path, code):
    for name in ("cmake", "nvcc"):
        (tmp_path / name).write_text(f"#!/bin/sh\necho '-- logitless: no CUTLASS'\nexit {code}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv(gpu_build.VARIABLE, "")
    found = gpu_build.build(60)
    assert "-- logitless: no CUTLASS" in found["notes"]
    assert (found["failure"] is None) == (code == 0)
    assert os.environ[gpu_build.VARIABLE] == (str(gpu_build.FOLDER / "liblogitless_cuda.so") if code == 0 else "")


def run_tests(suite: Path, text: str, folder: Path, seconds: float = 300, before: dict | None = None) -> dict:
    suite.write_text(text)
    return device_tests.run_tests("cpu", seconds, folder, suites=[str(suite)], before=before)


def test_the_suite_runs_on_the_device_and_its_numbers_come_back(tmp_path):
    text = (
        "import os, pytest\ndef test_device(): assert os.environ['LOGITLESS_TEST_DEVICE'] == 'cpu'\n"
        "def test_broken(): assert False, 'seven is not eight'\n"
        "@pytest.mark.skip\ndef test_left_out(): pass\n"
        "@pytest.fixture\ndef bad(): raise OSError\ndef test_error(bad): pass\n"
    )
    found = run_tests(tmp_path / "suite.py", text, tmp_path / "out")
    assert [found[x] for x in ("tests", "failures", "errors", "skipped", "status")] == [4, 1, 1, 1, 1]
    assert found["complete"] and "finished" not in found and (tmp_path / "out" / "tests.xml").exists()
    assert "suite.py::test_broken" in found["failed"][0] and "seven is not eight" in found["failed"][0]


def test_a_suite_that_does_not_end_in_time_is_ended(tmp_path):
    found = run_tests(tmp_path / "suite.py", "import time\ndef test_slow(): time.sleep(600)\n", tmp_path / "out", 1)
    assert not found["complete"] and found["status"] != 0 and "no test was finished" in found["failure"]


def test_what_was_finished_counts_however_the_run_ends_and_the_next_run_goes_on(tmp_path):
    text = (
        "import os, pathlib\nmark = pathlib.Path(__file__).with_name('mark')\n"
        "def test_first(): assert not mark.exists(), 'called again'\n"
        "def test_ends_it():\n    if not mark.exists():\n        mark.touch()\n        os._exit(9)\n"
        "def test_last(): pass\n"
    )
    first = run_tests(tmp_path / "suite.py", text, tmp_path / "out")
    assert not first["complete"] and first["status"] == 9 and first["tests"] == 1
    assert [name.split("::")[1] for name in first["finished"]] == ["test_first"]
    second = run_tests(tmp_path / "suite.py", text, tmp_path / "out", before=first)
    assert second["complete"] and (second["tests"], second["failures"]) == (3, 0)
    assert second["seconds"] > first["seconds"]


LOSES_ITS_DEVICE = """
import pytest
from benchmarks.gpu import device_tests
lost = []
device_tests.device_is_lost = lambda: bool(lost)
@pytest.mark.parametrize("i", range(60))
def test(i):
    assert not lost, "failed by another test"
    if i == 3:
        lost.append(i)
        raise RuntimeError("an illegal memory access")
"""


@pytest.mark.parametrize("processes", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_lost_device_fails_the_test_that_lost_it_alone(tmp_path, monkeypatch, processes):
    command = device_tests._command
    monkeypatch.setattr(device_tests, "_command", lambda *given: [*command(*given), "-n", str(processes)])
    found = run_tests(tmp_path / "suite.py", LOSES_ITS_DEVICE, tmp_path / "out")
    assert found["failures"] == 1 and "an illegal memory access" in found["failed"][0]
    if processes:  # the rest was tested in a process that took the place of the first
        assert found["complete"] and found["tests"] == 60 and found["errors"] == 1
        assert "crashed while running" in found["failed"][1]
    else:
        assert not found["complete"] and found["status"] == device_tests.LOST and len(found["finished"]) == 4


# ---------------------------------------------------------------------------------------------------------------------
# The report


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")
def test_without_a_gpu_it_says_so_in_a_sentence():
    with pytest.raises(SystemExit, match=r"finds no GPU here; --tiny runs the same steps"):
        gpu.main([])


def report(folder: Path | None, end: float | None = None, **options) -> gpu.GpuReport:
    about = describe(tiny=True, commit="abc")
    return gpu.GpuReport(folder, about, end=end or far(), tiny=True, providers=FEW, **options)


def test_a_tiny_run_writes_json_and_tables_part_by_part_and_resumes(tmp_path, capsys):
    first = report(tmp_path)
    first.run([ROWS, MAIN_CELL.name])
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert (
        list(results["parts"]) == [ROWS, MAIN_CELL.name] and results["build"]["failure"] == "a tiny run builds nothing"
    )
    about = results["parts"][ROWS]["environment"]
    assert about["commit"] == "abc" and about["tiny"] and "torch" in about["versions"]
    text = (tmp_path / "gpu.md").read_text()
    assert text.startswith("# A tiny run") and "chunked, single_pass" in text and "chunked, gradient" in text
    assert "chunked, single_pass" in capsys.readouterr().out
    second = report(tmp_path)
    assert second.has(MAIN_CELL.name) and not second.has(CELLS[1].name)
    second.about = {**second.about, "commit": "abd"}
    assert not second.has(MAIN_CELL.name)


def test_it_goes_on_with_an_earlier_file_unless_the_folder_has_one(tmp_path):
    earlier, later = tmp_path / "earlier.json", tmp_path / "out"
    report(tmp_path / "first").run([ROWS])
    (tmp_path / "first" / "gpu.json").rename(earlier)
    resumed = report(later, earlier=earlier)
    assert resumed.has(ROWS)
    resumed.results["parts"][ROWS]["complete"] = False
    resumed.save()
    assert not report(later, earlier=earlier).has(ROWS) and report(tmp_path / "other", earlier=earlier).has(ROWS)


def test_what_hung_in_an_earlier_run_is_spared_until_the_commit_is_another(monkeypatch):
    first = report(None)
    monkeypatch.setattr(first.worker, "measure", lambda *given, **options: {"rows": [], "complete": False})
    first.worker.fatal["quack"] = "no answer for 150 s"
    part = {**first.measure_part(MAIN_CELL.name), "environment": first.about}
    for commit, spared in (("abc", {"quack": "no answer for 150 s"}), ("abd", {})):
        second = report(None)
        second.about, second.results["parts"] = {**first.about, "commit": commit}, {MAIN_CELL.name: part}
        second.spare()
        assert second.worker.fatal == spared


def test_a_peer_that_hangs_does_not_take_the_time_of_the_others(monkeypatch):
    def call(*given: object, end: float, most: float) -> tuple:
        asked.append(most)
        return "the end", {"rows": [], "complete": True}, None

    worker, asked = Worker(plain=True, patience=75.0), []
    monkeypatch.setattr(worker, "call", call)
    for left in (400.0, 200.0, 20.0):
        worker.measure(cell(*FEW), time.monotonic() + left, far(), gpu=False)
    assert asked == pytest.approx([200.0, 100.0, 75.0], abs=1.0)


def test_out_of_time_it_begins_nothing_and_names_what_is_left(tmp_path, capsys):
    late = report(tmp_path, end=time.monotonic())
    late.run([MAIN_CELL.name, ROWS])
    assert late.results["parts"] == {} and f"goes on with: {MAIN_CELL.name} {ROWS}" in capsys.readouterr().err


def test_where_the_time_is_too_short_for_a_part_a_smaller_one_is_begun(tmp_path, capsys):
    short = report(tmp_path, end=time.monotonic() + gpu.GpuReport.RESERVE + 50)
    short.run([MAIN_CELL.name, ROWS, TESTS])
    assert (
        list(short.results["parts"]) == [ROWS] and f"goes on with: {MAIN_CELL.name} {TESTS}" in capsys.readouterr().err
    )


@pytest.mark.parametrize("runs", [True, False])
def test_the_carried_library_is_taken_where_it_runs_and_one_is_built_where_not(tmp_path, monkeypatch, runs):
    built = {"library": "built", "missing": [], "notes": [], "failure": None}
    monkeypatch.setattr(gpu_build, "build", lambda seconds: built)
    monkeypatch.setattr(internals, "unsupported", lambda *_: None if runs else "no code for this GPU")
    made = report(tmp_path, carried=bundle.Unpacked("abc", tmp_path / gpu_build.NAME, ["carried in the bundle"]))
    made.tiny = False
    made.run([])
    found = json.loads((tmp_path / "gpu.json").read_text())["build"]
    assert found["library"] == (gpu_build.NAME if runs else "built")
    assert found["notes"] == (
        ["carried in the bundle"] if runs else ["the bundle's library was not used: no code for this GPU"]
    )


def test_tests_have_seconds_of_their_own_and_go_on_where_an_earlier_call_ended(tmp_path, monkeypatch):
    asked = []

    def run(device, seconds, folder, *, suites, select, before):
        (folder / "tests.xml").write_text("<testsuites/>")
        asked.append((round(seconds), before and before["tests"], len(suites)))
        return {"tests": 5, "complete": len(asked) > 1, "failed": [], **dict.fromkeys(device_tests.COUNTS[1:], 0)}

    monkeypatch.setattr(device_tests, "run_tests", run)
    for _ in range(2):
        report(tmp_path, tests_seconds=77).run([TESTS])
    assert asked == [(77, None, len(device_tests.SUITES)), (77, 5, len(device_tests.SUITES))]
    assert report(tmp_path).has(TESTS) and (tmp_path / "tests.xml").exists()
    without = report(None)
    without.tiny, without.results["build"] = False, {"library": None}
    assert "were left out" in without.tests(tmp_path)["left_out"]
    assert asked[-1][2] == len(device_tests.SUITES) - len(device_tests.CUDA_SUITES)


@pytest.mark.slow
def test_the_command_runs_every_part_and_provider_and_writes_nothing_by_itself(capsys, tmp_path):
    committed = set(RESULTS.rglob("*"))
    gpu.main(["--dry", "--minutes", "20"])
    printed = capsys.readouterr().out
    assert set(RESULTS.rglob("*")) == committed
    assert "## Tests on the device" in printed and "0 failures, 0 errors" in printed
    for provider in PROVIDERS:
        assert f"| {provider.name} " in printed


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def row(name: str, role: str = "logitless", seconds: float = 1.0, extra: int | None = None, **other) -> dict:
    times = [seconds, seconds, seconds]
    made = dict(provider=name, role=role, frozen=False, forward=times, backward=times, seconds=times)
    memory = None if extra is None else dict(allocated=extra)
    return {**made, "memory": memory, "loss": 1.0, "error": None, "failure": None, **other}


def measured(*rows: dict) -> dict:
    return dict(rows=rows, logits_bytes=2000, head_gradient_bytes=250)


def kernel(name: str, seconds: float, floor: float, **other) -> dict:
    times = dict(seconds=[seconds] * 3, floor=[floor] * 3)
    blank = dict(failure=None, bytes=None, floor_bytes=None, error=None, wrong=None, memory=None)
    return {**blank, "provider": name, "role": "logitless", **times, **other}


def reached(target: Target, found: dict) -> float | None:
    return targets.reached(target, found)[1]


def test_a_target_is_a_ratio_of_what_was_measured():
    errors = dict(d_hidden=3.0, d_weight=1.0), dict(d_hidden=2.0, d_weight=0.5)
    found = measured(
        row(GEMMS.name, "floor", 2.0), row("triton, recompute", seconds=3.0, extra=500, error=errors[0]),
        row("fast", "peer", 4.0, error=errors[1]), row("broken", "peer", 0.1, failure="out of memory"),
    )  # fmt: skip
    name = "triton, recompute"
    assert reached(Target(name, "forward", GEMMS.name, 1), found) == 1.5
    assert reached(Target(name, "memory", LOGITS, 1), found) == 0.25
    assert reached(Target(name, "memory", HALF_LOGITS, 1), found) == 0.5
    assert reached(Target(name, "memory", HEAD_GRADIENT, 1), found) == 2.0
    assert reached(Target(name, "memory", BUDGET, 1), found) == 500 / 2**28
    assert reached(Target(name, "seconds", "fast", 1, "<"), found) == 0.75
    assert reached(Target(name, "error", "fast", 1), found) == 2.0
    assert reached(Target(name, "seconds", "broken", 1), found) is None
    assert reached(Target("cuda, recompute", "seconds", GEMMS.name, 1), found) is None
    calls = dict(rows=[kernel("linear_logprobs, N 512", 1.05, 1.0)])
    assert reached(Target("linear_logprobs, N 512", "forward", PRODUCT, 1), calls) == 1.05


def test_a_kernels_ratio_is_for_each_byte_where_its_floor_is_a_copy_of_another_size():
    assert targets.against_floor(kernel("x", 3.0, 2.0)) == 1.5
    assert targets.against_floor(kernel("x", 1.0, 1.0, bytes=50, floor_bytes=100)) == 2.0
    assert targets.against_floor(kernel("x", 1.0, 1.0, failure="no")) is None
    text = tables.part_table(dict(rows=[
        kernel("bad", 1.0, 1.0, error=dict(lse=0.5), wrong=["lse"]),
        kernel("good", 1.0, 1.0, memory=dict(allocated=2**20), error=dict(lse=1e-6), wrong=[]),
    ]), kernels.COLUMNS)  # fmt: skip
    assert "NO: lse" in text and "1.0e-06" in text and text.count("yes") == 1


def targets_lines(parts: dict) -> dict:
    text = gpu.targets_table([(name, part.targets) for name, part in gpu.MEASURED.items()], parts)
    return {line.split("|")[2].strip(): line for line in text.splitlines()}


def test_the_targets_table_says_met_missed_and_not_measured():
    main = measured(row(GEMMS.name, "floor", 2.0), row("cuda, single_pass", seconds=2.2), row("quack", "peer", 2.2))
    rows = [kernel("cuda, gradient", 1.0, 1.0, bytes=95, floor_bytes=100)]
    lines = targets_lines({MAIN_CELL.name: main, ROWS: dict(rows=rows)})
    step = lines[f"cuda, single_pass: time / {GEMMS.name}"]
    assert " met " in step and "1.100" in step and "<= 1.1" in step
    beaten = lines["cuda, single_pass: time / quack"]
    assert "missed" in beaten and "1.000" in beaten and "< 1" in beaten
    assert "not measured" in lines["cuda, single_pass: time / Liger scaled cross-entropy"]
    assert "not measured" in lines[f"linear_logprobs, N 512: forward / {PRODUCT}"]
    assert "0.950" in lines[f"cuda, gradient: bandwidth / {COPY}"]
    rows[0]["bytes"] = 50
    assert "missed" in targets_lines({ROWS: dict(rows=rows)})[f"cuda, gradient: bandwidth / {COPY}"]


ALL_TARGETS = [(part, target) for part in gpu.MEASURED.values() for target in part.targets]


@pytest.mark.parametrize(("part", "target"), ALL_TARGETS, ids=lambda x: x.provider if isinstance(x, Target) else x.name)
def test_every_target_is_of_a_provider_that_the_report_measures(part, target):
    if part.providers:
        names = {provider.name for provider in PROVIDERS}
        assert target.provider in names and target.relative_to in {*names, HALF_LOGITS, HEAD_GRADIENT, BUDGET}
    else:
        inputs = MAIN.tiny().inputs()
        many = inputs._replace(hidden=inputs.hidden.repeat(256, 1), targets=inputs.targets.repeat(256))
        assert target.provider in [kernel.name for kernel in part.kernels(many)]


# ---------------------------------------------------------------------------------------------------------------------
# Tools


def program(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!{sys.executable}\nimport sys\n{text}")
    (folder / name).chmod(0o755)


#: Writes the report that it is asked for, and tells what is in it.
NCU = """
if "--import" in sys.argv:
    print("  Duration      ms   12.5\\n  Something else")
else:
    open(sys.argv[sys.argv.index("--export") + 1], "w").write(" ".join(sys.argv))
"""
MEASURED = {
    FORWARD: dict(rows=[kernel("cuda, fused", 1.0, 1.0), kernel(kernels.BY_CHUNKS, 9.0, 1.0)]),
    ROWS: dict(rows=[
        kernel("cuda, statistics", 3.0, 1.0), kernel("cuda, gradient", 2.0, 1.0), kernel("chunked, gradient", 9.0, 1.0),
        kernel("triton, gradient", 4.0, 1.0), kernel("triton, statistics", 9.0, 1.0, failure="no"),
    ]),
}  # fmt: skip


def test_the_kernels_furthest_from_their_floor_are_profiled(monkeypatch, tmp_path):
    program(tmp_path, "ncu", NCU)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = tools.profile(MEASURED, tmp_path, far())
    names = ["rows: triton, gradient", "rows: cuda, statistics", "rows: cuda, gradient"]
    assert [kernel["kernel"] for kernel in found["kernels"]] == names and found["complete"]
    assert all(kernel["summary"] == ["Duration      ms   12.5"] for kernel in found["kernels"])
    command = (tmp_path / "profile-2.ncu-rep").read_text()
    assert "--profile-from-start off" in command and command.endswith("benchmarks.gpu.once rows cuda, statistics")
    assert "rows: cuda, gradient, 2.00 of its floor" in (tmp_path / "profiles.txt").read_text()


def test_a_profiler_that_is_absent_or_forbidden_is_a_line(monkeypatch, tmp_path):
    program(tmp_path, "ncu", "print('==ERROR== ERR_NVGPUCTRPERM')\nprint('more')\nsys.exit(1)")
    monkeypatch.setenv("PATH", str(tmp_path))
    found = tools.profile(MEASURED, tmp_path, far())
    assert found["kernels"][0]["failure"] == "ncu ended with 1: ==ERROR== ERR_NVGPUCTRPERM" and found["complete"]
    assert not tools.profile({}, tmp_path, far())["complete"]
    (tmp_path / "ncu").unlink()
    assert tools.profile(MEASURED, tmp_path, far())["failure"] == "ncu is not in PATH"
    assert tools.sanitize(tmp_path, far())["failure"] == "compute-sanitizer is not in PATH"


def test_without_time_for_a_tool_the_part_is_not_complete_and_goes_on_later(monkeypatch, tmp_path):
    program(tmp_path, "ncu", NCU)
    program(tmp_path, "compute-sanitizer", "print(sys.argv[2])")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for found in (
        tools.profile(MEASURED, tmp_path, time.monotonic()),
        tools.sanitize(tmp_path, time.monotonic()),
    ):
        assert not found["complete"] and found["failure"] is None
    texts = [tmp_path / "profiles.txt", tmp_path / "sanitizer.txt"]
    for text in texts:
        text.write_text("of the first call\n")
    first = dict(kernels=[dict(kernel="the first")])
    found = tools.profile(MEASURED, tmp_path, far(), first)
    assert [x["kernel"] for x in found["kernels"]] == ["the first", "rows: cuda, statistics", "rows: cuda, gradient"]
    reports = {path.name for path in tmp_path.glob("*.ncu-rep")}
    assert reports == {"profile-2.ncu-rep", "profile-3.ncu-rep"} and found["complete"]
    found = tools.sanitize(tmp_path, far(), dict(tools=[dict(tool="memcheck")]))
    assert [x["tool"] for x in found["tools"]] == ["memcheck", "racecheck", "synccheck"]
    assert found["tools"][1]["summary"] == "racecheck"
    assert all(text.read_text().startswith("of the first call\n") for text in texts)
    assert "rows: cuda, gradient" in texts[0].read_text() and "synccheck ended with 0" in texts[1].read_text()
    tools.sanitize(tmp_path, far())
    assert texts[1].read_text().startswith("memcheck ended with 0")  # a run of its own


def test_everything_is_at_most_eight_files_without_a_folder(monkeypatch, tmp_path):
    program(tmp_path, "ncu", NCU)
    program(tmp_path, "compute-sanitizer", "print('========= ERROR SUMMARY: 0 errors')")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    out = tmp_path / "out"
    made = report(out)
    about = dict(environment=made.about, complete=True, problem="made up")
    made.results["parts"] = {name: {**part, **about} for name, part in MEASURED.items()}
    made.run([TESTS, PROFILES, SANITIZER])
    profiles = [f"profile-{n}.ncu-rep" for n in (1, 2, 3)]
    expected = ["gpu.json", "gpu.md", *profiles, "profiles.txt", "sanitizer.txt", "tests.xml"]
    assert sorted(path.name for path in out.iterdir()) == expected
    text = (out / "gpu.md").read_text()
    assert "memcheck ended with 0: ========= ERROR SUMMARY: 0 errors" in text and "0 failures, 0 errors" in text
    assert "- rows: triton, gradient, 4.00 of its floor: Duration ms 12.5" in text
