"""A patched model that is pickled, saved whole, copied or sent to another process computes the same loss there."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from patch_models import batch, llama  # noqa: E402

from logitless import losses  # noqa: E402
from logitless.integrations.transformers import patch, unpatch  # noqa: E402


def adapted(patch_first: bool) -> Any:
    """A LoRA model around a patched one, or the other way round."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    if patch_first:
        return peft.get_peft_model(patch(llama()), settings).train()
    return patch(peft.get_peft_model(llama(), settings)).train()


def saved(model: Any) -> Any:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


WAYS: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "old_pickle": lambda model: pickle.loads(pickle.dumps(model, protocol=2)),
    "torch.save": saved,
    "deepcopy": copy.deepcopy,
    "twice": lambda model: saved(copy.deepcopy(model)),
}
MODELS: dict[str, Callable[[], Any]] = {
    "plain": lambda: patch(llama()),
    "tied": lambda: patch(llama(tie_word_embeddings=True)),
    "dft": lambda: patch(llama(), loss=losses.DFT(power=2.0), temperature=0.7, eval_logits=True),
    "peft_outside": lambda: adapted(True),
    "peft_inside": lambda: adapted(False),
}


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_a_pickled_model_is_patched_in_the_same_way_and_stands_on_its_own(way: str, name: str, used: bool) -> None:
    model, inputs = MODELS[name](), batch()
    if used:
        model(**inputs)  # the self-check has run, and the arguments are known
    other = WAYS[way](model)
    ours, theirs = model(**inputs), other(**inputs)
    assert theirs.logits is None
    assert torch.equal(ours.loss, theirs.loss)
    before = ours.loss.detach().clone()
    theirs.loss.backward()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    assert torch.equal(model(**inputs).loss, before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not torch.equal(other(**inputs).loss, before)
    assert model.eval()(**inputs).logits is None or name == "dft"
    assert (other.eval()(**inputs, loss="nll").logits is None) == (name != "dft")


@pytest.mark.parametrize("way", WAYS)
def test_its_signature_is_the_classs_own_and_unpatch_undoes_it(way: str) -> None:
    plain = llama()
    other = WAYS[way](patch(llama()))
    assert inspect.signature(other.forward) == inspect.signature(plain.forward)
    assert other.forward.__self__ is other
    assert set(unpatch(other).__dict__) == set(plain.__dict__)
    assert other(**batch()).logits is not None
    patch(other)
    assert other(**batch()).logits is None


def test_the_pickle_of_a_forward_brings_its_model_along() -> None:
    model, inputs = patch(llama()), batch()
    forward = pickle.loads(pickle.dumps(model.forward))
    assert torch.equal(forward(**inputs).loss, model(**inputs).loss)
    assert torch.equal(forward.__self__(**inputs).loss, model(**inputs).loss)


def test_checkpoints_hold_what_those_of_the_plain_model_hold(tmp_path: Path) -> None:
    plain, model = llama(), patch(llama())
    assert plain.state_dict().keys() == model.state_dict().keys()
    plain.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "patched")
    for file in ("config.json", "model.safetensors", "generation_config.json"):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "patched" / file).read_bytes()


def worker(rank: int, model: Any, inputs: dict[str, Tensor], folder: str) -> None:
    output = model(**inputs)
    torch.save((output.loss.detach(), output.logits), f"{folder}/{rank}.pt")


def test_a_spawned_process_gets_a_patched_model(tmp_path: Path) -> None:
    model, inputs = patch(llama(), loss="dft"), batch()
    torch.multiprocessing.spawn(worker, args=(model, inputs, str(tmp_path)), nprocs=1)
    loss, logits = torch.load(tmp_path / "0.pt")
    assert logits is None
    torch.testing.assert_close(loss, model(**inputs).loss.detach())


@pytest.fixture
def accelerate() -> Iterator[Any]:
    """The library, without the settings that another test's Trainer has left in it."""
    library = pytest.importorskip("accelerate")
    library.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield library
    library.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_a_host_that_wraps_the_forward_as_a_function_wraps_the_patched_one(accelerate: Any) -> None:
    """What accelerate does for mixed precision, and undoes for a checkpoint."""
    model, inputs, signature = patch(llama()), batch(), inspect.signature(llama().forward)
    expected = model(**inputs).loss
    wrapped = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
    assert inspect.signature(wrapped.forward) == signature
    output = wrapped(**inputs)
    assert output.logits is None
    torch.testing.assert_close(output.loss, expected, rtol=1e-2, atol=1e-2)
    with pytest.raises(ValueError, match="wrapped after the patch"):
        unpatch(model)
    model = accelerate.utils.extract_model_from_parallel(wrapped, keep_fp32_wrapper=False)
    assert inspect.signature(model.forward) == signature
    assert torch.equal(model(**inputs).loss, expected)
    assert unpatch(model)(**inputs).logits is not None
