"""Whole runs that sample from a server, which takes over the weights after every update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from training_fixtures import make_model, make_options, write_jsonl
from vllm_server import VllmServer

from logitless.training import InputError, train
from logitless.training.metrics import read_metrics

REWARD = """
def digits(completions, **columns):
    return [float(sum(character.isdigit() for character in text)) for text in completions]
"""


def run(tmp_path: Path, mode: str = "processed_logprobs", **changes: Any) -> list[dict[str, Any]]:
    """The records of a run of two rounds, of two updates each, against a server of the model it starts from."""
    folder = tmp_path / "model"
    folder.mkdir(parents=True)
    make_model(folder)
    reward = tmp_path / "reward.py"
    reward.write_text(REWARD)
    data = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"{i} + {i} = "} for i in range(6)])
    server = VllmServer(str(folder), mode=mode)
    try:
        sampled: dict[str, Any] = {
            "reward_funcs": (f"{reward}:digits",), "use_vllm": True, "vllm_server_base_url": server.url,
            "num_generations": 4, "steps_per_generation": 2, "max_completion_length": 6, "max_steps": 4,
            "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no",
        }  # fmt: skip
        train(make_options(tmp_path / "run", str(folder), data, **{"method": "grpo", **sampled, **changes}))
    finally:
        server.close()
    return [record for record in read_metrics(tmp_path / "run") if "loss" in record]


@pytest.mark.parametrize("changes", [{}, {"use_peft": True}, {"temperature": 0.7, "top_p": 0.8}],
                         ids=["weights", "adapter", "cut"])  # fmt: skip
def test_a_server_samples_what_the_run_trains_on(tmp_path: Path, changes: dict[str, Any]) -> None:
    """The scores of the trained model agree with the server's, which had to follow it to the second round."""
    if "use_peft" in changes:
        pytest.importorskip("peft")
    records = run(tmp_path, **changes)
    assert len(records) == 4
    assert all(record["completions/mean_length"] > 0 for record in records)
    if "top_p" in changes:  # the server says what was drawn from alone, which the cut makes likelier
        assert records[-1]["sampling/sampling_logp_difference/mean"] > 1e-3
    else:
        assert all(record["sampling/sampling_logp_difference/max"] < 1e-4 for record in records)


def test_a_server_that_does_not_say_what_it_draws_from_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"processed_logprobs, or set importance_sampling to none"):
        run(tmp_path, mode="raw_logprobs", temperature=0.7)
    records = run(tmp_path / "uncorrected", mode="raw_logprobs", temperature=0.7, importance_sampling="none")
    assert len(records) == 4


def test_no_server_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"vllm_server_base_url"):
        run(tmp_path, vllm_server_base_url="http://127.0.0.1:9", vllm_server_timeout=0.2)
