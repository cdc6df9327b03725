"""The training command takes any loss of the registry: its inputs from the reference model and the rows' columns."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from training_fixtures import completion_rows, make_model, make_options, preference_rows, write_jsonl

from logitless import linear_logprobs, losses
from logitless.training import InputError, train
from logitless.training.collate import Batch
from logitless.training.metrics import read_metrics
from logitless.training.objective import loss_count, stats_of_logits
from logitless.types import OUTPUTS, TokenStats

ROWS = [
    {
        **row,
        "advantages": (-1.0) ** i * (1 + i % 3),
        "label": i % 2 == 0,
        "demonstration": i % 4 == 0,
        "old_logprob": -5.5,
    }
    for i, row in enumerate(completion_rows())
]

PAIRS = [
    {
        **row,
        "chosen_reward": 1.0 + i % 2,
        "rejected_reward": -0.5 * (i % 3),
        "chosen_reward_shift": 0.5 * (i % 3),
        "rejected_reward_shift": -0.25,
        "chosen_from_reference": i % 2 == 0,
        "rejected_from_reference": i % 2 == 1,
    }
    for i, row in enumerate(preference_rows())
]

#: One or more losses of every level, and what is special about their inputs.
CASES: dict[str, dict[str, Any]] = {
    "token, a power of p": {"name": "dft", "power": 0.5},
    "token, at a temperature of its own": {"name": "gem", "beta": 0.6},
    "token, the collision probability": {"name": "deformed_log", "form": "deft"},
    "token, an advantage a row": {"name": "dapo"},
    "token, means of means": {"name": "grpo"},
    "token, a constant length": {"name": "dr_grpo"},
    "token, a reference": {"name": "grpo", "beta": 0.1},
    "token, a policy to stay near": {"name": "psft"},
    "token, true and false": {"name": "luffy"},
    "sequence": {"name": "gspo"},
    "sequence, a reference": {"name": "poft"},
    "pair, no reference": {"name": "simpo"},
    "pair, lengths": {"name": "rpo"},
    "pair, a weighted sum": {"name": "weighted_sum", "terms": ["dpo", "chosen_nll"], "weights": [1.0, 0.1]},
    "pair, a reward of each side": {"name": "rebel", "eta": 0.5},
    "pair, a mark of each side": {"name": "xpo", "alpha": 0.1},
    "unpaired": {"name": "kto", "loss_type": "apo_zero_unpaired"},
    "unpaired, a reference point": {"name": "kto"},
    "unpaired, a running mean": {"name": "bco"},
    "two means": {"name": "chord"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("losses")
    make_model(folder / "model")
    write_jsonl(folder / "rows.jsonl", ROWS)
    write_jsonl(folder / "pairs.jsonl", PAIRS)
    return folder


def curve(folder: Path, loss: dict[str, Any], **changes: Any) -> torch.Tensor:
    """[steps, 2] losses and gradient norms."""
    pairs = losses.get(loss["name"]).level == "pair"
    data = folder / ("pairs.jsonl" if pairs else "rows.jsonl")
    output = folder / f"run-{len(list(folder.iterdir()))}"
    result = train(make_options(output, str(folder / "model"), str(data), method=loss["name"], loss=loss, **changes))
    records = [record for record in read_metrics(result.output_dir) if "loss" in record]
    return torch.tensor([[record["loss"], record["grad_norm"]] for record in records], dtype=torch.float64)


@pytest.mark.parametrize("loss", CASES.values(), ids=CASES.keys())
def test_curves_lie_on_those_of_materialised_logits(folder: Path, loss: dict[str, Any]) -> None:
    ours = curve(folder, loss)
    torch.testing.assert_close(ours, curve(folder, loss, backend="materialised"), rtol=3e-5, atol=3e-5)


def test_evaluation_has_the_loss_s_own_temperature(folder: Path) -> None:
    """Evaluation computes the trained loss. Before any step it is equal for both backends, and equal on equal rows."""
    loss, rows = {"name": "gem", "beta": 0.5}, str(folder / "rows.jsonl")
    found = []
    for backend in ("auto", "materialised"):
        changes: dict[str, Any] = {"backend": backend, "eval_dataset_name": rows, "max_steps": 1, "learning_rate": 0.0}
        options = make_options(
            folder / f"eval-{backend}", str(folder / "model"), rows, method="gem", loss=loss, **changes
        )
        found.append(train(options).eval_metrics)
    assert found[0]["eval_loss"] == pytest.approx(found[1]["eval_loss"], rel=1e-5)
    whole = curve(folder, loss, per_device_train_batch_size=len(ROWS), max_steps=1)
    assert found[0]["eval_loss"] == pytest.approx(float(whole[0, 0]), rel=1e-5)
    assert found[0]["eval_loss"] != pytest.approx(0.5 * found[0]["eval_nll"], rel=1e-3)


def test_evaluation_divides_by_the_constant_length_as_training_does(folder: Path) -> None:
    rows = str(folder / "rows.jsonl")
    changes: dict[str, Any] = {"eval_dataset_name": rows, "max_steps": 1, "learning_rate": 0.0}
    output = folder / "eval-constant"
    evaluated = train(make_options(output, str(folder / "model"), rows, method="dr_grpo", **changes)).eval_metrics
    trained = curve(folder, {"name": "dr_grpo"}, per_device_train_batch_size=len(ROWS), max_steps=1)
    assert evaluated["eval_loss"] == pytest.approx(float(trained[0, 0]), rel=1e-5)


@pytest.mark.parametrize("loss", CASES.values(), ids=CASES.keys())
def test_accumulation_is_normalised_over_the_whole_step(folder: Path, loss: dict[str, Any]) -> None:
    whole = curve(folder, loss, per_device_train_batch_size=4)
    parts = curve(folder, loss, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    torch.testing.assert_close(whole, parts, rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize("loss", [{"name": "asft"}, {"name": "distillation", "kind": "js"}], ids=str)
def test_distributions_are_compared_with_the_model_at_the_start(folder: Path, loss: dict[str, Any]) -> None:
    """The divergence begins at 0 and grows; evaluation reports it; LoRA's reference is the model without it."""
    own = {"name": "dft"} if loss["name"] == "asft" else None
    found = curve(folder, loss)
    if own is None:
        assert found.abs().max() < 1e-6  # nothing but the divergence, from itself
    else:
        plain = curve(folder, own)
        torch.testing.assert_close(found[0, 0], plain[0, 0])
        assert not torch.equal(found[1:], plain[1:])
    curve(folder, loss, eval_fraction=0.2, use_peft=True, max_steps=1)
    with pytest.raises(InputError, match="compares distributions"):
        curve(folder, loss, backend="materialised")
    with pytest.raises(InputError, match="compares distributions"):
        curve(folder, loss, precompute_ref_log_probs=True)


def test_a_missing_column_is_named(folder: Path) -> None:
    with pytest.raises(InputError, match=r"rows\.jsonl: dense_path_reinforce needs a column sft_logprob"):
        curve(folder, {"name": "dense_path_reinforce"})
    write_jsonl(folder / "unlabelled.jsonl", [{"prompt": "q", "completion": "a"}])
    with pytest.raises(InputError, match=r"unlabelled\.jsonl: kto needs a column desirable or label: one number"):
        train(make_options(folder / "x", str(folder / "model"), str(folder / "unlabelled.jsonl"), method="kto"))
    write_jsonl(folder / "pairs-of-one-reward.jsonl", [{**row, "rejected_reward": None} for row in PAIRS])
    with pytest.raises(InputError, match=r"line 1: the loss reads the column rejected_reward, .*got None"):
        train(
            make_options(folder / "x", str(folder / "model"), str(folder / "pairs-of-one-reward.jsonl"), method="rebel")
        )


def test_one_column_for_both_sides_of_a_pair_is_refused(folder: Path) -> None:
    """A reward of both would train every pair towards a difference of 0."""
    rows = [{**row, "reward": row["chosen_reward"]} for row in PAIRS]
    data = folder / "pairs-of-a-reward.jsonl"
    write_jsonl(data, rows)
    with pytest.raises(InputError, match=r"rebel reads reward of either side .* got one for both"):
        train(make_options(folder / "x", str(folder / "model"), str(data), method="rebel"))


def test_each_side_of_a_pair_has_columns_of_its_own(folder: Path) -> None:
    """Before the first step the model is its reference, so that the columns alone make the loss."""
    whole = {"per_device_train_batch_size": len(PAIRS), "max_steps": 1}
    rebel = [(0.5 * (row["chosen_reward"] - row["rejected_reward"])) ** 2 for row in PAIRS]
    found = curve(folder, {"name": "rebel", "eta": 0.5}, **whole)[0, 0]
    assert found.item() == pytest.approx(sum(rebel) / len(PAIRS), rel=1e-5)
    bco = [
        math.log1p(math.exp(row["chosen_reward_shift"])) + math.log1p(math.exp(-row["rejected_reward_shift"]))
        for row in PAIRS
    ]
    found = curve(folder, {"name": "bco_pair"}, **whole)[0, 0]
    assert found.item() == pytest.approx(sum(bco) / len(PAIRS), rel=1e-5)


def test_a_teacher_is_another_model(folder: Path) -> None:
    """Distillation from it lowers the divergence."""
    teacher = make_model(folder / "teacher", tied=False)
    loss = {"name": "distillation", "kind": "reverse_kl"}
    found = curve(folder, loss, teacher_model_name_or_path=teacher, max_steps=12, learning_rate=3e-3)
    assert 0 < found[-1, 0] < found[0, 0]


@pytest.mark.parametrize("masked", [False, True])
def test_the_engines_agree_on_ties_and_on_masked_entries(masked: bool) -> None:
    """A tie counts as correct, and an entry of logit -inf adds nothing to the entropy, with full logits as without."""
    logits = torch.tensor([[[2.0, 1.0, 2.0, 0.0], [0.5, 0.5, 0.5, 0.5], [3.0, 1.0, -1.0, 2.0]]])
    bias = torch.tensor([0.0, 0.0, 0.0, -torch.inf if masked else 0.0])
    targets = torch.tensor([[2, 1, -100]])
    outputs = tuple(name for name in OUTPUTS if name != "mean_logit")  # -inf where an entry is masked
    ours = linear_logprobs(logits, torch.eye(4), targets, bias=bias, outputs=outputs)
    theirs = stats_of_logits(logits + bias, targets, outputs)
    for name in outputs:
        found = getattr(theirs, name)
        assert found.isfinite().all(), name
        torch.testing.assert_close(found, getattr(ours, name), rtol=1e-6, atol=1e-6)
    assert theirs.correct is not None and theirs.correct.tolist() == [[1.0, 1.0, 0.0]]


def test_a_step_is_divided_by_what_the_loss_counts() -> None:
    """Discriminative SFT counts demonstrated answers, padded or packed; thresholds count by statistics."""
    count = functools.partial(loss_count, stats=TokenStats)
    labels = torch.tensor([[1, 2, 3], [1, 2, -100], [1, -100, -100], [1, 2, 3]])
    negative = torch.tensor([0.0, 1.0, 0.0, 1.0])[:, None].expand(4, 3)
    batch = Batch(labels, labels, loss_inputs={"negative": negative})
    assert count(losses.get("discriminative_sft"), batch) == 1  # the third row has no token that counts
    flat = labels.reshape(1, 12).clone()
    flat[0, ::3] = -100  # a sequence's first token is predicted by none
    inputs = {"negative": negative.reshape(1, 12).roll(-1)}
    packed = Batch(flat, flat, cu_seqlens=torch.arange(0, 13, 3, dtype=torch.int32), loss_inputs=inputs)
    assert count(losses.get("discriminative_sft"), packed) == 1
    assert count(losses.get("minor_sft"), batch) == 3
    logprob = torch.log(torch.tensor([[0.6, 0.1, 0.0], [0.9, 0.9, 0.0], [0.9, 0.9, 0.0], [0.4, 0.9, 0.0]]))
    assert batch.counted == 5
    assert loss_count(losses.get("deformed_log", min_prob=0.5), batch, lambda: TokenStats(logprob=logprob)) == 3
