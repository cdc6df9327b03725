"""Every option of `logitless train`, stated once: name, type, default, allowed values, help.

The command line is generated from `TrainOptions`, a YAML file is checked against it, and Python callers make one
directly, so all three share the same names and checks. Names are those of TRL's and Transformers' configurations, so
that a TRL YAML of the common keys runs unchanged; where a default differs from TRL's, docs/training.md says so.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from logitless.training.errors import InputError, nearest
from logitless.training.other_names import (
    ALIASES,
    INERT_KEYS,
    LOSS_SETTINGS,
    NULLABLE,
    UNSUPPORTED_KEYS,
    loss_settings,
    notes_of,
    require_unused,
)
from logitless.training.rollouts.options import GROUP as ROLLOUTS
from logitless.training.rollouts.options import RolloutOptions, option
from logitless.types import BackwardName

if TYPE_CHECKING:
    from logitless.losses import Loss

#: Losses of which the samples are the model's own, so that a run draws them unless it is told not to.
_SAMPLED = ("on_policy_distillation",)
METHODS = {"sft": "nll", "dft": "dft", "f-divergence": "f_divergence_sft", "dpo": "dpo"}
UPDATED_SHARES = {"full": 1.0, "hft": 0.5, "sift": 0.05}  # the papers'; SIFT's is of its authors' runs of Llama
TEACHER_IDS = 64  # ids a token that `logitless teach` writes
LEARNING_RATE = 5e-6  # a quarter of the usual 2e-5, for the sake of a later DPO: docs/training.md, "Learning rate"
PREFERENCE_LEARNING_RATE = 1e-6  # TRL's default for DPO: its gradients move two sequences against each other

#: The groups of options, in the order in which help and documentation show them.
GROUPS = ("Method", "Model", "LoRA", "Data", "Optimisation", "Reference", ROLLOUTS, "Output")

#: Words for a switch.
TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
DIVERGENCE_ALIASES = {"js_divergence": "js", "alpha_divergence": "alpha"}

# Options that may name a file or folder.
PATHS = (
    *("model_name_or_path", "teacher_model_name_or_path", "chat_template_path", "dataset_name", "eval_dataset_name"),
    *("cache_dir", "output_dir", "resume_from_checkpoint", "vllm_weights_dir"),
)


@dataclass(frozen=True, kw_only=True)
class TrainOptions(RolloutOptions):
    """Options of one training run; `None` means "decided from the method or the machine", as each help text says.

    Raises:
        InputError: a value outside its range or choices; the message names the option and what came.
    """

    # What is trained, by which loss
    method: str = option("sft", "sft, dft, f-divergence, dpo, or any name of the loss registry.", group="Method")
    loss: Mapping[str, Any] | None = option(
        None, "The loss's hyper-parameters as a mapping, e.g. {name: dpo, beta: 0.2}.", group="Method"
    )
    beta: float | None = option(None, "The loss's beta (strength of the tie to the reference).", group="Method")
    loss_type: str | None = option(None, "The preference loss's form, such as sigmoid, hinge or ipo.", group="Method")
    label_smoothing: float | None = option(None, "The loss's label smoothing.", group="Method")
    divergence: str | None = option(None, "The loss's f-divergence.", group="Method")
    alpha: float | None = option(None, "The order of the alpha divergence.", group="Method")
    mixture: Sequence[Mapping[str, Any]] | None = option(
        None,
        "Several losses, each over data of its own: a list of {method, dataset_name, weight, ...}.",
        group="Method",
    )
    backend: str = option(
        "auto",
        "auto, cuda, triton, chunked, reference (full logits, through the patch), or materialised (the unpatched "
        "model's own logits: what the run costs without logitless).",
        group="Method",
    )
    backward: str = option(
        "auto",
        "Strategy of the loss's gradient; tail_corrected and screened approximate it.",
        group="Method",
        choices=get_args(BackwardName),
    )

    # Model
    model_name_or_path: str = option("", "Hub id, folder, or .gguf file. Required.", group="Model")
    model_revision: str = option("main", "Branch, tag or commit on the hub.", group="Model")
    gguf_file: str | None = option(None, "Name of the .gguf file inside the hub repository or folder.", group="Model")
    dtype: str = option(
        "float32",
        "Precision of the weights; auto keeps the checkpoint's.",
        group="Model",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    bf16: bool | None = option(
        None, "Compute in bfloat16 (autocast). Default: on GPUs that support it, off on the CPU.", group="Model"
    )
    attn_implementation: str = option(
        "auto",
        "auto: flash_attention_2 where flash-attn is installed and a GPU is used, else SDPA; or Transformers' names.",
        group="Model",
    )
    trust_remote_code: bool = option(False, "Run model code that comes with the checkpoint.", group="Model")
    chat_template_path: str | None = option(
        None,
        "Chat template in place of the tokenizer's own, saved with it: a .jinja file, or the folder or hub id of a "
        "tokenizer.",
        group="Model",
    )
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass.", group="Model")
    disable_dropout: bool | None = option(
        None, "Set every dropout probability to 0. Default: for losses with a reference model.", group="Model"
    )
    use_liger_kernel: bool = option(
        False, "Liger's RoPE, RMSNorm and SwiGLU kernels (a GPU and liger-kernel needed).", group="Model"
    )
    use_cpu: bool = option(False, "Stay on the CPU although a GPU is there.", group="Model")

    # LoRA
    use_peft: bool = option(
        False,
        "Train a LoRA adapter instead of the model: a new one, or the one that the model comes with.",
        group="LoRA",
    )
    lora_r: int | None = option(None, "Rank. Default: 16, or the given adapter's.", group="LoRA")
    lora_alpha: int | None = option(
        None,
        "Scale: the update is multiplied by lora_alpha / lora_r. Default: 32, or the given adapter's.",
        group="LoRA",
    )
    lora_dropout: float | None = option(
        None, "Dropout in front of the adapter. Default: 0.05, or the given adapter's.", group="LoRA"
    )
    lora_target_modules: tuple[str, ...] | None = option(
        None,
        "Module names, comma-separated, or all-linear. Default: peft's choice for the model, or the given adapter's.",
        group="LoRA",
    )

    # Data
    dataset_name: str = option(
        "",
        ".jsonl, .json, .csv, .tsv or .parquet file (also .gz, .zst, ...), save_to_disk folder, or hub name. Required.",
        group="Data",
    )
    dataset_config: str | None = option(None, "Configuration of the hub dataset.", group="Data")
    dataset_train_split: str = option("train", "Split of a dataset that is trained on.", group="Data")
    dataset_test_split: str = option(
        "test", "Split of a dataset that is evaluated on, where it has one and an eval_strategy is set.", group="Data"
    )
    eval_dataset_name: str | None = option(None, "Evaluation data, same forms as dataset_name.", group="Data")
    eval_fraction: float = option(0.0, "Share of the training rows held out for evaluation.", group="Data")
    dataset_text_field: str = option("text", "Column of plain text.", group="Data")
    column_map: Mapping[str, str] | None = option(
        None, "Columns to read under another name: new=old,... or a mapping of new names to old.", group="Data"
    )
    max_length: int = option(1024, "Tokens per row; longer rows are cut.", group="Data")
    truncation_mode: str = option(
        "keep_start", "Which end of a long row is kept.", group="Data", choices=("keep_start", "keep_end")
    )
    assistant_only_loss: bool | None = option(
        None,
        "Loss on the assistant's turns only. Default: in rows of messages. Off: every token of them. On: in "
        "completions of turns too.",
        group="Data",
    )
    completion_only_loss: bool | None = option(
        None,
        "Loss on completions only. Default: wherever a row has one; off trains on prompts too, and on every token of "
        "messages unless assistant_only_loss is on.",
        group="Data",
    )
    packing: bool = option(False, "Put several rows into one of max_length, without cross-attention.", group="Data")
    padding_free: bool | None = option(
        None, "One long row per batch instead of padding. Default: where flash attention is used.", group="Data"
    )

    # Optimisation
    per_device_train_batch_size: int = option(
        8, "Rows (pairs, packs, groups) per device and step.", group="Optimisation"
    )
    per_device_eval_batch_size: int = option(8, "Rows (pairs, groups) per device in evaluation.", group="Optimisation")
    gradient_accumulation_steps: int = option(1, "Micro-batches per optimizer step.", group="Optimisation")
    num_train_epochs: float = option(3.0, "Passes over the data.", group="Optimisation")
    max_steps: int = option(-1, "Optimizer steps; overrides num_train_epochs when positive.", group="Optimisation")
    learning_rate: float | None = option(
        None,
        f"Default: {LEARNING_RATE}; {PREFERENCE_LEARNING_RATE} with a preference loss. LoRA needs more.",
        group="Optimisation",
    )
    lr_scheduler_type: str = option(
        "linear",
        "Learning rate after the warm-up.",
        group="Optimisation",
        choices=("linear", "cosine", "constant", "constant_with_warmup"),
    )
    warmup_steps: float = option(0.0, "Steps of linear warm-up; below 1: share of all steps.", group="Optimisation")
    warmup_ratio: float = option(0.0, "Older name for warmup_steps below 1.", group="Optimisation")
    optim: str = option("adamw_torch", "Optimizer.", group="Optimisation", choices=("adamw_torch", "adamw_torch_fused"))
    finetuning_type: str = option(
        "full",
        "What an update moves: everything; hft (arXiv 2404.18466), half of the layers' matrices, the others frozen; "
        "sift (arXiv 2312.11875), the entries of the layers' matrices whose first gradients are largest.",
        group="Optimisation",
        choices=tuple(UPDATED_SHARES),
    )
    update_ratio: float | None = option(
        None,
        f"Share of the matrices (hft) or of each one's entries (sift). Default: {UPDATED_SHARES['hft']} with hft, "
        f"{UPDATED_SHARES['sift']} with sift.",
        group="Optimisation",
    )
    hft_round_steps: int | None = option(
        None,
        "Steps after which hft draws the matrices anew. Default: one draw a run.",
        group="Optimisation",
    )
    weight_decay: float = option(0.0, "Decay of matrices; vectors are exempt.", group="Optimisation")
    adam_beta1: float = option(0.9, "AdamW's beta1.", group="Optimisation")
    adam_beta2: float = option(0.999, "AdamW's beta2.", group="Optimisation")
    adam_epsilon: float = option(1e-8, "AdamW's epsilon.", group="Optimisation")
    max_grad_norm: float = option(1.0, "Gradient norm is clipped to this; 0 turns clipping off.", group="Optimisation")
    seed: int = option(42, "Seed of the data order, the adapter and dropout.", group="Optimisation")

    # Reference model
    teacher_model_name_or_path: str | None = option(
        None,
        "Model that the loss compares with (a distillation's teacher); default: the trained model as the run found it. "
        "It must have the same tokens.",
        group="Reference",
    )
    old_policy_steps: int = option(
        8,
        "Updates for which a proximal loss keeps its old policy, where no column old_logprob gives it; 8 in PSFT.",
        group="Reference",
    )
    sync_ref_model: bool = option(
        False, "Let the reference follow the trained model (TR-DPO), as the two options below say.", group="Reference"
    )
    ref_model_mixup_alpha: float = option(
        0.6, "The trained model's share of the mixture that the reference becomes; 1 is a copy.", group="Reference"
    )
    ref_model_sync_steps: int = option(512, "Updates after which the reference moves.", group="Reference")
    precompute_ref_log_probs: bool = option(
        False, "Compute the reference's log-probabilities once, before training, and cache them.", group="Reference"
    )
    cache_dir: str | None = option(
        None, "Folder of converted GGUF models and reference log-probabilities.", group="Reference"
    )

    # Output
    output_dir: str = option("logitless-output", "Checkpoints, metrics and the final model.", group="Output")
    logging_steps: int = option(10, "Steps between two log lines.", group="Output")
    eval_strategy: str = option(
        "no",
        "When to evaluate; with evaluation data, the end of training always is.",
        group="Output",
        choices=("no", "steps", "epoch"),
    )
    eval_steps: int | None = option(None, "Steps between evaluations. Default: logging_steps.", group="Output")
    eval_on_start: bool = option(False, "Evaluate before the first step.", group="Output")
    save_strategy: str = option(
        "steps", "When to write a checkpoint.", group="Output", choices=("no", "steps", "epoch")
    )
    save_steps: int = option(500, "Steps between checkpoints.", group="Output")
    save_total_limit: int | None = option(None, "Checkpoints kept; older ones are deleted.", group="Output")
    report_to: str = option("none", "Besides metrics.jsonl.", group="Output", choices=("none", "tensorboard"))
    resume: bool = option(False, "Continue from the newest checkpoint in output_dir, if there is one.", group="Output")
    resume_from_checkpoint: str | None = option(None, "Continue from this checkpoint folder.", group="Output")

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            _check_choice(spec, getattr(self, spec.name))
        for name in PATHS:  # a shell leaves the ~ of --output_dir=~/run, and of a file of options, as it is
            if str(path := getattr(self, name)).startswith("~"):
                object.__setattr__(self, name, str(Path(path).expanduser()))
        self._require_ranges()
        self._require("method", self.loss_name in _loss_names(), _known_methods(self.method))
        if self.warmup_ratio and self.warmup_steps:
            raise InputError("warmup_steps and warmup_ratio are two names of one setting: give one of them")
        if self.eval_fraction and self.eval_dataset_name:
            raise InputError("eval_fraction and eval_dataset_name both name evaluation data: give one of them")
        self._require_subset()

    def _require_ranges(self) -> None:
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
                     "logging_steps", "save_steps", "old_policy_steps", "ref_model_sync_steps"):  # fmt: skip
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("eval_steps", "save_total_limit", "lora_r", "lora_alpha", "hft_round_steps"):
            self._require(name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1")
        for name in ("warmup_steps", "weight_decay", "max_grad_norm", "adam_epsilon"):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        for name in ("adam_beta1", "adam_beta2", "eval_fraction", "warmup_ratio"):
            self._require(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        for name in ("num_generations", "num_iterations", "num_generations_eval", "max_completion_length"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("steps_per_generation", "per_device_generation_batch_size"):
            self._require(name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1")
        for name in ("gamma", "lam"):
            self._require(name, 0 <= getattr(self, name) <= 1, "in [0, 1]")
        for name in ("cliprange_value", "importance_sampling_cap"):
            self._require(name, 0 < getattr(self, name) < math.inf, "finite and above 0")
        self._require("critic_learning_rate", 0 <= self.critic_learning_rate < math.inf, "finite and at least 0")
        self._require("lora_dropout", self.lora_dropout is None or 0 <= self.lora_dropout < 1, "in [0, 1)")
        self._require("ref_model_mixup_alpha", 0 < self.ref_model_mixup_alpha <= 1, "in (0, 1]")
        self._require("update_ratio", self.update_ratio is None or 0 < self.update_ratio <= 1, "in (0, 1]")
        self._require("learning_rate", self.learning_rate is None or self.learning_rate >= 0, "at least 0")
        self._require("num_train_epochs", self.num_train_epochs > 0, "above 0")
        for name in ("learning_rate", "num_train_epochs", "warmup_steps", "weight_decay", "adam_epsilon"):
            self._require(name, getattr(self, name) != math.inf, "finite")
        self._require("seed", abs(self.seed) < 2**32, "a number of at most 32 bits")
        self._require("max_length", self.max_length >= 2, "at least 2 (one token to read, one to predict)")

    def _require_subset(self) -> None:
        """Raises InputError for an option of a subset that is not there."""
        kind = self.finetuning_type
        if kind != "full" and self.use_peft:
            raise InputError(f"finetuning_type: {kind} trains a part of the model's own weights, and use_peft trains "
                             "an adapter; give one of them")  # fmt: skip
        if kind == "full" and self.update_ratio is not None:
            raise InputError("update_ratio has no effect with finetuning_type=full; expected hft or sift")
        if kind != "hft" and self.hft_round_steps is not None:
            raise InputError(f"hft_round_steps has no effect with finetuning_type={kind}; expected hft")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise InputError(f"{name} must be {expected}, got {getattr(self, name)!r}")

    def require_inputs(self) -> None:
        """Raises InputError where the model or the data is not named (checked when a run starts, not when made)."""
        for name in ("model_name_or_path", "dataset_name") if self.mixture is None else ("model_name_or_path",):
            if not getattr(self, name):
                raise InputError(f"--{name} is required (on the command line or in the --config file)")

    @property
    def loss_name(self) -> str:
        """The name of the method's loss in the registry; a method may be written with hyphens."""
        return METHODS.get(self.method, self.method.replace("-", "_"))

    @property
    def samples(self) -> bool:
        """Whether the run samples the completions that it trains on."""
        if self.on_policy is not None:
            return self.on_policy
        return self.reward_funcs is not None or self.loss_name in _SAMPLED

    def make_loss(self) -> Loss:
        """The loss object that `method`, `loss` and the hyper-parameter flags describe.

        A flag wins over the same key of the `loss` mapping.

        Raises:
            InputError: no loss has that name, or the loss does not have a hyper-parameter, or not such a value of it.
        """
        from logitless import losses

        settings = dict(self.loss or {})
        name = settings.pop("name", self.loss_name)
        flags = ("beta", "loss_type", "label_smoothing", "divergence", "alpha")
        settings |= {key: value for key in flags if (value := getattr(self, key)) is not None}
        if name in ("nll", settings.get("loss_type")) and settings.get("loss_type") in ("nll", "dft"):
            name = settings.pop("loss_type")  # how TRL's SFT names its two losses
        if name == "grpo" and settings.get("loss_type") in losses.names():
            name = settings.pop("loss_type")  # and its GRPO the losses of sampled completions
        if "divergence" in settings:
            settings["divergence"] = DIVERGENCE_ALIASES.get(settings["divergence"], settings["divergence"])
        try:
            known = {spec.name for spec in dataclasses.fields(losses.get(name))}  # type: ignore[arg-type]
        except ValueError as error:
            raise InputError(str(error)) from error
        for key in settings:
            if key not in known:
                raise InputError(f"{key} is no setting of the loss {name!r}, which has {sorted(known)}")
        try:
            return losses.get(name, **settings)
        except (TypeError, ValueError) as error:
            raise InputError(str(error)) from error

    def warmup(self, total_steps: int) -> int:
        """Warm-up steps in a run of `total_steps`."""
        share = self.warmup_ratio or self.warmup_steps
        return math.ceil(share * total_steps) if share < 1 else int(share)

    def updated_share(self) -> float:
        """The share that an update moves: of all parameters, of the layers' matrices, or of each one's entries."""
        return UPDATED_SHARES[self.finetuning_type] if self.update_ratio is None else self.update_ratio

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as saved beside the metrics and taken back by `options_from_mapping`."""
        return {spec.name: getattr(self, spec.name) for spec in dataclasses.fields(self)}


def _loss_names() -> list[str]:
    from logitless import losses

    return losses.names()


def _known_methods(name: str) -> str:
    known = [*METHODS, *_loss_names()]
    return f"one of {', '.join(known)}{nearest(name, known)}"


def _check_choice(spec: dataclasses.Field[Any], value: object) -> None:
    choices = spec.metadata["choices"]
    if choices and value not in (*choices, spec.default):
        known = f"{', '.join(choices)}{nearest(str(value), choices)}"
        raise InputError(f"{spec.name} must be one of {known}, got {value!r}")


def field_types() -> dict[str, Any]:
    """Resolved annotation of every option."""
    return typing.get_type_hints(TrainOptions)


def options_from_mapping(values: Mapping[str, Any], source: str) -> tuple[TrainOptions, list[str]]:
    """`TrainOptions` from string keys (a YAML file, command-line flags), and notes on keys that change nothing.

    `source` names where the values come from in error messages. Numbers may come as text (YAML 1.1 reads 2e-5 as a
    string). Raises InputError for an unknown key, with the nearest known name, or a value of the wrong type.
    """
    notes = list(notes_of(values, source))
    given = convert({key: value for key, value in values.items() if key not in INERT_KEYS}, source)
    return TrainOptions(**given), notes


def convert(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Arguments of `TrainOptions` from string keys, under whatever name and as text or not; raises as above."""
    hints = field_types()
    given: dict[str, Any] = {}
    settings = loss_settings(values)
    for key, value in values.items():
        if key in UNSUPPORTED_KEYS:
            require_unused(key, value, source)
            continue
        name = ALIASES.get(key, key)
        if key in LOSS_SETTINGS or (value is None and name in NULLABLE):
            continue
        if name not in hints:
            raise InputError(f"{source}: unknown option {key!r}{nearest(key, [*hints, *ALIASES, *INERT_KEYS])}")
        if key == "resume_from_checkpoint" and value in (True, "true", "True"):  # Transformers: "the newest one"
            name = "resume"
        if key == "resume_from_checkpoint" and value in (False, "false", "False"):
            continue
        converted = coerce(name, value, hints[name], source)
        if key == "f_alpha_divergence_coef" and converted is not None:  # TRL orients it the other way round
            converted = 1 - converted
        if given.get(name, converted) != converted:
            raise InputError(f"{source}: {name} is given twice with different values ({key!r} is another name of it)")
        given[name] = converted
    if settings:
        given["loss"] = {**(given.get("loss") or {}), **coerce("loss", settings, hints["loss"], source)}
    return given


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises InputError for a missing file, broken YAML or anything but a mapping."""
    import yaml

    file = Path(path)
    if not file.is_file():
        raise InputError(f"config file not found: {file}")
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _loader_of_single_keys())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not valid YAML: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError(f"{file}: expected a mapping of option names to values, got {type(content).__name__}")
    return content


def _loader_of_single_keys() -> Any:
    """YAML's safe loader, which takes the last of two values of a key, made to refuse the second."""
    import yaml

    class SingleKeys(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            found = {"<<": None}
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"):
                if key.value in found:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
                found[key.value] = None
            return super().construct_mapping(node, deep)

    return SingleKeys


def coerce(name: str, value: Any, annotation: Any, source: str) -> Any:
    """`value` as the option's type; text is read where the type is a number, a boolean, a list or a mapping.

    Raises:
        InputError: a value of another type, or none where the option must have one.
    """
    kinds = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    if value is None or (value == "none" and type(None) in kinds and str not in kinds):
        if type(None) in kinds:
            return None
        raise InputError(f"{source}: {name} cannot be empty")
    kind = next(kind for kind in kinds if kind is not type(None))
    try:
        return _CONVERT[kind if kind in _CONVERT else typing.get_origin(kind)](value)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        expected = _DESCRIBED.get(kind, getattr(kind, "__name__", str(kind)))
        raise InputError(f"{source}: {name} must be a {expected}, got {value!r}") from error


def _to_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    return TRUTH[str(value).lower()]


def _to_int(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise TypeError(value)
    return int(value)


def _to_float(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(float(value)):
        raise TypeError(value)
    return float(value)


def _to_str(value: Any) -> str:
    if isinstance(value, list) and len(value) < 2:  # TRL lists what may be combined there: loss_type, report_to
        value = value[0] if value else "none"
    if isinstance(value, bool):  # YAML 1.1 reads a bare no as False: eval_strategy: no
        return "yes" if value else "no"
    if not isinstance(value, (str, int, float)):
        raise TypeError(value)
    return str(value)


def _to_names(value: Any) -> tuple[str, ...]:
    items = value.replace(",", " ").split() if isinstance(value, str) else value
    if not all(isinstance(item, str) for item in items):
        raise TypeError(value)
    return tuple(items)


def _to_floats(value: Any) -> tuple[float, ...]:
    items = value.replace(",", " ").split() if isinstance(value, str) else value
    return tuple(map(_to_float, items if isinstance(items, (list, tuple)) else [items]))


def _to_specs(value: Any) -> tuple[str | Mapping[str, Any], ...]:
    """Names of functions, or mappings that hold one and its arguments."""
    items = value.replace(",", " ").split() if isinstance(value, str) else value
    items = [items] if isinstance(items, Mapping) else items
    if not items or not all(isinstance(item, (str, Mapping)) for item in items):
        raise TypeError(value)
    return tuple(items)


def _to_mapping(value: Any) -> dict[str, Any]:
    import yaml

    content = yaml.safe_load(value) if isinstance(value, str) else value
    if isinstance(content, str):  # a bare loss name
        content = {"name": content}
    if not isinstance(content, Mapping):
        raise TypeError(value)
    return {key: _number(item) for key, item in content.items()}


def _to_columns(value: Any) -> dict[str, str]:
    """New names of columns to old ones, each once, from a mapping or from text such as `prompt=a,completion=b`."""
    import yaml

    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = yaml.safe_load(value)
    pairs = [part.split("=") for part in value.split(",")] if isinstance(value, str) else list(dict(value).items())
    found = {new.strip(): old.strip() for new, old in pairs}
    if len(set(found.values())) < len(pairs) or not all((*found, *found.values())):
        raise ValueError(value)
    return found


def _to_mappings(value: Any) -> list[dict[str, Any]]:
    import yaml

    items = yaml.safe_load(value) if isinstance(value, str) else value
    if not isinstance(items, Sequence) or not all(isinstance(item, Mapping) for item in items):
        raise TypeError(value)
    return [dict(item) for item in items]


def _number(value: Any) -> Any:
    """Text such as 1e-1, which YAML 1.1 leaves a string, as a number."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


_DESCRIBED = {
    float: "finite number",
    tuple[float, ...]: "list of finite numbers",
    tuple[str | Mapping[str, Any], ...]: "list of functions, module:function",
    Mapping[str, str]: "list new=old,... or a mapping, with every name once",
}
_CONVERT: dict[Any, Any] = {
    bool: _to_bool,
    int: _to_int,
    float: _to_float,
    str: _to_str,
    tuple: _to_names,
    tuple[float, ...]: _to_floats,
    tuple[str | Mapping[str, Any], ...]: _to_specs,
    Mapping: _to_mapping,
    Mapping[str, str]: _to_columns,
    Sequence: _to_mappings,
}
