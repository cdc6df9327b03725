"""LoRA: a new adapter to train, and a folder that holds an adapter as the model to start from.

    folder with adapter_config.json ──> base that it names + adapter ──> use_peft: the adapter is trained, base frozen
                                                                    └──> otherwise: the adapter is merged into the base

The model as it was given is the base with its adapter in both cases, and the reference too. What is saved is an
adapter of the base that it came with, or a whole model: `from_pretrained` of either gives the model that was trained.
A new adapter over a merged one would name the wrong base when saved, so a given one is trained on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from logitless.training.config import TrainOptions
from logitless.training.errors import InputError, nearest
from logitless.training.places import ADAPTER_CONFIG, MODEL_CONFIG, is_hub_id, unreadable
from logitless.training.sharding import is_part, like, parameters_of

ADAPTER_NAME = "default"  # peft's name of the adapter whose files lie in the folder itself
LORA_R, LORA_ALPHA, LORA_DROPOUT = 16, 32, 0.05  # of a new adapter, where the options leave them open
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError)  # what peft raises for files that do not fit
# Names that peft saves an embedding or a head of another size by, whole, and those that it saves beside, a second time
_WHOLE = (".weight", ".base_layer.weight", ".token_adapter.base_layer.weight")
_TWICE = (".modules_to_save.weight", ".token_adapter.trainable_tokens_delta")


class Adapter(NamedTuple):
    """An adapter in a folder or on the hub, and the model that it belongs on."""

    source: str
    revision: str
    config: Any  # peft's
    settings: Mapping[str, Any]  # the same as the file has it
    base: str
    base_revision: str

    def digest(self) -> str:
        """A hash of its weights' file and of what says how they are used."""
        digest = hashlib.sha256(json.dumps(_usage(self.settings)).encode())
        for name in ("adapter_model.safetensors", "adapter_model.bin"):
            if file := _file(self.source, name, self.revision):
                digest.update(file.read_bytes())
        return digest.hexdigest()[:32]


def find_adapter(source: str, options: TrainOptions) -> Adapter | None:
    """The adapter that a folder or hub id holds; None where it holds a whole model.

    Raises:
        InputError: peft is missing, or the adapter can be neither trained nor merged, or its base is not there.
    """
    file = _file(source, ADAPTER_CONFIG, options.model_revision)
    if file is None:
        return None
    _require_no_weights(source)
    config, settings = _read_config(source, options.model_revision, file)
    base, revision = config.base_model_name_or_path, config.revision or "main"
    _require_base(source, base, revision)
    return Adapter(source, options.model_revision, config, settings, base, revision)


def _read_config(source: str, revision: str, file: Path) -> tuple[Any, dict[str, Any]]:
    """An adapter's configuration as peft reads it, and as it stands in its file.

    Raises:
        InputError: it cannot be read whole, or it says what is not served here.
    """
    peft = _peft(f"{source} holds an adapter, which")
    try:
        config = peft.PeftConfig.from_pretrained(source, revision=revision)
        settings = json.loads(file.read_text(encoding="utf-8"))
    except _UNREADABLE as error:
        raise InputError(f"{source}: its {ADAPTER_CONFIG} cannot be read: {type(error).__name__}: {error}") from error
    if config.is_prompt_learning:
        raise InputError(f"{source}: an adapter of kind {config.peft_type.value} is made of virtual tokens, which can "
                         "be neither merged into the model nor trained on here")  # fmt: skip
    if getattr(config, "alora_invocation_tokens", None):
        raise InputError(f"{source}: an activated LoRA (alora_invocation_tokens) acts on a part of each row, which is "
                         "not served here")  # fmt: skip
    # peft drops what it does not know; a newer one also writes what is off, and sizes that then mean nothing
    unknown = (name for name in settings if not hasattr(config, name))
    if dropped := [name for name in unknown if settings[name] and isinstance(settings[name], (bool, dict))]:
        raise InputError(f"{source}: peft {peft.__version__} does not know {', '.join(dropped)} in {ADAPTER_CONFIG}, "
                         f"which peft {settings.get('peft_version', '')} wrote; install that one")  # fmt: skip
    return config, settings


def _file(source: str, name: str, revision: str) -> Path | None:
    """The file of this name in a folder or hub repository; None where it has none."""
    from transformers.utils import cached_file

    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    try:
        found = cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False,
                            _raise_exceptions_for_connection_errors=False)  # fmt: skip
    except (OSError, ValueError):  # no such repository
        return None
    return None if found is None else Path(found)


def _require_no_weights(source: str) -> None:
    """Raises where a folder holds a model's weights beside the adapter: `from_pretrained` would load both.

    A model's configuration alone, which some trainers copy beside the adapter, is no model.
    """
    folder = Path(source)
    weights = [path.name for pattern in ("model*.safetensors", "pytorch_model*.bin") for path in folder.glob(pattern)]
    if weights:
        raise InputError(f"{source}: it holds a whole model ({weights[0]}) and an adapter ({ADAPTER_CONFIG}), so which "
                         "of them to start from is open; move one of them into a folder of its own")  # fmt: skip


def _require_base(source: str, base: str | None, revision: str) -> None:
    """Raises where the model that an adapter names as its base is not there, or is an adapter itself."""
    name = f"{source}: the adapter's base model {base!r} (base_model_name_or_path in {ADAPTER_CONFIG})"
    if base is None:
        raise InputError(f"{source}: its {ADAPTER_CONFIG} names no base_model_name_or_path")
    if _file(base, ADAPTER_CONFIG, revision):
        raise InputError(f"{name} holds an adapter itself; merge that one into its own base first")
    if not _file(base, MODEL_CONFIG, revision):
        hub = ", neither as a folder here nor in the hub's cache or on the hub" if is_hub_id(base) else ""
        raise InputError(f"{name} was not found{hub}; write there where it is")


def tokenizer_source(source: str, options: TrainOptions) -> tuple[str, str]:
    """Where a model's tokenizer is, and its revision: with the adapter, or else with the adapter's base."""
    revision = options.model_revision
    files = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")
    adapter = None if any(_file(source, name, revision) for name in files) else find_adapter(source, options)
    return (source, revision) if adapter is None else (adapter.base, adapter.base_revision)


def require_free(options: TrainOptions, adapter: Adapter | None) -> None:
    """Raises where what the run saves would not be what `from_pretrained` reads, or would change the adapter's base."""
    if adapter is not None and Path(options.output_dir).resolve() == Path(adapter.base).resolve():
        raise InputError(f"output_dir {options.output_dir} is the base of the adapter in {adapter.source}, which would "
                         "then lie on another model; choose another --output_dir")  # fmt: skip
    other = MODEL_CONFIG if options.use_peft else ADAPTER_CONFIG
    if (Path(options.output_dir) / other).is_file():
        held, saved = ("a whole model", "an adapter") if options.use_peft else ("an adapter", "a whole model")
        raise InputError(f"output_dir {options.output_dir} holds {held} ({other}), which would be loaded together with "
                         f"{saved} that this run saves there; choose another --output_dir")  # fmt: skip


def idle_options(options: TrainOptions) -> list[str]:
    """A note for the log where options of LoRA are given to a run without it; saved configurations have them too."""
    names = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
    given = [name for name in names if getattr(options, name) is not None]
    if options.use_peft or not given:
        return []
    return [f"{', '.join(given)}: no effect without use_peft; all weights are trained"]


# ---------------------------------------------------------------------------------------------------------------------
# Adapters on a model


def add_lora(model: Any, options: TrainOptions, adapter: Adapter | None, resumed: Path | None) -> Any:
    """The frozen model under a trainable adapter: that of a checkpoint, or the given one, or else a new one.

    Raises:
        InputError: peft is missing or does not take the options, or they ask for another adapter than the given one.
    """
    if adapter is None and resumed is None:
        return _new_lora(model, options)
    source, revision = (adapter.source, adapter.revision) if adapter and not resumed else (str(resumed), None)
    config = _peft("use_peft").PeftConfig.from_pretrained(source, revision=revision)
    if config.peft_type != "LORA":
        raise InputError(f"use_peft: {source} holds an adapter of kind {config.peft_type.value}, and LoRA is what is "
                         "trained here; without use_peft it is merged into its base")  # fmt: skip
    _require_same_lora(model, options, config, source)
    if options.lora_dropout is not None:
        config.lora_dropout = options.lora_dropout
    return put_on(model, source, revision, config, trainable=True)


def _new_lora(model: Any, options: TrainOptions) -> Any:
    peft = _peft("use_peft")
    targets = options.lora_target_modules
    if targets and targets != ("all-linear",):
        _require_modules(model, targets)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=LORA_R if options.lora_r is None else options.lora_r,
        lora_alpha=LORA_ALPHA if options.lora_alpha is None else options.lora_alpha,
        lora_dropout=LORA_DROPOUT if options.lora_dropout is None else options.lora_dropout,
        target_modules="all-linear" if targets == ("all-linear",) else list(targets) if targets else None,
    )
    try:
        return peft.get_peft_model(model, config)
    except ValueError as error:
        unknown = f"peft has no choice for models of type {model.config.model_type!r}; expected names, or all-linear"
        raise InputError(f"lora_target_modules: {error if targets else unknown}") from error


def _require_modules(model: nn.Module, targets: Sequence[str]) -> None:
    """Raises where a name is that of no module: peft adapts the others and says nothing."""
    for name in targets:
        if not _adapted_modules(model, [name]):
            known = {found.rpartition(".")[2] for found, module in model.named_modules() if hasattr(module, "weight")}
            raise InputError(f"lora_target_modules: the model has no module called {name!r}{nearest(name, known)}")


def _require_same_lora(model: Any, options: TrainOptions, config: Any, source: str) -> None:
    """Raises where the options ask for an adapter of another shape than the one that is trained on."""
    numbers = {"lora_r": config.r, "lora_alpha": config.lora_alpha}
    for name, own in numbers.items():
        if getattr(options, name) not in (None, own):
            raise InputError(_other_lora(name, getattr(options, name), own, source))
    asked, own = options.lora_target_modules, config.target_modules
    if asked and _adapted_modules(model, asked) != _adapted_modules(model, own):
        own = own if isinstance(own, str) else sorted(own)
        raise InputError(_other_lora("lora_target_modules", list(asked), own, source))


def _other_lora(name: str, given: Any, own: Any, source: str) -> str:
    return (f"{name}: the adapter in {source}, which is trained on, has {own!r}, got {given!r}; leave {name} out, or "
            "merge the adapter into its base (peft's merge_and_unload) and start from that")  # fmt: skip


def _adapted_modules(model: nn.Module, names: Any) -> set[str]:
    """The modules that peft adapts for these names, or for a pattern, or for all-linear."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists
    from transformers.pytorch_utils import Conv1D

    if names in ("all-linear", ("all-linear",)):
        head = model.get_output_embeddings()  # type: ignore[operator]
        modules = model.named_modules()
        return {name for name, module in modules if isinstance(module, (nn.Linear, Conv1D)) and module is not head}
    config = LoraConfig(target_modules=names if isinstance(names, str) else list(names))
    return {name for name, _ in model.named_modules() if check_target_module_exists(config, name)}


def _weights(source: str, revision: str | None) -> dict[str, torch.Tensor]:
    """The tensors of an adapter's file. Raises InputError if there is none, or none that can be read."""
    from peft.utils import load_peft_weights

    try:
        weights: dict[str, torch.Tensor] = load_peft_weights(source, device="cpu", revision=revision)
    except Exception as error:  # a damaged file can break the reader anywhere
        raise unreadable(source, "adapter", error) from error
    return weights


def _fit_vocabulary(model: Any, weights: Mapping[str, torch.Tensor], source: str) -> None:
    """Gives the base as many rows of embedding and head as the adapter was trained with, which must bring them all."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if module is embedding or module is head]
    wholes = [
        weights[key] for name in names for inner in _WHOLE if (key := f"base_model.model.{name}{inner}") in weights
    ]
    rows = {len(weight) for weight in wholes}
    if rows <= {len(embedding.weight)}:
        return
    if len(rows) > 1 or len(wholes) < (1 if embedding.weight is head.weight else 2):
        raise InputError(f"{source}: the adapter was trained with {max(rows)} rows of the vocabulary, and its base "
                         f"{model.name_or_path} has {len(embedding.weight)}; neither has all of them")  # fmt: skip
    model.resize_token_embeddings(rows.pop(), mean_resizing=False)


def put_on(model: Any, source: str, revision: str | None, config: Any, *, trainable: bool) -> Any:
    """The model under the adapter in a folder or on the hub, with every weight of it in place.

    Raises:
        InputError: files that are missing, or that do not fit the model. peft itself warns where names do not.
    """
    peft = _peft(source)
    _fit_vocabulary(model, _weights(source, revision), source)
    try:
        adapted = peft.PeftModel.from_pretrained(
            model, source, config=config, is_trainable=trainable, revision=revision
        )
        report = adapted.load_adapter(source, ADAPTER_NAME, is_trainable=trainable, revision=revision)
    except _UNREADABLE as error:
        raise InputError(f"{source}: the adapter does not fit {model.name_or_path}: {error}") from error
    unexpected = [name for name in report.unexpected_keys if not name.endswith(_TWICE)]
    if unmatched := [*report.missing_keys, *unexpected]:
        raise InputError(f"{source}: the adapter does not fit {model.name_or_path}: {len(unmatched)} weights have no "
                         f"counterpart, such as {unmatched[0]}")  # fmt: skip
    return adapted


@torch.no_grad()
def merged(adapted: Any, source: str) -> Any:
    """The base with the adapter merged into its weights, an ordinary model whose logits are those of `adapted`.

    Raises:
        InputError: a kind of adapter that peft cannot merge, or a model in which merging gives other logits.
    """
    adapted.eval()
    ids = torch.tensor([[1, 2, 3]], device=adapted.device)
    before = adapted(input_ids=ids, use_cache=False).logits.float()
    _separate_head(adapted)
    try:
        model = adapted.merge_and_unload()
    except (AttributeError, NotImplementedError, *_UNREADABLE) as error:
        raise InputError(f"{source}: its adapter cannot be merged into the base: {error}") from error
    _say_where_untied(model)
    # a merge that goes wrong is off by the size of the adapter, far above what rounding does to the largest logit
    tolerance = max(64 * torch.finfo(model.dtype).eps, 1e-3) * before.abs().max()
    off = (model(input_ids=ids, use_cache=False).logits.float() - before).abs().max()
    if not off <= tolerance:
        raise InputError(f"{source}: merging its adapter into the base changes the logits by {off:.2g}; merge it by "
                         "hand, or train it on with use_peft")  # fmt: skip
    return model


def _separate_head(adapted: Any) -> None:
    """Gives a head that shares the embedding's weight one of its own if an adapter is merged into either.

    peft merges in place, so that the other of the two would get the adapter as well.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    ends = adapted.get_output_embeddings(), adapted.get_input_embeddings()
    adapts = [isinstance(module, BaseTunerLayer) for module in ends]
    head, embedding = (x.get_base_layer() if own else x for x, own in zip(ends, adapts, strict=True))
    if any(adapts) and head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone())


def _say_where_untied(model: Any) -> None:
    """Says in the configuration that head and embedding are not tied, if they are not: saving would tie them again."""
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = False


# ---------------------------------------------------------------------------------------------------------------------
# The model as it was given


def given_weights(model: Any, adapter: Adapter) -> dict[str, torch.Tensor]:
    """The trainable parameters as the adapter's files have them, by name; the model keeps those that it has."""
    own = _trainable(model)
    model.load_adapter(adapter.source, ADAPTER_NAME, is_trainable=True, revision=adapter.revision)
    given = _trainable(model)
    parameters = dict(model.named_parameters())
    for name, value in own.items():
        parameters[name].data.copy_(value)
    return given


def _trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: x.detach().clone() for name, x in model.named_parameters() if x.requires_grad}


@contextmanager
def holding(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Has the model's parameters of these names hold these values meanwhile."""
    parameters = parameters_of(model)
    own = {name: x.detach().clone() if is_part(x := parameters[name]) else x.data for name in weights}
    try:
        _fill(model, weights)
        yield
    finally:
        _fill(model, own)


@torch.no_grad()
def _fill(model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Has the parameters of these names hold these values, which are copied into sharded ones."""
    parameters = parameters_of(model)
    for name, value in values.items():
        parameter = parameters[name]
        if is_part(parameter):
            parameter.copy_(value if is_part(value) else like(value, parameter))
        else:
            parameter.data = value


def settings_of(config: Any) -> dict[str, Any]:
    """What peft's configuration of an adapter says of how its weights are used, as plain values in one order."""
    return _usage(config.to_dict())


def _usage(settings: Mapping[str, Any]) -> dict[str, Any]:
    about = {"base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping"}
    own = {name: value for name, value in sorted(settings.items()) if name not in about}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in own.items()}


def _peft(needed_by: str) -> Any:
    try:
        import peft
    except ImportError as error:
        raise InputError(f"{needed_by} needs the peft library (pip install peft)") from error
    return peft
