"""The model and its tokenizer: loading, GGUF conversion, precision, attention, and what is refused.

A GGUF model loaded through Transformers counts as quantised although its tensors are plain floats: it can neither be
saved nor trained. It is rebuilt once from its configuration and tensors and kept as an ordinary folder in the cache,
named by a hash of the file.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from logitless.losses import Loss
from logitless.training import adapters, files
from logitless.training.checks import embedding_rows, learned_positions
from logitless.training.config import TrainOptions
from logitless.training.errors import InputError
from logitless.training.parallel import World
from logitless.training.places import unreadable
from logitless.training.template import set_template
from logitless.types import BackendName, BackwardName


def locate(options: TrainOptions) -> str:
    """The name for `from_pretrained`: a hub id or a folder. A GGUF model is converted on the way."""
    name = options.model_name_or_path
    path = Path(name)
    if path.suffix.lower() == ".gguf":
        return str(convert_gguf(path, cache_folder(options)))
    if options.gguf_file is not None:
        return str(convert_gguf(_gguf_inside(name, options.gguf_file), cache_folder(options)))
    return name


def _gguf_inside(name: str, file: str) -> Path:
    from transformers.utils import cached_file

    try:
        return Path(cached_file(name, file))
    except OSError as error:
        raise unreadable(name, f"file {file}", error) from error


def locate_once(options: TrainOptions, world: World) -> str:
    """`locate`, with the main process first: it converts and downloads what the others then find."""
    if not world.is_main:
        world.wait()
        return locate(options)
    source = locate(options)
    world.wait()
    return source


def cache_folder(options: TrainOptions) -> Path:
    """Where converted models and reference log-probabilities are kept: `cache_dir`, or the user's cache folder."""
    if options.cache_dir is not None:
        return Path(options.cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "logitless"


def convert_gguf(file: Path, cache: Path) -> Path:
    """The folder with the model and tokenizer of a GGUF file in float32, made on first use.

    Raises:
        InputError: the `gguf` package is missing, or Transformers cannot read the file.
    """
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(1 << 24):
            digest.update(block)
    folder = cache / "gguf" / f"{file.stem}-{digest.hexdigest()[:16]}"
    if not folder.is_dir():
        if importlib.util.find_spec("gguf") is None:
            raise InputError(f"{file}: reading GGUF needs the gguf package (pip install gguf)")
        with files.new_folder(folder) as unfinished:
            _convert(file, unfinished)
    return folder


def _convert(file: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    except Exception as error:  # a damaged file can break the reader anywhere
        raise InputError(f"{file}: Transformers cannot read this GGUF file: {error}") from error
    derived = {"quantization_config", "_name_or_path", "transformers_version", "model_type", "architectures"}
    settings = {key: value for key, value in quantised.config.to_dict().items() if key not in derived}
    plain = type(quantised)(type(quantised.config)(**settings))
    plain.load_state_dict(quantised.state_dict())
    plain.generation_config = copy.deepcopy(quantised.generation_config)
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_tokenizer(source: str, options: TrainOptions) -> Any:
    """The tokenizer of the model, or of an adapter's base; with the chat template that the options name, if any.

    Raises:
        InputError: no tokenizer there, or a template that cannot be used with it.
    """
    from transformers import AutoTokenizer

    source, revision = adapters.tokenizer_source(source, options)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=revision, trust_remote_code=options.trust_remote_code
        )
    except Exception as error:  # a damaged file can break the reader anywhere
        raise unreadable(source, "tokenizer", error) from error
    set_template(tokenizer, options)
    return tokenizer


def load_model(source: str, options: TrainOptions, world: World, *, frozen: bool = False) -> Any:
    """The model that a source holds, as it was given: with an adapter, its base under it.

    The adapter is merged into the base unless the run trains adapters: then both of a comparison are computed alike.

    Raises:
        InputError: `load_base`'s, or an adapter that does not fit its base or cannot be merged.
    """
    adapter = adapters.find_adapter(source, options)
    if adapter is None:
        return load_base(source, options.model_revision, options, world, frozen=frozen)
    base = load_base(adapter.base, adapter.base_revision, options, world, frozen=True)
    model = adapters.put_on(base, source, adapter.revision, adapter.config, trainable=False)
    if not options.use_peft:
        model = adapters.merged(model, source)
    model.requires_grad_(not frozen)
    return model


def load_base(source: str, revision: str, options: TrainOptions, world: World, *, frozen: bool = False) -> Any:
    """The causal LM, ready for `patch`: plain weights, head checked, kernels as asked.

    It is on the device of the process, or in the host's memory where it is about to be sharded.

    Raises:
        InputError: nothing there, not a causal LM, or one without some of its weights.
    """
    from transformers import AutoModelForCausalLM

    attention = choose_attention(options, world.device)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            source,
            revision=revision,
            trust_remote_code=options.trust_remote_code,
            dtype=options.dtype if options.dtype == "auto" else getattr(torch, options.dtype),
            attn_implementation=attention,
            output_loading_info=True,
        )
    except Exception as error:  # a damaged file can break the reader anywhere
        raise unreadable(source, "causal language model", error) from error
    _require_weights(model, set(report["missing_keys"]), source)
    if getattr(model, "is_quantized", False):
        raise InputError(f"{source}: the model is quantised, and quantised weights cannot be trained")
    model.to(world.strategy.host(world.device))
    model.requires_grad_(not frozen)
    if options.use_liger_kernel:
        apply_liger(model, world.device)
    return model


def patched(model: Any, options: TrainOptions, loss: Loss) -> Any:
    """The model with logitless behind its loss; as it is where the options ask for its own logits.

    Raises:
        InputError: a model that `logitless.patch` refuses.
    """
    if options.backend == "materialised":
        return model
    from logitless.integrations.transformers import patch

    backend, backward = cast(BackendName, options.backend), cast(BackwardName, options.backward)
    try:
        return patch(model, loss=loss, backend=backend, backward=backward)
    except (TypeError, ValueError) as error:
        raise InputError(f"{options.model_name_or_path}: {error}") from error


def _load_under_lora(options: TrainOptions, source: str, resumed: Path | None, loss: Loss, world: World) -> Any:
    """The frozen base, patched, under the adapter to train."""
    adapter = adapters.find_adapter(source, options)
    base, revision = (source, options.model_revision) if adapter is None else (adapter.base, adapter.base_revision)
    model = patched(load_base(base, revision, options, world, frozen=True), options, loss)
    return adapters.add_lora(model, options, adapter, resumed)


def load_trained(
    options: TrainOptions, source: str, resumed: Path | None, loss: Loss, world: World, *, dropout: bool
) -> Any:
    """The model to train: patched, under its adapter if there is one, from the checkpoint if a run goes on."""
    if options.use_peft:
        model = _load_under_lora(options, source, resumed, loss, world)
    else:
        model = patched(load_model(source if resumed is None else str(resumed), options, world), options, loss)
    if not dropout:
        disable_dropout(model)
    if options.gradient_checkpointing:
        checkpoint_activations(model)
    return model


def _require_weights(model: Any, missing: set[str], source: str) -> None:
    """Raises where the model has no linear head, or parameters that the checkpoint does not have."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module) or not isinstance(getattr(head, "weight", None), torch.Tensor):
        raise InputError(f"{source}: {type(model).__name__} has no linear output head")
    names = {f"{name}.weight" for name, module in model.named_modules() if module is head}
    if names & missing:
        raise InputError(
            f"{source}: the checkpoint has no weights for the output head ({', '.join(sorted(names))}), which would be "
            "random; use a checkpoint of the causal language model, not of its base model"
        )
    if absent := sorted(missing & {name for name, _ in model.named_parameters()}):
        some = ", ".join(absent[:3]) + (f" and {len(absent) - 3} more" if len(absent) > 3 else "")
        raise InputError(f"{source}: the checkpoint has no weights for {some}, which would be random; its config.json "
                         "describes another model")  # fmt: skip


def choose_attention(options: TrainOptions, device: torch.device) -> str | None:
    """The `attn_implementation` to load with; None lets Transformers take SDPA where the model has it.

    Raises:
        InputError: flash attention is asked for, and there is no GPU or no flash-attn.
    """
    asked = options.attn_implementation
    installed = importlib.util.find_spec("flash_attn") is not None
    if asked == "auto":
        return "flash_attention_2" if installed and device.type == "cuda" else None
    if asked == "flash_attention_2" and not (installed and device.type == "cuda"):
        missing = "flash-attn is not installed" if device.type == "cuda" else f"the device is {device.type}"
        raise InputError(f"attn_implementation=flash_attention_2 needs flash-attn and a GPU: {missing}")
    return asked


def uses_flash_attention(model: Any) -> bool:
    """Whether the model was loaded with one of the flash attention implementations."""
    return "flash" in (getattr(model.config, "_attn_implementation", None) or "")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode, and back into the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout probability to 0: of dropout modules, and those that modules keep as numbers."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or name == "layerdrop"):
                setattr(module, name, 0.0)


def checkpoint_activations(model: Any) -> None:
    """Recomputes activations in the backward pass, in PyTorch's non-reentrant form.

    Raises:
        InputError: the model's class does not support it.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise InputError(f"gradient_checkpointing: {error}") from error


def hide_progress_bars() -> None:
    """Turns Transformers' loading and saving bars off: they would cut through the run's own."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def apply_liger(model: Any, device: torch.device) -> None:
    """Liger's kernels for the layers; the loss stays ours.

    Raises:
        InputError: no GPU, no liger-kernel, or a model type that it does not know.
    """
    if device.type != "cuda" or importlib.util.find_spec("liger_kernel") is None:
        missing = f"the device is {device.type}" if device.type != "cuda" else "liger-kernel is not installed"
        raise InputError(f"use_liger_kernel needs a GPU and liger-kernel: {missing}")
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    apply = MODEL_TYPE_TO_APPLY_LIGER_FN.get(model.config.model_type)
    if apply is None:
        raise InputError(f"use_liger_kernel: liger-kernel has no kernels for model type {model.config.model_type!r}")
    wanted = {"rope": True, "rms_norm": True, "swiglu": True, "cross_entropy": False}
    wanted["fused_linear_cross_entropy"] = False
    known = inspect.signature(apply).parameters
    apply(model=model, **{name: value for name, value in wanted.items() if name in known})


def _outputs(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    """Hidden states of a patched model, logits of another, by its own call, which puts sharded weights together."""
    hidden_only = {"hidden_only": True} if hasattr(model, "_logitless_patch") else {}
    found: torch.Tensor = model(**inputs, use_cache=False, **hidden_only).logits
    return found


@torch.no_grad()
def check_packing(model: Any) -> None:
    """Runs two short sequences apart and packed; raises InputError where the model lets them see each other.

    Families whose positions or states do not restart with `position_ids` (state-space models, ALiBi) are found here
    rather than in a worse model. Flash attention is checked on GPU tensors, SDPA and eager anywhere.
    """
    vocabulary, device = embedding_rows(model), model.get_input_embeddings().weight.device
    parts = [torch.arange(1, 1 + n, device=device)[None] * 7 % vocabulary for n in (5, 4)]
    positions = torch.cat([torch.arange(part.shape[1], device=device) for part in parts])[None]
    try:
        with evaluating(model):
            apart = torch.cat([_outputs(model, input_ids=part) for part in parts], dim=1)
            together = _outputs(model, input_ids=torch.cat(parts, dim=1), position_ids=positions)
    except TypeError as error:
        raise InputError(f"packing: {type(model).__name__} takes no position_ids, so rows cannot be packed") from error
    error_size, size = (together - apart).float().abs().max(), apart.float().abs().max()
    tolerance = 64 * torch.finfo(model.dtype).eps * size
    if not error_size <= tolerance:
        raise InputError(
            f"packing: {type(model).__name__} with {model.config._attn_implementation} attention lets packed rows see "
            f"each other (hidden states differ by {error_size:.2g}); use --no-packing --no-padding_free"
        )


@torch.no_grad()
def check_width(model: Any, width: int) -> None:
    """Raises InputError where a model with a table of positions cannot read a packed row of `width` tokens.

    Positions that restart are within the table. But GPT-Neo keeps a mask that is as wide as the table.
    """
    most = learned_positions(model)
    if most is None or width <= most:
        return
    ids = torch.ones(1, width, dtype=torch.long, device=model.get_input_embeddings().weight.device)
    try:
        _outputs(model, input_ids=ids, position_ids=ids.cumsum(1) % most)
    except (RuntimeError, IndexError) as error:
        raise InputError(
            f"packing: {type(model).__name__} has {most} positions and cannot read a packed row of {width} tokens; "
            f"use --no-packing --no-padding_free, or packing with a max_length of at most {most}: {error}"
        ) from error
