"""Updates of a part of the model: half fine-tuning and sparse increments, against AdamW on that part alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_checkpoint import Runs
from test_training_sharded import CLOSE, Bench, needs_deepspeed, on_cpu
from training_fixtures import completion_rows, make_model, make_options, preference_rows, write_jsonl
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from logitless.training import InputError, TrainOptions, train, trainer
from logitless.training.parallel import World
from logitless.training.run import Run, prepare
from logitless.training.sharding import Copies
from logitless.training.subsets import Everything, Halves, SparseEntries, make_subset, require_subset
from logitless.training.trainer import run_steps

ALONE = World(0, 1, torch.device("cpu"))
Named = dict[str, torch.Tensor]


def weights(model: Any) -> Named:
    return {name: x.detach().clone() for name, x in model.named_parameters()}


class Followed:
    """A run of which the gradients and weights of every step are kept."""

    def __init__(self, options: TrainOptions, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gradients: list[Named] = []  # before clipping; of what the optimizer moves, in its own shape
        self.trained: list[set[str]] = []
        self.run = prepare(options, ALONE)
        self.weights = [weights(self.run.model)]
        collect = type(self.run.subset).collect

        def followed(subset: Everything) -> None:
            collect(subset)
            held = subset.held()
            self.trained.append(set(held))
            self.gradients.append({name: x.grad.clone() for name, x in held.items() if x.grad is not None})

        take_step = trainer.take_step

        def taken(run: Run, step: int) -> Any:
            record = take_step(run, step)
            self.weights.append(weights(run.model))
            return record

        with monkeypatch.context() as patched:
            patched.setattr(type(self.run.subset), "collect", followed)
            patched.setattr(trainer, "take_step", taken)
            self.result = run_steps(self.run)


@pytest.fixture
def rows(tmp_path: Path) -> str:
    return write_jsonl(tmp_path / "rows.jsonl", completion_rows())


@pytest.fixture
def model(tmp_path: Path) -> str:
    return make_model(tmp_path / "model")


def options_of(tmp_path: Path, model: str, rows: str, kind: str, name: str = "run", **changes: Any) -> TrainOptions:
    return make_options(tmp_path / name, model, rows, finetuning_type=kind, **changes)


def folder_weights(folder: Path) -> Named:
    return load_file(folder / "model.safetensors")


# Half fine-tuning


def drawn(model: Any, **changes: Any) -> Halves:
    done = changes.pop("done", 0)
    subset = make_subset(model, TrainOptions(finetuning_type="hft", **changes), ALONE, done)
    assert isinstance(subset, Halves)
    return subset


def llama(folder: Path, layers: int = 2) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(make_model(folder))
    config.num_hidden_layers = layers
    return LlamaForCausalLM(config)


def trained_of(model: Any, part: str) -> list[int]:
    """How many parameters of a part are trained in each layer."""
    names = [name for name, x in model.named_parameters() if x.requires_grad and part in name]
    return [sum(f".{layer}." in name for name in names) for layer in range(model.config.num_hidden_layers)]


@pytest.mark.parametrize("layers", [2, 4, 5])
def test_half_of_the_matrices_of_every_kind_is_trained(tmp_path: Path, layers: int) -> None:
    """Two of four in attention; in the feed-forward block one of three in half of the layers, two in the others."""
    model = llama(tmp_path / "model", layers)
    drawn(model)
    assert trained_of(model, "self_attn") == [2] * layers
    assert sorted(set(trained_of(model, "mlp"))) == [1, 2]
    assert abs(sum(trained_of(model, "mlp")) - 1.5 * layers) <= 0.5
    assert trained_of(model, "layernorm") == [1] * layers
    outside = {name: x for name, x in model.named_parameters() if "layers" not in name}
    assert set(outside) == {"model.embed_tokens.weight", "model.norm.weight"}
    assert all(x.requires_grad for x in outside.values())


def test_a_draw_follows_from_seed_and_round(tmp_path: Path) -> None:
    model = llama(tmp_path / "model", 4)

    def names(**changes: Any) -> set[str]:
        return set(drawn(model, **changes).held())

    assert names(seed=1) == names(seed=1) != names(seed=2)
    first = drawn(model, seed=1, hft_round_steps=3)
    held = set(first.held())
    assert not first.begin(0) and not first.begin(2) and set(first.held()) == held
    assert first.begin(3) and set(first.held()) != held
    assert set(first.held()) == names(seed=1, hft_round_steps=3, done=4)
    assert held == names(seed=1, hft_round_steps=3, done=3)  # the round of the last step that was taken


def test_a_bias_goes_with_its_matrix_and_an_expert_s_matrices_are_those_of_its_block() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=3, n_head=2, n_embd=8, vocab_size=11, n_positions=8))
    held = set(drawn(gpt2).held())
    layer = {name for name in held if ".h." in name}
    for name in layer:
        other = name.replace(".bias", ".weight") if name.endswith(".bias") else name.replace(".weight", ".bias")
        assert other in held
    assert trained_of(gpt2, "attn.") == trained_of(gpt2, "mlp.") == trained_of(gpt2, ".ln_") == [2, 2, 2]
    assert {"transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.bias"} <= held
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "vocab_size": 11}
    config = MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, num_local_experts=2)
    mixtral = MixtralForCausalLM(config)
    drawn(mixtral)
    assert sum(trained_of(mixtral, "mlp")) == 3 and trained_of(mixtral, "self_attn") == [2, 2]


def test_another_share_of_the_matrices(tmp_path: Path) -> None:
    model = llama(tmp_path / "model", 4)
    drawn(model, update_ratio=0.25)
    assert trained_of(model, "self_attn") == [1] * 4 and sum(trained_of(model, "mlp")) == 3
    model.requires_grad_(True)
    drawn(model, update_ratio=1.0)
    assert all(x.requires_grad for x in model.parameters())


def test_what_is_frozen_has_no_gradient_no_moments_and_does_not_move(
    tmp_path: Path, model: str, rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither does weight decay move it, nor clipping count it."""
    options = options_of(tmp_path, model, rows, "hft", weight_decay=0.5, lr_scheduler_type="constant", max_steps=3)
    run = Followed(options, monkeypatch)
    held = run.trained[0]
    assert run.trained == [held] * 3
    before, after = run.weights[0], run.weights[-1]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == held
    frozen = {name: x for name, x in run.run.model.named_parameters() if name not in held}
    assert frozen and all(x.grad is None and x not in run.run.optimizer.state for x in frozen.values())
    assert len(run.run.optimizer.state) == len(held)


def test_a_step_is_adamw_s_on_what_is_trained(
    tmp_path: Path, model: str, rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against PyTorch's AdamW with the gradients of the whole model: those of what is trained are the same."""
    settings = {"weight_decay": 0.1, "lr_scheduler_type": "constant", "gradient_accumulation_steps": 2, "max_steps": 1}
    half = Followed(options_of(tmp_path, model, rows, "hft", **settings), monkeypatch)
    full = Followed(options_of(tmp_path, model, rows, "full", "full", **settings), monkeypatch)
    names = sorted(half.trained[0])
    assert len(names) < len(full.trained[0])
    for name in names:
        assert torch.equal(half.gradients[0][name], full.gradients[0][name])
    expected = adamw(half.weights[0], [{name: full.gradients[0][name] for name in names}], weight_decay=0.1)
    for name in half.weights[0]:
        torch.testing.assert_close(half.weights[1][name], expected.get(name, half.weights[0][name]), **EXACT)


EXACT = {"rtol": 1e-6, "atol": 1e-8}


def adamw(start: Named, gradients: list[Named], *, weight_decay: float, rate: float = 1e-3, clip: float = 1.0) -> Named:
    """The parameters that have gradients after a step with each of them, clipped together."""
    parameters = {name: torch.nn.Parameter(start[name].clone()) for name in gradients[0]}
    decays = [[x for x in parameters.values() if (x.dim() > 1) is matrix] for matrix in (True, False)]
    groups = [{"params": each, "weight_decay": weight_decay * (not i)} for i, each in enumerate(decays) if each]
    optimizer = torch.optim.AdamW(groups, lr=rate)
    for step in gradients:
        for name, parameter in parameters.items():
            parameter.grad = step[name].clone()
        torch.nn.utils.clip_grad_norm_(parameters.values(), clip)
        optimizer.step()
    return {name: x.detach() for name, x in parameters.items()}


def test_moments_begin_anew_in_every_round(
    tmp_path: Path, model: str, rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options_of(
        tmp_path, model, rows, "hft", hft_round_steps=2, max_steps=4, lr_scheduler_type="constant", weight_decay=0.1
    )
    run = Followed(options, monkeypatch)
    assert run.trained[0] == run.trained[1] != run.trained[2] == run.trained[3]
    for first in (0, 2):
        expected = adamw(run.weights[first], run.gradients[first : first + 2], weight_decay=0.1)
        for name, value in run.weights[first + 2].items():
            torch.testing.assert_close(value, expected.get(name, run.weights[first][name]), **EXACT)


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_share_of_one_is_full_training_bit_for_bit(tmp_path: Path, model: str, rows: str, method: str) -> None:
    data = rows if method == "sft" else write_jsonl(tmp_path / "pairs.jsonl", preference_rows())
    for kind, share in (("full", None), ("hft", 1.0)):
        train(options_of(tmp_path, model, data, kind, kind, method=method, update_ratio=share, weight_decay=0.1))
    full, half = folder_weights(tmp_path / "full"), folder_weights(tmp_path / "hft")
    assert all(torch.equal(full[name], half[name]) for name in full)
    assert not torch.equal(full["model.norm.weight"], folder_weights(Path(model))["model.norm.weight"])


def test_a_tied_embedding_and_an_untied_head_are_trained(tmp_path: Path, rows: str) -> None:
    untied = make_model(tmp_path / "untied", tied=False)
    train(options_of(tmp_path, untied, rows, "hft"))
    before, after = folder_weights(Path(untied)), folder_weights(tmp_path / "run")
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= {
        k for k in before if not torch.equal(before[k], after[k])
    }


# Sparse increments


def test_the_entries_of_the_largest_first_gradients_are_chosen(
    tmp_path: Path, model: str, rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient is that of the whole first step, of all its micro-batches."""
    settings = {"gradient_accumulation_steps": 3, "max_steps": 3, "lr_scheduler_type": "constant"}
    sift = Followed(options_of(tmp_path, model, rows, "sift", update_ratio=0.1, **settings), monkeypatch)
    full = Followed(options_of(tmp_path, model, rows, "full", "full", **settings), monkeypatch)
    subset = sift.run.subset
    assert isinstance(subset, SparseEntries)
    before, after = sift.weights[0], sift.weights[-1]
    assert set(subset.weights) == {name for name in before if "proj" in name}
    for name, value in before.items():
        moved = (value != after[name]).flatten()
        if name not in subset.weights:
            assert not moved.any()
            continue
        count = math.ceil(0.1 * value.numel())
        gradient = full.gradients[0][name].abs().flatten()
        places = subset.chosen[name].long()
        assert len(places) == count == len(places.unique())
        rest = torch.ones_like(moved)
        rest[places] = False
        assert gradient[places].min() >= gradient[rest].max()
        assert moved[places].all() and not moved[rest].any()


@pytest.mark.parametrize("fused", [False, True])
def test_chosen_entries_take_adamw_s_steps(
    tmp_path: Path, model: str, rows: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With weight decay and clipping of these entries alone, and with their own moments."""
    options = options_of(
        tmp_path, model, rows, "sift", weight_decay=0.1, lr_scheduler_type="constant", gradient_accumulation_steps=2,
        optim="adamw_torch_fused" if fused else "adamw_torch",
    )  # fmt: skip
    run = Followed(options, monkeypatch)
    subset = run.run.subset
    assert isinstance(subset, SparseEntries) and len(run.gradients) == 4
    starts = {name: run.weights[0][name].take(places.long())[None] for name, places in subset.chosen.items()}
    expected = adamw(starts, [{name: g[None] for name, g in step.items()} for step in run.gradients], weight_decay=0.1)
    for name, places in subset.chosen.items():
        torch.testing.assert_close(run.weights[-1][name].take(places.long()), expected[name][0], **EXACT)
    held = {x.numel() for x in subset.values.values()}
    moments = [state["exp_avg"].numel() for state in run.run.optimizer.state.values()]
    assert set(moments) == held and sum(moments) <= 0.06 * sum(x.numel() for x in subset.weights.values())
    assert all(x.grad is None for x in run.run.model.parameters())


def test_a_sparse_share_of_one_is_full_training_of_the_matrices(
    tmp_path: Path, model: str, rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit. Clipping is off, since the norm of the same numbers is summed in another order."""
    settings = {"weight_decay": 0.1, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0}
    sift = Followed(options_of(tmp_path, model, rows, "sift", update_ratio=1.0, **settings), monkeypatch)
    run = prepare(options_of(tmp_path, model, rows, "full", "full", **settings), ALONE)
    for name, parameter in run.model.named_parameters():
        parameter.requires_grad_("proj" in name)
    run_steps(run)
    for name, value in run.model.named_parameters():
        assert torch.equal(value, sift.weights[-1][name]), name


def test_entries_of_bfloat16_weights(tmp_path: Path, model: str, rows: str) -> None:
    train(options_of(tmp_path, model, rows, "sift", dtype="bfloat16", learning_rate=1e-2))
    assert folder_weights(tmp_path / "run")["model.norm.weight"].dtype == torch.bfloat16


def test_matrices_in_another_order_of_memory_are_written_in_place() -> None:
    """A weight that is a transposed view is read and written by its own order of entries."""
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=8))
    weight = gpt2.transformer.h[0].mlp.c_fc.weight
    weight.data = weight.data.t().contiguous().t()
    before = weight.detach().clone()
    subset = make_subset(gpt2, TrainOptions(finetuning_type="sift", update_ratio=0.1), ALONE, 0)
    assert isinstance(subset, SparseEntries)
    gpt2(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    subset.collect()
    name = "transformer.h.0.mlp.c_fc.weight"
    with torch.no_grad():
        subset.values[name] += 1
    subset.write()
    moved = (weight.detach() - before).flatten()
    assert not weight.is_contiguous() and moved.nonzero()[:, 0].tolist() == subset.chosen[name].tolist()
    torch.testing.assert_close(moved[subset.chosen[name].long()], torch.ones(len(subset.chosen[name])))


def test_several_losses_choose_by_their_sum(
    tmp_path: Path, model: str, rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixture = [{"method": "sft", "dataset_name": rows}, {"method": "dft", "dataset_name": rows, "weight": 3.0}]
    changes = {"mixture": mixture, "dataset_name": "", "max_steps": 1}
    sift = Followed(options_of(tmp_path, model, rows, "sift", **changes), monkeypatch)
    full = Followed(options_of(tmp_path, model, rows, "full", "full", **changes), monkeypatch)
    subset = sift.run.subset
    assert isinstance(subset, SparseEntries)
    for name, places in subset.chosen.items():
        assert torch.equal(sift.gradients[0][name], full.gradients[0][name].take(places.long()))


# Checkpoints


@pytest.mark.parametrize(
    "changes",
    [
        {"finetuning_type": "hft"},
        {"finetuning_type": "hft", "hft_round_steps": 2},  # a round ends where the checkpoint is
        {"finetuning_type": "hft", "hft_round_steps": 3},
        {"finetuning_type": "sift", "update_ratio": 0.2},
        {"finetuning_type": "sift", "update_ratio": 0.2, "gradient_checkpointing": True},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_resumed_run_goes_on_bit_for_bit(
    tmp_path: Path, method: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Runs(tmp_path, method)
    train(runs.options("whole", weight_decay=0.1, **changes))
    for after in (3, 5):
        name = f"killed-{after}"
        runs.interrupted(name, monkeypatch, after, weight_decay=0.1, **changes)
        train(runs.options(name, resume=True, weight_decay=0.1, **changes))
        runs.assert_same("whole", name)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({"finetuning_type": "sift"}, {}, "finetuning_type was 'sift' and is 'full'"),
        ({}, {"finetuning_type": "hft"}, "finetuning_type was 'full' and is 'hft'"),
        ({"finetuning_type": "sift"}, {"finetuning_type": "sift", "update_ratio": 0.1}, "was 0.05 and is 0.1"),
        ({"finetuning_type": "hft"}, {"finetuning_type": "hft", "hft_round_steps": 1}, "was None and is 1"),
    ],
)
def test_a_run_goes_on_with_its_own_part(
    tmp_path: Path, model: str, rows: str, before: dict[str, Any], after: dict[str, Any], message: str
) -> None:
    same = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    train(make_options(tmp_path / "run", model, rows, **same | before))
    with pytest.raises(InputError, match=message):
        train(make_options(tmp_path / "run", model, rows, resume=True, **same | {"max_steps": 3} | after))


def test_a_share_that_is_the_default_may_be_named_on_resuming(tmp_path: Path, model: str, rows: str) -> None:
    same = {"finetuning_type": "sift", "save_strategy": "steps", "save_steps": 2}
    train(make_options(tmp_path / "run", model, rows, max_steps=2, **same))
    train(make_options(tmp_path / "run", model, rows, max_steps=3, resume=True, update_ratio=0.05, **same))


def test_a_checkpoint_without_its_entries_is_refused(tmp_path: Path, model: str, rows: str) -> None:
    same = {"finetuning_type": "sift", "save_strategy": "steps", "save_steps": 2}
    train(make_options(tmp_path / "run", model, rows, max_steps=2, **same))
    (tmp_path / "run" / "checkpoint-2" / "entries.safetensors").unlink()
    with pytest.raises(InputError, match="chosen entries are not as many"):
        train(make_options(tmp_path / "run", model, rows, max_steps=3, resume=True, **same))


# Several processes


class Parts(Copies):
    """Stands for a strategy that shards."""

    shards = True
    name = "FSDP2"


def test_what_sharded_weights_cannot_do_is_refused() -> None:
    world = World(0, 2, torch.device("cpu"), Parts())
    with pytest.raises(InputError, match=r"finetuning_type: sift .*FSDP2"):
        require_subset(TrainOptions(finetuning_type="sift"), world)
    with pytest.raises(InputError, match="hft_round_steps: FSDP2 cannot freeze other weights"):
        require_subset(TrainOptions(finetuning_type="hft", hft_round_steps=2), world)
    for options in (TrainOptions(), TrainOptions(finetuning_type="hft")):
        require_subset(options, world)
    require_subset(TrainOptions(finetuning_type="sift"), ALONE)


@on_cpu
@pytest.mark.parametrize("changes", [{"finetuning_type": "hft", "hft_round_steps": 2}, {"finetuning_type": "sift"}])
def test_copies_train_what_one_process_does(tmp_path: Path, changes: dict[str, Any]) -> None:
    bench = Bench(tmp_path)
    bench.alone(**changes)
    bench.together("together", "ddp", **changes)
    bench.assert_same_weights("alone", "together", **CLOSE)


@on_cpu
@pytest.mark.parametrize("strategy", ["fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_sharded_halves_train_what_one_process_does(tmp_path: Path, strategy: str) -> None:
    """In one go, and resumed in the middle."""
    bench = Bench(tmp_path)
    changes = {"finetuning_type": "hft", "lr_scheduler_type": "constant", "weight_decay": 0.1}
    bench.alone(**changes)
    bench.together("together", strategy, max_steps=2, save_strategy="steps", save_steps=2, **changes)
    bench.together("together", strategy, resume=True, **changes)
    bench.assert_same_weights("alone", "together", **CLOSE)
    before = folder_weights(Path(bench.tied))
    whole, parts = folder_weights(tmp_path / "alone"), folder_weights(tmp_path / "together")
    frozen = [name for name in before if torch.equal(before[name], whole[name])]
    assert frozen == [name for name in before if torch.equal(before[name], parts[name])] and frozen


# Options


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"finetuning_type": "lora"}, "finetuning_type must be one of full, hft, sift, got 'lora'"),
        ({"finetuning_type": "sift", "use_peft": True}, "sift trains a part of the model's own weights, and use_peft"),
        ({"finetuning_type": "hft", "use_peft": True}, "hft trains a part"),
        ({"update_ratio": 0.5}, "update_ratio has no effect with finetuning_type=full"),
        ({"finetuning_type": "sift", "hft_round_steps": 5}, "hft_round_steps has no effect with finetuning_type=sift"),
        ({"hft_round_steps": 5}, "hft_round_steps has no effect with finetuning_type=full"),
        ({"finetuning_type": "hft", "hft_round_steps": 0}, "hft_round_steps must be at least 1"),
        ({"finetuning_type": "sift", "update_ratio": 0.0}, r"update_ratio must be in \(0, 1\]"),
        ({"finetuning_type": "hft", "update_ratio": 1.5}, r"update_ratio must be in \(0, 1\]"),
        ({"finetuning_type": "hft", "update_ratio": math.nan}, "update_ratio must be in"),
    ],
)
def test_options_that_would_do_nothing_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainOptions(**changes)


@pytest.mark.parametrize("kind", ["hft", "sift"])
def test_a_model_without_layers_is_refused(tmp_path: Path, kind: str) -> None:
    model = llama(tmp_path / "model")
    model.model.layers = torch.nn.ModuleList()
    with pytest.raises(InputError, match="finetuning_type: some-model has no numbered layers"):
        make_subset(model, TrainOptions(finetuning_type=kind, model_name_or_path="some-model"), ALONE, 0)
