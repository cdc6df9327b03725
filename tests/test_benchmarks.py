"""The benchmark suites on tiny problems: every provider runs and computes the loss that it is compared on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import training_fixtures
from benchmarks import __main__ as command
from benchmarks.places import RESULTS, ROOT
from benchmarks.suites import cpu
from benchmarks.suites import losses as losses_suite
from benchmarks.suites import suite as suite_module
from benchmarks.tail import data, exact, plots, times

import logitless
from logitless import losses
from logitless.bench import measure, memory, report, tables, targets, work
from logitless.bench.environment import machine_kind, processor, provenance, units_of
from logitless.bench.machine import Cpu
from logitless.bench.measure import Method, Part, Row, silent
from logitless.bench.problem import Inputs, Problem
from logitless.bench.provider import Provider
from logitless.bench.providers import peers
from logitless.bench.providers.floors import CHUNKED_GEMMS, GEMMS
from logitless.bench.providers.materialised import DPO as MATERIALISED_DPO
from logitless.bench.providers.materialised import NLL as MATERIALISED
from logitless.bench.providers.own import DPO, LOGPROBS, NLL, token_loss_nll
from logitless.bench.targets import LOGITS, SLOWEST, Target

SUITES = (cpu.SUITE, losses_suite.SUITE)
PARTS = {part.name: part.tiny() for suite in SUITES for part in suite.parts}
COMPILED = {peers.CCE.name, peers.LIGER_DPO.name} | {liger.name for _, liger in peers.OF_REGISTRY.values()}
CASES = [
    pytest.param(
        part,
        provider,
        id=f"{part.name}-{provider.name}",
        marks=[pytest.mark.slow] if provider.name in COMPILED else [],
    )
    for part in PARTS.values()
    for provider in part.providers
]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize(("part", "provider"), CASES)
def test_provider_computes_the_loss_it_is_compared_on(part: Part, provider: Provider) -> None:
    alone = replace(part, providers=(provider,), method=replace(part.method, rounds=1))
    [row] = alone.measure(Cpu(), far(), {}, silent)["rows"]
    if row["failure"]:
        pytest.skip(row["failure"])
    assert len(row["seconds"]) == 1
    if provider.role == "floor":
        return
    expected = {"loss", "d_hidden"} if part.problem.frozen_head else {"loss", "d_hidden", "d_weight"}
    assert row["error"].keys() == expected
    assert max(row["error"].values()) < TOLERANCE[part.problem.dtype], row["error"]


def far() -> float:
    return time.monotonic() + 600


LOSS_PARTS = {part.name: PARTS[part.name] for part in losses_suite.PARTS}


@pytest.fixture(scope="module")
def counted() -> dict[str, dict[str, dict[str, float]]]:
    """Products and passes over the vocabulary of logitless's losses, by part."""

    def of(part: Part) -> dict[str, dict[str, float]]:
        inputs = part.problem.inputs()
        ours = [provider for provider in part.providers if provider.role == "logitless"]
        return {p.name: work.count(partial(p.step, inputs), part.problem)._asdict() for p in ours}

    return {name: of(part) for name, part in LOSS_PARTS.items()}


def test_every_registered_loss_has_a_row(counted: Any) -> None:
    assert {row for rows in counted.values() for row in rows} >= set(losses.names())


def test_a_loss_and_its_metrics_add_no_pass_over_the_vocabulary(counted: Any) -> None:
    """Beyond those of the statistics: entropy, where a loss reads it, costs passes and no product."""
    for part, base in (("losses-token", "nll"), ("losses-sequence", LOGPROBS.name)):
        plain = counted[part][base]
        assert plain["passes"] > 0
        for name, found in counted[part].items():
            if name != LOGPROBS.name and losses.get(name).outputs == ("logprob",):
                assert found == plain, name
            assert found["products"] == plain["products"], name
    assert counted["losses-token"]["nll"]["products"] == 3
    assert counted["losses-sequence"]["dpo"]["products"] == 4
    assert {found["products"] for found in counted["losses-real"].values()} == {3}


def test_a_distribution_loss_costs_a_sweep_of_each_of_its_parts(counted: Any) -> None:
    products = {name: found["products"] for name, found in counted["losses-distribution"].items()}
    assert products == {"distillation": 4, "gkd": 4, "js": 4, "asft": 7, "sft_kl": 7, "distillation and nll": 7}


def test_floors_of_one_problem_are_the_same_products() -> None:
    inputs = PARTS["nll"].problem.inputs()
    whole, chunked = GEMMS.step(inputs), CHUNKED_GEMMS.step(inputs)
    assert whole.d_weight is not None and chunked.d_weight is not None
    torch.testing.assert_close(whole.d_hidden, chunked.d_hidden)
    torch.testing.assert_close(whole.d_weight, chunked.d_weight)


def test_tiny_long_pairs_do_not_fit_a_chunk() -> None:
    problem = PARTS["dpo-long"].problem
    assert problem.chunk_bytes is not None
    assert 2 * problem.length > problem.chunk_bytes // (4 * problem.vocabulary)


def _failing(hidden: object, weight: object, inputs: object) -> Any:
    raise RuntimeError("no such device\nand more")


def _measured_alone(provider: Provider) -> dict[str, Any]:
    return replace(PARTS["nll"], providers=(provider,)).measure(Cpu(), far(), {}, silent)["rows"][0]


def test_a_peer_that_fails_is_a_line_and_our_own_failure_an_error() -> None:
    assert _measured_alone(Provider("broken", "peer", _failing))["failure"] == "RuntimeError: no such device"
    with pytest.raises(RuntimeError, match="no such device"):
        _measured_alone(Provider("broken", "logitless", _failing))


@pytest.mark.parametrize(("seconds", "rounds"), [(100, [3, 3, 1]), (0, [1, 1, 1])])
def test_a_slow_peer_is_timed_once_and_a_deadline_leaves_one_round(seconds: float, rounds: list[int]) -> None:
    part = PARTS["nll"]
    chosen = (part.provider("materialised"), part.provider("logitless"), Provider("slow", "peer", _slow, ""))
    part = replace(part, providers=chosen, method=Method(rounds=3, seconds=seconds, patience=1.5))
    found = part.measure(Cpu(), far(), {}, silent)
    assert [len(row["seconds"]) for row in found["rows"]] == rounds


def _slow(hidden: torch.Tensor, weight: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    time.sleep(0.3)
    return hidden.sum() + weight.sum()


def test_turns_alternate() -> None:
    assert list(measure.in_turns("abc", 3)) == list("abccbaabc")
    assert list(measure.in_turns("abc", 3, stop=0.0)) == list("abc")


def test_memory_is_beyond_the_gradients() -> None:
    def loss(hidden: torch.Tensor, weight: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        value = hidden.sum() + weight.sum()
        scratch = torch.empty(1 << 16)
        del scratch
        return value

    part = PARTS["nll"]
    found = memory.of_step(part, Provider("a quarter MiB", "peer", loss))
    few_floats = 64
    assert 0 <= found["allocated"] + part.problem.gradient_bytes - 4 * (1 << 16) < 4 * few_floats
    assert part.problem.gradient_bytes == 4 * 24 * (40 + 96)


@pytest.mark.slow
def test_memory_in_a_process_of_its_own() -> None:
    part = PARTS["nll"]
    found = memory.in_process(part, NLL)
    assert found["allocated"] is not None and found["allocated"] > 0
    with pytest.raises(RuntimeError, match="no such device"):
        memory.in_process(part, Provider("broken", "peer", _failing))


# ---------------------------------------------------------------------------------------------------------------------
# The commands


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.name)
def test_the_whole_command_runs_tiny(suite: suite_module.Suite) -> None:
    printed = run(suite.name, "--tiny").stdout
    assert "| part " in printed and "Traceback" not in printed
    for part in suite.parts:
        assert f"## {part.name}" in printed
        assert all(f"| {provider.name} " in printed for provider in part.providers)


def test_the_command_measures_a_part_in_a_process_and_its_memory_in_others() -> None:
    printed = run("cpu", "--tiny", "--only", "bf16-many", "--rounds", "1").stdout
    [line] = [x for x in printed.splitlines() if x.startswith("| logitless ") and " x 1 |" in x]
    assert all(cell.strip() for cell in line.split("|")[4:9]), line


def test_the_command_of_the_losses_measures_every_distribution() -> None:
    printed = run("losses", "--tiny", "--only", "losses-distribution", "--rounds", "1").stdout
    lines = [line for line in printed.splitlines() if " x 1 |" in line]
    part = PARTS["losses-distribution"]
    ours = [provider.name for provider in part.providers if provider.role != "peer"]
    assert [line.split("|")[1].strip() for line in lines][: len(ours)] == ours


def test_micro_benchmarks_compare_the_ways_through_a_problem(tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    options = ["-k", "dpo", f"--benchmark-json={saved}", f"--benchmark-storage={tmp_path}"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "benchmarks", *options]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # no xdist's worker
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(saved.read_text())["benchmarks"]
    assert {x["name"] for x in found} == {f"test_step[dpo-{p}]" for p in (GEMMS.name, MATERIALISED_DPO.name, DPO.name)}
    assert len({x["group"] for x in found}) == 1 and all(len(x["stats"]["data"]) == 5 for x in found)


def test_the_command_names_what_it_expects() -> None:
    with pytest.raises(SystemExit, match="expected one of cpu, gpu, losses, tail, figures, bundle, got 'cpus'"):
        command.main(["cpus"])


def test_a_suite_saves_resumes_and_keeps_the_parts_it_does_not_measure(tmp_path: Path, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(memory, "in_process", lambda part, provider: {"allocated": 2**20, "resident": None})
    where = ["--tiny", "--output", str(tmp_path)]
    cpu.main([*where, "--only", "dpo-long", "--rounds", "1"])
    cpu.main([*where, "--only", "bf16-many", "--rounds", "2"])
    results = json.loads((tmp_path / "cpu.json").read_text())
    assert list(results["parts"]) == ["dpo-long", "bf16-many"]
    assert (tmp_path / "cpu.md").read_text() == cpu.SUITE.markdown(results)
    assert "materialised DPO" in capsys.readouterr().out
    cpu.main([*where, "--minutes", "0"])
    assert "goes on with: nll frozen dpo lists bf16\n" in capsys.readouterr().err


def committed(name: str) -> list[Any]:
    """The file of this name of every kind of machine that has one."""
    return [pytest.param(path, id=f"{path.parent.name}-{path.stem}") for path in sorted(RESULTS.glob(f"*/{name}.json"))]


COMMITTED = [pytest.param(suite, *case.values, id=case.id) for suite in SUITES for case in committed(suite.name)]


@pytest.mark.parametrize(("suite", "path"), COMMITTED)
def test_tables_are_made_again_without_measuring(suite: suite_module.Suite, path: Path, tmp_path: Path) -> None:
    copy = tmp_path / path.name
    copy.write_text(path.read_text())
    command.main([suite.name, "--tables", str(copy)])
    assert copy.with_suffix(".md").read_text() == path.with_suffix(".md").read_text()


@pytest.mark.parametrize(("suite", "path"), COMMITTED)
def test_committed_tables_are_those_of_the_committed_measurements(suite: suite_module.Suite, path: Path) -> None:
    results = report.load(path)
    assert path.with_suffix(".md").read_text() == suite.markdown(results)
    assert set(results["parts"]) <= {part.name for part in suite.parts}


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of machines

AVX512_FLAGS = "fpu avx avx2 avx512f avx512dq"


@pytest.mark.parametrize(
    ("cpu", "flags", "expected"),
    [
        ("AMD EPYC", "fpu avx avx2", "epyc-avx2"),
        ("AMD EPYC 7763 64-Core Processor", "avx2", "epyc-avx2"),
        ("AMD EPYC", f"{AVX512_FLAGS} avx_vnni avx512_bf16 avx512_vnni", "epyc-avx512-bf16"),
        ("Intel(R) Xeon(R) CPU @ 2.00GHz", AVX512_FLAGS, "xeon-avx512"),
        ("Intel(R) Xeon(R) Gold 6230 CPU @ 2.10GHz", f"{AVX512_FLAGS} avx512_vnni", "xeon-avx512-vnni"),
        ("Intel Xeon Processor (SapphireRapids)", f"{AVX512_FLAGS} avx512_vnni avx512_bf16 amx_bf16", "xeon-amx"),
        ("13th Gen Intel(R) Core(TM) i7-1360P", "avx2 avx_vnni", "core-avx2"),
        ("Common KVM processor", "fpu sse2", "common-kvm-processor"),
        ("arm", None, "arm"),
    ],
)
def test_the_kind_of_a_machine_is_its_processor_and_its_newest_units(
    cpu: str, flags: str | None, expected: str
) -> None:
    about = {"cpu": cpu, "units": units_of(flags), "capability": "DEFAULT", "bf16_units": False}
    assert machine_kind(about) == expected


def test_two_designs_of_one_name_are_two_kinds() -> None:
    about = {"cpu": "AMD EPYC", "units": ["AVX2", "AVX-512", "bf16"], "threads": 2}
    assert machine_kind(about | {"design": "25-17"}) == "epyc-25-17-avx512-bf16"
    assert machine_kind(about | {"design": None}) == "epyc-avx512-bf16"
    assert processor(about | {"design": "26-2"}) == "AMD EPYC (26-2: AVX2, AVX-512, bf16), 2 threads"


def test_a_gpu_is_a_kind_of_its_own() -> None:
    assert machine_kind({"device": "NVIDIA H100 80GB HBM3", "driver": None}) == "nvidia-h100-80gb-hbm3"


def test_tables_name_the_units_or_what_a_file_knows_of_them() -> None:
    part = report.load(RESULTS / "epyc-avx2" / "cpu.json")["parts"]["nll"]
    assert "AMD EPYC (AVX2, without bf16 units), 2 threads" in provenance(part["environment"])
    listed = part["environment"] | {"units": ["AVX2", "AVX-512", "VNNI"], "threads": 1}
    assert "AMD EPYC (AVX2, AVX-512, VNNI), 1 thread," in provenance(listed)


@pytest.mark.parametrize("path", committed("*"))
def test_committed_results_lie_in_the_folder_of_their_machine(path: Path) -> None:
    found = report.load(path)
    kinds = {machine_kind(part["environment"]) for part in found.get("parts", {"": found}).values()}
    assert kinds == {path.parent.name}


def test_results_go_to_this_machine_s_folder_unless_another_is_asked_for(tmp_path: Path) -> None:
    about = {"cpu": "AMD EPYC", "units": ["AVX2"]}
    for arguments, expected in (
        ([], RESULTS / "epyc-avx2"),
        (["--tiny"], None),
        (["--output", str(tmp_path)], tmp_path),
    ):
        given = suite_module.options("cpu", None, (), None).parse_args(arguments)
        assert suite_module.output(given, about) == expected


# ---------------------------------------------------------------------------------------------------------------------
# Targets


def _measured(**seconds: list[float]) -> dict[str, Any]:
    rows = [vars(Row(name, "peer", seconds=x, memory={"allocated": 100, "resident": 1})) for name, x in seconds.items()]
    return {"rows": rows, "logits_bytes": 1000}


def test_targets_compare_within_rounds() -> None:
    measured = _measured(logitless=[1.0, 3.0, 10.0], other=[2.0, 4.0, 100.0])
    for asked, expected in (
        (("seconds", "other"), 0.5),
        (("memory", "other"), 1.0),
        (("memory", LOGITS), 0.1),
        (("seconds", "absent"), None),
    ):
        assert targets.reached(Target(NLL.name, *asked, 1.0), measured) == (NLL.name, expected)


def test_a_bound_is_about_the_slowest_of_our_losses() -> None:
    measured = _measured(nll=[1.0, 2.0, 4.0], dft=[1.1, 2.0, 4.4], focal=[1.0, 2.0, 4.0], peer=[9.0, 9.0, 9.0])
    for row in measured["rows"][:3]:
        row["role"] = "logitless"
    what, value, limit, verdict = Target(SLOWEST, "seconds", "nll", 1.05).line(measured)
    assert (what, value, limit, verdict) == ("the slowest, dft: time / nll", "1.100", "<= 1.05", "missed")
    assert "1.00-1.10" in tables.part_table(measured, losses_suite.COUNTED, "nll")
    assert Target(SLOWEST, "seconds", "absent", 1.05).line(measured)[3] == "not measured"


# ---------------------------------------------------------------------------------------------------------------------
# The tail


def peaked() -> Inputs:
    """A vocabulary of which single entries are kept at a tolerance of 2^-4, and most are not."""
    return Problem(96, 24, 1000, data="peaked").inputs()


def test_the_rule_of_the_curves_is_what_the_strategy_does() -> None:
    inputs, tolerance = peaked(), 2.0**-4
    found = exact.Exact(inputs).entries({"native": torch.arange(1000)}, tolerance, exact.TAIL_BLOCK)["native"]
    step = Provider("", "logitless", partial(token_loss_nll, backward="tail_corrected", tail_tolerance=tolerance)).step
    with logitless.tail_report() as seen:
        outcome = step(inputs)
    reference = MATERIALISED.step(inputs.to(torch.float64))
    errors = [measure.relative(x, y) for x, y in zip(outcome[1:], reference[1:], strict=True)]
    assert seen.kept / seen.entries == pytest.approx(found["kept"], abs=1e-6) and 0.01 < found["kept"] < 0.3
    assert errors == pytest.approx(found["errors"], rel=1e-3) and min(errors) > 1e-3


def test_a_curve_falls_with_the_tolerance() -> None:
    points = exact.curves(peaked())["points"]
    assert [p["kept"] for p in points] == sorted(p["kept"] for p in points)
    assert all(p["corrected"][0] <= p["dropped"][0] for p in points)


def test_the_tail_command_runs_tiny_saves_and_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    command.main(["tail", "--tiny", "--rounds", "1", "--output", str(tmp_path)])
    results = json.loads((tmp_path / "tail.json").read_text())
    assert [part["kind"] for part in results["parts"].values()] == ["curves", "orders", "times", "flat"]
    methods = plots.of_kind(results, "times")[0]["methods"]
    assert set(methods) == {provider.name for provider in times.providers(torch.arange(700))}
    assert max(methods["screened 2^-9"]["errors"]) < 0.1 and methods["tail-corrected 2^-12"]["kept"] > 0
    assert (tmp_path / "tail.md").read_text() == plots.markdown(results) and (tmp_path / "tail.png").exists()


@pytest.mark.parametrize("path", committed("tail"))
def test_committed_tail_tables_are_those_of_the_committed_measurements(path: Path) -> None:
    assert path.with_suffix(".md").read_text() == plots.markdown(report.load(path))


@pytest.mark.slow
def test_the_tail_command_measures_a_model_and_fine_tunes_it(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model = training_fixtures.make_model(tmp_path / "model")
    where = ["--model", model, "--work", str(tmp_path), "--output", str(tmp_path), "--texts", "docstrings"]
    command.main(["tail", "--only", "curves", "finetune", *where, "--tokens", "64", "--steps", "3", "--seeds", "0"])
    results = report.load(tmp_path / "tail.json")
    assert (tmp_path / "finetuned" / "config.json").exists()
    exactly, approximately = (run["losses"] for run in plots.of_kind(results, "finetune"))
    assert len(exactly) == 3 and exactly == pytest.approx(approximately, rel=1e-3)
    assert plots.of_kind(results, "curves")[0]["loss"] == pytest.approx(exactly[0], rel=0.1)


@pytest.mark.slow
def test_texts_are_the_same_on_every_run_and_what_is_held_out_is_not_trained_on() -> None:
    held, trained = (data.docstrings(held_out=held_out) for held_out in (True, False))
    assert held == data.docstrings(held_out=True) and 4 < len(trained) / len(held) < 12
    assert data.TEXTS["tables"]().count("\n") > 1000
