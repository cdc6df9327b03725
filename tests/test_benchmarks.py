"""The benchmark suite on tiny problems: every provider runs and computes the loss that it is compared on."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import cpu_report, measure, memory, parts, peers, report, work
from benchmarks.parts import PARTS, Part, Target
from benchmarks.problems import Inputs
from benchmarks.providers import LOGPROBS, NLL, Outcome, Provider, chunked_gemms, gemms

from logitless import losses

COMPILED = {peers.CCE.name, peers.LIGER_DPO.name} | {liger.name for _, liger in peers.OF_REGISTRY.values()}
CASES = [
    pytest.param(
        part.tiny(),
        provider,
        id=f"{part.name}-{provider.name}",
        marks=[pytest.mark.slow] if provider.name in COMPILED else [],
    )
    for part in PARTS
    for provider in part.providers
]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize(("part", "provider"), CASES)
def test_provider_computes_the_loss_it_is_compared_on(part: Part, provider: Provider) -> None:
    inputs = part.problem.inputs()
    [row] = measure.first_calls([provider], inputs)
    if row.failure:
        pytest.skip(row.failure)
    measure.time_in_turns([provider], [row], inputs, rounds=1)
    assert len(row.seconds) == 1
    if provider.role == "floor":
        return
    assert row.error is not None
    expected = {"loss", "d_hidden"} if part.problem.frozen_head else {"loss", "d_hidden", "d_weight"}
    assert row.error.keys() == expected
    assert max(row.error.values()) < TOLERANCE[part.problem.dtype], row.error


LOSS_PARTS = {name: parts.get(name).tiny() for name in parts.GROUPS["losses"]}


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
    assert products == {"distillation": 4, "js": 4, "asft": 7, "sft_kl": 7, "distillation and nll": 7}


def test_floors_of_one_problem_are_the_same_products() -> None:
    inputs = parts.get("nll").tiny().problem.inputs()
    whole, chunked = gemms(inputs), chunked_gemms(inputs)
    assert whole.d_weight is not None and chunked.d_weight is not None
    torch.testing.assert_close(whole.d_hidden, chunked.d_hidden)
    torch.testing.assert_close(whole.d_weight, chunked.d_weight)


def test_tiny_long_pairs_do_not_fit_a_chunk() -> None:
    problem = parts.get("dpo-long").tiny().problem
    assert problem.chunk_bytes is not None
    assert 2 * problem.length > problem.chunk_bytes // (4 * problem.vocabulary)


def _failing(role: Any) -> Provider:
    def step(inputs: object) -> Outcome:
        raise RuntimeError("no such device\nand more")

    return Provider("broken", role, "nll", step)


def test_a_peer_that_fails_is_a_line_and_our_own_failure_an_error() -> None:
    inputs = parts.get("nll").tiny().problem.inputs()
    [row] = measure.first_calls([_failing("peer")], inputs)
    assert row.failure == "RuntimeError: no such device"
    with pytest.raises(RuntimeError, match="no such device"):
        measure.first_calls([_failing("logitless")], inputs)


def test_a_slow_peer_is_timed_once_and_a_deadline_leaves_one_round() -> None:
    part = parts.get("nll").tiny()
    chosen = [part.provider("materialised"), part.provider("logitless"), Provider("slow", "peer", "nll", _slow)]
    rows = [measure.Row(p.name, p.role) for p in chosen]
    measure.time_in_turns(chosen, rows, part.problem.inputs(), rounds=3)
    assert [len(row.seconds) for row in rows] == [3, 3, 1]
    rows = [measure.Row(p.name, p.role) for p in chosen]
    measure.time_in_turns(chosen, rows, part.problem.inputs(), rounds=3, deadline=0.0)
    assert [len(row.seconds) for row in rows] == [1, 1, 1]


def _slow(inputs: object) -> Outcome:
    time.sleep(0.3)
    return Outcome(None, None, None)


def test_memory_is_beyond_the_gradients() -> None:
    def step(inputs: Inputs) -> Outcome:
        scratch = torch.empty(1 << 16)
        del scratch
        return Outcome(None, torch.empty_like(inputs.hidden), torch.empty_like(inputs.weight))

    part = parts.get("nll").tiny()
    found = memory.of_step(part, Provider("a quarter MiB", "peer", "nll", step))
    assert found["allocated"] == 4 * (1 << 16) - part.problem.gradient_bytes
    assert part.problem.gradient_bytes == 4 * 24 * (40 + 96)


@pytest.mark.slow
def test_memory_in_a_process_of_its_own() -> None:
    part = parts.get("nll")
    found = memory.in_subprocess(part.tiny(), NLL, tiny=True)
    assert found["allocated"] is not None and found["allocated"] > 0
    with pytest.raises(RuntimeError, match="StopIteration"):
        memory.in_subprocess(part, _failing("peer"), tiny=True)


def test_report_saves_and_keeps_the_parts_it_does_not_measure(tmp_path: Path, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(memory, "in_subprocess", lambda part, provider, *, tiny: {"allocated": 2**20, "resident": None})
    output = tmp_path / "cpu.json"
    cpu_report.main(["--tiny", "--only", "dpo-long", "--rounds", "1", "--output", str(output)])
    cpu_report.main(["--tiny", "--only", "bf16-many", "--rounds", "2", "--output", str(output)])
    results = json.loads(output.read_text())
    assert list(results["parts"]) == ["dpo-long", "bf16-many"]
    assert output.with_suffix(".md").read_text() == report.markdown(results)
    assert "materialised DPO" in capsys.readouterr().out
    cpu_report.main(["--tiny", "--only", "dpo-long", "bf16-many", "--minutes", "0", "--rounds", "1"])
    assert "go on with: --only bf16-many" in capsys.readouterr().err


def _measured(**seconds: list[float]) -> dict[str, Any]:
    rows = [
        measure.Row(name, "peer", x, memory={"allocated": 100, "resident": 1}).as_json() for name, x in seconds.items()
    ]
    return {"rows": rows, "logits_bytes": 1000}


def test_targets_compare_within_rounds() -> None:
    measured = _measured(logitless=[1.0, 3.0, 10.0], other=[2.0, 4.0, 100.0])
    assert report.reached(Target(NLL, "seconds", "other", 1.0), measured) == 0.5
    assert report.reached(Target(NLL, "memory", "other", 1.0), measured) == 1.0
    assert report.reached(Target(NLL, "memory", parts.LOGITS, 1.0), measured) == 0.1
    assert report.reached(Target(NLL, "seconds", "absent", 1.0), measured) is None


def test_a_bound_is_about_the_slowest_of_our_losses() -> None:
    measured = _measured(nll=[1.0, 2.0, 4.0], dft=[1.1, 2.0, 4.4], focal=[1.0, 2.0, 4.0], peer=[9.0, 9.0, 9.0])
    for row in measured["rows"][:3]:
        row["role"] = "logitless"
    bound = parts.Bound("nll", 1.05)
    assert report.slowest(bound, measured) == ("dft", pytest.approx(1.1))
    assert "1.00-1.10" in report.part_table(measured, bound)
    assert report.slowest(parts.Bound("absent", 1.05), measured) is None


def test_committed_tables_are_those_of_the_committed_measurements() -> None:
    if not cpu_report.RESULTS.exists():
        pytest.skip("no results are committed")
    table = cpu_report.RESULTS.with_suffix(".md").read_text()
    assert table == report.markdown(json.loads(cpu_report.RESULTS.read_text()))
