"""Every loss of the registry, trained by the command: its first gradient is the one that the loss alone gives.

The rows are made from what a loss says of its inputs, so a new loss is tested here without being named.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loss_cases import length, lists_of_ids, loss_inputs
from torch import Tensor
from training_fixtures import make_model, make_options, make_tokenizer, write_jsonl
from transformers import LlamaForCausalLM

from logitless import linear_loss, losses
from logitless.losses import Loss, PairLoss
from logitless.training import InputError
from logitless.training.evaluation import evaluate_loss
from logitless.training.inputs import OFF_POLICY, REFERENCE_FIELDS
from logitless.training.parallel import World
from logitless.training.run import prepare
from logitless.training.trainer import take_step

NAMES = losses.names()
ROWS = 4  # pairs are two sequences each
PROMPTS = ["1 + 1 = ", "the sky is ", "x", "a longer prompt: "]
ANSWERS = ["2", "blue and wide", "yz", "no", "3", "green", "zyx", "none of these"]
WORLD = World(0, 1, torch.device("cpu"))
TOKENIZER = make_tokenizer()
SINGLE = ("group", "demonstration")  # written as one value a row, as they are made


@functools.lru_cache
def loss_of(name: str) -> Loss:
    return losses.get(name)


class Data:
    """Rows of a loss, and the same as tensors: ids, targets and inputs of whole sequences, aligned with predictions."""

    def __init__(self, loss: Loss) -> None:
        self.pairs = isinstance(loss, PairLoss)
        count = ROWS * (1 + self.pairs)
        prompts = [list(TOKENIZER(PROMPTS[i % ROWS])["input_ids"]) for i in range(count)]
        answers = [[*TOKENIZER(ANSWERS[i])["input_ids"], TOKENIZER.eos_token_id] for i in range(count)]
        lengths = [len(answer) for answer in answers]
        generator = torch.Generator().manual_seed(7)
        made = loss_inputs(loss, count, max(lengths), 32, generator, torch.float32)
        made.pop("ref_hidden", None)
        width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        self.ids = torch.ones(count, width, dtype=torch.int64)
        self.targets = torch.full((count, width), -100)
        self.inputs: dict[str, Tensor] = {name: x for name, x in made.items() if name in loss.sequence_inputs}
        per_token = {name: x for name, x in made.items() if name not in loss.sequence_inputs}
        self.inputs |= {name: x.new_zeros(count, width, *x.shape[2:]) for name, x in per_token.items()}
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            whole, start = prompt + answer, len(prompt) - 1
            self.ids[i, : len(whole)] = torch.tensor(whole)
            self.targets[i, start : start + len(answer)] = torch.tensor(answer)
            for name, x in per_token.items():
                self.inputs[name][i, start : start + len(answer)] = x[i, : len(answer)]
        self.columns = [
            {name: self._column(name, x, i, lengths[i], loss) for name, x in made.items()} for i in range(count)
        ]
        if loss.lists:
            self.targets = lists_of_ids(self.targets, 258)
            for own, listed in zip(self.columns, self.targets, strict=True):
                own["target_ids"] = listed[listed[:, 0] != -100].tolist()

    @staticmethod
    def _column(name: str, x: Tensor, i: int, tokens: int, loss: Loss) -> Any:
        if name in loss.sequence_inputs:
            return x.item() if x.dim() == 0 else x[i].item()
        return x[i, 0].item() if name in SINGLE else x[i, :tokens].tolist()

    def rows(self, without: tuple[str, ...] = ()) -> list[dict[str, Any]]:
        kept = [{name: x for name, x in columns.items() if name not in without} for columns in self.columns]
        if not self.pairs:
            return [{"prompt": PROMPTS[i], "completion": ANSWERS[i]} | kept[i] for i in range(ROWS)]
        sides = {"chosen": 0, "rejected": ROWS}
        return [
            {"prompt": PROMPTS[i]}
            | {side: ANSWERS[start + i] for side, start in sides.items()}
            | {f"{side}_{name}": x for side, start in sides.items() for name, x in kept[start + i].items()}
            for i in range(ROWS)
        ]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The folders of a model and a teacher: both have seen the texts, so that there are tokens of every p."""
    folder = tmp_path_factory.mktemp("models")
    return make_taught(folder / "model", 24), make_taught(folder / "teacher", 32)


def make_taught(folder: Path, steps: int) -> str:
    make_model(folder, tied=False)
    model, data = LlamaForCausalLM.from_pretrained(folder), Data(losses.DPO())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        linear_loss("nll", model.model(data.ids).last_hidden_state, model.lm_head.weight, data.targets).backward()
        optimizer.step()
    model.save_pretrained(folder)
    return str(folder)


def trained(models: tuple[str, str], folder: Path, loss: Loss, rows: list[dict[str, Any]], /, **changes: Any) -> Any:
    """The run of these rows, at its first step."""
    data = write_jsonl(folder / "rows.jsonl", rows)
    same = {"method": loss.name, "per_device_train_batch_size": ROWS, "max_grad_norm": 0.0, "on_policy": False}
    return prepare(make_options(folder / "run", models[0], data, **same | changes), WORLD)


def gradients_of_first_step(run: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def keep() -> None:
        named = run.model.named_parameters()
        found.update({name: p.grad.clone() for name, p in named if p.grad is not None})

    run.optimizer.step = keep
    take_step(run, 0)
    return found


def gradients_alone(models: tuple[str, str], loss: Loss, data: Data, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The gradients of `linear_loss` on the model's hidden states; demonstrations' own means are taken here."""
    model = LlamaForCausalLM.from_pretrained(models[0])
    options: dict[str, Any] = {"max_length": 64} if length(loss) else {}
    call: Callable[..., Any] = functools.partial(
        linear_loss, loss, model.model(data.ids).last_hidden_state, model.lm_head.weight, data.targets, **inputs
    )
    if loss.own_means:
        values, counted, shown = call(reduction="none"), data.targets != -100, inputs["demonstration"]
        value = values[counted & shown].mean() + values[counted & ~shown].mean()
    else:
        out = call(**options)
        value = out if isinstance(out, Tensor) else out.loss
    value.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Equal in float32, in which the largest entry is about 1e4 times the rounding of a sum of this length."""
    assert ours.keys() == theirs.keys() and any(x.abs().max() > 0 for x in theirs.values())
    scale = max(float(x.abs().max()) for x in theirs.values())
    for name, x in theirs.items():
        torch.testing.assert_close(ours[name], x, rtol=1e-4, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}")


def teacher_states(models: tuple[str, str], data: Data) -> dict[str, Any]:
    teacher = LlamaForCausalLM.from_pretrained(models[1])
    with torch.no_grad():
        hidden = teacher.model(data.ids).last_hidden_state
    return {"ref_hidden": hidden, "ref_head": teacher.lm_head.weight.detach()}


@pytest.mark.parametrize("name", NAMES)
def test_the_first_gradient_is_that_of_the_loss_alone(models: tuple[str, str], tmp_path: Path, name: str) -> None:
    """With every input in columns; whole distributions are a teacher's."""
    loss = loss_of(name)
    data = Data(loss)
    inputs, changes = dict(data.inputs), {}
    if loss.compares_distributions:
        inputs |= teacher_states(models, data)
        changes = {"teacher_model_name_or_path": models[1]}
    run = trained(models, tmp_path, loss, data.rows(), **changes)
    assert_same(gradients_of_first_step(run), gradients_alone(models, loss, data, inputs))


#: Settings under which a loss reads, counts or reduces otherwise than by default.
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("deformed_log", {"min_prob": 0.2}),  # tokens below do not count in the divisor
    ("discriminative_sft", {"ref_free": True}),
    ("f_divergence_sft", {"divergence": "squared_hellinger", "value": "lse"}),
    ("sft_kl", {"kl": "k3"}),
    ("gem", {"beta": 0.6}),
    ("grpo", {"beta": 0.1, "entropy_coef": 0.01, "top_entropy": 0.5, "off_policy_threshold": 0.1}),
    ("top_k_distillation", {"kind": "mixed_kl", "unlisted": "renormalized"}),
]


@pytest.mark.parametrize(("name", "settings"), SETTINGS, ids=lambda x: x if isinstance(x, str) else ",".join(x))
def test_other_settings_are_the_loss_s_own_too(
    models: tuple[str, str], tmp_path: Path, name: str, settings: dict[str, Any]
) -> None:
    """In two micro-batches, over which the divisor is counted, where the loss can be cut."""
    loss = losses.get(name, **settings)
    data = Data(loss)
    changes: dict[str, Any] = {"loss": settings}
    if not loss.batch_wide:
        changes |= {"per_device_train_batch_size": ROWS // 2, "gradient_accumulation_steps": 2}
    run = trained(models, tmp_path, loss, data.rows(), **changes)
    assert_same(gradients_of_first_step(run), gradients_alone(models, loss, data, data.inputs))
    (component,) = run.components
    evaluated = evaluate_loss(component, component.loader)["loss"]
    assert evaluated == pytest.approx(take_step(run, 0)["loss"], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_has_the_loss_that_is_trained(models: tuple[str, str], tmp_path: Path, name: str) -> None:
    """On the rows of a step, before it is taken."""
    loss = loss_of(name)
    run = trained(models, tmp_path, loss, Data(loss).rows(), per_device_eval_batch_size=ROWS)
    (component,) = run.components
    evaluated = evaluate_loss(component, component.loader)["loss"]
    assert evaluated == pytest.approx(take_step(run, 0)["loss"], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", [name for name in NAMES if set(loss_of(name).inputs) & REFERENCE_FIELDS.keys()])
def test_the_reference_model_stands_for_its_columns(models: tuple[str, str], tmp_path: Path, name: str) -> None:
    loss = loss_of(name)
    data = Data(loss)
    inputs = {k: x for k, x in data.inputs.items() if k not in REFERENCE_FIELDS} | teacher_states(models, data)
    rows = data.rows(without=tuple(REFERENCE_FIELDS))
    run = trained(models, tmp_path, loss, rows, teacher_model_name_or_path=models[1])
    assert_same(gradients_of_first_step(run), gradients_alone(models, loss, data, inputs))


@pytest.mark.parametrize("name", NAMES)
def test_a_column_that_nothing_stands_for_is_named(models: tuple[str, str], tmp_path: Path, name: str) -> None:
    """Every needed input is a column, or comes from a source that the documentation names, or is refused by name."""
    loss = loss_of(name)
    data = Data(loss)
    others = (*REFERENCE_FIELDS, "reference_point", "reward_shift", "log_normalizer")
    needed = [each for each in (*loss.inputs, *loss.sequence_inputs) if each not in others]
    needed = [each for each in needed if (each, name) != (OFF_POLICY, "psft")]
    needed += [OFF_POLICY] if OFF_POLICY in loss.optional_inputs else []
    needed += ["target_ids"] if loss.lists else []
    for each in needed:
        column = f"columns chosen_{each} and rejected_{each}" if isinstance(loss, PairLoss) else f"a column {each}"
        with pytest.raises(InputError, match=rf"rows\.jsonl: {name} needs {column}\b"):
            trained(models, tmp_path, loss, data.rows(without=(each,)))
