"""LLaMA-Factory: its trainers with and without logits. The real package where it is installed, a stub everywhere.

The stub has the published interface of 0.9.5: the parameters of the two trainers, and the three losses that they put
into `compute_loss_func`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from host_cases import CHUNK, LARGE, TRAINING, Run, assert_no_logits, assert_same_run, collate, rows, train  # noqa: E402
from host_stubs import installed, real_or_stub, stubbed  # noqa: E402
from patch_models import V, llama  # noqa: E402

from logitless import losses  # noqa: E402
from logitless.integrations import hosts, llamafactory  # noqa: E402
from logitless.testing import watch_allocations  # noqa: E402


def shifted_nll(outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels and NLL of the positions that count."""
    labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
    counts = labels != -100
    z = outputs["logits"][counts].float()
    return z, labels[counts], F.cross_entropy(z, labels[counts], reduction="none")


def own_dft(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    _, _, nll = shifted_nll(outputs, labels)
    return (nll * torch.exp(-nll).detach()).sum() / (len(nll) if num_items_in_batch is None else num_items_in_batch)


def own_eaft(outputs: Any, labels: Tensor, num_items_in_batch: Any, alpha: float) -> Tensor:
    z, _, nll = shifted_nll(outputs, labels)
    p = z.detach().topk(20, dim=-1).values.softmax(-1)
    weighted = nll * (torch.special.entr(p).sum(-1) / 3).pow(alpha)
    return weighted.sum() / (len(nll) if num_items_in_batch is None else num_items_in_batch)


def own_asft(outputs: Any, labels: Tensor, reference: Tensor, weight: float) -> Tensor:
    z, _, _ = shifted_nll(outputs, labels)
    ref, _, _ = shifted_nll({"logits": reference}, labels)
    kl = F.kl_div(z.log_softmax(-1), ref.log_softmax(-1), reduction="batchmean", log_target=True)
    return own_dft(outputs, labels) + weight * kl


class StubSFT(transformers.Seq2SeqTrainer):
    def __init__(
        self,
        finetuning_args: Any,
        processor: Any,
        model_args: Any = None,
        gen_kwargs: Any = None,
        ref_model: Any = None,
        **kwargs: Any,
    ) -> None:
        kwargs["processing_class"] = kwargs.pop("tokenizer")
        super().__init__(**kwargs)
        self.finetuning_args, self.ref_model = finetuning_args, ref_model
        if processor is not None:
            self.model_accepts_loss_kwargs = False
        if finetuning_args.use_dft_loss:
            self.compute_loss_func = own_dft
        elif finetuning_args.use_eaft_loss:
            alpha = finetuning_args.eaft_alpha
            self.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: own_eaft(
                outputs, labels, num_items_in_batch, alpha
            )
        elif finetuning_args.use_asft_loss:
            self.compute_loss_func = own_asft

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.finetuning_args.use_asft_loss:
            return super().compute_loss(model, inputs, *args, **kwargs)
        with torch.no_grad():
            reference = self.ref_model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        return own_asft(model(**inputs), inputs["labels"], reference, self.finetuning_args.asft_alpha)


class StubPT(transformers.Trainer):
    def __init__(self, finetuning_args: Any, processor: Any, model_args: Any = None, **kwargs: Any) -> None:
        kwargs["processing_class"] = kwargs.pop("tokenizer")
        super().__init__(**kwargs)


class StubPreferences(transformers.Trainer):
    def __init__(
        self,
        model: Any,
        ref_model: Any,
        finetuning_args: Any,
        processor: Any,
        disable_dropout: bool = True,
        **kwargs: Any,
    ) -> None:
        kwargs["processing_class"] = kwargs.pop("tokenizer")
        self.ref_model, self.loss_type, self.ld_alpha = ref_model, finetuning_args.pref_loss, finetuning_args.ld_alpha
        super().__init__(model=model, **kwargs)


class StubDPO(StubPreferences):
    def concatenated_forward(self, model: Any, batch: Any, is_ref_model: bool = False) -> Any:
        rest = {name: value for name, value in batch.items() if name != "labels"}
        logits, labels = model(**rest, return_dict=True, use_cache=False).logits, batch["labels"][:, 1:]
        logp = logits[:, :-1].log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        weight = (labels != -100).float()
        if self.ld_alpha is not None and not is_ref_model:
            for i, row in enumerate(weight):
                shared = int(min(weight[i].sum(), weight[(i + len(weight) // 2) % len(weight)].count_nonzero()))
                row[row.nonzero()[shared:, 0]] = self.ld_alpha
        sums, means = (logp * weight).sum(-1), (logp * weight).sum(-1) / (labels != -100).sum(-1)
        scores = means if self.loss_type in ("ipo", "orpo", "simpo") else sums
        found = {"chosen_logps": scores.chunk(2)[0], "rejected_logps": scores.chunk(2)[1]}
        found |= {"chosen_logits": logits.chunk(2)[0], "rejected_logits": logits.chunk(2)[1]}
        return {**found, "chosen_logps_avg": means.chunk(2)[0]}


class StubKTO(StubPreferences):
    def forward(self, model: Any, batch: Any, prefix: str = "") -> Any:
        ids, mask = batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"]
        logits, labels = model(input_ids=ids, attention_mask=mask).logits, batch[f"{prefix}labels"][:, 1:]
        logp = logits[:, :-1].log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)
        return logits, logp.sum(-1), logp.sum(-1) / (labels != -100).sum(-1)


STUB = {
    "llamafactory.train.dpo.trainer": {"CustomDPOTrainer": StubDPO},
    "llamafactory.train.kto.trainer": {"CustomKTOTrainer": StubKTO},
    "llamafactory.train.sft.trainer": {"CustomSeq2SeqTrainer": StubSFT},
    "llamafactory.train.pt.trainer": {"CustomTrainer": StubPT},
}


def import_trainers() -> None:
    """Imports LLaMA-Factory's trainers; torchaudio, which it reads sound with, may be absent and is empty then."""
    llama()
    absent = not installed("torchaudio")
    if absent:
        sys.modules["torchaudio"] = ModuleType("torchaudio")
    try:
        importlib.import_module("llamafactory.train.sft.trainer")
        importlib.import_module("llamafactory.train.pt.trainer")
        importlib.import_module("llamafactory.train.dpo.trainer")
        importlib.import_module("llamafactory.train.kto.trainer")
    finally:
        if absent:
            del sys.modules["torchaudio"]


@pytest.fixture(params=["stub", "real"])
def host(request: pytest.FixtureRequest) -> Iterator[str]:
    with real_or_stub(request.param, "llamafactory", "0.9.5", STUB, "llamafactory"):
        if request.param == "real":
            import_trainers()
        yield request.param
        llamafactory.disable()


def make(
    host: str,
    folder: Any,
    *,
    stage: str = "sft",
    processor: Any = None,
    model: Any = None,
    data: Any = None,
    **options: Any,
) -> Any:
    """A trainer of the stage; options of TrainingArguments and of FinetuningArguments are told apart by name."""
    from llamafactory.train.pt.trainer import CustomTrainer
    from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer

    own = {name: options.pop(name) for name in list(options) if name.startswith(("use_", "asft", "eaft"))}
    if host == "real":
        from llamafactory.hparams import FinetuningArguments, TrainingArguments

        finetuning = FinetuningArguments(**own)
    else:
        names = dict.fromkeys(llamafactory.OWN_LOSSES, False)
        finetuning = SimpleNamespace(**{**names, "asft_alpha": 0.1, "eaft_alpha": 1.0, "use_badam": False, **own})
        TrainingArguments = transformers.Seq2SeqTrainingArguments
    metrics = {"compute_metrics": options.pop("compute_metrics")} if "compute_metrics" in options else {}
    arguments = TrainingArguments(output_dir=str(folder), **{**TRAINING, **options})
    sets = {"train_dataset": data or rows(), "eval_dataset": rows()[:3], "data_collator": collate, "tokenizer": None}
    common = dict(finetuning_args=finetuning, processor=processor, model=model or llama(), args=arguments)
    common = {**common, **sets, **metrics}
    if stage == "pt":
        return CustomTrainer(**common)
    reference = None
    if own.get("use_asft_loss"):
        reference = llama(
            **{name: getattr(common["model"].config, name) for name in ("vocab_size", "max_position_embeddings")}
        )
        with torch.no_grad():
            reference.lm_head.weight.mul_(0.5)
    return CustomSeq2SeqTrainer(ref_model=reference, **common)


CASES = [
    {},
    {"stage": "pt"},
    {"use_dft_loss": True},
    {"use_eaft_loss": True, "eaft_alpha": 0.7},
    {"use_asft_loss": True, "asft_alpha": 0.3},
]


@pytest.mark.parametrize("options", CASES, ids=lambda case: "-".join(case) or "nll")
def test_a_run_is_the_hosts_own(host: str, options: dict[str, Any], tmp_path: Any) -> None:
    own = train(make(host, tmp_path, **options))
    with llamafactory.enable():
        trainer = make(host, tmp_path, **options)
    ours = train(trainer)
    assert_same_run(ours, own)
    assert "_logitless_patch" in trainer.model.__dict__
    torch.testing.assert_close(
        torch.tensor(trainer.evaluate()["eval_loss"]) if "use_asft_loss" not in options else torch.tensor(0.0),
        torch.tensor(evaluated(host, tmp_path, options, trainer.model)),
        rtol=1e-4,
        atol=1e-6,
    )


def evaluated(host: str, folder: Any, options: dict[str, Any], model: Any) -> float:
    """The host's own evaluation of trained weights; LLaMA-Factory has none with ASFT."""
    if "use_asft_loss" in options:
        return 0.0
    plain = llama()
    plain.load_state_dict(model.state_dict())
    loss: float = make(host, folder, model=plain, **options).evaluate()["eval_loss"]
    return loss


@pytest.mark.parametrize(
    "options",
    [CASES[0], *(pytest.param(case, marks=pytest.mark.slow) for case in CASES[2:])],
    ids=lambda case: "-".join(case) or "nll",
)
def test_no_logits_are_allocated(host: str, options: dict[str, Any], tmp_path: Any) -> None:
    def run() -> Run:
        model = llama(vocab_size=LARGE, max_position_embeddings=256)
        return train(make(host, tmp_path, model=model, data=rows(vocabulary=LARGE, times=10), max_steps=1, **options))

    own = run()
    with llamafactory.enable():
        assert_no_logits(run(), own)


def test_a_loss_of_the_registry_trains(host: str, tmp_path: Any) -> None:
    own = train(make(host, tmp_path, use_dft_loss=True))
    with llamafactory.enable(loss="dft"):
        ours = train(make(host, tmp_path))
    assert_same_run(ours, own)
    with llamafactory.enable(loss=losses.NLL(label_smoothing=0.1)):
        smoothed = train(make(host, tmp_path))
    assert abs(smoothed.logs[0]["loss"] - train(make(host, tmp_path)).logs[0]["loss"]) > 1e-3


def test_a_processor_changes_the_normalisation_as_in_the_host(host: str, tmp_path: Any) -> None:
    """With one, LLaMA-Factory passes no counts to the model, but still to its own loss functions."""
    for options in ({}, {"use_dft_loss": True}):
        own = train(make(host, tmp_path, processor=SimpleNamespace(save_pretrained=print), **options))
        with llamafactory.enable():
            ours = train(make(host, tmp_path, processor=SimpleNamespace(save_pretrained=print), **options))
        assert_same_run(ours, own)


def preferences(host: str, folder: Any, cls: str, **options: Any) -> Any:
    """A trainer of the stage `dpo` or `kto`, of two pairs a micro-batch: the chosen answers first."""
    stage = "kto" if "KTO" in cls else "dpo"
    trainer = getattr(importlib.import_module(f"llamafactory.train.{stage}.trainer"), cls)
    own = {name: options.pop(name) for name in list(options) if name.startswith(("pref_", "ld_", "simpo", "kto_"))}
    if host == "real":
        from llamafactory.hparams import FinetuningArguments, TrainingArguments

        finetuning = FinetuningArguments(stage=stage, **own)
        finetuning.use_ref_model = own.get("pref_loss", "sigmoid") not in ("orpo", "simpo")
    else:
        finetuning = SimpleNamespace(**{"pref_loss": "sigmoid", "ld_alpha": None, **own})
        TrainingArguments = transformers.Seq2SeqTrainingArguments
    reference = llama()
    with torch.no_grad():
        reference.lm_head.weight.mul_(0.5)
    return trainer(
        model=options.pop("model", None) or llama(),
        ref_model=reference,
        finetuning_args=finetuning,
        processor=None,
        args=TrainingArguments(output_dir=str(folder), **{**TRAINING, "learning_rate": 1e-3, **options}),
        train_dataset=rows(),
        data_collator=collate_answers if stage == "kto" else collate_pairs,
        tokenizer=None,
    )


def collate_pairs(examples: list[Any]) -> dict[str, Tensor]:
    return collate([*examples, *({**x, "input_ids": x["input_ids"][::-1]} for x in examples)])


def collate_answers(examples: list[Any]) -> dict[str, Tensor]:
    moved = collate([examples[-1], *examples[:-1]])
    tags = torch.arange(len(examples)) % 2 == 0
    return {**collate(examples), **{f"kl_{name}": value for name, value in moved.items()}, "kto_tags": tags}


@pytest.mark.parametrize("options", [{}, {"ld_alpha": 0.3}, {"pref_loss": "simpo"}, {"pref_loss": "ipo"}], ids=str)
def test_preferences_are_scored_as_in_the_host(host: str, options: dict[str, Any], tmp_path: Any) -> None:
    batch = collate_pairs(rows()[:2])
    batch["labels"][0, 6:] = -100

    def scored() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        trainer = preferences(host, tmp_path, "CustomDPOTrainer", **options)
        found = {name: x.mean() for name, x in trainer.concatenated_forward(trainer.model, dict(batch)).items()}
        (found["chosen_logps"] - 2 * found["rejected_logps"] + found["chosen_logps_avg"]).backward()
        return found, {name: p.grad for name, p in trainer.model.named_parameters()}

    own = scored()
    with llamafactory.enable():
        ours = scored()
    for mine, theirs in zip(ours, own, strict=True):
        assert mine.keys() == theirs.keys()
        for name, expected in theirs.items():
            torch.testing.assert_close(mine[name], expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_single_answers_are_scored_as_in_the_host(host: str, tmp_path: Any) -> None:
    batch = collate_answers(rows()[:3])

    def scored(prefix: str) -> list[Tensor]:
        trainer = preferences(host, tmp_path, "CustomKTOTrainer")
        logits, sums, means = trainer.forward(trainer.model, dict(batch), prefix=prefix)
        return [logits[1:].nansum(), sums, means]

    for prefix in ("", "kl_"):
        own = scored(prefix)
        with llamafactory.enable():
            ours = scored(prefix)
        for mine, theirs in zip(ours, own, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3)


STAGES = [
    ("CustomDPOTrainer", {}),
    ("CustomDPOTrainer", {"pref_loss": "simpo", "pref_ftx": 0.1}),
    ("CustomDPOTrainer", {"pref_loss": "orpo"}),
    ("CustomDPOTrainer", {"ld_alpha": 0.5, "pref_ftx": 0.2}),
    ("CustomKTOTrainer", {}),
]


@pytest.mark.parametrize(("cls", "options"), STAGES, ids=str)
def test_runs_on_preferences_are_the_hosts_own(cls: str, options: dict[str, Any], host: str, tmp_path: Any) -> None:
    """Losses, weights and every metric; of the real package, whose losses the stub does not have."""
    if host == "stub":
        pytest.skip("the stub has no losses of preferences")

    def run() -> tuple[Run, list[dict[str, float]]]:
        trainer = preferences(host, tmp_path, cls, **options)
        found = train(trainer)
        return found, [log for log in trainer.state.log_history if "loss" in log]

    own, own_logs = run()
    with llamafactory.enable():
        ours, logs = run()
    assert_same_run(ours, own)
    assert any("rewards/chosen" in log and "logits/chosen" in log for log in own_logs)
    for mine, theirs in zip(logs, own_logs, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_preferences_allocate_no_logits(host: str, tmp_path: Any) -> None:
    def allocated() -> Any:
        model = llama(vocab_size=LARGE, max_position_embeddings=256)
        trainer = preferences(host, tmp_path, "CustomDPOTrainer", model=model)
        batch = collate_pairs(rows(vocabulary=LARGE, times=10)[:1])
        with watch_allocations() as seen:
            found = trainer.concatenated_forward(trainer.model, batch)
            (found["chosen_logps"] - found["rejected_logps"]).sum().backward()
        return seen

    own = allocated()
    with llamafactory.enable():
        ours = allocated()
    assert own.largest > 40 * 2**20 and ours.largest <= CHUNK and ours.peak < own.peak


def test_another_loss_in_a_preference_stage_is_refused(host: str, tmp_path: Any) -> None:
    with (
        llamafactory.enable(loss="dft"),
        pytest.raises(hosts.UnsupportedHostError, match=r"loss=.dft.: .*DPO"),
    ):
        preferences(host, tmp_path, "CustomDPOTrainer")


def test_metrics_of_evaluation_see_logits(host: str, tmp_path: Any) -> None:
    seen = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions.shape)
        return {}

    for options in ({}, {"use_dft_loss": True}):
        with llamafactory.enable():
            trainer = make(host, tmp_path, compute_metrics=metrics, **options)
        trainer.evaluate()
        assert seen.pop()[-1] == V and not seen


def test_what_is_not_served_is_refused_by_name(host: str, tmp_path: Any) -> None:
    with llamafactory.enable(), pytest.raises(hosts.UnsupportedHostError, match="label_smoothing_factor"):
        make(host, tmp_path, label_smoothing_factor=0.1)
    with llamafactory.enable(loss="nll"), pytest.raises(hosts.UnsupportedHostError, match="enabled already"):
        llamafactory.enable()
    with (
        llamafactory.enable(loss="dft"),
        pytest.raises(hosts.UnsupportedHostError, match=r"use_eaft_loss: enable\(loss='dft'\)"),
    ):
        make(host, tmp_path, use_eaft_loss=True)


def test_an_exception_in_the_host_leaves_the_model_as_it_was(host: str, tmp_path: Any) -> None:
    model = llama()
    with llamafactory.enable(), pytest.raises(TypeError):
        make(host, tmp_path, model=model, compute_metrics=print, no_such_argument=1)
    from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer

    arguments = make(host, tmp_path).args
    with llamafactory.enable(), pytest.raises(TypeError, match="no_such"):
        CustomSeq2SeqTrainer(
            make(host, tmp_path).finetuning_args, None, model=model, args=arguments, tokenizer=None, no_such=1
        )
    assert "forward" not in model.__dict__ and "_logitless_patch" not in model.__dict__
    with llamafactory.enable():
        pass
    assert CustomSeq2SeqTrainer.__init__.__module__ in ("llamafactory.train.sft.trainer", __name__)


def test_another_release_or_interface_changes_nothing() -> None:
    class Changed(StubSFT):
        def __init__(self, finetuning_args: Any, processor: Any, surprise: Any, **kwargs: Any) -> None:
            raise NotImplementedError

    def enabled() -> bool:
        return hasattr(StubSFT.__init__, "__wrapped__") or hasattr(StubPT.__init__, "__wrapped__")

    for version in ("0.9.4", "0.9.6", "1.0.0"):
        with stubbed("llamafactory", version, STUB):
            with pytest.raises(hosts.UnsupportedHostError, match=f"llamafactory {version}: logitless was tested with"):
                llamafactory.enable()
            assert not enabled()
    changed = {**STUB, "llamafactory.train.sft.trainer": {"CustomSeq2SeqTrainer": Changed}}
    with stubbed("llamafactory", "0.9.5", changed):
        with pytest.raises(
            hosts.UnsupportedHostError, match=r"Changed.__init__: expected the parameters .*'gen_kwargs'"
        ):
            llamafactory.enable()
        assert not enabled()
    if not installed("llamafactory"):
        with pytest.raises(
            hosts.UnsupportedHostError, match=r"llamafactory: not installed; expected >=0\.9\.5,<0\.9\.6"
        ):
            llamafactory.enable()
