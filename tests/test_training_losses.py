"""The training command takes any loss of the registry: its inputs from the reference model and the rows' columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training_fixtures import completion_rows, make_model, make_options, preference_rows, write_jsonl
from transformers import LlamaForCausalLM

from logitless import linear_logprobs
from logitless.training import InputError, train
from logitless.training.metrics import read_metrics
from logitless.training.objective import stats_of_logits
from logitless.types import OUTPUTS

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
    write_jsonl(folder / "pairs.jsonl", preference_rows())
    return folder


def curve(folder: Path, loss: dict[str, Any], **changes: Any) -> torch.Tensor:
    """[steps, 2] losses and gradient norms."""
    pairs = loss["name"] in ("simpo", "rpo", "weighted_sum")
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


def test_a_teacher_is_another_model(folder: Path) -> None:
    """Distillation from it lowers the divergence; another vocabulary is refused."""
    teacher = make_model(folder / "teacher", tied=False)
    loss = {"name": "distillation", "kind": "reverse_kl"}
    found = curve(folder, loss, teacher_model_name_or_path=teacher, max_steps=12, learning_rate=3e-3)
    assert 0 < found[-1, 0] < found[0, 0]
    model = LlamaForCausalLM.from_pretrained(teacher)
    model.resize_token_embeddings(300)
    model.save_pretrained(teacher)
    with pytest.raises(InputError, match="vocabulary"):
        curve(folder, loss, teacher_model_name_or_path=teacher)


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
